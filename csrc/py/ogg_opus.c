/* ogg_opus.c: the types OggOpusReader and OggOpusWriter: Opus in Ogg as a stream. */
#include "buffers.h"

#include <stdlib.h>
#include <string.h>

/* What a call gives, in pieces of `element` bytes; grows with the GIL released. */
struct output {
    char *data;
    size_t used, room, element;
};

/* Room for at least one more; 0 when there is no memory. */
static int output_grow(struct output *out)
{
    if (out->used < out->room) return 1;
    size_t room = out->room ? 2 * out->room : 8192;
    char *data = realloc(out->data, room * out->element);
    if (!data) return 0;
    out->data = data;
    out->room = room;
    return 1;
}

/* Beside the statuses of the core, which are not positive. */
enum { NO_MEMORY = 1, TOO_MUCH };

/* ---- reader ----------------------------------------------------------------------------- */

struct reader_object {
    PyObject_HEAD
    struct moshi_opus_reader *reader;
    struct guard guard;
    double max_seconds;
    int rate;
};

static const char THIS_READER[] = "this OggOpusReader";

static struct reader_object *reader_of(PyObject *self)
{
    return (struct reader_object *)self;
}

static PyObject *reader_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"rate", "max_seconds", NULL};
    const struct module_state *state = PyType_GetModuleState(type);
    int rate = 24000;
    double max_seconds = Py_HUGE_VAL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|id:OggOpusReader", names, &rate, &max_seconds))
        return NULL;
    struct reader_object *self = (struct reader_object *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    guard_init(&self->guard);
    self->rate = rate;
    self->max_seconds = max_seconds;
    int status = moshi_opus_reader_create(rate, &self->reader);
    if (status == MOSHI_OK) {
        atomic_store(&self->guard.closed, 0);
    } else {
        raise_status(state, status);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void reader_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    moshi_opus_reader_destroy(reader_of(object)->reader);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

static int traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    return 0;
}

static int read_all(struct reader_object *self, const Py_buffer *view, struct output *out)
{
    const uint8_t *data = view->buf;
    size_t bytes = (size_t)view->len, samples;
    do {
        if (!output_grow(out)) return NO_MEMORY;
        int status = moshi_opus_reader_append(self->reader, &data, &bytes,
                                              (float *)out->data + out->used, out->room - out->used,
                                              &samples);
        if (status != MOSHI_OK) return status;
        out->used += samples;
        if ((double)out->used > self->max_seconds * self->rate) return TOO_MUCH;
    } while (samples);
    return MOSHI_OK;
}

static PyObject *reader_append(PyObject *object, PyObject *args)
{
    struct reader_object *self = reader_of(object);
    const struct module_state *state = state_of(object);
    struct output out = {.element = sizeof(float)};
    PyObject *pcm = NULL;
    Py_buffer view;
    int status;
    if (!PyArg_ParseTuple(args, "y*:append", &view)) return NULL;
    if (guard_enter(&self->guard, state, THIS_READER) < 0) goto done;
    Py_BEGIN_ALLOW_THREADS
    status = read_all(self, &view, &out);
    Py_END_ALLOW_THREADS
    guard_leave(&self->guard);
    if (status == NO_MEMORY) {
        PyErr_NoMemory();
    } else if (status == TOO_MUCH) {
        PyObject *limit = PyFloat_FromDouble(self->max_seconds);
        PyErr_Format(state->audio_error,
                     "%zd bytes of an Opus stream hold more than %S s of sound; expected at most "
                     "that in one piece",
                     view.len, limit);
        Py_XDECREF(limit);
    } else if (status != MOSHI_OK) {
        raise_status(state, status);
    } else {
        npy_intp shape[1] = {(npy_intp)out.used};
        pcm = array_float32(1, shape);
        if (pcm && out.used)
            memcpy(PyArray_DATA((PyArrayObject *)pcm), out.data, out.used * sizeof(float));
    }

done:
    free(out.data);
    PyBuffer_Release(&view);
    return pcm;
}

static PyObject *reader_pre_skip(PyObject *object, void *Py_UNUSED(closure))
{
    struct reader_object *self = reader_of(object);
    if (guard_enter(&self->guard, state_of(object), THIS_READER) < 0) return NULL;
    int samples = moshi_opus_reader_pre_skip(self->reader);
    guard_leave(&self->guard);
    return PyLong_FromLong(samples);
}

static PyObject *reader_counts(PyObject *object, void *Py_UNUSED(closure))
{
    struct reader_object *self = reader_of(object);
    if (guard_enter(&self->guard, state_of(object), THIS_READER) < 0) return NULL;
    struct moshi_opus_counts counts = moshi_opus_reader_counts(self->reader);
    guard_leave(&self->guard);
    return Py_BuildValue("{s:L,s:L,s:L}", "packets", (long long)counts.packets, "lost",
                         (long long)counts.lost, "damaged", (long long)counts.damaged);
}

static PyMethodDef reader_methods[] = {
    {"append", reader_append, METH_VARARGS,
     PyDoc_STR("append($self, data, /)\n--\n\nBytes of the stream -> float32[n].")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef reader_properties[] = {
    {"counts", reader_counts, NULL, PyDoc_STR("Packets decoded, pages lost, damage met."), NULL},
    {"pre_skip", reader_pre_skip, NULL, PyDoc_STR("Samples a player drops in front."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot reader_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Opus in Ogg -> samples.")},
    {Py_tp_new, reader_new},
    {Py_tp_dealloc, reader_dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_methods, reader_methods},
    {Py_tp_getset, reader_properties},
    {0, NULL},
};

PyType_Spec opus_reader_spec = {
    .name = "moshi_c._core.OggOpusReader",
    .basicsize = sizeof(struct reader_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = reader_slots,
};

/* ---- writer ----------------------------------------------------------------------------- */

struct writer_object {
    PyObject_HEAD
    struct moshi_opus_writer *writer;
    struct guard guard;
};

static const char THIS_WRITER[] = "this OggOpusWriter";

static struct writer_object *writer_of(PyObject *self)
{
    return (struct writer_object *)self;
}

static PyObject *writer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"rate", "serial", NULL};
    const struct module_state *state = PyType_GetModuleState(type);
    int rate = 24000;
    unsigned int serial = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|iI:OggOpusWriter", names, &rate, &serial))
        return NULL;
    struct writer_object *self = (struct writer_object *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    guard_init(&self->guard);
    int status = moshi_opus_writer_create(rate, serial, &self->writer);
    if (status == MOSHI_OK) {
        atomic_store(&self->guard.closed, 0);
    } else {
        raise_status(state, status);
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void writer_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    moshi_opus_writer_destroy(writer_of(object)->writer);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

/* in NULL: the end of the stream. */
static int write_all(struct writer_object *self, const struct input *in, struct output *out)
{
    const float *pcm = in ? in->data : NULL;
    size_t samples = in ? (size_t)input_row_length(in) : 0, bytes;
    do {
        if (!output_grow(out)) return NO_MEMORY;
        uint8_t *data = (uint8_t *)out->data + out->used;
        size_t room = out->room - out->used;
        int status = in ? moshi_opus_writer_append(self->writer, &pcm, &samples, data, room, &bytes)
                        : moshi_opus_writer_close(self->writer, data, room, &bytes);
        if (status != MOSHI_OK) return status;
        out->used += bytes;
    } while (bytes);
    return MOSHI_OK;
}

static PyObject *write_pages(struct writer_object *self, const struct module_state *state,
                             const struct input *in)
{
    struct output out = {.element = 1};
    PyObject *data = NULL;
    int status;
    if (guard_enter(&self->guard, state, THIS_WRITER) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = write_all(self, in, &out);
    Py_END_ALLOW_THREADS
    guard_leave(&self->guard);
    if (status == NO_MEMORY)
        PyErr_NoMemory();
    else if (status != MOSHI_OK)
        raise_status(state, status);
    else
        data = PyBytes_FromStringAndSize(out.data, (Py_ssize_t)out.used);
    free(out.data);
    return data;
}

static PyObject *writer_append(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pcm", "dtype", NULL};
    const struct module_state *state = state_of(object);
    const char *dtype = NULL;
    PyObject *arg, *data = NULL;
    struct input pcm;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|z:append", names, &arg, &dtype)) return NULL;
    if (input_pcm(&pcm, state, arg, "pcm", dtype) < 0) return NULL;
    if (input_row_length(&pcm) < 0) {
        char shape[96];
        input_shape_text(&pcm, shape);
        PyErr_Format(state->audio_error, "pcm has shape %s; expected one channel, (n,)", shape);
    } else {
        data = write_pages(writer_of(object), state, &pcm);
    }
    input_release(&pcm);
    return data;
}

static PyObject *writer_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    return write_pages(writer_of(object), state_of(object), NULL);
}

static PyMethodDef writer_methods[] = {
    {"append", KEYWORDS(writer_append),
     PyDoc_STR("append($self, pcm, dtype=None)\n--\n\nSamples -> pages that are ready.")},
    {"close", writer_close, METH_NOARGS,
     PyDoc_STR("close($self, /)\n--\n\nThe last pages of the stream.")},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot writer_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("Samples -> Opus in Ogg.")},
    {Py_tp_new, writer_new},
    {Py_tp_dealloc, writer_dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_methods, writer_methods},
    {0, NULL},
};

PyType_Spec opus_writer_spec = {
    .name = "moshi_c._core.OggOpusWriter",
    .basicsize = sizeof(struct writer_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = writer_slots,
};
