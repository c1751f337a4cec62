/* fake_cublaslt.h: what a test sees of fake_cublaslt.c; exported as `fake_cublaslt`. */
#ifndef FAKE_CUBLASLT_H
#define FAKE_CUBLASLT_H

#define FAKE_ROWS 24
#define FAKE_COLUMNS 40

struct fake_cublaslt {
    int fault;        /* of the next searches, if it is not 0 */
    int products;     /* asked for so far */
    int objects;      /* made and not destroyed */
    const void *last; /* the weights of the latest product */
};

#endif
