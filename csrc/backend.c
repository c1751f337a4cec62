/* backend.c: what all backends share. */
#include "backend.h"

#include <stdarg.h>
#include <stdio.h>

void backend_fail(struct backend *backend, int status, const char *format, ...)
{
    va_list args;

    if (backend->failure != MOSHI_OK) return;
    backend->failure = status;
    va_start(args, format);
    vsnprintf(backend->sentence, sizeof backend->sentence, format, args);
    va_end(args);
}
