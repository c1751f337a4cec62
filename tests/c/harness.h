/* harness.h: tests that return 1, or by CHECK 0 with the reason, one after the other. */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdio.h>

#include "moshi.h"

static int passed, failed;
static char why[700];

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            snprintf(why, sizeof why, "line %d: %s (%s)", __LINE__, #condition,                    \
                     moshi_error_detail());                                                        \
            return 0;                                                                              \
        }                                                                                          \
    } while (0)

static void run(const char *name, int (*test)(void))
{
    why[0] = '\0';
    if (test()) {
        ++passed;
        printf("ok %s\n", name);
    } else {
        ++failed;
        printf("FAIL %s: %s\n", name, why);
    }
}

#endif
