/* conversion.c: the type Conversion: a checkpoint in another format, part after part. */
#include "binding.h"

struct conversion_object {
    PyObject_HEAD
    struct moshi_conversion *conversion;
    struct guard guard;
};

static const char THIS_CONVERSION[] = "this conversion";

static struct conversion_object *conversion_of(PyObject *self)
{
    return (struct conversion_object *)self;
}

static PyObject *conversion_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"lm_path", "dtype", "config_path", "threads", NULL};
    const struct module_state *state = PyType_GetModuleState(type);
    PyObject *lm = NULL, *config = NULL;
    const char *dtype;
    struct moshi_model_options options = {0};
    struct conversion_object *self = NULL;
    int status;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&s|O&i:Conversion", names, path_or_none, &lm,
                                     &dtype, path_or_none, &config, &options.threads))
        return NULL;
    if (dtype_from_text(state, dtype, &options.dtype) < 0) goto done;
    options.lm_path = path_text(lm);
    options.config_path = path_text(config);
    self = (struct conversion_object *)PyType_GenericAlloc(type, 0);
    if (!self) goto done;
    guard_init(&self->guard);
    Py_BEGIN_ALLOW_THREADS
    status = moshi_conversion_open(&options, &self->conversion);
    Py_END_ALLOW_THREADS
    if (status == MOSHI_OK) {
        atomic_store(&self->guard.closed, 0);
    } else {
        raise_status(state, status);
        Py_CLEAR(self);
    }

done:
    Py_XDECREF(lm);
    Py_XDECREF(config);
    return (PyObject *)self;
}

/* The caller holds the guard, or the last reference. */
static void conversion_destroy(struct conversion_object *self)
{
    struct moshi_conversion *conversion = self->conversion;
    self->conversion = NULL;
    Py_BEGIN_ALLOW_THREADS
    moshi_conversion_close(conversion);
    Py_END_ALLOW_THREADS
}

static PyObject *conversion_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct conversion_object *self = conversion_of(object);
    if (atomic_load(&self->guard.closed)) Py_RETURN_NONE;
    if (guard_enter(&self->guard, state_of(object), THIS_CONVERSION) < 0) return NULL;
    atomic_store(&self->guard.closed, 1);
    conversion_destroy(self);
    guard_leave(&self->guard);
    Py_RETURN_NONE;
}

static void conversion_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    conversion_destroy(conversion_of(object));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

static int conversion_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    return 0;
}

static PyObject *conversion_sizes(PyObject *object, void *Py_UNUSED(closure))
{
    struct conversion_object *self = conversion_of(object);
    if (guard_enter(&self->guard, state_of(object), THIS_CONVERSION) < 0) return NULL;
    int count = moshi_conversion_count(self->conversion);
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple && i < count; i++) {
        PyObject *bytes = PyLong_FromLongLong(moshi_conversion_bytes(self->conversion, i));
        if (!bytes || PyTuple_SetItem(tuple, i, bytes) < 0) Py_CLEAR(tuple);
    }
    guard_leave(&self->guard);
    return tuple;
}

static PyObject *conversion_read(PyObject *object, PyObject *args)
{
    struct conversion_object *self = conversion_of(object);
    const struct module_state *state = state_of(object);
    PyObject *data = NULL;
    int part, status;
    if (!PyArg_ParseTuple(args, "i:read", &part)) return NULL;
    if (guard_enter(&self->guard, state, THIS_CONVERSION) < 0) return NULL;
    int64_t bytes = moshi_conversion_bytes(self->conversion, part);
    data = PyBytes_FromStringAndSize(NULL, bytes > 0 ? (Py_ssize_t)bytes : 0);
    if (data) {
        char *to = PyBytes_AsString(data);
        Py_BEGIN_ALLOW_THREADS
        status = moshi_conversion_read(self->conversion, part, to);
        Py_END_ALLOW_THREADS
        if (status != MOSHI_OK) {
            raise_status(state, status);
            Py_CLEAR(data);
        }
    }
    guard_leave(&self->guard);
    return data;
}

static PyMethodDef conversion_methods[] = {
    {"read", conversion_read, METH_VARARGS,
     PyDoc_STR("read($self, part, /)\n--\n\nThe bytes of a part, made now.")},
    {"close", conversion_close, METH_NOARGS,
     PyDoc_STR("close($self, /)\n--\n\nCloses the checkpoint.")},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef conversion_properties[] = {
    {"sizes", conversion_sizes, NULL, PyDoc_STR("Bytes of each part."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot conversion_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("A language model in another format, as the parts of one file.")},
    {Py_tp_new, conversion_new},
    {Py_tp_dealloc, conversion_dealloc},
    {Py_tp_traverse, conversion_traverse},
    {Py_tp_methods, conversion_methods},
    {Py_tp_getset, conversion_properties},
    {0, NULL},
};

PyType_Spec conversion_spec = {
    .name = "moshi_c._core.Conversion",
    .basicsize = sizeof(struct conversion_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = conversion_slots,
};
