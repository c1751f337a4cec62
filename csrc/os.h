/* os.h: every operating-system call the core makes stands here: files, memory maps, threads,
 * clock, environment. All sizes are bytes. */
#ifndef MOSHI_OS_H
#define MOSHI_OS_H

#include <stddef.h>
#include <stdint.h>

/* A read-only view of a whole file: mapped, or a private copy. */
struct os_file {
    const uint8_t *data;
    size_t bytes;
    int mapped;
};

/* copy != 0 reads the file into memory (safe when others may change it). Fails with
 * MOSHI_ERROR_CHECKPOINT for a missing, unreadable, empty or non-regular file. */
int os_file_open(const char *path, int copy, struct os_file *file);
void os_file_close(struct os_file *file);
int os_path_exists(const char *path);
int os_path_is_folder(const char *path);
int64_t os_path_bytes(const char *path); /* -1 when there is no such file */

/* Zeroed memory, aligned to a page, committed by the system when first touched; NULL on failure. */
void *os_reserve(size_t bytes);
void os_release(void *memory, size_t bytes);
/* Asks for large pages under memory that was just reserved; a wish. */
void os_advise_huge(void *memory, size_t bytes);
/* Gives the pages back; they read as zeros afterwards. Both ends are rounded inward to pages. */
void os_decommit(void *memory, size_t bytes);
/* Of a mapped file: what lies here is not needed for now, and is read from the file again if it is. */
void os_forget(const void *data, size_t bytes);

/* Monotonic seconds. */
double os_clock(void);
int os_cpu_count(void); /* that this process may run on, at least 1 */
int64_t os_memory_total(void); /* physical, 0 if unknown */
int64_t os_memory_free(void); /* available, 0 if unknown */
const char *os_environment(const char *name); /* NULL if unset or empty */
int64_t os_process(void); /* this process's number */

/* A library that is loaded by its path; NULL on failure, with the system's words in `reason`. It stays
 * until the process ends. */
void *os_library_open(const char *path, char *reason, size_t capacity);
void *os_library_symbol(void *library, const char *name); /* NULL: there is none */
/* The folder of the file that this code was loaded from; 0 if it does not fit or is unknown. */
int os_own_folder(char *folder, size_t capacity);

enum os_cpu_feature { OS_CPU_DOTPROD, OS_CPU_I8MM, OS_CPU_TILES };

/* Instructions of ARM, which the system has to be asked about, and the tile registers of x86, which it
 * has to allow this process to use; 0 on other processors. */
int os_cpu_has(enum os_cpu_feature feature);

struct os_thread;
struct os_mutex;
struct os_condition;

int os_thread_start(struct os_thread **thread, void (*body)(void *), void *arg);
void os_thread_join(struct os_thread *thread); /* frees it; NULL is fine */
struct os_mutex *os_mutex_create(void); /* NULL on failure */
/* Whoever comes first is served first: a thread that takes it again and again keeps nobody waiting
 * for more than one turn. Not for conditions. */
struct os_mutex *os_mutex_create_queue(void);
void os_mutex_destroy(struct os_mutex *mutex);
void os_mutex_lock(struct os_mutex *mutex);
void os_mutex_unlock(struct os_mutex *mutex);
struct os_condition *os_condition_create(void);
void os_condition_destroy(struct os_condition *condition);
void os_condition_wait(struct os_condition *condition, struct os_mutex *mutex);
void os_condition_wake_all(struct os_condition *condition);
/* Blocks while *word == value, or until woken; may return early. Any thread wakes up to `count`, or
 * more. */
void os_wait_word(uint32_t *word, uint32_t value);
void os_wake_word(uint32_t *word, int count);

/* A flag that an event loop can watch: its descriptor is readable from set until clear. */
struct os_event;

int os_event_create(struct os_event **event);
void os_event_destroy(struct os_event *event);
int os_event_descriptor(const struct os_event *event);
void os_event_set(struct os_event *event);
void os_event_clear(struct os_event *event);

#endif
