/* buffers.h: samples and codes on their way in. Any object with the buffer protocol is taken, and
 * through numpy.from_dlpack any CPU tensor. Memory that already has the right form is viewed, not
 * copied. Whatever is wrong with the object is an AudioError of one sentence. */
#ifndef MOSHI_PY_BUFFERS_H
#define MOSHI_PY_BUFFERS_H

#include "binding.h"

#define INPUT_MAX_DIMS 3

struct input {
    const void *data; /* float or int32_t, C-contiguous, shape[ndim] */
    int ndim;
    Py_ssize_t shape[INPUT_MAX_DIMS];
    const char *name; /* of the argument, for messages */
    /* private */
    Py_ssize_t strides[INPUT_MAX_DIMS]; /* of the view */
    Py_buffer view;
    int has_view;
    void *copy;
};

/* float32 or int16 samples as float; int16 is divided by 32768. dtype NULL: as the object says; else
 * "float32" or "int16", which raw bytes need. On failure -1, and there is nothing to release. */
int input_pcm(struct input *in, const struct module_state *state, PyObject *object,
              const char *name, const char *dtype);
/* Integers of any width as int32_t. */
int input_codes(struct input *in, const struct module_state *state, PyObject *object,
                const char *name);
/* n of the shape [n], or [1, n]; -1 for another shape. */
Py_ssize_t input_row_length(const struct input *in);
/* AudioError and -1 unless the shape is [n], or [1, n]. */
int input_expect_row(const struct input *in, const struct module_state *state, Py_ssize_t n,
                     const char *what);
/* A frame of samples: as above, with the words of a frame. */
int input_expect_frame(const struct input *in, const struct module_state *state, int frame_size,
                       int sample_rate);
/* The shape as text, "(2, 1920)"; at most 96 bytes. */
void input_shape_text(const struct input *in, char text[96]);
void input_release(struct input *in);

#endif
