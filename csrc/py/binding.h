/* binding.h: what the files of the extension module share. The module is a client of moshi.h and of
 * nothing else of the core.
 *
 * Threads. Nothing here leans on the GIL for safety: which calls may run is decided by atomic flags
 * in the objects, so that a build without the GIL is as safe. Every call that can take long runs
 * with the GIL released; none of them enters Python.
 *
 * Lifetimes. A Session or MimiStream holds a strong reference to its Model and counts as one of its
 * users; a Model closes only when it has none. */
#ifndef MOSHI_PY_BINDING_H
#define MOSHI_PY_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define NPY_TARGET_VERSION NPY_1_22_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL moshi_array_api
#ifndef MOSHI_PY_IMPORTS_ARRAY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include <stdatomic.h>

#include "../moshi.h"

/* Two fields of a PyMethodDef: a function that takes keywords. */
#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS

struct module_state {
    PyTypeObject *model_type, *session_type, *stream_type;
    PyObject *moshi_error, *checkpoint_error, *device_error, *audio_error, *session_error;
    PyObject *from_dlpack; /* numpy.from_dlpack */
};

/* The types are final, so an object's type is the one made for its module. */
static inline struct module_state *state_of(PyObject *self)
{
    return PyType_GetModuleState(Py_TYPE(self));
}

/* Raises the exception for a status, with the sentence the core recorded. Returns -1. */
int raise_status(const struct module_state *state, int status);
/* Raises `type` with a message; an exception already set becomes its cause. Returns -1. */
int raise_from_current(PyObject *type, const char *format, ...);
/* For "O&": a path as bytes, or NULL for None. */
int path_or_none(PyObject *object, void *result);
const char *path_text(PyObject *path); /* NULL for NULL */
/* The format of that name; ValueError and -1. */
int dtype_from_text(const struct module_state *state, const char *name, enum moshi_dtype *dtype);
/* Any integer, 0..2**64-1; else ValueError or TypeError and -1. */
int seed_from_object(PyObject *object, uint64_t *seed);
/* A new array of zeros; float32 or int32. */
PyObject *array_float32(int ndim, const npy_intp *shape);
PyObject *array_int32(int ndim, const npy_intp *shape);

/* SessionError and -1 in a process forked from `process`, which made the object: there the core does
 * no work, and flags and locks may be held for ever by threads that the child does not have. `what`
 * begins the sentence, e.g. "this session". */
int check_process(long process, const struct module_state *state, const char *what);
long this_process(void);

/* One call at a time for an object that a thread may be using and another may want to close. */
struct guard {
    atomic_int busy;
    atomic_int closed;
    long process; /* the one in which it was made */
};

/* Of an object that is not open yet. */
void guard_init(struct guard *guard);
/* SessionError and -1 when closed, in a forked process, or when another thread is inside. */
int guard_check_open(struct guard *guard, const struct module_state *state, const char *what);
int guard_enter(struct guard *guard, const struct module_state *state, const char *what);
void guard_leave(struct guard *guard);

struct model_object {
    PyObject_HEAD
    struct moshi_model *model;
    struct moshi_engine *engine; /* made by the first call that needs it, under engine_lock */
    PyThread_type_lock engine_lock;
    struct moshi_engine_options engine_options;
    long process;
    atomic_int users; /* calls in progress and open sessions and streams; -1: closed */
    atomic_int children; /* the sessions and streams among them, for the message of close */
};

/* Keeps the model open until model_leave. SessionError and -1 when it is closed. */
int model_enter(struct model_object *self, const struct module_state *state);
void model_leave(struct model_object *self);
/* As enter and leave, for as long as a session or stream is open. The engine, made now if there is
 * none; NULL with an exception. */
struct moshi_engine *model_attach(struct model_object *self, const struct module_state *state);
void model_detach(struct model_object *self);

extern PyType_Spec model_spec, session_spec, stream_spec, conversion_spec;
extern PyType_Spec opus_reader_spec, opus_writer_spec;

/* step_many(sessions, pcms, decode=True), a function of the module. */
PyObject *sessions_step_many(PyObject *module, PyObject *args, PyObject *kwargs);

#endif
