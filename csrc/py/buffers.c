/* buffers.c: see buffers.h. */
#include "buffers.h"

#include <string.h>

/* What the elements of a buffer are. */
struct element {
    char letter; /* of the struct module; 0 when it is not a plain number of 1, 2, 4 or 8 bytes */
    int bytes;
    int is_integer, is_signed;
    int swapped; /* not in the machine's byte order */
};

static struct element element_parse(const Py_buffer *view)
{
    const char *format = view->format ? view->format : "B";
    struct element e = {0};
    char order = 0;
    if (strchr("@=<>!", *format) && *format) order = *format++;
    if (!format[0] || format[1] || !strchr("bBhHiIlLqQnNefd?c", format[0])) return e;
    e.bytes = (int)view->itemsize;
    if (e.bytes != 1 && e.bytes != 2 && e.bytes != 4 && e.bytes != 8) return e;
    e.letter = format[0];
    e.is_integer = strchr("bBhHiIlLqQnN", e.letter) != NULL;
    e.is_signed = strchr("bhilqn", e.letter) != NULL;
#if PY_BIG_ENDIAN
    e.swapped = order == '<' && e.bytes > 1;
#else
    e.swapped = (order == '>' || order == '!') && e.bytes > 1;
#endif
    return e;
}

/* "float64", "uint8"; the format itself when it has no such name. */
static void element_name(const struct element *e, const Py_buffer *view, char name[32])
{
    const char *order = e->swapped ? "byte-swapped " : "";
    if (e->is_integer)
        PyOS_snprintf(name, 32, "%s%sint%d", order, e->is_signed ? "" : "u", 8 * e->bytes);
    else if (e->letter && strchr("efd", e->letter))
        PyOS_snprintf(name, 32, "%sfloat%d", order, 8 * e->bytes);
    else if (e->letter == '?')
        PyOS_snprintf(name, 32, "bool");
    else
        PyOS_snprintf(name, 32, "format '%.16s'", view->format ? view->format : "B");
}

/* A NumPy array over an object that has DLPack but no buffer; NULL with an AudioError. */
static PyObject *read_dlpack(const struct module_state *state, PyObject *object, const char *name,
                             const char *expected)
{
    PyObject *type_name = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
    PyObject *array = NULL;
    if (!type_name) return NULL;
    if (!PyObject_HasAttrString(object, "__dlpack__")) {
        PyErr_Format(state->audio_error,
                     "%s is a %U; expected an array of %s, such as numpy.asarray makes", name,
                     type_name, expected);
    } else {
        array = PyObject_CallFunctionObjArgs(state->from_dlpack, object, NULL);
        if (!array)
            raise_from_current(state->audio_error,
                               "%s is a %U that could not be read through DLPack; expected %s in "
                               "the memory of the CPU",
                               name, type_name, expected);
    }
    Py_DECREF(type_name);
    return array;
}

/* Gets a strided, read-only view of the object; of its DLPack form when it has no buffer. */
static int input_open(struct input *in, const struct module_state *state, PyObject *object,
                      const char *name, const char *expected)
{
    memset(in, 0, sizeof *in);
    in->name = name;
    PyObject *source = object;
    if (PyObject_CheckBuffer(object))
        Py_INCREF(source);
    else
        source = read_dlpack(state, object, name, expected);
    if (!source) return -1;
    if (PyObject_GetBuffer(source, &in->view, PyBUF_RECORDS_RO) < 0) {
        raise_from_current(state->audio_error, "%s has elements of no plain type; expected %s",
                           name, expected);
        Py_DECREF(source);
        return -1;
    }
    in->has_view = 1;
    Py_DECREF(source); /* the view keeps its own reference */
    if (in->view.ndim < 1 || in->view.ndim > INPUT_MAX_DIMS) {
        PyErr_Format(state->audio_error, "%s has %d dimensions; expected 1 to %d", name,
                     in->view.ndim, INPUT_MAX_DIMS);
        input_release(in);
        return -1;
    }
    in->ndim = in->view.ndim;
    for (int d = 0; d < in->ndim; d++) {
        in->shape[d] = in->view.shape[d];
        in->strides[d] = in->view.strides[d];
    }
    return 0;
}

void input_release(struct input *in)
{
    if (in->has_view) PyBuffer_Release(&in->view);
    PyMem_Free(in->copy);
    in->has_view = 0;
    in->copy = NULL;
    in->data = NULL;
}

static Py_ssize_t input_count(const struct input *in)
{
    Py_ssize_t count = 1;
    for (int d = 0; d < in->ndim; d++) count *= in->shape[d];
    return count;
}

/* Views the buffer's memory if it is contiguous and aligned for elements of `bytes`. */
static int input_borrow(struct input *in, size_t bytes)
{
    if (!PyBuffer_IsContiguous(&in->view, 'C') || (uintptr_t)in->view.buf % bytes) return 0;
    in->data = in->view.buf;
    return 1;
}

/* Room for a converted copy of four-byte elements. */
static void *input_allocate(struct input *in)
{
    Py_ssize_t count = input_count(in);
    if (count > PY_SSIZE_T_MAX / 4) count = PY_SSIZE_T_MAX / 4;
    in->copy = PyMem_Malloc(count > 0 ? 4 * (size_t)count : 1);
    if (!in->copy) PyErr_NoMemory();
    in->data = in->copy;
    return in->copy;
}

/* Where row i begins: the elements along the last dimension, rows counted in C order. */
static const char *row_at(const struct input *in, Py_ssize_t i)
{
    const char *at = in->view.buf;
    for (int d = in->ndim - 2; d >= 0; d--) {
        at += i % in->shape[d] * in->strides[d];
        i /= in->shape[d];
    }
    return at;
}

static float sample_from_int16(const char *at)
{
    int16_t value;
    memcpy(&value, at, sizeof value);
    return (float)value / 32768.0f;
}

static int64_t integer_at(const char *at, const struct element *e, int *overflow)
{
    union {
        int8_t i8;
        uint8_t u8;
        int16_t i16;
        uint16_t u16;
        int32_t i32;
        uint32_t u32;
        int64_t i64;
        uint64_t u64;
    } v;
    memcpy(&v, at, (size_t)e->bytes);
    switch (e->bytes) {
    case 1:
        return e->is_signed ? v.i8 : v.u8;
    case 2:
        return e->is_signed ? v.i16 : v.u16;
    case 4:
        return e->is_signed ? v.i32 : (int64_t)v.u32;
    default:
        *overflow = !e->is_signed && v.u64 > INT64_MAX;
        return v.i64;
    }
}

/* Raw bytes become samples: one dimension of `bytes`-sized elements. */
static int input_from_raw(struct input *in, const struct module_state *state, int bytes)
{
    Py_ssize_t length = in->shape[0];
    if (in->ndim != 1 || !PyBuffer_IsContiguous(&in->view, 'C')) {
        PyErr_Format(state->audio_error, "%s holds raw bytes that are not one contiguous row",
                     in->name);
        return -1;
    }
    if (length % bytes) {
        PyErr_Format(state->audio_error, "%s has %zd bytes; expected whole samples of %d bytes",
                     in->name, length, bytes);
        return -1;
    }
    in->shape[0] = length / bytes;
    in->strides[0] = bytes;
    return 0;
}

static int pcm_convert(struct input *in, const struct module_state *state, const char *dtype)
{
    struct element e = element_parse(&in->view);
    char found[32];
    element_name(&e, &in->view, found);
    int raw = e.bytes == 1 && e.letter != '?';
    int is_float = e.letter == 'f' && e.bytes == 4;
    int is_int16 = e.is_integer && e.is_signed && e.bytes == 2;

    if (dtype && strcmp(dtype, "float32") && strcmp(dtype, "int16")) {
        PyErr_Format(state->audio_error, "dtype is '%s'; expected 'float32' or 'int16'", dtype);
        return -1;
    }
    if (raw && !dtype) {
        PyErr_Format(state->audio_error,
                     "%s is raw bytes, which do not tell their type; pass dtype='float32' or "
                     "dtype='int16'",
                     in->name);
        return -1;
    }
    if (raw) {
        is_float = !strcmp(dtype, "float32");
        is_int16 = !is_float;
        if (input_from_raw(in, state, is_float ? 4 : 2) < 0) return -1;
    } else if ((!is_float && !is_int16) || e.swapped) {
        PyErr_Format(state->audio_error,
                     "%s is %s; expected float32 or int16: convert with %s.astype('float32')%s",
                     in->name, found, in->name, e.is_integer ? " after scaling to -1..1" : "");
        return -1;
    } else if (dtype && strcmp(dtype, is_float ? "float32" : "int16")) {
        PyErr_Format(state->audio_error, "%s is %s; dtype says %s", in->name, found, dtype);
        return -1;
    }

    if (is_float && input_borrow(in, sizeof(float))) return 0;
    float *out = input_allocate(in);
    if (!out) return -1;
    Py_ssize_t count = input_count(in), columns = in->shape[in->ndim - 1];
    Py_ssize_t step = in->strides[in->ndim - 1];
    for (Py_ssize_t row = 0; row * columns < count; row++) {
        const char *at = row_at(in, row);
        for (Py_ssize_t j = 0; j < columns; j++, at += step, out++) {
            if (is_float)
                memcpy(out, at, sizeof *out);
            else
                *out = sample_from_int16(at);
        }
    }
    return 0;
}

int input_pcm(struct input *in, const struct module_state *state, PyObject *object,
              const char *name, const char *dtype)
{
    if (input_open(in, state, object, name, "float32 or int16 samples") < 0) return -1;
    if (pcm_convert(in, state, dtype) < 0) {
        input_release(in);
        return -1;
    }
    return 0;
}

static int codes_convert(struct input *in, const struct module_state *state)
{
    struct element e = element_parse(&in->view);
    if (!e.is_integer || e.swapped) {
        char found[32];
        element_name(&e, &in->view, found);
        PyErr_Format(state->audio_error,
                     "%s is %s; expected integers: convert with %s.astype('int32')", in->name,
                     found, in->name);
        return -1;
    }
    if (e.is_signed && e.bytes == 4 && input_borrow(in, sizeof(int32_t))) return 0;
    int32_t *out = input_allocate(in);
    if (!out) return -1;
    Py_ssize_t count = input_count(in), columns = in->shape[in->ndim - 1];
    Py_ssize_t step = in->strides[in->ndim - 1];
    for (Py_ssize_t row = 0; row * columns < count; row++) {
        const char *at = row_at(in, row);
        for (Py_ssize_t j = 0; j < columns; j++, at += step, out++) {
            int overflow = 0;
            int64_t value = integer_at(at, &e, &overflow);
            if (overflow || value < INT32_MIN || value > INT32_MAX) {
                PyErr_Format(state->audio_error,
                             overflow ? "%s holds %llu; expected codes of 32 bits"
                                      : "%s holds %lld; expected codes of 32 bits",
                             in->name, (long long)value);
                return -1;
            }
            *out = (int32_t)value;
        }
    }
    return 0;
}

int input_codes(struct input *in, const struct module_state *state, PyObject *object,
                const char *name)
{
    if (input_open(in, state, object, name, "integers") < 0) return -1;
    if (codes_convert(in, state) < 0) {
        input_release(in);
        return -1;
    }
    return 0;
}

void input_shape_text(const struct input *in, char text[96])
{
    size_t used = 1;
    text[0] = '(';
    for (int d = 0; d < in->ndim; d++)
        used += (size_t)PyOS_snprintf(text + used, 96 - used, d ? ", %lld" : "%lld",
                                      (long long)in->shape[d]);
    PyOS_snprintf(text + used, 96 - used, in->ndim == 1 ? ",)" : ")");
}

Py_ssize_t input_row_length(const struct input *in)
{
    for (int d = 0; d < in->ndim - 1; d++)
        if (in->shape[d] != 1) return -1;
    return in->shape[in->ndim - 1];
}

int input_expect_row(const struct input *in, const struct module_state *state, Py_ssize_t n,
                     const char *what)
{
    if (input_row_length(in) == n) return 0;
    char shape[96];
    input_shape_text(in, shape);
    PyErr_Format(state->audio_error, "%s has shape %s; expected (%zd,), %s", in->name, shape, n,
                 what);
    return -1;
}

int input_expect_frame(const struct input *in, const struct module_state *state, int frame_size,
                       int sample_rate)
{
    Py_ssize_t length = input_row_length(in);
    if (length == frame_size) return 0;
    if (length < 0) {
        char shape[96];
        input_shape_text(in, shape);
        PyErr_Format(state->audio_error, "%s has shape %s; expected one channel, (%d,)", in->name,
                     shape, frame_size);
    } else {
        PyErr_Format(state->audio_error,
                     "%s has %zd samples; a frame is %d (%d ms at %d Hz): use Session.push for "
                     "other lengths",
                     in->name, length, frame_size, (int)(1000.0 * frame_size / sample_rate + 0.5),
                     sample_rate);
    }
    return -1;
}
