/* model.c: the type Model: a moshi_model, and its engine from the first call that needs one. */
#include "buffers.h"

#include <limits.h>
#include <stddef.h>

static struct model_object *model_of(PyObject *self)
{
    return (struct model_object *)self;
}

int model_enter(struct model_object *self, const struct module_state *state)
{
    int users = atomic_load(&self->users);
    if (users >= 0 && check_process(self->process, state, "this model") < 0) return -1;
    while (users >= 0)
        if (atomic_compare_exchange_weak(&self->users, &users, users + 1)) return 0;
    PyErr_SetString(state->session_error, "this model is closed");
    return -1;
}

void model_leave(struct model_object *self)
{
    atomic_fetch_sub(&self->users, 1);
}

/* The engine, made now if there is none; between enter and leave only. NULL with an exception. */
static struct moshi_engine *model_engine(struct model_object *self,
                                         const struct module_state *state)
{
    int status = MOSHI_OK;
    struct moshi_engine *engine;
    /* Without the GIL, since the thread that holds the lock may take long. */
    Py_BEGIN_ALLOW_THREADS
    PyThread_acquire_lock(self->engine_lock, WAIT_LOCK);
    if (!self->engine)
        status = moshi_engine_create(self->model, &self->engine_options, &self->engine);
    engine = self->engine;
    PyThread_release_lock(self->engine_lock);
    Py_END_ALLOW_THREADS
    if (status != MOSHI_OK) {
        raise_status(state, status);
        return NULL;
    }
    return engine;
}

struct moshi_engine *model_attach(struct model_object *self, const struct module_state *state)
{
    if (model_enter(self, state) < 0) return NULL;
    struct moshi_engine *engine = model_engine(self, state);
    if (engine) {
        atomic_fetch_add(&self->children, 1);
        Py_INCREF((PyObject *)self);
    } else {
        model_leave(self);
    }
    return engine;
}

void model_detach(struct model_object *self)
{
    atomic_fetch_sub(&self->children, 1);
    model_leave(self);
    Py_DECREF((PyObject *)self);
}

static void model_destroy(struct model_object *self)
{
    struct moshi_engine *engine = self->engine;
    struct moshi_model *model = self->model;
    self->engine = NULL;
    self->model = NULL;
    Py_BEGIN_ALLOW_THREADS
    moshi_engine_destroy(engine);
    moshi_model_close(model);
    Py_END_ALLOW_THREADS
}

/* ---- new, close ------------------------------------------------------------------------- */

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"folder",
                            "config_path",
                            "lm_path",
                            "mimi_path",
                            "mimi_config_path",
                            "device",
                            "dtype",
                            "mimi_dtype",
                            "mimi_codebooks",
                            "threads",
                            "codec_only",
                            "copy_weights",
                            "kv_dtype",
                            "context",
                            "max_sessions",
                            "check_weights",
                            NULL};
    const struct module_state *state = PyType_GetModuleState(type);
    PyObject *folder = NULL, *config = NULL, *lm = NULL, *mimi = NULL, *mimi_config = NULL;
    const char *dtype = "auto", *mimi_dtype = "auto", *kv_dtype = "auto";
    struct moshi_model_options options = {.device = "auto"};
    struct moshi_engine_options engine_options = {0};
    struct model_object *self = NULL;
    int status;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$O&O&O&O&O&sssiippsiip:Model", names,
                                     path_or_none, &folder, path_or_none, &config, path_or_none,
                                     &lm, path_or_none, &mimi, path_or_none, &mimi_config,
                                     &options.device, &dtype, &mimi_dtype, &options.mimi_codebooks,
                                     &options.threads, &options.codec_only, &options.copy_weights,
                                     &kv_dtype, &engine_options.context,
                                     &engine_options.max_sessions, &options.check_weights))
        return NULL;
    if (dtype_from_text(state, dtype, &options.dtype) < 0 ||
        dtype_from_text(state, mimi_dtype, &options.mimi_dtype) < 0 ||
        dtype_from_text(state, kv_dtype, &engine_options.kv_dtype) < 0)
        goto done;
    options.folder = path_text(folder);
    options.config_path = path_text(config);
    options.lm_path = path_text(lm);
    options.mimi_path = path_text(mimi);
    options.mimi_config_path = path_text(mimi_config);

    self = (struct model_object *)PyType_GenericAlloc(type, 0);
    if (!self) goto done;
    atomic_init(&self->users, -1); /* closed, until it is open */
    self->process = this_process();
    self->engine_options = engine_options;
    self->engine_lock = PyThread_allocate_lock();
    if (!self->engine_lock) {
        PyErr_NoMemory();
        Py_CLEAR(self);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    status = moshi_model_open(&options, &self->model);
    Py_END_ALLOW_THREADS
    if (status == MOSHI_OK) {
        atomic_store(&self->users, 0);
    } else {
        raise_status(state, status);
        Py_CLEAR(self);
    }

done:
    Py_XDECREF(folder);
    Py_XDECREF(config);
    Py_XDECREF(lm);
    Py_XDECREF(mimi);
    Py_XDECREF(mimi_config);
    return (PyObject *)self;
}

static PyObject *model_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct model_object *self = model_of(object);
    const struct module_state *state = state_of(object);
    int users = 0;
    if (self->process != this_process()) { /* nothing of the parent's is given back here */
        atomic_store(&self->users, -1);
    } else if (atomic_compare_exchange_strong(&self->users, &users, -1)) {
        model_destroy(self);
    } else if (users > 0) {
        int children = atomic_load(&self->children);
        if (children > 0)
            PyErr_Format(state->session_error,
                         "this model has %d open sessions and streams; close them first", children);
        else
            PyErr_SetString(state->session_error, "this model is in use by another thread");
        return NULL;
    }
    Py_RETURN_NONE;
}

/* Sessions and streams hold a reference, so none is open here. */
static void model_dealloc(PyObject *object)
{
    struct model_object *self = model_of(object);
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    model_destroy(self);
    if (self->engine_lock) PyThread_free_lock(self->engine_lock);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

/* No clear: a Model refers to no object but its type. */
static int model_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    return 0;
}

/* ---- what it is ------------------------------------------------------------------------- */

enum field_kind { FIELD_BOOL, FIELD_INT, FIELD_INT64, FIELD_FLOAT, FIELD_DOUBLE, FIELD_TEXT };

struct field {
    const char *name;
    enum field_kind kind;
    size_t offset;
};

static PyObject *field_value(const void *base, const struct field *field)
{
    const char *at = (const char *)base + field->offset;
    switch (field->kind) {
    case FIELD_BOOL:
        return PyBool_FromLong(*(const int *)at);
    case FIELD_INT:
        return PyLong_FromLong(*(const int *)at);
    case FIELD_INT64:
        return PyLong_FromLongLong(*(const int64_t *)at);
    case FIELD_FLOAT:
        return PyFloat_FromDouble((double)*(const float *)at);
    case FIELD_DOUBLE:
        return PyFloat_FromDouble(*(const double *)at);
    default:
        break;
    }
    const char *text = *(const char *const *)at;
    if (!text) Py_RETURN_NONE;
    return PyUnicode_DecodeFSDefault(text); /* paths come back as they went in */
}

/* A dict of the fields of a C struct; fields end with a NULL name. */
static PyObject *dict_of_fields(const void *base, const struct field *fields)
{
    PyObject *dict = PyDict_New();
    for (; dict && fields->name; fields++) {
        PyObject *value = field_value(base, fields);
        if (!value || PyDict_SetItemString(dict, fields->name, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

#define INFO(kind, name) {#name, FIELD_##kind, offsetof(struct moshi_model_info, name)}
static const struct field info_fields[] = {
    INFO(TEXT, family),
    INFO(TEXT, device),
    INFO(TEXT, dtype),
    INFO(TEXT, mimi_dtype),
    INFO(TEXT, lm_path),
    INFO(TEXT, mimi_path),
    INFO(TEXT, config_path),
    INFO(INT, threads),
    INFO(BOOL, has_lm),
    INFO(BOOL, has_mimi),
    INFO(INT, sample_rate),
    INFO(INT, frame_size),
    INFO(DOUBLE, frame_rate),
    INFO(INT, codebooks),
    INFO(INT, codebook_size),
    INFO(INT, n_q),
    INFO(INT, dep_q),
    INFO(INT, user_q),
    INFO(INT, card),
    INFO(INT, text_card_in),
    INFO(INT, text_card),
    INFO(INT, max_delay),
    INFO(INT, context),
    INFO(INT, text_padding_id),
    INFO(INT, text_end_padding_id),
    INFO(INT, heads),
    INFO(INT, head_dim),
    INFO(BOOL, has_conditions),
    INFO(FLOAT, text_temperature),
    INFO(FLOAT, audio_temperature),
    INFO(INT, text_top_k),
    INFO(INT, audio_top_k),
    INFO(INT64, parameters),
    INFO(INT64, weight_bytes),
    INFO(INT64, mapped_bytes),
    INFO(INT64, encode_bytes),
    INFO(INT64, temporal_bytes),
    INFO(INT64, depth_bytes),
    INFO(INT64, decode_bytes),
    INFO(INT64, encode_flops),
    INFO(INT64, decode_flops),
    {NULL, FIELD_INT, 0},
};

#define MEMORY(name) {#name, FIELD_INT64, offsetof(struct moshi_memory, name)}
static const struct field memory_fields[] = {
    MEMORY(weights_bytes),      MEMORY(session_bytes), MEMORY(kv_bytes),
    MEMORY(session_used_bytes), MEMORY(free_bytes),    {NULL, FIELD_INT, 0},
};

#define STATS(kind, name) {#name, FIELD_##kind, offsetof(struct moshi_engine_stats, name)}
static const struct field stats_fields[] = {
    STATS(INT64, ticks),       STATS(INT64, frames),   STATS(DOUBLE, encode_s),
    STATS(DOUBLE, temporal_s), STATS(DOUBLE, depth_s), STATS(DOUBLE, decode_s),
    STATS(DOUBLE, other_s),    {NULL, FIELD_INT, 0},
};

static PyObject *model_info(PyObject *object, void *Py_UNUSED(closure))
{
    struct model_object *self = model_of(object);
    if (model_enter(self, state_of(object)) < 0) return NULL;
    PyObject *dict = dict_of_fields(moshi_model_get_info(self->model), info_fields);
    model_leave(self);
    return dict;
}

static PyObject *model_delays(PyObject *object, void *Py_UNUSED(closure))
{
    struct model_object *self = model_of(object);
    if (model_enter(self, state_of(object)) < 0) return NULL;
    const struct moshi_model_info *info = moshi_model_get_info(self->model);
    const int *delays = moshi_model_delays(self->model);
    Py_ssize_t count = info->has_lm && delays ? info->n_q + 1 : 0;
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple && i < count; i++) {
        PyObject *delay = PyLong_FromLong(delays[i]);
        if (!delay || PyTuple_SetItem(tuple, i, delay) < 0) Py_CLEAR(tuple);
    }
    model_leave(self);
    return tuple;
}

static PyObject *condition_values(const struct moshi_model *model, int i)
{
    PyObject *values = PyList_New(0);
    const char *text;
    for (int j = 0; values && (text = moshi_model_condition_value(model, i, j)); j++) {
        PyObject *value = PyUnicode_FromString(text);
        if (!value || PyList_Append(values, value) < 0) Py_CLEAR(values);
        Py_XDECREF(value);
    }
    return values;
}

static PyObject *model_conditions(PyObject *object, void *Py_UNUSED(closure))
{
    struct model_object *self = model_of(object);
    if (model_enter(self, state_of(object)) < 0) return NULL;
    PyObject *dict = PyDict_New();
    const char *name;
    for (int i = 0; dict && (name = moshi_model_condition_name(self->model, i)); i++) {
        PyObject *values = condition_values(self->model, i);
        if (!values || PyDict_SetItemString(dict, name, values) < 0) Py_CLEAR(dict);
        Py_XDECREF(values);
    }
    model_leave(self);
    return dict;
}

static PyObject *model_closed(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(atomic_load(&model_of(object)->users) < 0);
}

static PyObject *model_memory(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct model_object *self = model_of(object);
    const struct module_state *state = state_of(object);
    PyObject *dict = NULL;
    if (model_enter(self, state) < 0) return NULL;
    struct moshi_engine *engine = model_engine(self, state);
    if (engine) {
        struct moshi_memory memory = {0};
        int status = moshi_engine_memory(engine, &memory);
        if (status == MOSHI_OK)
            dict = dict_of_fields(&memory, memory_fields);
        else
            raise_status(state, status);
    }
    model_leave(self);
    return dict;
}

static PyObject *model_stats(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct model_object *self = model_of(object);
    const struct module_state *state = state_of(object);
    PyObject *dict = NULL;
    if (model_enter(self, state) < 0) return NULL;
    struct moshi_engine *engine = model_engine(self, state);
    if (engine) {
        struct moshi_engine_stats stats = {0};
        int status = moshi_engine_get_stats(engine, &stats);
        if (status == MOSHI_OK)
            dict = dict_of_fields(&stats, stats_fields);
        else
            raise_status(state, status);
    }
    model_leave(self);
    return dict;
}

/* ---- whole signals ---------------------------------------------------------------------- */

static int expect_dimensions(const struct module_state *state, const struct input *in, int ndim,
                             const char *expected)
{
    int fits = in->ndim == ndim && in->shape[0] <= INT_MAX && in->shape[1] <= PY_SSIZE_T_MAX / 2;
    if (ndim == 3) fits = fits && in->shape[1] <= INT_MAX;
    for (int d = 0; fits && d < ndim; d++) fits = in->shape[d] > 0;
    if (fits) return 0;
    char shape[96];
    input_shape_text(in, shape);
    PyErr_Format(state->audio_error, "%s has shape %s; expected %s, none of them 0", in->name,
                 shape, expected);
    return -1;
}

/* Between enter and leave. */
static PyObject *encode_all(struct model_object *self, const struct module_state *state,
                            const struct input *pcm)
{
    const struct moshi_model_info *info = moshi_model_get_info(self->model);
    struct moshi_engine *engine = model_engine(self, state);
    if (!engine) return NULL;
    Py_ssize_t frame = info->frame_size > 0 ? info->frame_size : 1, samples = pcm->shape[1];
    npy_intp shape[3] = {pcm->shape[0], info->codebooks, samples / frame + (samples % frame != 0)};
    PyObject *codes = array_int32(3, shape);
    if (!codes) return NULL;
    int32_t *out = PyArray_DATA((PyArrayObject *)codes);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = moshi_mimi_encode(engine, pcm->data, (int)pcm->shape[0], samples, out);
    Py_END_ALLOW_THREADS
    if (status != MOSHI_OK) {
        raise_status(state, status);
        Py_CLEAR(codes);
    }
    return codes;
}

static PyObject *model_encode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pcm", NULL};
    struct model_object *self = model_of(object);
    const struct module_state *state = state_of(object);
    struct input pcm;
    PyObject *arg;
    PyObject *codes = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:encode", names, &arg)) return NULL;
    if (input_pcm(&pcm, state, arg, "pcm", NULL) < 0) return NULL;
    if (expect_dimensions(state, &pcm, 2, "(batch, samples)") == 0 &&
        model_enter(self, state) == 0) {
        codes = encode_all(self, state, &pcm);
        model_leave(self);
    }
    input_release(&pcm);
    return codes;
}

static PyObject *decode_all(struct model_object *self, const struct module_state *state,
                            const struct input *codes)
{
    const struct moshi_model_info *info = moshi_model_get_info(self->model);
    struct moshi_engine *engine = model_engine(self, state);
    if (!engine) return NULL;
    Py_ssize_t frame = info->frame_size > 0 ? info->frame_size : 1, frames = codes->shape[2];
    if (frames > PY_SSIZE_T_MAX / frame) return PyErr_NoMemory();
    npy_intp shape[2] = {codes->shape[0], frames * frame};
    PyObject *pcm = array_float32(2, shape);
    if (!pcm) return NULL;
    float *out = PyArray_DATA((PyArrayObject *)pcm);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = moshi_mimi_decode(engine, codes->data, (int)codes->shape[0], (int)codes->shape[1],
                               frames, out);
    Py_END_ALLOW_THREADS
    if (status != MOSHI_OK) {
        raise_status(state, status);
        Py_CLEAR(pcm);
    }
    return pcm;
}

static PyObject *model_decode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"codes", NULL};
    struct model_object *self = model_of(object);
    const struct module_state *state = state_of(object);
    struct input codes;
    PyObject *arg;
    PyObject *pcm = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:decode", names, &arg)) return NULL;
    if (input_codes(&codes, state, arg, "codes") < 0) return NULL;
    if (expect_dimensions(state, &codes, 3, "(batch, codebooks, frames)") == 0 &&
        model_enter(self, state) == 0) {
        pcm = decode_all(self, state, &codes);
        model_leave(self);
    }
    input_release(&codes);
    return pcm;
}

/* ---- type ------------------------------------------------------------------------------- */

static PyMethodDef model_methods[] = {
    {"memory", model_memory, METH_NOARGS,
     PyDoc_STR("memory($self, /)\n--\n\nBytes: of the weights, of a session, free.")},
    {"stats", model_stats, METH_NOARGS,
     PyDoc_STR("stats($self, /)\n--\n\nWhere the time of all frames so far went, in seconds.")},
    {"encode", KEYWORDS(model_encode),
     PyDoc_STR("encode($self, pcm)\n--\n\nfloat32[B, N] -> int32[B, K, T], whole signals.")},
    {"decode", KEYWORDS(model_decode),
     PyDoc_STR("decode($self, codes)\n--\n\nint32[B, K, T] -> float32[B, T * frame_size].")},
    {"close", model_close, METH_NOARGS,
     PyDoc_STR("close($self, /)\n--\n\n"
               "Frees the weights; SessionError while sessions or streams are open.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef model_properties[] = {
    {"info", model_info, NULL, PyDoc_STR("What the model is, as a dict."), NULL},
    {"delays", model_delays, NULL, PyDoc_STR("Frames each stream is late by, text first."), NULL},
    {"conditions", model_conditions, NULL,
     PyDoc_STR("The conditions it can be given, each with its values."), NULL},
    {"closed", model_closed, NULL, PyDoc_STR("Whether close has been called."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot model_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Weights on one device; immutable, shared by its sessions.")},
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_traverse, model_traverse},
    {Py_tp_methods, model_methods},
    {Py_tp_getset, model_properties},
    {0, NULL},
};

PyType_Spec model_spec = {
    .name = "moshi_c._core.Model",
    .basicsize = sizeof(struct model_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = model_slots,
};
