/* session.c: the type Session, one conversation, and step_many over several. */
#include "buffers.h"

#include <limits.h>
#include <string.h>

struct session_object {
    PyObject_HEAD
    struct model_object *model; /* strong; attached */
    struct moshi_session *session;
    struct guard guard;
    _Atomic uint64_t seed;
    /* from the model's info */
    int frame_size, sample_rate, user_q, dep_q, card, text_card, head_dim;
    int has_voice; /* there is sound to decode */
    /* a frame between submit and finish, which hold the guard meanwhile */
    atomic_int submitted;
    struct moshi_frame frame;
    PyObject *room;
};

static const char THIS_SESSION[] = "this session";

static struct session_object *session_of(PyObject *self)
{
    return (struct session_object *)self;
}

/* ---- new -------------------------------------------------------------------------------- */

struct condition_list {
    PyObject *items; /* owns the text */
    struct moshi_condition *conditions;
    int count;
};

static int conditions_from_object(struct condition_list *list, PyObject *object)
{
    if (!object || object == Py_None) return 0;
    list->items = PyMapping_Items(object);
    if (!list->items) return -1;
    Py_ssize_t count = PyList_Size(list->items);
    list->conditions = PyMem_Calloc(count > 0 ? (size_t)count : 1, sizeof *list->conditions);
    if (!list->conditions || count > INT_MAX) {
        PyErr_NoMemory();
        return -1;
    }
    list->count = (int)count;
    for (int i = 0; i < list->count; i++) {
        PyObject *item = PyList_GetItem(list->items, i);
        struct moshi_condition *condition = &list->conditions[i];
        if (!PyTuple_Check(item)) {
            PyErr_SetString(PyExc_TypeError,
                            "conditions: expected a mapping of str to str or None");
            return -1;
        }
        if (!PyArg_ParseTuple(item, "sz;conditions: expected a mapping of str to str or None",
                              &condition->name, &condition->value))
            return -1;
    }
    return 0;
}

static void conditions_release(struct condition_list *list)
{
    PyMem_Free(list->conditions);
    Py_XDECREF(list->items);
}

static int int_from_object(PyObject *object, const char *name, int *value)
{
    PyObject *number = PyNumber_Index(object);
    if (!number) return -1;
    long found = PyLong_AsLong(number);
    int failed = PyErr_Occurred() != NULL;
    if (failed || found < INT_MIN || found > INT_MAX) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s is %S; expected 32 bits", name, number);
        failed = 1;
    }
    *value = (int)found;
    Py_DECREF(number);
    return failed ? -1 : 0;
}

/* None leaves *value as it is. */
static int int_or_default(PyObject *object, const char *name, int *value)
{
    return object && object != Py_None ? int_from_object(object, name, value) : 0;
}

static int float_or_default(PyObject *object, float *value)
{
    if (!object || object == Py_None) return 0;
    double found = PyFloat_AsDouble(object);
    if (found == -1.0 && PyErr_Occurred()) return -1;
    *value = (float)found;
    return 0;
}

/* A session of C that belongs to nobody yet: new, restored, or a fork. */
static PyObject *session_alloc(PyTypeObject *type)
{
    struct session_object *self = (struct session_object *)PyType_GenericAlloc(type, 0);
    if (self) guard_init(&self->guard);
    return (PyObject *)self;
}

/* Attaches to the model, whose engine it gives; NULL with an exception. */
static struct moshi_engine *session_attach(struct session_object *self,
                                           const struct module_state *state,
                                           struct model_object *model)
{
    struct moshi_engine *engine = model_attach(model, state);
    if (!engine) return NULL;
    self->model = model;
    const struct moshi_model_info *info = moshi_model_get_info(model->model);
    self->frame_size = info->frame_size;
    self->sample_rate = info->sample_rate;
    self->user_q = info->user_q;
    self->dep_q = info->dep_q;
    self->card = info->card;
    self->text_card = info->text_card;
    self->head_dim = info->head_dim;
    self->has_voice = info->has_mimi && info->dep_q > 0;
    return engine;
}

/* After the core has made the session, or failed to. */
static int session_opened(struct session_object *self, const struct module_state *state, int status)
{
    if (status != MOSHI_OK) return raise_status(state, status);
    atomic_store(&self->seed, moshi_session_seed(self->session));
    atomic_store(&self->guard.closed, 0);
    return 0;
}

static int session_create(struct session_object *self, const struct module_state *state,
                          struct model_object *model, const struct moshi_session_options *options)
{
    struct moshi_engine *engine = session_attach(self, state, model);
    if (!engine) return -1;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = moshi_session_create(engine, options, &self->session);
    Py_END_ALLOW_THREADS
    return session_opened(self, state, status);
}

static PyObject *session_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model",
                            "seed",
                            "text_temperature",
                            "text_top_k",
                            "audio_temperature",
                            "audio_top_k",
                            "cfg_coef",
                            "cfg_masked_until",
                            "cfg_no_text",
                            "conditions",
                            "null_conditions",
                            "offline_start",
                            "keep_logits",
                            "context_policy",
                            "context_range",
                            "context_keep",
                            NULL};
    const struct module_state *state = PyType_GetModuleState(type);
    PyObject *model, *seed = NULL, *conditions = NULL, *null_conditions = NULL;
    PyObject *text_temperature = NULL, *text_top_k = NULL;
    PyObject *audio_temperature = NULL, *audio_top_k = NULL;
    float cfg_coef = 1.0f;
    int cfg_masked_until = -1, cfg_no_text = 0, offline_start = 0, keep_logits = 0;
    int context_range = 0, context_keep = 0;
    const char *context_policy = "ring";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|$OOOOOfipOOppsii:Session", names,
                                     state->model_type, &model, &seed, &text_temperature,
                                     &text_top_k, &audio_temperature, &audio_top_k, &cfg_coef,
                                     &cfg_masked_until, &cfg_no_text, &conditions, &null_conditions,
                                     &offline_start, &keep_logits, &context_policy, &context_range,
                                     &context_keep))
        return NULL;
    if (strcmp(context_policy, "ring") != 0 && strcmp(context_policy, "refresh") != 0) {
        PyErr_Format(PyExc_ValueError, "context_policy is '%s'; expected 'ring' or 'refresh'",
                     context_policy);
        return NULL;
    }
    if (!seed) {
        PyErr_SetString(PyExc_TypeError, "Session() needs the keyword argument seed");
        return NULL;
    }

    struct model_object *model_self = (struct model_object *)model;
    struct condition_list list = {0}, null_list = {0};
    struct moshi_session_options options;
    struct session_object *self = NULL;
    if (model_enter(model_self, state) < 0) return NULL;
    moshi_session_options_init(model_self->model, &options);
    if (seed_from_object(seed, &options.seed) < 0 ||
        float_or_default(text_temperature, &options.text_temperature) < 0 ||
        float_or_default(audio_temperature, &options.audio_temperature) < 0 ||
        int_or_default(text_top_k, "text_top_k", &options.text_top_k) < 0 ||
        int_or_default(audio_top_k, "audio_top_k", &options.audio_top_k) < 0 ||
        conditions_from_object(&list, conditions) < 0 ||
        conditions_from_object(&null_list, null_conditions) < 0)
        goto done;
    options.cfg_coef = cfg_coef;
    options.cfg_masked_until = cfg_masked_until;
    options.cfg_no_text = cfg_no_text;
    options.conditions = list.conditions;
    options.n_conditions = list.count;
    options.null_conditions = null_list.conditions;
    options.n_null_conditions = null_list.count;
    options.start = offline_start ? MOSHI_START_OFFLINE : MOSHI_START_LIVE;
    options.keep_logits = keep_logits;
    options.context_policy = strcmp(context_policy, "refresh") == 0 ? MOSHI_CONTEXT_REFRESH
                                                                    : MOSHI_CONTEXT_RING;
    options.context_range = context_range;
    options.context_keep = context_keep;

    self = session_of(session_alloc(type));
    if (self && session_create(self, state, model_self, &options) < 0) Py_CLEAR(self);

done:
    model_leave(model_self);
    conditions_release(&list);
    conditions_release(&null_list);
    return (PyObject *)self;
}

/* Frees the session of C and lets the model go. The caller holds the guard, or the last reference. */
static void session_destroy(struct session_object *self)
{
    struct moshi_session *session = self->session;
    struct model_object *model = self->model;
    self->session = NULL;
    self->model = NULL;
    Py_BEGIN_ALLOW_THREADS
    moshi_session_destroy(session); /* waits for a frame in flight */
    Py_END_ALLOW_THREADS
    Py_CLEAR(self->room);
    if (model) model_detach(model);
}

static PyObject *session_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct session_object *self = session_of(object);
    if (atomic_load(&self->guard.closed)) Py_RETURN_NONE;
    if (self->guard.process != this_process()) { /* nothing of the parent's is given back here */
        atomic_store(&self->guard.closed, 1);
        Py_RETURN_NONE;
    }
    if (guard_enter(&self->guard, state_of(object), THIS_SESSION) < 0) return NULL;
    atomic_store(&self->guard.closed, 1);
    session_destroy(self);
    guard_leave(&self->guard);
    Py_RETURN_NONE;
}

static void session_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    session_destroy(session_of(object));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

/* No clear: a Model refers to no other object, so no cycle goes through ours. */
static int session_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)session_of(object)->model);
    return 0;
}

/* ---- step ------------------------------------------------------------------------------- */

static PyObject *int32_row(const int32_t *values, int count)
{
    npy_intp shape[1] = {count};
    PyObject *array = array_int32(1, shape);
    if (array && count) memcpy(PyArray_DATA((PyArrayObject *)array), values, 4 * (size_t)count);
    return array;
}

static PyObject *heads_array(const struct moshi_frame *frame, int head_dim)
{
    npy_intp shape[2] = {frame->n_heads, head_dim};
    PyObject *array = array_float32(2, shape);
    if (!array) return NULL;
    float *out = PyArray_DATA((PyArrayObject *)array);
    for (int i = 0; i < frame->n_heads; i++)
        memcpy(out + i * head_dim, frame->heads[i], sizeof *out * (size_t)head_dim);
    return array;
}

static PyObject *none(void)
{
    Py_RETURN_NONE;
}

static const char *const events[] = {[MOSHI_EVENT_NONE] = NULL,
                                     [MOSHI_EVENT_CONTEXT_80] = "context_80",
                                     [MOSHI_EVENT_REFRESH_BEGIN] = "refresh_begin",
                                     [MOSHI_EVENT_REFRESH_END] = "refresh_end"};

/* The tuple of _core.pyi. Takes the reference to pcm, which may be NULL. */
static PyObject *frame_tuple(const struct session_object *self, const struct moshi_frame *frame,
                             PyObject *pcm)
{
    PyObject *codes = frame->n_codes > 0 ? int32_row(frame->codes, frame->n_codes) : none();
    PyObject *user_codes = int32_row(frame->user_codes, frame->n_user_codes);
    PyObject *heads = frame->n_heads > 0 ? heads_array(frame, self->head_dim) : none();
    return Py_BuildValue("(LNiNNdNdz)", (long long)frame->index, pcm ? pcm : none(),
                         (int)frame->text_token, codes, user_codes, (double)frame->level_db, heads,
                         frame->step_s, events[frame->event]);
}

/* Room for the sound of one frame; NULL with an exception, or NULL without when there is none. */
static PyObject *pcm_room(const struct session_object *self, int decode, struct moshi_frame *frame)
{
    frame->pcm = NULL;
    if (!decode || !self->has_voice) return NULL;
    npy_intp shape[1] = {self->frame_size};
    PyObject *pcm = array_float32(1, shape);
    if (pcm) frame->pcm = PyArray_DATA((PyArrayObject *)pcm);
    return pcm;
}

/* Exactly one of pcm, codes is not NULL. */
static PyObject *step_with(struct session_object *self, const struct module_state *state,
                           const float *pcm, const int32_t *codes, int decode)
{
    struct moshi_frame frame;
    memset(&frame, 0, sizeof frame);
    PyObject *room = pcm_room(self, decode, &frame);
    if (!room && PyErr_Occurred()) return NULL;
    if (guard_enter(&self->guard, state, THIS_SESSION) < 0) {
        Py_XDECREF(room);
        return NULL;
    }
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = pcm ? moshi_session_step(self->session, pcm, &frame)
                 : moshi_session_step_codes(self->session, codes, &frame);
    Py_END_ALLOW_THREADS
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        raise_status(state, status);
        Py_XDECREF(room);
        return NULL;
    }
    return frame_tuple(self, &frame, room);
}

static PyObject *session_step(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pcm", "decode", "dtype", NULL};
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    PyObject *arg, *result = NULL;
    int decode = 1;
    const char *dtype = NULL;
    struct input pcm;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|pz:step", names, &arg, &decode, &dtype))
        return NULL;
    if (guard_check_open(&self->guard, state, THIS_SESSION) < 0) return NULL;
    if (input_pcm(&pcm, state, arg, "pcm", dtype) < 0) return NULL;
    if (input_expect_frame(&pcm, state, self->frame_size, self->sample_rate) == 0)
        result = step_with(self, state, pcm.data, NULL, decode);
    input_release(&pcm);
    return result;
}

static PyObject *session_step_codes(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"codes", "decode", NULL};
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    PyObject *arg, *result = NULL;
    int decode = 1;
    struct input codes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|p:step_codes", names, &arg, &decode))
        return NULL;
    if (guard_check_open(&self->guard, state, THIS_SESSION) < 0) return NULL;
    if (input_codes(&codes, state, arg, "codes") < 0) return NULL;
    if (input_expect_row(&codes, state, self->user_q, "one code of each stream of the user") == 0)
        result = step_with(self, state, NULL, codes.data, decode);
    input_release(&codes);
    return result;
}

static int expect_frames(const struct input *in, const struct module_state *state, int rows,
                         Py_ssize_t frames)
{
    if (in->ndim == 2 && in->shape[0] == rows && in->shape[1] == frames) return 0;
    char shape[96];
    input_shape_text(in, shape);
    PyErr_Format(state->audio_error,
                 "%s has shape %s; expected (%d, %zd), as many frames as text "
                 "tokens",
                 in->name, shape, rows, frames);
    return -1;
}

static PyObject *session_prefill(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"text_tokens", "codes", "user_codes", NULL};
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    PyObject *text_arg, *codes_arg, *user_arg, *said = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO:prefill", names, &text_arg, &codes_arg,
                                     &user_arg))
        return NULL;
    if (guard_check_open(&self->guard, state, THIS_SESSION) < 0) return NULL;
    struct input text, codes, user;
    if (input_codes(&text, state, text_arg, "text_tokens") < 0) return NULL;
    if (input_codes(&codes, state, codes_arg, "codes") < 0) goto text_done;
    if (input_codes(&user, state, user_arg, "user_codes") < 0) goto codes_done;
    npy_intp frames = text.shape[text.ndim - 1];
    if (frames > INT_MAX) frames = INT_MAX; /* which no array of codes below has */
    if (input_expect_row(&text, state, frames, "one token a frame") < 0 ||
        expect_frames(&codes, state, self->dep_q, frames) < 0 ||
        expect_frames(&user, state, self->user_q, frames) < 0)
        goto done;
    said = array_int32(1, &frames);
    if (said && guard_enter(&self->guard, state, THIS_SESSION) == 0) {
        int status;
        Py_BEGIN_ALLOW_THREADS
        status = moshi_session_prefill(self->session, (int)frames, text.data, codes.data, user.data,
                                       PyArray_DATA((PyArrayObject *)said));
        Py_END_ALLOW_THREADS
        guard_leave(&self->guard);
        if (status == MOSHI_OK) goto done;
        raise_status(state, status);
    }
    Py_CLEAR(said);

done:
    input_release(&user);
codes_done:
    input_release(&codes);
text_done:
    input_release(&text);
    return said;
}

/* ---- submit and finish ------------------------------------------------------------------- */

static PyObject *session_submit(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pcm", "decode", "dtype", NULL};
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    PyObject *arg;
    int decode = 1, status = MOSHI_ERROR_ARGUMENT;
    const char *dtype = NULL;
    struct input pcm;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|pz:submit", names, &arg, &decode, &dtype))
        return NULL;
    if (guard_check_open(&self->guard, state, THIS_SESSION) < 0) return NULL;
    if (input_pcm(&pcm, state, arg, "pcm", dtype) < 0) return NULL;
    if (input_expect_frame(&pcm, state, self->frame_size, self->sample_rate) == 0 &&
        guard_enter(&self->guard, state, THIS_SESSION) == 0) {
        memset(&self->frame, 0, sizeof self->frame);
        self->room = pcm_room(self, decode, &self->frame);
        if (self->room || !PyErr_Occurred()) {
            status = moshi_session_submit(self->session, pcm.data, &self->frame);
            if (status != MOSHI_OK) raise_status(state, status);
        }
        if (status == MOSHI_OK) {
            atomic_store(&self->submitted, 1);
        } else {
            Py_CLEAR(self->room);
            guard_leave(&self->guard);
        }
    }
    input_release(&pcm);
    return status == MOSHI_OK ? none() : NULL;
}

/* One caller gets the frame in flight; the others, and those without one, a SessionError. */
static int take_flight(struct session_object *self, const struct module_state *state)
{
    if (atomic_exchange(&self->submitted, 0)) return 0;
    PyErr_SetString(state->session_error, "this session has no frame in flight; submit one first");
    return -1;
}

static PyObject *session_finish(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    if (take_flight(self, state) < 0) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = moshi_session_wait(self->session);
    Py_END_ALLOW_THREADS
    PyObject *room = self->room, *result = NULL;
    self->room = NULL;
    if (status == MOSHI_OK) {
        result = frame_tuple(self, &self->frame, room);
    } else {
        raise_status(state, status);
        Py_XDECREF(room);
    }
    guard_leave(&self->guard);
    return result;
}

static PyObject *session_withdraw(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct session_object *self = session_of(object);
    if (take_flight(self, state_of(object)) < 0) return NULL;
    if (!moshi_session_withdraw(self->session)) {
        atomic_store(&self->submitted, 1); /* too late: it is to be finished */
        Py_RETURN_FALSE;
    }
    Py_CLEAR(self->room);
    guard_leave(&self->guard);
    Py_RETURN_TRUE;
}

static PyObject *session_descriptor(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    int descriptor;
    if (guard_enter(&self->guard, state, THIS_SESSION) < 0) return NULL;
    int status = moshi_session_descriptor(self->session, &descriptor);
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        raise_status(state, status);
        return NULL;
    }
    return PyLong_FromLong(descriptor);
}

/* ---- snapshot, restore, fork ------------------------------------------------------------- */

static PyObject *session_snapshot(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"note", NULL};
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    PyObject *note;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "S:snapshot", names, &note)) return NULL;
    const char *note_data = PyBytes_AsString(note);
    const size_t note_bytes = (size_t)PyBytes_Size(note);
    if (guard_enter(&self->guard, state, THIS_SESSION) < 0) return NULL;
    size_t bytes;
    PyObject *result = NULL;
    int status = moshi_session_snapshot(self->session, note_data, note_bytes, NULL, &bytes);
    if (status == MOSHI_OK) {
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)bytes);
        char *room = result ? PyBytes_AsString(result) : NULL;
        if (room) {
            Py_BEGIN_ALLOW_THREADS
            status = moshi_session_snapshot(self->session, note_data, note_bytes, room, &bytes);
            Py_END_ALLOW_THREADS
        }
    }
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        Py_CLEAR(result);
        raise_status(state, status);
    }
    return result;
}

static PyObject *session_restore(PyObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "data", NULL};
    const struct module_state *state = PyType_GetModuleState((PyTypeObject *)type);
    PyObject *model, *data;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!S:restore", names, state->model_type, &model,
                                     &data))
        return NULL;
    struct session_object *self = session_of(session_alloc((PyTypeObject *)type));
    if (!self) return NULL;
    const char *bytes = PyBytes_AsString(data);
    const size_t size = (size_t)PyBytes_Size(data);
    const void *note;
    size_t note_bytes;
    struct moshi_engine *engine = session_attach(self, state, (struct model_object *)model);
    if (engine) {
        int status;
        Py_BEGIN_ALLOW_THREADS
        status = moshi_session_restore(engine, bytes, size, &self->session, &note, &note_bytes);
        Py_END_ALLOW_THREADS
        if (session_opened(self, state, status) == 0)
            return Py_BuildValue("(Ny#)", self, note_bytes ? note : "", (Py_ssize_t)note_bytes);
    }
    Py_DECREF(self);
    return NULL;
}

static PyObject *session_fork(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"seed", NULL};
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    PyObject *seed_arg = Py_None;
    uint64_t seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:fork", names, &seed_arg)) return NULL;
    if (seed_arg != Py_None && seed_from_object(seed_arg, &seed) < 0) return NULL;
    if (guard_enter(&self->guard, state, THIS_SESSION) < 0) return NULL;
    struct session_object *fork = session_of(session_alloc(Py_TYPE(object)));
    int failed = !fork || !session_attach(fork, state, self->model);
    if (!failed) {
        int status;
        Py_BEGIN_ALLOW_THREADS
        status = moshi_session_fork(self->session, seed_arg != Py_None ? &seed : NULL,
                                    &fork->session);
        Py_END_ALLOW_THREADS
        failed = session_opened(fork, state, status) < 0;
    }
    guard_leave(&self->guard);
    if (failed) Py_CLEAR(fork);
    return (PyObject *)fork;
}

/* ---- step_many -------------------------------------------------------------------------- */

/* What one session of a batch needs. */
struct lane {
    struct session_object *session; /* borrowed from the tuple of sessions */
    struct input given; /* samples or codes */
    int has_input, entered;
    PyObject *room;
};

static int lane_prepare(struct lane *lane, struct moshi_frame *frame,
                        const struct module_state *state, PyObject *given, int decode, int by_codes)
{
    struct session_object *self = lane->session;
    if (guard_check_open(&self->guard, state, THIS_SESSION) < 0) return -1;
    if ((by_codes ? input_codes(&lane->given, state, given, "codes")
                  : input_pcm(&lane->given, state, given, "pcm", NULL)) < 0)
        return -1;
    lane->has_input = 1;
    if ((by_codes
             ? input_expect_row(&lane->given, state, self->user_q,
                                "one code of each stream of the user")
             : input_expect_frame(&lane->given, state, self->frame_size, self->sample_rate)) < 0)
        return -1;
    lane->room = pcm_room(self, decode, frame);
    return PyErr_Occurred() ? -1 : 0;
}

/* Enters all sessions, or none. The same session twice finds itself in use. */
static int lanes_enter(struct lane *lanes, Py_ssize_t count, const struct module_state *state)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        for (Py_ssize_t j = 0; j < i; j++)
            if (lanes[j].session == lanes[i].session) {
                PyErr_Format(PyExc_ValueError,
                             "step_many got one session twice, at %zd and %zd; expected each once",
                             j, i);
                return -1;
            }
        if (guard_enter(&lanes[i].session->guard, state, THIS_SESSION) < 0) return -1;
        lanes[i].entered = 1;
    }
    return 0;
}

static void lanes_leave(struct lane *lanes, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        if (lanes[i].entered) guard_leave(&lanes[i].session->guard);
        lanes[i].entered = 0;
    }
}

static PyObject *lanes_result(struct lane *lanes, const struct moshi_frame *frames,
                              Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list && i < count; i++) {
        PyObject *tuple = frame_tuple(lanes[i].session, &frames[i], lanes[i].room);
        lanes[i].room = NULL;
        if (!tuple || PyList_SetItem(list, i, tuple) < 0) Py_CLEAR(list);
    }
    return list;
}

static PyObject *lanes_step(PyObject *sessions, PyObject *given, int decode, int by_codes,
                            const struct module_state *state)
{
    Py_ssize_t count = PyTuple_Size(sessions);
    size_t n = (size_t)count;
    PyObject *result = NULL;
    struct lane *lanes = PyMem_Calloc(n, sizeof *lanes);
    struct moshi_frame *frames = PyMem_Calloc(n, sizeof *frames);
    struct moshi_session **handles = PyMem_Calloc(n, sizeof(struct moshi_session *));
    const float **pcms = PyMem_Calloc(n, sizeof *pcms);
    const int32_t **codes = PyMem_Calloc(n, sizeof *codes);
    if (!lanes || !frames || !handles || !pcms || !codes) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        lanes[i].session = session_of(PyTuple_GetItem(sessions, i));
        if (lane_prepare(&lanes[i], &frames[i], state, PyTuple_GetItem(given, i), decode,
                         by_codes) < 0)
            goto done;
        if (by_codes)
            codes[i] = lanes[i].given.data;
        else
            pcms[i] = lanes[i].given.data;
    }
    if (lanes_enter(lanes, count, state) < 0) goto done;
    for (Py_ssize_t i = 0; i < count; i++) handles[i] = lanes[i].session->session;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = moshi_sessions_step(handles, (int)count, by_codes ? NULL : pcms,
                                 by_codes ? codes : NULL, frames);
    Py_END_ALLOW_THREADS
    lanes_leave(lanes, count);
    if (status == MOSHI_OK)
        result = lanes_result(lanes, frames, count);
    else
        raise_status(state, status);

done:
    if (lanes) lanes_leave(lanes, count);
    for (Py_ssize_t i = 0; lanes && i < count; i++) {
        if (lanes[i].has_input) input_release(&lanes[i].given);
        Py_XDECREF(lanes[i].room);
    }
    PyMem_Free(lanes);
    PyMem_Free(frames);
    PyMem_Free(handles);
    PyMem_Free(pcms);
    PyMem_Free(codes);
    return result;
}

PyObject *sessions_step_many(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"sessions", "pcms", "decode", "codes", NULL};
    const struct module_state *state = PyModule_GetState(module);
    PyObject *sessions_arg, *pcms_arg, *result = NULL;
    int decode = 1, by_codes = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|pp:step_many", names, &sessions_arg,
                                     &pcms_arg, &decode, &by_codes))
        return NULL;
    PyObject *sessions = PySequence_Tuple(sessions_arg), *pcms = NULL;
    if (sessions) pcms = PySequence_Tuple(pcms_arg);
    if (!pcms) goto done;
    Py_ssize_t count = PyTuple_Size(sessions);
    if (PyTuple_Size(pcms) != count || count > INT_MAX) {
        PyErr_Format(PyExc_ValueError, "step_many got %zd sessions and %zd pcms; expected as many",
                     count, PyTuple_Size(pcms));
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (Py_TYPE(PyTuple_GetItem(sessions, i)) != state->session_type) {
            PyErr_Format(PyExc_TypeError, "step_many: element %zd of sessions is no Session", i);
            goto done;
        }
    result = count ? lanes_step(sessions, pcms, decode, by_codes, state) : PyList_New(0);

done:
    Py_XDECREF(sessions);
    Py_XDECREF(pcms);
    return result;
}

/* ---- what comes next, what came last ---------------------------------------------------- */

static PyObject *session_force_text(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"tokens", NULL};
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    PyObject *arg;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:force_text", names, &arg)) return NULL;
    PyObject *tuple = PySequence_Tuple(arg);
    if (!tuple) return NULL;
    Py_ssize_t count = PyTuple_Size(tuple);
    int status = MOSHI_ERROR_ARGUMENT, failed = 1;
    int32_t *tokens = PyMem_Calloc(count > 0 ? (size_t)count : 1, sizeof *tokens);
    if (!tokens || count > INT_MAX) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (int_from_object(PyTuple_GetItem(tuple, i), "a text token", &tokens[i]) < 0) goto done;
    if (guard_enter(&self->guard, state, THIS_SESSION) < 0) goto done;
    status = moshi_session_force_text(self->session, tokens, (int)count);
    guard_leave(&self->guard);
    failed = status != MOSHI_OK;
    if (failed) raise_status(state, status);

done:
    PyMem_Free(tokens);
    Py_DECREF(tuple);
    return failed ? NULL : none();
}

static PyObject *session_force_next(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"text", "audio", NULL};
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    PyObject *text_arg, *audio_arg;
    int text = -2; /* free */
    struct input audio = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:force_next", names, &text_arg, &audio_arg))
        return NULL;
    if (text_arg != Py_None) {
        if (int_from_object(text_arg, "text", &text) < 0) return NULL;
        if (text < -1) {
            PyErr_Format(PyExc_ValueError, "text is %d; expected a text token or None", text);
            return NULL;
        }
    }
    if (audio_arg != Py_None) {
        if (input_codes(&audio, state, audio_arg, "audio") < 0) return NULL;
        if (input_expect_row(&audio, state, self->dep_q, "one code of each stream of the model") <
            0) {
            input_release(&audio);
            return NULL;
        }
    }
    int status = MOSHI_OK, entered = guard_enter(&self->guard, state, THIS_SESSION) == 0;
    if (entered) {
        status = moshi_session_force_next(self->session, text, audio.data);
        guard_leave(&self->guard);
        if (status != MOSHI_OK) raise_status(state, status);
    }
    input_release(&audio);
    return entered && status == MOSHI_OK ? none() : NULL;
}

static PyObject *session_logits(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    npy_intp text_shape[1] = {self->text_card}, audio_shape[2] = {self->dep_q, self->card};
    PyObject *text = array_float32(1, text_shape);
    PyObject *audio = text ? array_float32(2, audio_shape) : NULL;
    if (audio && guard_enter(&self->guard, state, THIS_SESSION) == 0) {
        int status = moshi_session_logits(self->session, PyArray_DATA((PyArrayObject *)text),
                                          PyArray_DATA((PyArrayObject *)audio));
        guard_leave(&self->guard);
        if (status == MOSHI_OK) return Py_BuildValue("(NN)", text, audio);
        raise_status(state, status);
    }
    Py_XDECREF(text);
    Py_XDECREF(audio);
    return NULL;
}

static PyObject *session_reset(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"seed", NULL};
    struct session_object *self = session_of(object);
    const struct module_state *state = state_of(object);
    PyObject *seed_arg = Py_None;
    uint64_t seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:reset", names, &seed_arg)) return NULL;
    if (seed_arg != Py_None && seed_from_object(seed_arg, &seed) < 0) return NULL;
    if (guard_enter(&self->guard, state, THIS_SESSION) < 0) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = moshi_session_reset(self->session, seed_arg != Py_None ? &seed : NULL);
    Py_END_ALLOW_THREADS
    if (status == MOSHI_OK && seed_arg != Py_None) atomic_store(&self->seed, seed);
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        raise_status(state, status);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* For what happens before the core is called. */
static PyObject *session_check_open(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    if (guard_check_open(&session_of(object)->guard, state_of(object), THIS_SESSION) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *session_seed(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(atomic_load(&session_of(object)->seed));
}

static PyObject *session_closed(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(atomic_load(&session_of(object)->guard.closed));
}

static PyObject *session_in_flight(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(atomic_load(&session_of(object)->submitted));
}

static PyObject *session_forced_left(PyObject *object, void *Py_UNUSED(closure))
{
    struct session_object *self = session_of(object);
    if (guard_enter(&self->guard, state_of(object), THIS_SESSION) < 0) return NULL;
    int left = moshi_session_forced_left(self->session);
    guard_leave(&self->guard);
    return PyLong_FromLong(left);
}

/* ---- type ------------------------------------------------------------------------------- */

static PyMethodDef session_methods[] = {
    {"step", KEYWORDS(session_step),
     PyDoc_STR("step($self, pcm, decode=True, dtype=None)\n--\n\n"
               "One frame of what the user says in, one of what the model says out.")},
    {"step_codes", KEYWORDS(session_step_codes),
     PyDoc_STR("step_codes($self, codes, decode=True)\n--\n\n"
               "As step, from the codes of the user's frame.")},
    {"prefill", KEYWORDS(session_prefill),
     PyDoc_STR("prefill($self, text_tokens, codes, user_codes)\n--\n\n"
               "Frames of which all is known; the text tokens that come out meanwhile.")},
    {"force_text", KEYWORDS(session_force_text),
     PyDoc_STR("force_text($self, tokens)\n--\n\nThe model's next text tokens, one a frame.")},
    {"force_next", KEYWORDS(session_force_next),
     PyDoc_STR("force_next($self, text, audio)\n--\n\n"
               "What the next step stores instead of what it samples; None leaves it free.")},
    {"logits", session_logits, METH_NOARGS,
     PyDoc_STR("logits($self, /)\n--\n\nOf the last step: text, audio. Needs keep_logits.")},
    {"reset", KEYWORDS(session_reset),
     PyDoc_STR("reset($self, seed=None)\n--\n\nBack to the start; None keeps the seed.")},
    {"check_open", session_check_open, METH_NOARGS,
     PyDoc_STR("check_open($self, /)\n--\n\nSessionError when closed or in a forked process.")},
    {"submit", KEYWORDS(session_submit),
     PyDoc_STR("submit($self, pcm, decode=True, dtype=None)\n--\n\n"
               "The first half of step: returns while the frame is being stepped.")},
    {"finish", session_finish, METH_NOARGS,
     PyDoc_STR("finish($self, /)\n--\n\nThe second half of step; waits for the frame.")},
    {"withdraw", session_withdraw, METH_NOARGS,
     PyDoc_STR("withdraw($self, /)\n--\n\nTakes a submitted frame back, if it is not too late.")},
    {"descriptor", session_descriptor, METH_NOARGS,
     PyDoc_STR("descriptor($self, /)\n--\n\nReadable while a frame waits to be finished.")},
    {"snapshot", KEYWORDS(session_snapshot),
     PyDoc_STR("snapshot($self, note)\n--\n\nThe whole state, with a note for restore.")},
    {"restore", (PyCFunction)(void (*)(void))session_restore,
     METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     PyDoc_STR("restore($type, model, data)\n--\n\nThe session of a snapshot, and its note.")},
    {"fork", KEYWORDS(session_fork),
     PyDoc_STR("fork($self, seed=None)\n--\n\nA second session in the same state.")},
    {"close", session_close, METH_NOARGS, PyDoc_STR("close($self, /)\n--\n\nGives the slot back.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef session_properties[] = {
    {"seed", session_seed, NULL, PyDoc_STR("The seed in use."), NULL},
    {"closed", session_closed, NULL, PyDoc_STR("Whether close has been called."), NULL},
    {"in_flight", session_in_flight, NULL,
     PyDoc_STR("Whether a submitted frame is to be finished."), NULL},
    {"forced_left", session_forced_left, NULL, PyDoc_STR("Forced tokens still to come."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot session_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("One conversation with a model.")},
    {Py_tp_new, session_new},
    {Py_tp_dealloc, session_dealloc},
    {Py_tp_traverse, session_traverse},
    {Py_tp_methods, session_methods},
    {Py_tp_getset, session_properties},
    {0, NULL},
};

PyType_Spec session_spec = {
    .name = "moshi_c._core.Session",
    .basicsize = sizeof(struct session_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = session_slots,
};
