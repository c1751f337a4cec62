/* os.c: the only file that talks to the operating system and the only one with #ifdefs for it.
 * Linux first; macOS where a portable call exists (no free-memory figure, and waiting on a word
 * goes through one condition variable for the process). */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#ifdef __APPLE__
#define _DARWIN_C_SOURCE
#endif

#include "os.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

#include "status.h"

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

#ifndef __has_feature
#define __has_feature(feature) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define GUARD_BYTES 4096
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes) (void)0
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes) (void)0
#define GUARD_BYTES 0
#endif

struct os_thread {
    pthread_t handle;
    void (*body)(void *);
    void *arg;
};

struct os_mutex {
    pthread_mutex_t handle;
    /* a queue: held by the ticket that is served, and the handle guards the numbers */
    int is_queue;
    uint64_t next, served;
    pthread_cond_t turn;
};

struct os_condition {
    pthread_cond_t handle;
};

/* strerror shares a buffer between threads on some systems; strerror_r has two signatures. */
static const char *error_text(int error, char *buffer, size_t capacity)
{
#ifdef __GLIBC__
    return strerror_r(error, buffer, capacity);
#else
    return strerror_r(error, buffer, capacity) == 0 ? buffer : "unknown error";
#endif
}

static int fail_file(const char *path, const char *action, int error)
{
    char buffer[128];
    int status = error == ENOMEM ? MOSHI_ERROR_MEMORY : MOSHI_ERROR_CHECKPOINT;
    return moshi_fail(status, "%s: cannot %s: %s", path, action,
                      error_text(error, buffer, sizeof buffer));
}

static void *map_anonymous(void *where, size_t bytes, int flags)
{
    void *memory = mmap(where, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

/* What is mapped for a block. The address sanitizer knows the ends of what malloc gives; of these
 * pages it has to be told, and forbids what lies behind them. */
static size_t mapped_bytes(size_t bytes)
{
    return (bytes > 0 ? bytes : 1) + GUARD_BYTES;
}

static int read_whole(int fd, const char *path, uint8_t *data, size_t bytes)
{
    size_t done = 0;
    while (done < bytes) {
        /* Linux moves at most 2 GiB a call, macOS refuses more. */
        size_t want = bytes - done < ((size_t)1 << 30) ? bytes - done : (size_t)1 << 30;
        ssize_t got = read(fd, data + done, want);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return fail_file(path, "read the file", errno);
        }
        if (got == 0) {
            return moshi_fail(MOSHI_ERROR_CHECKPOINT,
                              "%s: the file ended after %zu bytes while being read, expected %zu",
                              path, done, bytes);
        }
        done += (size_t)got;
    }
    return MOSHI_OK;
}

int os_file_open(const char *path, int copy, struct os_file *file)
{
    *file = (struct os_file){0};
    int fd;
    /* O_NONBLOCK: a named pipe must be refused below, not waited for here. */
    do {
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    } while (fd < 0 && errno == EINTR);
    if (fd < 0) {
        return fail_file(path, "open the file", errno);
    }
    int status = MOSHI_OK;
    struct stat info;
    if (fstat(fd, &info) != 0) {
        status = fail_file(path, "examine the file", errno);
    } else if (!S_ISREG(info.st_mode)) {
        status = moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s: found %s, expected a regular file", path,
                            S_ISDIR(info.st_mode) ? "a folder" : "a special file");
    } else if (info.st_size <= 0) {
        status = moshi_fail(MOSHI_ERROR_CHECKPOINT, "%s: the file is empty", path);
    } else if ((uint64_t)info.st_size > SIZE_MAX / 2) {
        status = moshi_fail(MOSHI_ERROR_CHECKPOINT,
                            "%s: %lld bytes do not fit into the address space", path,
                            (long long)info.st_size);
    }
    if (status == MOSHI_OK) {
        size_t bytes = (size_t)info.st_size;
        void *data = copy ? map_anonymous(NULL, bytes, 0)
                          : mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (data == NULL || data == MAP_FAILED) {
            status = fail_file(path, copy ? "make room for the file" : "map the file", errno);
        } else {
            *file = (struct os_file){.data = data, .bytes = bytes, .mapped = !copy};
            /* Under a map it decides how much of the file comes at once where none is cached. */
            os_advise_huge(data, bytes);
            status = copy ? read_whole(fd, path, data, bytes) : MOSHI_OK;
        }
    }
    close(fd);
    if (status != MOSHI_OK) {
        os_file_close(file);
    }
    return status;
}

void os_file_close(struct os_file *file)
{
    if (file != NULL && file->data != NULL) {
        munmap((void *)(uintptr_t)file->data, file->bytes);
        *file = (struct os_file){0};
    }
}

int os_path_exists(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0;
}

int os_path_is_folder(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

int64_t os_path_bytes(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 ? (int64_t)info.st_size : -1;
}

void *os_reserve(size_t bytes)
{
    void *memory = map_anonymous(NULL, mapped_bytes(bytes), 0);
    if (memory != NULL) {
        ASAN_POISON_MEMORY_REGION((char *)memory + bytes, GUARD_BYTES);
    }
    return memory;
}

void os_release(void *memory, size_t bytes)
{
    if (memory != NULL) {
        ASAN_UNPOISON_MEMORY_REGION((char *)memory + bytes, GUARD_BYTES);
        munmap(memory, mapped_bytes(bytes));
    }
}

void os_advise_huge(void *memory, size_t bytes)
{
#ifdef MADV_HUGEPAGE
    (void)madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

void os_decommit(void *memory, size_t bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = ((uintptr_t)memory + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)memory + bytes) / page * page;
    if (end <= start) {
        return;
    }
#ifdef __linux__
    int done = madvise((void *)start, end - start, MADV_DONTNEED) == 0;
#else
    /* Elsewhere MADV_DONTNEED may keep the contents; a fresh map over them may not. */
    int done = map_anonymous((void *)start, end - start, MAP_FIXED) != NULL;
#endif
    if (!done) {
        /* Locked pages can't be given back, but must still read as zeros. */
        memset((void *)start, 0, end - start);
    }
}

void os_forget(const void *data, size_t bytes)
{
#ifdef __linux__
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = ((uintptr_t)data + page - 1) / page * page;
    uintptr_t end = ((uintptr_t)data + bytes) / page * page;

    if (end > start) (void)madvise((void *)start, end - start, MADV_DONTNEED);
#else
    (void)data, (void)bytes; /* there this may lose what was read */
#endif
}

double os_clock(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

int os_cpu_count(void)
{
#ifdef __linux__
    /* The call fails with EINVAL while the set is smaller than the kernel's. */
    for (int capacity = 1024; capacity <= 1 << 18; capacity *= 4) {
        cpu_set_t *set = CPU_ALLOC((size_t)capacity);
        if (set == NULL) {
            break;
        }
        size_t bytes = CPU_ALLOC_SIZE((size_t)capacity);
        int error = sched_getaffinity(0, bytes, set) == 0 ? 0 : errno;
        int count = error == 0 ? CPU_COUNT_S(bytes, set) : 0;
        CPU_FREE(set);
        if (count > 0) {
            return count;
        }
        if (error != EINVAL) {
            break;
        }
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 && online < INT_MAX ? (int)online : 1;
}

int64_t os_memory_total(void)
{
    long pages = sysconf(_SC_PHYS_PAGES);
    long page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? (int64_t)pages * page : 0;
}

int64_t os_memory_free(void)
{
    int64_t bytes = 0;
#ifdef __linux__
    FILE *file = fopen("/proc/meminfo", "re");
    char line[256];
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, "MemAvailable:", 13) == 0) {
            long long kib = strtoll(line + 13, NULL, 10);
            bytes = kib > 0 && kib < INT64_MAX / 1024 ? (int64_t)kib * 1024 : 0;
            break;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
#endif
    return bytes;
}

const char *os_environment(const char *name)
{
    const char *value = getenv(name);
    return value != NULL && value[0] != '\0' ? value : NULL;
}

void *os_library_open(const char *path, char *reason, size_t capacity)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *words = dlerror();
        snprintf(reason, capacity, "%s", words ? words : "unknown");
    }
    return library;
}

void *os_library_symbol(void *library, const char *name)
{
    return dlsym(library, name);
}

int os_own_folder(char *folder, size_t capacity)
{
    static const char here;
    Dl_info info;
    if (!dladdr(&here, &info) || !info.dli_fname) return 0;
    const char *slash = strrchr(info.dli_fname, '/');
    int length = slash ? (int)(slash - info.dli_fname) : 1;
    return snprintf(folder, capacity, "%.*s", length, slash ? info.dli_fname : ".") < (int)capacity;
}

int64_t os_process(void)
{
    return (int64_t)getpid();
}

int os_cpu_has(enum os_cpu_feature feature)
{
#if defined(__linux__) && defined(__aarch64__)
    /* HWCAP_ASIMDDP and HWCAP2_I8MM; not every system's headers have the names. */
    return feature == OS_CPU_DOTPROD ? (getauxval(AT_HWCAP) >> 20 & 1) != 0
           : feature == OS_CPU_I8MM  ? (getauxval(AT_HWCAP2) >> 13 & 1) != 0
                                     : 0;
#elif defined(__linux__) && defined(__x86_64__)
    /* ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA; not every system's headers have the names. */
    return feature == OS_CPU_TILES && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#elif defined(__APPLE__) && defined(__aarch64__)
    const char *name = feature == OS_CPU_DOTPROD ? "hw.optional.arm.FEAT_DotProd"
                                                 : "hw.optional.arm.FEAT_I8MM";
    int value = 0;
    size_t bytes = sizeof value;
    if (feature == OS_CPU_TILES) return 0;
    return sysctlbyname(name, &value, &bytes, NULL, 0) == 0 && value != 0;
#else
    (void)feature;
    return 0;
#endif
}

static void *thread_main(void *arg)
{
    struct os_thread *thread = arg;
    thread->body(thread->arg);
    return NULL;
}

int os_thread_start(struct os_thread **thread, void (*body)(void *), void *arg)
{
    *thread = NULL;
    struct os_thread *made = malloc(sizeof *made);
    if (made == NULL) {
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for a thread");
    }
    made->body = body;
    made->arg = arg;
    /* The host program's signals must reach its own threads (Python's Ctrl-C, for one). */
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&made->handle, NULL, thread_main, made);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) {
        char buffer[128];
        free(made);
        return moshi_fail(MOSHI_ERROR_DEVICE, "cannot start a thread: %s",
                          error_text(error, buffer, sizeof buffer));
    }
    *thread = made;
    return MOSHI_OK;
}

void os_thread_join(struct os_thread *thread)
{
    if (thread != NULL) {
        pthread_join(thread->handle, NULL);
        free(thread);
    }
}

static struct os_mutex *create_mutex(int is_queue)
{
    struct os_mutex *mutex = calloc(1, sizeof *mutex);
    if (mutex == NULL) return NULL;
    mutex->is_queue = is_queue;
    if (pthread_mutex_init(&mutex->handle, NULL) != 0) {
        free(mutex);
        return NULL;
    }
    if (pthread_cond_init(&mutex->turn, NULL) != 0) {
        pthread_mutex_destroy(&mutex->handle);
        free(mutex);
        return NULL;
    }
    return mutex;
}

struct os_mutex *os_mutex_create(void)
{
    return create_mutex(0);
}

struct os_mutex *os_mutex_create_queue(void)
{
    return create_mutex(1);
}

void os_mutex_destroy(struct os_mutex *mutex)
{
    if (mutex != NULL) {
        pthread_cond_destroy(&mutex->turn);
        pthread_mutex_destroy(&mutex->handle);
        free(mutex);
    }
}

void os_mutex_lock(struct os_mutex *mutex)
{
    pthread_mutex_lock(&mutex->handle);
    if (!mutex->is_queue) return;
    const uint64_t ticket = mutex->next++;
    while (mutex->served != ticket) pthread_cond_wait(&mutex->turn, &mutex->handle);
    pthread_mutex_unlock(&mutex->handle);
}

void os_mutex_unlock(struct os_mutex *mutex)
{
    if (mutex->is_queue) {
        pthread_mutex_lock(&mutex->handle);
        if (++mutex->served != mutex->next) pthread_cond_broadcast(&mutex->turn);
    }
    pthread_mutex_unlock(&mutex->handle);
}

struct os_condition *os_condition_create(void)
{
    struct os_condition *condition = malloc(sizeof *condition);
    if (condition != NULL && pthread_cond_init(&condition->handle, NULL) != 0) {
        free(condition);
        return NULL;
    }
    return condition;
}

void os_condition_destroy(struct os_condition *condition)
{
    if (condition != NULL) {
        pthread_cond_destroy(&condition->handle);
        free(condition);
    }
}

void os_condition_wait(struct os_condition *condition, struct os_mutex *mutex)
{
    pthread_cond_wait(&condition->handle, &mutex->handle);
}

void os_condition_wake_all(struct os_condition *condition)
{
    pthread_cond_broadcast(&condition->handle);
}

#ifdef __linux__

void os_wait_word(uint32_t *word, uint32_t value)
{
    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

void os_wake_word(uint32_t *word, int count)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

#else

/* The one exception to "no process-wide state": a futex has no memory of its own, and neither may
 * its replacement, since callers hand over nothing but the word. */
static pthread_mutex_t word_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t word_changed = PTHREAD_COND_INITIALIZER;

void os_wait_word(uint32_t *word, uint32_t value)
{
    pthread_mutex_lock(&word_mutex);
    if (__atomic_load_n(word, __ATOMIC_SEQ_CST) == value) {
        pthread_cond_wait(&word_changed, &word_mutex);
    }
    pthread_mutex_unlock(&word_mutex);
}

void os_wake_word(uint32_t *word, int count)
{
    (void)word, (void)count;
    pthread_mutex_lock(&word_mutex);
    pthread_cond_broadcast(&word_changed);
    pthread_mutex_unlock(&word_mutex);
}

#endif

/* A pipe whose reading end is watched; on Linux both ends are one eventfd. */
struct os_event {
    int reading, writing;
};

int os_event_create(struct os_event **event)
{
    *event = NULL;
    struct os_event *made = malloc(sizeof *made);
    if (made == NULL) {
        return moshi_fail(MOSHI_ERROR_MEMORY, "no memory for an event");
    }
#ifdef __linux__
    made->reading = made->writing = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int failed = made->reading < 0;
#else
    int ends[2];
    int failed = pipe(ends) != 0;
    for (int i = 0; i < 2 && !failed; i++) {
        (void)fcntl(ends[i], F_SETFD, FD_CLOEXEC);
        (void)fcntl(ends[i], F_SETFL, O_NONBLOCK);
    }
    made->reading = ends[0];
    made->writing = ends[1];
#endif
    if (failed) {
        char buffer[128];
        int error = errno;
        free(made);
        return moshi_fail(MOSHI_ERROR_DEVICE, "no descriptor for an event loop: %s",
                          error_text(error, buffer, sizeof buffer));
    }
    *event = made;
    return MOSHI_OK;
}

void os_event_destroy(struct os_event *event)
{
    if (event == NULL) {
        return;
    }
    close(event->reading);
    if (event->writing != event->reading) {
        close(event->writing);
    }
    free(event);
}

int os_event_descriptor(const struct os_event *event)
{
    return event->reading;
}

void os_event_set(struct os_event *event)
{
    uint64_t one = 1; /* a full pipe is readable already */
    ssize_t written = write(event->writing, &one, sizeof one);
    (void)written;
}

void os_event_clear(struct os_event *event)
{
    uint64_t count;
    while (read(event->reading, &count, sizeof count) > 0) {}
}
