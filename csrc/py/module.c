/* module.c: the module moshi_c._core: its state, its types, its exceptions, and what the files of the
 * binding share. */
#define MOSHI_PY_IMPORTS_ARRAY
#include "binding.h"

#include <stdarg.h>
#include <string.h>
#include <unistd.h>

static PyObject *exception_of(const struct module_state *state, int status)
{
    switch (status) {
    case MOSHI_ERROR_CHECKPOINT:
        return state->checkpoint_error;
    case MOSHI_ERROR_DEVICE:
    case MOSHI_ERROR_MEMORY: /* of the machine; Python's own is not exhausted */
        return state->device_error;
    case MOSHI_ERROR_AUDIO:
        return state->audio_error;
    case MOSHI_ERROR_SESSION:
        return state->session_error;
    case MOSHI_ERROR_ARGUMENT:
        return PyExc_ValueError;
    default:
        return state->moshi_error;
    }
}

int raise_status(const struct module_state *state, int status)
{
    const char *detail = moshi_error_detail();
    PyObject *message = PyUnicode_DecodeUTF8(detail, (Py_ssize_t)strlen(detail), "replace");
    if (message) {
        PyErr_SetObject(exception_of(state, status), message);
        Py_DECREF(message);
    }
    return -1;
}

int raise_from_current(PyObject *type, const char *format, ...)
{
    PyObject *cause_type, *cause, *traceback;
    PyErr_Fetch(&cause_type, &cause, &traceback);
    /* What ends the program, and what is no judgement on the input, goes through as it is. */
    if (cause_type && (!PyErr_GivenExceptionMatches(cause_type, PyExc_Exception) ||
                       PyErr_GivenExceptionMatches(cause_type, PyExc_MemoryError))) {
        PyErr_Restore(cause_type, cause, traceback);
        return -1;
    }
    if (cause_type) {
        PyErr_NormalizeException(&cause_type, &cause, &traceback);
        if (traceback) PyException_SetTraceback(cause, traceback);
        Py_DECREF(cause_type);
        Py_XDECREF(traceback);
    }
    va_list args;
    va_start(args, format);
    PyObject *message = PyUnicode_FromFormatV(format, args);
    va_end(args);
    if (message) PyErr_SetObject(type, message);
    Py_XDECREF(message);
    if (!cause) return -1;

    PyObject *new_type, *new_value, *new_traceback;
    PyErr_Fetch(&new_type, &new_value, &new_traceback);
    PyErr_NormalizeException(&new_type, &new_value, &new_traceback);
    PyException_SetCause(new_value, cause); /* takes our reference */
    PyErr_Restore(new_type, new_value, new_traceback);
    return -1;
}

int path_or_none(PyObject *object, void *result)
{
    PyObject **path = result;
    if (object == Py_None) {
        *path = NULL;
        return 1;
    }
    return PyUnicode_FSConverter(object, result);
}

const char *path_text(PyObject *path)
{
    return path ? PyBytes_AsString(path) : NULL;
}

int dtype_from_text(const struct module_state *state, const char *name, enum moshi_dtype *dtype)
{
    int status = moshi_dtype_parse(name, dtype);
    return status == MOSHI_OK ? 0 : raise_status(state, status);
}

int seed_from_object(PyObject *object, uint64_t *seed)
{
    PyObject *number = PyNumber_Index(object);
    if (!number) return -1;
    *seed = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "seed is %S; expected 0 to 2**64 - 1", number);
    }
    Py_DECREF(number);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *array_zeros(int ndim, const npy_intp *shape, int type)
{
    return PyArray_ZEROS(ndim, (npy_intp *)shape, type, 0);
}

PyObject *array_float32(int ndim, const npy_intp *shape)
{
    return array_zeros(ndim, shape, NPY_FLOAT32);
}

PyObject *array_int32(int ndim, const npy_intp *shape)
{
    return array_zeros(ndim, shape, NPY_INT32);
}

/* ---- guard ------------------------------------------------------------------------------ */

long this_process(void)
{
    return (long)getpid();
}

int check_process(long process, const struct module_state *state, const char *what)
{
    long here = this_process();
    if (here == process) return 0;
    PyErr_Format(state->session_error,
                 "%s was made by process %ld, and this is process %ld, forked from it without its "
                 "threads; expected a model loaded in this process",
                 what, process, here);
    return -1;
}

void guard_init(struct guard *guard)
{
    atomic_init(&guard->busy, 0);
    atomic_init(&guard->closed, 1);
    guard->process = this_process();
}

int guard_check_open(struct guard *guard, const struct module_state *state, const char *what)
{
    if (!atomic_load(&guard->closed)) return check_process(guard->process, state, what);
    PyErr_Format(state->session_error, "%s is closed", what);
    return -1;
}

int guard_enter(struct guard *guard, const struct module_state *state, const char *what)
{
    int idle = 0;
    if (guard_check_open(guard, state, what) < 0) return -1;
    if (!atomic_compare_exchange_strong(&guard->busy, &idle, 1)) {
        PyErr_Format(state->session_error,
                     "%s is in use by another thread; expected one thread at a time", what);
        return -1;
    }
    if (guard_check_open(guard, state, what) < 0) {
        guard_leave(guard);
        return -1;
    }
    return 0;
}

void guard_leave(struct guard *guard)
{
    atomic_store(&guard->busy, 0);
}

/* ---- module ----------------------------------------------------------------------------- */

#define MAX_DEVICES 32

static PyObject *core_devices(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    struct moshi_device devices[MAX_DEVICES];
    int count;
    Py_BEGIN_ALLOW_THREADS
    count = moshi_devices(devices, MAX_DEVICES);
    Py_END_ALLOW_THREADS
    PyObject *list = PyList_New(0);
    if (!list) return NULL;
    for (int i = 0; i < count && i < MAX_DEVICES; i++) {
        const struct moshi_device *d = &devices[i];
        PyObject *entry = Py_BuildValue("{s:s,s:s,s:L,s:N,s:s}", "name", d->name, "description",
                                        d->description, "memory_bytes", (long long)d->memory_bytes,
                                        "usable", PyBool_FromLong(d->usable), "reason", d->reason);
        if (!entry || PyList_Append(list, entry) < 0) {
            Py_XDECREF(entry);
            Py_DECREF(list);
            return NULL;
        }
        Py_DECREF(entry);
    }
    return list;
}

static PyObject *core_measure(PyObject *module, PyObject *args)
{
    struct moshi_limits limits;
    double seconds;
    int threads, status;
    if (!PyArg_ParseTuple(args, "id:measure", &threads, &seconds)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = moshi_measure(threads, seconds, &limits);
    Py_END_ALLOW_THREADS
    if (status != MOSHI_OK) {
        raise_status(PyModule_GetState(module), status);
        return NULL;
    }
    return Py_BuildValue("{s:d,s:d}", "read_bytes_s", limits.read_bytes_s, "flops_s",
                         limits.flops_s);
}

static PyMethodDef core_methods[] = {
    {"devices", core_devices, METH_NOARGS,
     PyDoc_STR("devices()\n--\n\nWhat this machine offers; for what is not usable, why.")},
    {"measure", core_measure, METH_VARARGS,
     PyDoc_STR("measure(threads, seconds, /)\n--\n\n"
               "The best rates of reading and multiplying that the machine reached.")},
    {"step_many", KEYWORDS(sessions_step_many),
     PyDoc_STR("step_many(sessions, pcms, decode=True, codes=False)\n--\n\n"
               "One batched step of many sessions of one model: all of them step, or none.")},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type && PyModule_AddType(module, type) < 0) Py_CLEAR(type);
    return type;
}

static int core_exec(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    import_array1(-1);

    PyObject *errors = PyImport_ImportModule("moshi_c.errors");
    if (!errors) return -1;
    state->moshi_error = PyObject_GetAttrString(errors, "MoshiError");
    state->checkpoint_error = PyObject_GetAttrString(errors, "CheckpointError");
    state->device_error = PyObject_GetAttrString(errors, "DeviceError");
    state->audio_error = PyObject_GetAttrString(errors, "AudioError");
    state->session_error = PyObject_GetAttrString(errors, "SessionError");
    Py_DECREF(errors);
    if (!state->moshi_error || !state->checkpoint_error || !state->device_error ||
        !state->audio_error || !state->session_error)
        return -1;

    PyObject *numpy = PyImport_ImportModule("numpy");
    if (!numpy) return -1;
    state->from_dlpack = PyObject_GetAttrString(numpy, "from_dlpack");
    Py_DECREF(numpy);
    if (!state->from_dlpack) return -1;

    state->model_type = add_type(module, &model_spec);
    state->session_type = add_type(module, &session_spec);
    state->stream_type = add_type(module, &stream_spec);
    if (!state->model_type || !state->session_type || !state->stream_type) return -1;
    PyType_Spec *others[] = {&conversion_spec, &opus_reader_spec, &opus_writer_spec};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        PyTypeObject *type = add_type(module, others[i]);
        if (!type) return -1;
        Py_DECREF((PyObject *)type); /* the module has its own */
    }
    return PyModule_AddStringConstant(module, "__version__", moshi_version());
}

static int core_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct module_state *state = PyModule_GetState(module);
    Py_VISIT(state->model_type);
    Py_VISIT(state->session_type);
    Py_VISIT(state->stream_type);
    Py_VISIT(state->moshi_error);
    Py_VISIT(state->checkpoint_error);
    Py_VISIT(state->device_error);
    Py_VISIT(state->audio_error);
    Py_VISIT(state->session_error);
    Py_VISIT(state->from_dlpack);
    return 0;
}

static int core_clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->model_type);
    Py_CLEAR(state->session_type);
    Py_CLEAR(state->stream_type);
    Py_CLEAR(state->moshi_error);
    Py_CLEAR(state->checkpoint_error);
    Py_CLEAR(state->device_error);
    Py_CLEAR(state->audio_error);
    Py_CLEAR(state->session_error);
    Py_CLEAR(state->from_dlpack);
    return 0;
}

static void core_free(void *module)
{
    core_clear(module);
}

static PyModuleDef_Slot core_slots[] = {
    {Py_mod_exec, core_exec},
#ifdef Py_mod_multiple_interpreters
    /* NumPy's table of functions is one static pointer, and NumPy itself refuses too. */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef core_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "moshi_c._core",
    .m_doc = PyDoc_STR("The C core of moshi_c; use it through the package."),
    .m_size = sizeof(struct module_state),
    .m_methods = core_methods,
    .m_slots = core_slots,
    .m_traverse = core_traverse,
    .m_clear = core_clear,
    .m_free = core_free,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&core_module);
}
