/* mimi_stream.c: the type MimiStream: the codec alone, frame by frame, for a batch of signals, or for
 * a whole signal in pieces. */
#include "buffers.h"

#include <limits.h>

struct stream_object {
    PyObject_HEAD
    struct model_object *model; /* strong; attached */
    struct mimi_stream *stream;
    struct guard guard;
    int batch, whole;
    int frame_size, codebooks; /* from the model's info */
};

static const char THIS_STREAM[] = "this stream";

static struct stream_object *stream_of(PyObject *self)
{
    return (struct stream_object *)self;
}

static int stream_open(struct stream_object *self, const struct module_state *state,
                       struct model_object *model)
{
    struct moshi_engine *engine = model_attach(model, state);
    if (!engine) return -1;
    self->model = model;
    const struct moshi_model_info *info = moshi_model_get_info(model->model);
    self->frame_size = info->frame_size;
    self->codebooks = info->codebooks;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = self->whole ? mimi_stream_create_whole(engine, &self->stream)
                         : mimi_stream_create(engine, self->batch, &self->stream);
    Py_END_ALLOW_THREADS
    if (status != MOSHI_OK) return raise_status(state, status);
    atomic_store(&self->guard.closed, 0);
    return 0;
}

static PyObject *stream_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "batch", "whole", NULL};
    const struct module_state *state = PyType_GetModuleState(type);
    PyObject *model;
    int batch = 1, whole = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|ip:MimiStream", names, state->model_type,
                                     &model, &batch, &whole))
        return NULL;
    struct stream_object *self = (struct stream_object *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    guard_init(&self->guard);
    self->batch = whole ? 1 : batch;
    self->whole = whole;
    if (stream_open(self, state, (struct model_object *)model) < 0) Py_CLEAR(self);
    return (PyObject *)self;
}

/* Frees the stream of C and lets the model go. The caller holds the guard, or the last reference. */
static void stream_destroy(struct stream_object *self)
{
    struct mimi_stream *stream = self->stream;
    struct model_object *model = self->model;
    self->stream = NULL;
    self->model = NULL;
    Py_BEGIN_ALLOW_THREADS
    mimi_stream_destroy(stream);
    Py_END_ALLOW_THREADS
    if (model) model_detach(model);
}

static PyObject *stream_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct stream_object *self = stream_of(object);
    if (atomic_load(&self->guard.closed)) Py_RETURN_NONE;
    if (self->guard.process != this_process()) { /* nothing of the parent's is given back here */
        atomic_store(&self->guard.closed, 1);
        Py_RETURN_NONE;
    }
    if (guard_enter(&self->guard, state_of(object), THIS_STREAM) < 0) return NULL;
    atomic_store(&self->guard.closed, 1);
    stream_destroy(self);
    guard_leave(&self->guard);
    Py_RETURN_NONE;
}

static void stream_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    stream_destroy(stream_of(object));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

/* No clear: a Model refers to no other object, so no cycle goes through ours. */
static int stream_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)stream_of(object)->model);
    return 0;
}

/* The columns of [batch][columns], or of [columns] when the batch is one; else AudioError and -1. */
static Py_ssize_t batch_columns(const struct stream_object *self, const struct module_state *state,
                                const struct input *in, const char *columns)
{
    if (in->ndim == 2 && in->shape[0] == self->batch) return in->shape[1];
    if (in->ndim == 1 && self->batch == 1) return in->shape[0];
    char shape[96];
    input_shape_text(in, shape);
    PyErr_Format(state->audio_error, "%s has shape %s; expected (%d, %s)", in->name, shape,
                 self->batch, columns);
    return -1;
}

static PyObject *encode_frame(struct stream_object *self, const struct module_state *state,
                              const struct input *pcm)
{
    Py_ssize_t samples = batch_columns(self, state, pcm, "frame_size");
    if (samples < 0) return NULL;
    if (samples != self->frame_size) {
        PyErr_Format(state->audio_error, "pcm has %zd samples; a frame is %d", samples,
                     self->frame_size);
        return NULL;
    }
    npy_intp shape[2] = {self->batch, self->codebooks};
    PyObject *codes = array_int32(2, shape);
    if (!codes || guard_enter(&self->guard, state, THIS_STREAM) < 0) {
        Py_XDECREF(codes);
        return NULL;
    }
    int32_t *out = PyArray_DATA((PyArrayObject *)codes);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = mimi_stream_encode(self->stream, pcm->data, out);
    Py_END_ALLOW_THREADS
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        raise_status(state, status);
        Py_CLEAR(codes);
    }
    return codes;
}

static PyObject *stream_encode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pcm", NULL};
    struct stream_object *self = stream_of(object);
    const struct module_state *state = state_of(object);
    PyObject *arg;
    struct input pcm;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:encode", names, &arg)) return NULL;
    if (guard_check_open(&self->guard, state, THIS_STREAM) < 0) return NULL;
    if (input_pcm(&pcm, state, arg, "pcm", NULL) < 0) return NULL;
    PyObject *codes = encode_frame(self, state, &pcm);
    input_release(&pcm);
    return codes;
}

static PyObject *decode_frame(struct stream_object *self, const struct module_state *state,
                              const struct input *codes)
{
    Py_ssize_t n_codes = batch_columns(self, state, codes, "codebooks");
    if (n_codes < 0) return NULL;
    npy_intp shape[2] = {self->batch, self->frame_size};
    PyObject *pcm = array_float32(2, shape);
    if (!pcm || guard_enter(&self->guard, state, THIS_STREAM) < 0) {
        Py_XDECREF(pcm);
        return NULL;
    }
    float *out = PyArray_DATA((PyArrayObject *)pcm);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = mimi_stream_decode(self->stream, codes->data,
                                n_codes > INT_MAX ? INT_MAX : (int)n_codes, out);
    Py_END_ALLOW_THREADS
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        raise_status(state, status);
        Py_CLEAR(pcm);
    }
    return pcm;
}

static PyObject *stream_decode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"codes", NULL};
    struct stream_object *self = stream_of(object);
    const struct module_state *state = state_of(object);
    PyObject *arg;
    struct input codes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:decode", names, &arg)) return NULL;
    if (guard_check_open(&self->guard, state, THIS_STREAM) < 0) return NULL;
    if (input_codes(&codes, state, arg, "codes") < 0) return NULL;
    PyObject *pcm = decode_frame(self, state, &codes);
    input_release(&codes);
    return pcm;
}

static PyObject *encode_samples(struct stream_object *self, const struct module_state *state,
                                const struct input *pcm)
{
    if (pcm->ndim != 1) {
        PyErr_SetString(state->audio_error, "pcm has several dimensions; expected [samples]");
        return NULL;
    }
    const Py_ssize_t samples = pcm->shape[0], frame = self->frame_size;
    npy_intp shape[2] = {self->codebooks, samples / frame + (samples % frame != 0)};
    PyObject *codes = array_int32(2, shape);
    if (!codes || guard_enter(&self->guard, state, THIS_STREAM) < 0) {
        Py_XDECREF(codes);
        return NULL;
    }
    int32_t *out = PyArray_DATA((PyArrayObject *)codes);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = mimi_stream_encode_piece(self->stream, pcm->data, samples, out);
    Py_END_ALLOW_THREADS
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        raise_status(state, status);
        Py_CLEAR(codes);
    }
    return codes;
}

static PyObject *stream_encode_piece(PyObject *object, PyObject *arg)
{
    struct stream_object *self = stream_of(object);
    const struct module_state *state = state_of(object);
    struct input pcm;
    if (guard_check_open(&self->guard, state, THIS_STREAM) < 0) return NULL;
    if (input_pcm(&pcm, state, arg, "pcm", NULL) < 0) return NULL;
    PyObject *codes = encode_samples(self, state, &pcm);
    input_release(&pcm);
    return codes;
}

static PyObject *decode_codes(struct stream_object *self, const struct module_state *state,
                              const struct input *codes)
{
    if (codes->ndim != 2 || codes->shape[0] > INT_MAX ||
        codes->shape[1] > PY_SSIZE_T_MAX / self->frame_size / 4) {
        PyErr_SetString(state->audio_error, "codes are not [codebooks, frames]");
        return NULL;
    }
    const Py_ssize_t frames = codes->shape[1];
    npy_intp shape[1] = {frames * self->frame_size};
    PyObject *pcm = array_float32(1, shape);
    if (!pcm || guard_enter(&self->guard, state, THIS_STREAM) < 0) {
        Py_XDECREF(pcm);
        return NULL;
    }
    float *out = PyArray_DATA((PyArrayObject *)pcm);
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = mimi_stream_decode_piece(self->stream, codes->data, (int)codes->shape[0], frames, out);
    Py_END_ALLOW_THREADS
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        raise_status(state, status);
        Py_CLEAR(pcm);
    }
    return pcm;
}

static PyObject *stream_decode_piece(PyObject *object, PyObject *arg)
{
    struct stream_object *self = stream_of(object);
    const struct module_state *state = state_of(object);
    struct input codes;
    if (guard_check_open(&self->guard, state, THIS_STREAM) < 0) return NULL;
    if (input_codes(&codes, state, arg, "codes") < 0) return NULL;
    PyObject *pcm = decode_codes(self, state, &codes);
    input_release(&codes);
    return pcm;
}

static PyObject *stream_reset(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct stream_object *self = stream_of(object);
    const struct module_state *state = state_of(object);
    if (guard_enter(&self->guard, state, THIS_STREAM) < 0) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = mimi_stream_reset(self->stream);
    Py_END_ALLOW_THREADS
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        raise_status(state, status);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *stream_snapshot(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct stream_object *self = stream_of(object);
    const struct module_state *state = state_of(object);
    if (guard_enter(&self->guard, state, THIS_STREAM) < 0) return NULL;
    size_t bytes;
    PyObject *result = NULL;
    int status = mimi_stream_snapshot(self->stream, NULL, &bytes);
    if (status == MOSHI_OK) {
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)bytes);
        char *room = result ? PyBytes_AsString(result) : NULL;
        if (room) {
            Py_BEGIN_ALLOW_THREADS
            status = mimi_stream_snapshot(self->stream, room, &bytes);
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

static PyObject *stream_restore(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", NULL};
    struct stream_object *self = stream_of(object);
    const struct module_state *state = state_of(object);
    PyObject *data;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "S:restore", names, &data)) return NULL;
    const char *bytes = PyBytes_AsString(data);
    const size_t size = (size_t)PyBytes_Size(data);
    if (guard_enter(&self->guard, state, THIS_STREAM) < 0) return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = mimi_stream_restore(self->stream, bytes, size);
    Py_END_ALLOW_THREADS
    guard_leave(&self->guard);
    if (status != MOSHI_OK) {
        raise_status(state, status);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *stream_closed(PyObject *object, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(atomic_load(&stream_of(object)->guard.closed));
}

static PyMethodDef stream_methods[] = {
    {"encode", KEYWORDS(stream_encode),
     PyDoc_STR("encode($self, pcm)\n--\n\nfloat32[batch, frame_size] -> int32[batch, K].")},
    {"decode", KEYWORDS(stream_decode),
     PyDoc_STR("decode($self, codes)\n--\n\nint32[batch, K] -> float32[batch, frame_size].")},
    {"encode_piece", stream_encode_piece, METH_O,
     PyDoc_STR("encode_piece($self, pcm, /)\n--\n\n"
               "Of a whole signal: float32[samples] -> int32[K, frames].")},
    {"decode_piece", stream_decode_piece, METH_O,
     PyDoc_STR("decode_piece($self, codes, /)\n--\n\n"
               "Of a whole signal: int32[K, frames] -> float32[frames * frame_size].")},
    {"reset", stream_reset, METH_NOARGS,
     PyDoc_STR("reset($self, /)\n--\n\nForgets what came before, both ways.")},
    {"snapshot", stream_snapshot, METH_NOARGS,
     PyDoc_STR("snapshot($self, /)\n--\n\nThe whole state.")},
    {"restore", KEYWORDS(stream_restore),
     PyDoc_STR("restore($self, data)\n--\n\nGoes on where a snapshot was taken.")},
    {"close", stream_close, METH_NOARGS, PyDoc_STR("close($self, /)\n--\n\nFrees the state.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef stream_properties[] = {
    {"closed", stream_closed, NULL, PyDoc_STR("Whether close has been called."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot stream_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("The codec alone, one frame at a time.")},
    {Py_tp_new, stream_new},
    {Py_tp_dealloc, stream_dealloc},
    {Py_tp_traverse, stream_traverse},
    {Py_tp_methods, stream_methods},
    {Py_tp_getset, stream_properties},
    {0, NULL},
};

PyType_Spec stream_spec = {
    .name = "moshi_c._core.MimiStream",
    .basicsize = sizeof(struct stream_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = stream_slots,
};
