/* test_base.c: status, os, json, safetensors and config, with hand-made bytes.
 *
 * Build: gcc -std=gnu11 -O1 -g -fsanitize=address,undefined -Icsrc tests/c/test_base.c \
 *        csrc/status.c csrc/os.c csrc/json.c csrc/safetensors.c csrc/config.c -lm -lpthread
 * A name states a promise. Files go to a folder below TMPDIR, which is removed at the end. */
#include <limits.h>
#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "config.h"
#include "json.h"
#include "os.h"
#include "safetensors.h"
#include "status.h"

/* ---- scheme ------------------------------------------------------------------------------ */

static char folder[512], problem[2048];

static void report(int line, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void report(int line, const char *format, ...)
{
    va_list args;
    if (problem[0] != '\0') {
        return;
    }
    int n = snprintf(problem, sizeof problem, "line %d: ", line);
    va_start(args, format);
    (void)vsnprintf(problem + n, sizeof problem - (size_t)n, format, args);
    va_end(args);
}

/* The first problem of a test ends it. */
#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            report(__LINE__, "expected %s", #condition);                                           \
            return;                                                                                \
        }                                                                                          \
    } while (0)
#define CHECK_OK(call)                                                                             \
    do {                                                                                           \
        int status_ = (call);                                                                      \
        if (status_ != MOSHI_OK) {                                                                 \
            report(__LINE__, "%s gave %d: %s", #call, status_, moshi_error_detail());              \
            return;                                                                                \
        }                                                                                          \
    } while (0)
#define CHECK_FAILS(call, status, piece)                                                           \
    do {                                                                                           \
        int status_ = (call);                                                                      \
        if (status_ != (status) || strstr(moshi_error_detail(), (piece)) == NULL) {                \
            report(__LINE__, "%s gave %d '%s', expected %s with '%s'", #call, status_,             \
                   moshi_error_detail(), #status, (piece));                                        \
            return;                                                                                \
        }                                                                                          \
    } while (0)
#define CHECK_TEXT(found, wanted)                                                                  \
    do {                                                                                           \
        const char *found_ = (found);                                                              \
        if (found_ == NULL || strcmp(found_, (wanted)) != 0) {                                     \
            report(__LINE__, "%s is '%s', expected '%s'", #found, found_ ? found_ : "NULL",        \
                   (wanted));                                                                      \
            return;                                                                                \
        }                                                                                          \
    } while (0)

static const char *in_folder(const char *name)
{
    static char path[1024];
    (void)snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void write_file(const char *name, const void *bytes, size_t count)
{
    FILE *file = fopen(in_folder(name), "wb");
    if (file == NULL || fwrite(bytes, 1, count, file) != count || fclose(file) != 0) {
        report(__LINE__, "cannot write %s", name);
    }
}

/* A sentence is there, valid UTF-8, one line, and ends in no half character. */
static int is_sentence(void)
{
    const char *text = moshi_error_detail();
    size_t bytes = strlen(text), at = 0;
    while (at < bytes) {
        size_t n = moshi_utf8_bytes(text + at, bytes - at);
        if (n == 0 || (unsigned char)text[at] < 0x20) {
            return 0;
        }
        at += n;
    }
    return bytes > 0 && bytes < 512;
}

static volatile uint8_t read_back; /* keeps reads of data alive */
static uint64_t random_state = 1;

static uint32_t next_random(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33);
}

/* ---- status ------------------------------------------------------------------------------ */

static void a_failure_returns_its_status_and_keeps_its_sentence(void)
{
    CHECK(moshi_fail(MOSHI_ERROR_DEVICE, "card %d is %s", 3, "gone") == MOSHI_ERROR_DEVICE);
    CHECK_TEXT(moshi_error_detail(), "card 3 is gone");
    CHECK(moshi_fail_prefix(MOSHI_ERROR_AUDIO, "slot %d", 1) == MOSHI_ERROR_AUDIO);
    CHECK_TEXT(moshi_error_detail(), "slot 1: card 3 is gone");
    CHECK(moshi_fail(MOSHI_ERROR_MEMORY, "again: %s", moshi_error_detail()) == MOSHI_ERROR_MEMORY);
    CHECK_TEXT(moshi_error_detail(), "again: slot 1: card 3 is gone");
}

static void a_sentence_is_one_line_of_utf8(void)
{
    moshi_fail(MOSHI_ERROR_CHECKPOINT, "a\nb\x7f"
                                       "c\xFF\xC3\xA9\xC3(\xED\xA0\x80");
    CHECK_TEXT(moshi_error_detail(), "a?b?c?\xC3\xA9?(???");
    for (int length = 0; length < 1200; length++) {
        char text[4096];
        int bytes = 0;
        for (int i = 0; i < length; i++) {
            bytes += snprintf(text + bytes, sizeof text - (size_t)bytes, "%s",
                              i % 3 == 0   ? "\xE2\x82\xAC"
                              : i % 3 == 1 ? "x"
                                           : "\xC3\xA9");
        }
        text[bytes] = '\0';
        for (int shift = 0; shift < 6; shift++) { /* both cuts meet every byte of the pattern */
            moshi_fail(MOSHI_ERROR_CHECKPOINT, "%.*s%s!", shift, "shifts", text);
            CHECK(is_sentence() && strchr(moshi_error_detail(), '?') == NULL);
        }
    }
}

static void a_long_sentence_keeps_both_ends(void)
{
    char path[3000];
    memset(path, 'p', sizeof path - 1);
    path[sizeof path - 1] = '\0';
    moshi_fail(MOSHI_ERROR_CHECKPOINT, "start %s, expected end", path);
    CHECK(strlen(moshi_error_detail()) == 511);
    CHECK(strncmp(moshi_error_detail(), "start pp", 8) == 0);
    CHECK_TEXT(strstr(moshi_error_detail(), ", expected"), ", expected end");
    CHECK(strstr(moshi_error_detail(), "p...p") != NULL);
    moshi_fail_prefix(MOSHI_ERROR_CHECKPOINT, "%s%s%s", path, path, path);
    CHECK(strlen(moshi_error_detail()) == 511);
    CHECK_TEXT(strstr(moshi_error_detail(), ", expected"), ", expected end");
}

static void fail_elsewhere(void *arg)
{
    char *seen = arg;
    (void)snprintf(seen, 64, "%s", moshi_error_detail());
    moshi_fail(MOSHI_ERROR_DEVICE, "other");
}

static void a_sentence_belongs_to_its_thread(void)
{
    struct os_thread *thread;
    char seen[64] = "untouched";
    moshi_fail(MOSHI_ERROR_DEVICE, "mine");
    CHECK_OK(os_thread_start(&thread, fail_elsewhere, seen));
    os_thread_join(thread);
    CHECK_TEXT(seen, "");
    CHECK_TEXT(moshi_error_detail(), "mine");
}

static void formats_have_names_both_ways(void)
{
    enum moshi_dtype dtype, all[] = {MOSHI_AUTO, MOSHI_F32,  MOSHI_F16, MOSHI_BF16,
                                     MOSHI_FP8,  MOSHI_INT8, MOSHI_Q8,  MOSHI_Q4};
    for (int i = 0; i < 8; i++) {
        CHECK_OK(moshi_dtype_parse(moshi_dtype_name(all[i]), &dtype));
        CHECK(dtype == all[i]);
    }
    CHECK_TEXT(moshi_dtype_name(MOSHI_BF16), "bf16");
    CHECK_TEXT(moshi_dtype_name(MOSHI_AUTO), "auto");
    CHECK_TEXT(moshi_dtype_name((enum moshi_dtype)77), "unknown");
    CHECK_FAILS(moshi_dtype_parse("f64", &dtype), MOSHI_ERROR_ARGUMENT, "'f64'");
    CHECK_FAILS(moshi_dtype_parse(NULL, &dtype), MOSHI_ERROR_ARGUMENT, "expected");
    CHECK(moshi_version()[0] != '\0');
}

static void utf8_lengths_are_strict(void)
{
    static const struct {
        const char *text;
        size_t bytes, length;
    } cases[] = {{"", 0, 0},
                 {"a", 1, 1},
                 {"\xC3\xA9", 2, 2},
                 {"\xC3", 1, 0},
                 {"\xC0\x80", 2, 0},
                 {"\xC1\xBF", 2, 0},
                 {"\x80", 1, 0},
                 {"\xE2\x82\xAC", 3, 3},
                 {"\xE0\x9F\xBF", 3, 0},
                 {"\xED\x9F\xBF", 3, 3},
                 {"\xED\xA0\x80", 3, 0},
                 {"\xEE\x80\x80", 3, 3},
                 {"\xF0\x9F\x98\x80", 4, 4},
                 {"\xF0\x8F\xBF\xBF", 4, 0},
                 {"\xF4\x8F\xBF\xBF", 4, 4},
                 {"\xF4\x90\x80\x80", 4, 0},
                 {"\xF0\x9F\x98", 3, 0},
                 {"\xF8\x88\x80\x80\x80", 5, 0},
                 {"\xC3(", 2, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (moshi_utf8_bytes(cases[i].text, cases[i].bytes) != cases[i].length) {
            report(__LINE__, "case %zu", i);
        }
    }
}

/* ---- os ---------------------------------------------------------------------------------- */

static void a_mapped_file_equals_a_copied_one(void)
{
    uint8_t bytes[10000];
    for (size_t i = 0; i < sizeof bytes; i++) {
        bytes[i] = (uint8_t)next_random();
    }
    write_file("file", bytes, sizeof bytes);
    struct os_file map, copy;
    CHECK_OK(os_file_open(in_folder("file"), 0, &map));
    CHECK_OK(os_file_open(in_folder("file"), 1, &copy));
    CHECK(map.mapped && !copy.mapped);
    CHECK(map.bytes == sizeof bytes && copy.bytes == sizeof bytes);
    CHECK(memcmp(map.data, bytes, sizeof bytes) == 0);
    CHECK(memcmp(copy.data, bytes, sizeof bytes) == 0);
    os_file_close(&map);
    os_file_close(&copy);
    os_file_close(&copy);
    os_file_close(NULL);
    CHECK(copy.data == NULL);
}

static void what_is_no_file_gives_a_sentence(void)
{
    struct os_file file;
    CHECK_FAILS(os_file_open(in_folder("none"), 0, &file), MOSHI_ERROR_CHECKPOINT, "none: cannot");
    CHECK_FAILS(os_file_open("", 0, &file), MOSHI_ERROR_CHECKPOINT, "cannot open");
    CHECK_FAILS(os_file_open(folder, 0, &file), MOSHI_ERROR_CHECKPOINT, "a folder");
    write_file("empty", "", 0);
    CHECK_FAILS(os_file_open(in_folder("empty"), 1, &file), MOSHI_ERROR_CHECKPOINT, "is empty");
    CHECK(mkfifo(in_folder("pipe"), 0600) == 0);
    CHECK_FAILS(os_file_open(in_folder("pipe"), 0, &file), MOSHI_ERROR_CHECKPOINT, "regular");
    CHECK(file.data == NULL);
    CHECK(os_path_exists(folder) && os_path_is_folder(folder));
    CHECK(os_path_exists(in_folder("empty")) && !os_path_is_folder(in_folder("empty")));
    CHECK(!os_path_exists(in_folder("none")) && !os_path_is_folder(in_folder("none")));
}

static void given_back_pages_read_as_zeros(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = 8 * page;
    uint8_t *memory = os_reserve(bytes);
    CHECK(memory != NULL && (uintptr_t)memory % page == 0);
    for (size_t i = 0; i < bytes; i++) {
        CHECK(memory[i] == 0);
    }
    memset(memory, 7, bytes);
    os_decommit(memory + 1, 3 * page);
    CHECK(memory[0] == 7 && memory[page - 1] == 7);
    CHECK(memory[page] == 0 && memory[3 * page - 1] == 0);
    CHECK(memory[3 * page] == 7);
    os_decommit(memory + 1, page / 2);
    CHECK(memory[1] == 7);
    os_decommit(memory, bytes);
    CHECK(memory[0] == 0 && memory[bytes - 1] == 0);
    os_release(memory, bytes);
    os_release(NULL, 5);
    CHECK(os_reserve(SIZE_MAX / 2) == NULL);
    void *nothing = os_reserve(0);
    CHECK(nothing != NULL);
    os_release(nothing, 0);
}

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>

static void the_sanitizer_knows_where_reserved_memory_ends(void)
{
    for (size_t bytes = 4090; bytes < 4103; bytes++) {
        uint8_t *memory = os_reserve(bytes);
        CHECK(memory != NULL && __asan_region_is_poisoned(memory, bytes) == NULL);
        CHECK(__asan_address_is_poisoned(memory + bytes));
        os_release(memory, bytes);
        CHECK(!__asan_address_is_poisoned(memory + bytes));
    }
}
#endif

static void the_machine_answers(void)
{
    CHECK(os_cpu_count() >= 1);
    CHECK(os_memory_total() >= 0 && os_memory_free() >= 0);
    CHECK(os_memory_free() <= os_memory_total());
    double before = os_clock();
    CHECK(os_clock() >= before);
    setenv("MOSHI_TEST_EMPTY", "", 1);
    setenv("MOSHI_TEST_SET", "x", 1);
    unsetenv("MOSHI_TEST_NONE");
    CHECK(os_environment("MOSHI_TEST_EMPTY") == NULL);
    CHECK(os_environment("MOSHI_TEST_NONE") == NULL);
    CHECK_TEXT(os_environment("MOSHI_TEST_SET"), "x");
}

struct shared {
    struct os_mutex *mutex;
    struct os_condition *condition;
    uint32_t go;
    int arrived, total;
};

static void arrive(void *arg)
{
    struct shared *shared = arg;
    os_mutex_lock(shared->mutex);
    shared->arrived++;
    os_condition_wake_all(shared->condition);
    os_mutex_unlock(shared->mutex);
    while (__atomic_load_n(&shared->go, __ATOMIC_ACQUIRE) == 0) {
        os_wait_word(&shared->go, 0);
    }
    for (int i = 0; i < 1000; i++) {
        os_mutex_lock(shared->mutex);
        shared->total++;
        os_mutex_unlock(shared->mutex);
    }
}

static void one_wake_reaches_every_waiting_thread(void)
{
    struct shared shared = {.mutex = os_mutex_create(), .condition = os_condition_create()};
    struct os_thread *threads[4];
    CHECK(shared.mutex != NULL && shared.condition != NULL);
    for (int i = 0; i < 4; i++) {
        CHECK_OK(os_thread_start(&threads[i], arrive, &shared));
    }
    os_mutex_lock(shared.mutex);
    while (shared.arrived < 4) {
        os_condition_wait(shared.condition, shared.mutex);
    }
    os_mutex_unlock(shared.mutex);
    os_wait_word(&shared.go, 1);
    __atomic_store_n(&shared.go, 1, __ATOMIC_RELEASE);
    os_wake_word(&shared.go, 16);
    for (int i = 0; i < 4; i++) {
        os_thread_join(threads[i]);
    }
    CHECK(shared.total == 4000);
    os_condition_destroy(shared.condition);
    os_mutex_destroy(shared.mutex);
    os_condition_destroy(NULL);
    os_mutex_destroy(NULL);
    os_thread_join(NULL);
}

/* ---- json -------------------------------------------------------------------------------- */

/* The text in a block of exactly its size, so that a read beyond it is seen by the sanitizer. */
static int parse_exactly(const char *text, size_t bytes, struct json_document **document)
{
    char *copy = malloc(bytes > 0 ? bytes : 1);
    memcpy(copy, text, bytes);
    int status = json_parse(copy, bytes, "here", document);
    free(copy);
    return status;
}

static int parse_text(const char *text, struct json_document **document)
{
    return parse_exactly(text, strlen(text), document);
}

static const char json_example[] =
    " {\"a\": [1, -2.5e1, true, false, null, []],\n\t\"\": {}, \"\\u00e9\\uD83D\\uDE00\": "
    "\"q\\\"\\\\\\/\\b\\f\\n\\r\\t\\u20aC\xC3\xA9\"}\r\n";

static void json_values_are_read(void)
{
    struct json_document *document;
    CHECK_OK(parse_text(json_example, &document));
    const struct json *root = json_root(document);
    CHECK(root->type == JSON_OBJECT && root->count == 3 && root->key == NULL);
    const struct json *a = json_get(root, "a");
    CHECK(a != NULL && a->type == JSON_ARRAY && a->count == 6);
    const struct json *item = a->first;
    CHECK(item->type == JSON_NUMBER && item->number == 1 && item->key == NULL);
    CHECK((item = item->next)->number == -25);
    CHECK((item = item->next)->type == JSON_BOOL && item->boolean);
    CHECK((item = item->next)->type == JSON_BOOL && !item->boolean);
    CHECK((item = item->next)->type == JSON_NULL);
    CHECK((item = item->next)->type == JSON_ARRAY && item->count == 0 && item->first == NULL);
    CHECK(item->next == NULL);
    CHECK(json_get(root, "")->type == JSON_OBJECT);
    CHECK_TEXT(json_get(root, "\xC3\xA9\xF0\x9F\x98\x80")->string,
               "q\"\\/\b\f\n\r\t\xE2\x82\xAC\xC3\xA9");
    CHECK(json_get(root, "b") == NULL && json_get(a, "a") == NULL && json_get(NULL, "a") == NULL);
    json_free(document);
    json_free(NULL);
    static const char *const roots[] = {"1", "\"\"", "null", "true", "[]", "{}"};
    for (int i = 0; i < 6; i++) {
        CHECK_OK(parse_text(roots[i], &document));
        json_free(document);
    }
}

static void broken_json_is_refused_with_its_place(void)
{
    static const struct {
        const char *text, *piece;
    } cases[] = {
        {"", "here: JSON line 1, column 1: the text ends"},
        {"  \n ", "line 2, column 2"},
        {"{", "expected a key"},
        {"[1,]", "column 4: expected a value"},
        {"{\"a\":1,}", "expected a key"},
        {"{a:1}", "expected a key"},
        {"{\"a\" 1}", "expected ':' behind the key 'a'"},
        {"{\"a\":}", "expected a value"},
        {"[1 2]", "expected ',' or ']'"},
        {"{\"a\":1 \"b\":2}", "expected ',' or '}'"},
        {"[1", "expected ',' or ']'"},
        {"[1}", "expected ',' or ']'"},
        {"1 2", "expected nothing behind"},
        {"{}x", "expected nothing behind"},
        {"tru", "expected a value"},
        {"nul", "expected a value"},
        {"True", "expected a value"},
        {"NaN", "expected a value"},
        {"Infinity", "expected a value"},
        {"-Infinity", "needs a digit"},
        {"'a'", "expected a value"},
        {"01", "may not start with 0"},
        {"-01", "may not start with 0"},
        {"+1", "expected a value"},
        {".5", "expected a value"},
        {"-", "needs a digit"},
        {"1.", "decimal point needs"},
        {"1.e5", "decimal point needs"},
        {"1e", "exponent needs"},
        {"1e+", "exponent needs"},
        {"1e999", "too large"},
        {"-1e309", "too large"},
        {"1e99999999999999999999", "too large"},
        {"0x10", "expected nothing behind"},
        {"\"abc", "never ends"},
        {"\"a\\", "unknown escape"},
        {"\"\\x\"", "unknown escape"},
        {"\"\\u12", "four hexadecimal"},
        {"\"\\u12g4\"", "four hexadecimal"},
        {"\"\\u0000\"", "\\u0000"},
        {"\"\\ud800\"", "surrogate"},
        {"\"\\ud800\\u0041\"", "surrogate"},
        {"\"\\udc00\\ud800\"", "surrogate"},
        {"\"\\ud800\\", "surrogate"},
        {"\"a\nb\"", "control character"},
        {"\"\x01\"", "control character"},
        {"\"\xFF\"", "UTF-8"},
        {"\"\xC3\"", "UTF-8"},
        {"\"\xED\xA0\x80\"", "UTF-8"},
        {"\xEF\xBB\xBF{}", "expected a value"},
        {"{\"a\":1,\"b\":2,\"a\":3}", "twice the key 'a'"},
        {"{\"a\":1,\"\\u0061\":3}", "twice the key 'a'"},
        {"[{\"\":1,\"\":3}]", "twice the key"},
        {"// no", "expected a value"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct json_document *document;
        CHECK_FAILS(parse_text(cases[i].text, &document), MOSHI_ERROR_CHECKPOINT, cases[i].piece);
        CHECK(document == NULL && is_sentence());
    }
    struct json_document *document;
    CHECK_FAILS(json_parse(NULL, 0, "none", &document), MOSHI_ERROR_CHECKPOINT, "none");
    CHECK_FAILS(parse_exactly("\"a\0b\"", 5, &document), MOSHI_ERROR_CHECKPOINT, "control");
    CHECK_FAILS(parse_exactly("[1]\0", 4, &document), MOSHI_ERROR_CHECKPOINT, "nothing behind");
}

static void every_prefix_of_json_is_refused(void)
{
    for (size_t bytes = 0; bytes + 2 < sizeof json_example - 1; bytes++) {
        struct json_document *document;
        CHECK_FAILS(parse_exactly(json_example, bytes, &document), MOSHI_ERROR_CHECKPOINT, "here");
    }
}

static void random_json_gives_a_tree_or_a_sentence(void)
{
    static const char bytes[] = "{}[]\",:\\u0d8aeE+-.19 tfnrusl\n\xC3\xA9";
    for (int i = 0; i < 20000; i++) {
        char text[96];
        size_t count;
        if (i % 2 == 0) {
            count = next_random() % sizeof text;
            for (size_t j = 0; j < count; j++) {
                text[j] = bytes[next_random() % (sizeof bytes - 1)];
            }
        } else {
            count = sizeof json_example - 1 < sizeof text ? sizeof json_example - 1 : sizeof text;
            memcpy(text, json_example + (sizeof json_example - 1 - count), count);
            text[next_random() % count] = bytes[next_random() % (sizeof bytes - 1)];
        }
        struct json_document *document;
        moshi_fail(MOSHI_OK, "%s", "");
        int status = parse_exactly(text, count, &document);
        CHECK(status == MOSHI_OK ? document != NULL : document == NULL && is_sentence());
        json_free(document);
    }
}

static void numbers_are_exact(void)
{
    static const struct {
        const char *text;
        double value;
    } cases[] = {{"0", 0},
                 {"-0", -0.0},
                 {"0.0", 0},
                 {"0e99999", 0},
                 {"4.125", 4.125},
                 {"0.01", 0.01},
                 {"1e-5", 1e-5},
                 {"1E+2", 100},
                 {"12.5e-1", 1.25},
                 {"100e-2", 1},
                 {"0.000000000000000000000000000000000000000000000001", 1e-48},
                 {"3.14159265358979323846264338327950288419716939937510", 3.14159265358979323846},
                 {"123456789012345678901234567890123456789012345678901234567890",
                  123456789012345678901234567890123456789012345678901234567890.0},
                 {"123456789012345678901234567890123456789012345.5e-40",
                  123456789012345678901234567890123456789012345.5e-40},
                 {"1.7976931348623157e308", 1.7976931348623157e308},
                 {"5e-324", 5e-324},
                 {"1e-400", 0},
                 {"1e-99999999999999999999", 0},
                 {"9007199254740993", 9007199254740992.0},
                 {"0.1", 0.1}};
    static const char *const locales[] = {"C", "de_DE.UTF-8", "fr_FR.UTF-8"};
    for (int l = 0; l < 3; l++) {
        setlocale(LC_NUMERIC, locales[l]);
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
            struct json_document *document;
            CHECK_OK(parse_text(cases[i].text, &document));
            double found = json_root(document)->number;
            if (found != cases[i].value || signbit(found) != signbit(cases[i].value)) {
                report(__LINE__, "%s is %.17g", cases[i].text, found);
            }
            json_free(document);
        }
        setlocale(LC_NUMERIC, "C");
    }
}

static void integers_are_whole_and_below_2_to_53(void)
{
    static const struct {
        const char *text;
        int ok;
        int64_t value;
    } cases[] = {{"5", 1, 5},
                 {"-5", 1, -5},
                 {"5.0", 1, 5},
                 {"5e3", 1, 5000},
                 {"9007199254740992", 1, 9007199254740992},
                 {"-9007199254740992", 1, -9007199254740992},
                 {"9007199254740994", 0, 0},
                 {"1e300", 0, 0},
                 {"5.5", 0, 0},
                 {"\"5\"", 0, 0},
                 {"true", 0, 0},
                 {"null", 0, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct json_document *document;
        int64_t value = 0;
        CHECK_OK(parse_text(cases[i].text, &document));
        CHECK(json_integer(json_root(document), &value) == cases[i].ok);
        CHECK(value == cases[i].value);
        json_free(document);
    }
    int64_t value;
    CHECK(!json_integer(NULL, &value));
}

static void deep_nesting_is_refused_and_64_levels_are_not(void)
{
    static const int depths[] = {JSON_MAX_DEPTH, JSON_MAX_DEPTH + 1, 100000};
    for (int i = 0; i < 3; i++) {
        for (int objects = 0; objects < 2; objects++) {
            const char *open = objects ? "{\"a\":" : "[";
            size_t n = strlen(open), depth = (size_t)depths[i];
            char *text = malloc(depth * (n + 1) + 1);
            for (size_t j = 0; j < depth; j++) {
                memcpy(text + j * n, open, n);
            }
            text[depth * n] = '1';
            memset(text + depth * n + 1, objects ? '}' : ']', depth);
            struct json_document *document;
            int status = json_parse(text, depth * (n + 1) + 1, "deep", &document);
            free(text);
            CHECK((status == MOSHI_OK) == (i == 0));
            CHECK(i == 0 || strstr(moshi_error_detail(), "nested too deeply") != NULL);
            json_free(document);
        }
    }
}

static void more_values_than_any_model_has_are_refused(void)
{
    size_t bytes = 10000001;
    char *text = malloc(bytes);
    for (size_t i = 0; i < bytes; i++) {
        text[i] = i % 2 ? '1' : ',';
    }
    text[0] = '[';
    text[bytes - 1] = ']';
    struct json_document *document;
    int status = json_parse(text, bytes, "many", &document);
    free(text);
    CHECK(status == MOSHI_ERROR_CHECKPOINT && document == NULL);
    CHECK(strstr(moshi_error_detail(), "5000001 values, expected at most 4194304") != NULL);
}

/* 300,000 keys: 45 thousand million comparisons if each were compared with all. */
static void a_key_twice_is_found_quickly_among_many(void)
{
    enum { COUNT = 300000 };
    char *text = malloc(COUNT * 16 + 64);
    for (int twice = 0; twice < 2; twice++) {
        size_t at = 0;
        text[at++] = '{';
        for (int i = 0; i < COUNT; i++) {
            at += (size_t)sprintf(text + at, "\"k%07d\":1,", (int)((int64_t)i * 7919 % COUNT));
        }
        at += (size_t)sprintf(text + at, "\"k%s\":1}", twice ? "0000017" : "last");
        struct json_document *document;
        double start = os_clock();
        int status = json_parse(text, at, "many", &document);
        CHECK((status == MOSHI_OK) == !twice);
        CHECK(!twice || strstr(moshi_error_detail(), "twice the key 'k0000017'") != NULL);
        CHECK(os_clock() - start < 20);
        json_free(document);
    }
    free(text);
}

/* ---- safetensors ------------------------------------------------------------------------- */

/* A file with this header, then `data` bytes counting up. Returns the whole size. */
static size_t make_tensors(uint8_t *out, const char *header, size_t data)
{
    size_t bytes = strlen(header);
    for (size_t i = 0; i < 8; i++) {
        out[i] = (uint8_t)((uint64_t)bytes >> 8 * i);
    }
    memcpy(out + 8, header, bytes);
    for (size_t i = 0; i < data; i++) {
        out[8 + bytes + i] = (uint8_t)i;
    }
    return 8 + bytes + data;
}

static void write_tensors(const char *name, const char *header, size_t data)
{
    uint8_t *bytes = malloc(strlen(header) + data + 8);
    write_file(name, bytes, make_tensors(bytes, header, data));
    free(bytes);
}

/* Stored out of order, one empty, one scalar, one not aligned to its element. */
static const char good_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},"
    "\"w\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[3,27]},"
    "\"b.\xC3\xA9\":{\"dtype\":\"BF16\",\"shape\":[1,1],\"data_offsets\":[27,29]},"
    "\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},"
    "\"empty\":{\"dtype\":\"F16\",\"shape\":[0,5],\"data_offsets\":[27,27]},"
    "\"scalar\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[29,37]}}   ";

static void tensors_are_read_in_the_order_of_their_names(void)
{
    static const char *const names[] = {"a", "b.\xC3\xA9", "empty", "scalar", "w"};
    write_tensors("good.safetensors", good_header, 37);
    for (int copy = 0; copy < 2; copy++) {
        struct tensor_file *file;
        CHECK_OK(tensor_file_open(in_folder("good.safetensors"), copy, &file));
        CHECK(tensor_file_count(file) == 5);
        CHECK_TEXT(tensor_file_path(file), in_folder("good.safetensors"));
        CHECK(tensor_file_mapped_bytes(file) ==
              (copy ? 0 : (int64_t)(8 + sizeof good_header - 1 + 37)));
        for (int i = 0; i < 5; i++) {
            CHECK_TEXT(tensor_file_at(file, i)->name, names[i]);
            CHECK(tensor_file_find(file, names[i]) == tensor_file_at(file, i));
            CHECK(!tensor_file_at(file, i)->used);
        }
        CHECK(tensor_file_at(file, 5) == NULL && tensor_file_at(file, -1) == NULL);
        CHECK(tensor_file_find(file, "__metadata__") == NULL);
        CHECK(tensor_file_find(file, "") == NULL && tensor_file_find(file, "zz") == NULL);
        const struct tensor *w = tensor_file_find(file, "w");
        CHECK(w->dtype == TENSOR_F32 && w->n_dims == 2 && w->dims[0] == 2 && w->dims[1] == 3);
        CHECK(w->elements == 6 && w->bytes == 24 && *(const uint8_t *)w->data == 3);
        const struct tensor *scalar = tensor_file_find(file, "scalar");
        CHECK(scalar->n_dims == 0 && scalar->elements == 1 && scalar->bytes == 8);
        CHECK(((const uint8_t *)scalar->data)[7] == 36);
        const struct tensor *empty = tensor_file_find(file, "empty");
        CHECK(empty->elements == 0 && empty->bytes == 0 && empty->dims[1] == 5);
        tensor_file_close(file);
    }
    tensor_file_close(NULL);
}

static void every_dtype_has_its_name_and_size(void)
{
    static const size_t sizes[] = {8, 4, 2, 2, 1, 1, 8, 4, 2, 1, 8, 4, 2, 1, 1};
    for (int i = 0; i < 15; i++) {
        char header[256];
        enum tensor_dtype dtype = (enum tensor_dtype)i;
        CHECK(tensor_dtype_bytes(dtype) == sizes[i]);
        (void)snprintf(header, sizeof header,
                       "{\"t\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[0,%zu]}}",
                       tensor_dtype_name(dtype), 3 * sizes[i]);
        write_tensors("dtype.safetensors", header, 3 * sizes[i]);
        struct tensor_file *file;
        CHECK_OK(tensor_file_open(in_folder("dtype.safetensors"), 0, &file));
        CHECK(tensor_file_at(file, 0)->dtype == dtype && tensor_file_at(file, 0)->elements == 3);
        tensor_file_close(file);
    }
    CHECK_TEXT(tensor_dtype_name((enum tensor_dtype)99), "unknown");
    CHECK(tensor_dtype_bytes((enum tensor_dtype)99) == 0);
}

static void a_file_without_tensors_is_fine(void)
{
    struct tensor_file *file;
    write_tensors("none.safetensors", "{}", 0);
    CHECK_OK(tensor_file_open(in_folder("none.safetensors"), 0, &file));
    CHECK(tensor_file_count(file) == 0 && tensor_file_find(file, "a") == NULL);
    tensor_file_close(file);
}

#define T(dtype, shape, offsets)                                                                   \
    "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void each_lie_of_a_header_has_its_sentence(void)
{
    static const struct {
        const char *header;
        size_t data;
        const char *piece;
    } cases[] = {
        {"[]", 0, "not a JSON object"},
        {"{\"t\":1}", 0, "tensor 't' is not described by an object"},
        {"{\"t\":{}}", 0, "tensor 't' has no dtype"},
        {"{\"t\":" T("F31", "[1]", "[0,4]") "}", 4, "'t' has the unknown dtype 'F31'"},
        {"{\"t\":{\"dtype\":4}}", 0, "no dtype"},
        {"{\"t\":{\"dtype\":\"F32\"}}", 0, "'t' has no shape"},
        {"{\"t\":" T("F32", "4", "[0,4]") "}", 4, "no shape"},
        {"{\"t\":" T("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "9 dimensions"},
        {"{\"t\":" T("F32", "[-1]", "[0,4]") "}", 4, "not a whole number"},
        {"{\"t\":" T("F32", "[1.5]", "[0,4]") "}", 4, "not a whole number"},
        {"{\"t\":" T("F32", "[\"1\"]", "[0,4]") "}", 4, "not a whole number"},
        {"{\"t\":" T("F32", "[1e300]", "[0,4]") "}", 4, "not a whole number"},
        {"{\"t\":" T("F32", "[9007199254740992,9007199254740992]", "[0,4]") "}", 4, "overflows"},
        {"{\"t\":" T("U8", "[4294967296,4294967296]", "[0,0]") "}", 0,
         "[4294967296,4294967296], whose size overflows"},
        {"{\"t\":" T("F64", "[2147483648,1073741824]", "[0,0]") "}", 0, "overflows"},
        {"{\"t\":" T("F32", "[0,9007199254740992,9007199254740992]", "[0,0]") "}", 0, "overflows"},
        {"{\"t\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "no valid data_offsets"},
        {"{\"t\":" T("F32", "[1]", "[0]") "}", 4, "no valid data_offsets"},
        {"{\"t\":" T("F32", "[1]", "[0,4,8]") "}", 4, "no valid data_offsets"},
        {"{\"t\":" T("F32", "[1]", "[4,0]") "}", 4, "no valid data_offsets"},
        {"{\"t\":" T("F32", "[1]", "[-4,0]") "}", 4, "no valid data_offsets"},
        {"{\"t\":" T("F32", "[1]", "[0,4.5]") "}", 4, "no valid data_offsets"},
        {"{\"t\":" T("F32", "[1]", "[0,8]") "}", 4, "ends at byte 8 of the data"},
        {"{\"t\":" T("F32", "[1]", "[9007199254740988,9007199254740992]") "}", 4,
         "ends at byte 9007199254740992"},
        {"{\"t\":" T("F32", "[2,3]", "[0,4]") "}", 4,
         "'t' has 4 bytes of data, expected 24 for F32 of [2,3]"},
        {"{\"t\":" T("F32", "[0]", "[0,4]") "}", 4, "4 bytes of data, expected 0"},
        {"{\"t\":" T("F32", "[1]", "[4,8]") "}", 8, "begins at byte 4 of the data, expected 0"},
        {"{\"t\":" T("F32", "[1]", "[0,4]") ",\"u\":" T("F32", "[1]", "[5,9]") "}", 9,
         "'u' begins at byte 5 of the data, expected 4"},
        {"{\"t\":" T("F32", "[2]", "[0,8]") ",\"u\":" T("F32", "[1]", "[4,8]") "}", 8,
         "'u' begins at byte 4 of the data and overlaps tensor 't', which ends at 8"},
        {"{\"t\":" T("F32", "[1]", "[0,4]") ",\"u\":" T("F32", "[1]", "[0,4]") "}", 4, "overlaps"},
        {"{\"t\":" T("F32", "[2]", "[0,8]") ",\"u\":" T("F32", "[0]", "[4,4]") "}", 8, "overlaps"},
        {"{\"t\":" T("F32", "[1]", "[0,4]") "}", 5, "end at byte 4 of the data, expected 5"},
        {"{}", 5, "end at byte 0 of the data, expected 5"},
        {"{\"t\":" T("F32", "[1]", "[0,4]") ",\"t\":" T("F32", "[1]", "[4,8]") "}", 8,
         "twice the key 't'"},
        {"{\"t\":" T("F32", "[1]", "[0,4]"), 4, "JSON line 1"},
        {"{\"t\":" T("F32", "[1]", "[0,4]") "} x", 4, "nothing behind"},
        {"{\"\\u0000\":" T("F32", "[1]", "[0,4]") "}", 4, "\\u0000"},
        {"", 4, "the text ends"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct tensor_file *file;
        write_tensors("bad.safetensors", cases[i].header, cases[i].data);
        CHECK_FAILS(tensor_file_open(in_folder("bad.safetensors"), 0, &file),
                    MOSHI_ERROR_CHECKPOINT, cases[i].piece);
        CHECK(file == NULL && is_sentence());
        CHECK(strstr(moshi_error_detail(), "bad.safetensors") != NULL);
    }
}

static void a_header_length_is_checked_before_use(void)
{
    static const struct {
        const char *bytes;
        size_t count;
        const char *piece;
    } cases[] = {
        {"\x02", 1, "too few"},
        {"\x02\0\0\0\0\0\0", 7, "too few"},
        {"\x02\0\0\0\0\0\0\0{", 9, "claims 2 bytes, but only 1 follow"},
        {"\x00\xE1\xF5\x05\0\0\0\0{}", 10, "claims 100000000 bytes, but only 2"},
        {"\x01\xE1\xF5\x05\0\0\0\0{}", 10, "claims 100000001 bytes, expected at most 100000000"},
        {"\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF{}", 10, "claims 18446744073709551615"},
        {"\0\0\0\0\0\0\0\0", 8, "the text ends"},
        {"PK\x03\x04 a zip file of pytorch", 27, "is this a safetensors file?"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct tensor_file *file;
        write_file("short.safetensors", cases[i].bytes, cases[i].count);
        CHECK_FAILS(tensor_file_open(in_folder("short.safetensors"), (int)i % 2, &file),
                    MOSHI_ERROR_CHECKPOINT, cases[i].piece);
    }
    struct tensor_file *file;
    CHECK_FAILS(tensor_file_open(in_folder("missing.safetensors"), 0, &file),
                MOSHI_ERROR_CHECKPOINT, "missing.safetensors: cannot open");
}

static void every_truncation_of_a_tensor_file_is_refused(void)
{
    uint8_t bytes[1024];
    size_t count = make_tensors(bytes, good_header, 37);
    for (size_t i = 0; i <= count; i++) {
        struct tensor_file *file;
        write_file("cut.safetensors", bytes, i);
        int status = tensor_file_open(in_folder("cut.safetensors"), (int)i % 2, &file);
        CHECK((status == MOSHI_OK) == (i == count));
        CHECK(status == MOSHI_OK || (file == NULL && is_sentence()));
        tensor_file_close(file);
    }
}

static void every_changed_byte_gives_a_table_or_a_sentence(void)
{
    uint8_t bytes[1024];
    size_t count = make_tensors(bytes, good_header, 37);
    for (size_t i = 0; i < 8 + sizeof good_header - 1; i++) {
        static const uint8_t others[] = {0, '0', '9', '-', ',', ']', '"', ' ', 0xFF};
        for (size_t j = 0; j < sizeof others; j++) {
            uint8_t before = bytes[i];
            bytes[i] = others[j];
            write_file("changed.safetensors", bytes, count);
            bytes[i] = before;
            struct tensor_file *file;
            int status = tensor_file_open(in_folder("changed.safetensors"), 0, &file);
            CHECK(status == MOSHI_OK ? file != NULL : file == NULL && is_sentence());
            for (int k = 0; file != NULL && k < tensor_file_count(file); k++) {
                const struct tensor *tensor = tensor_file_at(file, k);
                for (size_t l = 0; l < tensor->bytes; l++) {
                    read_back = ((const uint8_t *)tensor->data)[l];
                }
            }
            tensor_file_close(file);
        }
    }
}

static void shards_make_one_table(void)
{
    write_tensors("one.safetensors",
                  "{\"b\":" T("F32", "[1]", "[0,4]") ",\"d\":" T("U8", "[1]", "[4,5]") "}", 5);
    write_tensors("two.safetensors",
                  "{\"a\":" T("F32", "[1]", "[0,4]") ",\"c\":" T("U8", "[0]", "[4,4]") "}", 4);
    static const char index[] =
        "{\"metadata\":{\"total_size\":9},\"weight_map\":{\"a\":\"two.safetensors\","
        "\"b\":\"one.safetensors\",\"c\":\"two.safetensors\",\"d\":\"one.safetensors\"}}";
    write_file("model.safetensors.index.json", index, sizeof index - 1);
    struct tensor_file *file;
    CHECK_OK(tensor_file_open(in_folder("model.safetensors.index.json"), 0, &file));
    CHECK(tensor_file_count(file) == 4);
    for (int i = 0; i < 4; i++) {
        char name[2] = {(char)('a' + i), '\0'};
        CHECK_TEXT(tensor_file_at(file, i)->name, name);
        CHECK(tensor_file_find(file, name) == tensor_file_at(file, i));
    }
    CHECK(tensor_file_find(file, "d")->bytes == 1);
    CHECK(tensor_file_mapped_bytes(file) > 9);
    tensor_file_close(file);

    char before[1024];
    CHECK(getcwd(before, sizeof before) != NULL && chdir(folder) == 0);
    int status = tensor_file_open("model.safetensors.index.json", 1, &file);
    CHECK(chdir(before) == 0);
    CHECK_OK(status);
    CHECK(tensor_file_mapped_bytes(file) == 0);
    tensor_file_close(file);
}

static void each_lie_of_an_index_has_its_sentence(void)
{
    static const struct {
        const char *index, *piece;
    } cases[] = {
        {"[]", "no 'weight_map'"},
        {"{}", "no 'weight_map'"},
        {"{\"weight_map\":[]}", "no 'weight_map'"},
        {"{\"weight_map\":{}}", "no 'weight_map'"},
        {"{\"weight_map\":{\"a\":1}}", "'a' is placed in '(not a string)'"},
        {"{\"weight_map\":{\"a\":\"../two.safetensors\"}}", "without folders"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "without folders"},
        {"{\"weight_map\":{\"a\":\"x/two.safetensors\"}}", "without folders"},
        {"{\"weight_map\":{\"a\":\"..\"}}", "without folders"},
        {"{\"weight_map\":{\"a\":\"\"}}", "without folders"},
        {"{\"weight_map\":{\"a\":\"three.safetensors\"}}",
         "names the shard 'three.safetensors', expected that file"},
        {"{\"weight_map\":{\"a\":\"two.safetensors\",\"x\":\"two.safetensors\"}}",
         "'x' is expected in shard 'two.safetensors', but found in no shard"},
        {"{\"weight_map\":{\"a\":\"two.safetensors\",\"b\":\"two.safetensors\","
         "\"d\":\"one.safetensors\"}}",
         "'b' is expected in shard 'two.safetensors', but found in 'one.safetensors'"},
        {"{\"weight_map\":{\"a\":\"two.safetensors\",\"b\":\"same.safetensors\"}}",
         "'a' stands in two shards"},
        {"{\"weight_map\":{\"a\":\"two.safetensors\",\"b\":\"cut.safetensors\"}}",
         "cut.safetensors: tensor 'b' ends at byte 4"},
        {"{\"weight_map\":", "bad.index.json: JSON line 1"},
    };
    write_tensors("same.safetensors",
                  "{\"a\":" T("F32", "[1]", "[0,4]") ",\"b\":" T("U8", "[1]", "[4,5]") "}", 5);
    write_tensors("cut.safetensors", "{\"b\":" T("F32", "[1]", "[0,4]") "}", 3);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct tensor_file *file;
        write_file("bad.index.json", cases[i].index, strlen(cases[i].index));
        CHECK_FAILS(tensor_file_open(in_folder("bad.index.json"), (int)i % 2, &file),
                    MOSHI_ERROR_CHECKPOINT, cases[i].piece);
        CHECK(file == NULL && is_sentence());
    }
    struct tensor_file *file;
    CHECK_FAILS(tensor_file_open(in_folder("none.index.json"), 0, &file), MOSHI_ERROR_CHECKPOINT,
                "none.index.json: cannot open");
}

static void a_hostile_name_stays_out_of_the_way_of_the_sentence(void)
{
    char header[4000] = "{\"";
    memset(header + 2, 'n', 3000);
    strcpy(header + 3002, "\":" T("F32", "[7]", "[0,4]") "}");
    write_tensors("name.safetensors", header, 4);
    struct tensor_file *file;
    CHECK_FAILS(tensor_file_open(in_folder("name.safetensors"), 0, &file), MOSHI_ERROR_CHECKPOINT,
                "expected 28 for F32 of [7]");
    CHECK(strstr(moshi_error_detail(), "name.safetensors") != NULL && is_sentence());
}

static void shape_texts_fit(void)
{
    int64_t dims[] = {2048, 512, INT64_MAX};
    char text[64];
    CHECK_TEXT(tensor_shape_text(dims, 2, text, sizeof text), "[2048,512]");
    CHECK_TEXT(tensor_shape_text(dims, 0, text, sizeof text), "[]");
    CHECK_TEXT(tensor_shape_text(dims, 2, text, 5), "[204");
    CHECK_TEXT(tensor_shape_text(dims, 3, text, 1), "");
    CHECK(tensor_shape_text(dims, 3, text, 0) == text);
}

/* ---- config ------------------------------------------------------------------------------ */

struct pair {
    const char *key, *value; /* value NULL: no such key */
};

/* Appends {"key": value, ...}: `base` with `changes` over it; a change "seanet.x" counts for the
 * section "seanet.". */
static size_t put_object(char *out, const struct pair *base, const struct pair *changes,
                         const char *section)
{
    size_t at = (size_t)sprintf(out, "{"), n = strlen(section);
    const char *comma = "";
    for (int pass = 0; pass < 2; pass++) {
        for (const struct pair *p = pass ? changes : base; p->key != NULL; p++) {
            const char *key = p->key, *value = p->value;
            int seen = 0;
            if (pass) {
                if (strncmp(key, section, n) != 0 || strchr(key + n, '.') != NULL) {
                    continue;
                }
                key += n;
                for (const struct pair *q = base; q->key != NULL; q++) {
                    seen |= strcmp(q->key, key) == 0;
                }
            } else {
                for (const struct pair *q = changes; q->key != NULL; q++) {
                    if (strncmp(q->key, section, n) == 0 && strcmp(q->key + n, key) == 0) {
                        value = q->value;
                    }
                }
            }
            if (value != NULL && !seen) {
                at += (size_t)sprintf(out + at, "%s\"%s\": %s", comma, key, value);
                comma = ", ";
            }
        }
    }
    return at + (size_t)sprintf(out + at, "}");
}

static const struct pair lm_base[] = {{"dim", "256"},
                                      {"text_card", "320"},
                                      {"n_q", "16"},
                                      {"dep_q", "8"},
                                      {"card", "512"},
                                      {"num_heads", "4"},
                                      {"num_layers", "4"},
                                      {"hidden_scale", "4.125"},
                                      {"causal", "true"},
                                      {"layer_scale", "null"},
                                      {"context", "250"},
                                      {"max_period", "10000"},
                                      {"gating", "\"silu\""},
                                      {"norm", "\"rms_norm_f32\""},
                                      {"positional_embedding", "\"rope\""},
                                      {"depformer_dim", "96"},
                                      {"depformer_dim_feedforward", "396"},
                                      {"depformer_num_heads", "4"},
                                      {"depformer_num_layers", "2"},
                                      {"depformer_layer_scale", "null"},
                                      {"depformer_multi_linear", "true"},
                                      {"depformer_gating", "\"silu\""},
                                      {"depformer_pos_emb", "\"none\""},
                                      {"depformer_weights_per_step", "true"},
                                      {"delays", "[0, 0,1,1,1,1,1,1,1, 0,1,1,1,1,1,1,1]"},
                                      {NULL, NULL}};

static int parse_lm(const struct pair *changes, struct lm_config *config)
{
    char text[8192];
    size_t bytes = put_object(text, lm_base, changes, "");
    char *copy = malloc(bytes);
    memcpy(copy, text, bytes);
    int status = lm_config_parse(copy, bytes, "config.json", config);
    free(copy);
    return status;
}

/* Up to three changes. */
static int parse_lm_with(struct lm_config *config, const char *key, const char *value,
                         const char *key2, const char *value2, const char *key3, const char *value3)
{
    struct pair changes[] = {{key, value}, {key2, value2}, {key3, value3}, {NULL, NULL}};
    return parse_lm(changes, config);
}

#define LM1(config, k, v) parse_lm_with(config, k, v, NULL, NULL, NULL, NULL)
#define LM2(config, k, v, k2, v2) parse_lm_with(config, k, v, k2, v2, NULL, NULL)
#define LM3(config, k, v, k2, v2, k3, v3) parse_lm_with(config, k, v, k2, v2, k3, v3)

static void without_a_config_it_is_the_7b(void)
{
    struct lm_config c;
    CHECK_OK(lm_config_parse(NULL, 0, NULL, &c));
    CHECK_TEXT(c.family, "moshi");
    CHECK(c.temporal.dim == 4096 && c.temporal.heads == 32 && c.temporal.layers == 32);
    CHECK(c.temporal.kv_heads == 32 && c.temporal.feedforward == 11264 && c.temporal.gated);
    CHECK(c.temporal.norm == NORM_RMS && c.temporal.norm_eps == 1e-8f);
    CHECK(c.temporal.position == POSITION_ROPE && c.temporal.max_period == 10000);
    CHECK(c.temporal.context == 3000 && !c.temporal.layer_scale && c.temporal.weight_sets == 1);
    CHECK(c.depth.dim == 1024 && c.depth.heads == 16 && c.depth.layers == 6);
    CHECK(c.depth.kv_heads == 16 && c.depth.feedforward == 2816 && c.depth.gated);
    CHECK(c.depth.norm == NORM_RMS && c.depth.norm_eps == 1e-8f);
    CHECK(c.depth.position == POSITION_NONE && c.depth.context == 8 && c.depth.weight_sets == 8);
    CHECK(c.n_q == 16 && c.dep_q == 8 && c.card == 2048);
    CHECK(c.text_card == 32000 && c.text_card_out == 32000);
    static const int delays[] = {0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1};
    CHECK(memcmp(c.delays, delays, sizeof delays) == 0 && c.max_delay == 1);
    for (int i = 0; i < 8; i++) {
        CHECK(c.depth_schedule[i] == i);
    }
    CHECK(c.depth_multi_linear && c.depth_low_rank == 0 && c.depth_norm == NORM_NONE);
    CHECK(!c.norm_emb && !c.bias_proj && !c.demux_second_stream && !c.cross_attention);
    CHECK(c.text_padding_id == 3 && c.text_end_padding_id == 0);
    CHECK(c.heads == 0 && c.head_dim == 6 && !c.has_conditions && c.n_conditions == 0);
    CHECK(c.text_temperature == 0.7f && c.audio_temperature == 0.8f);
    CHECK(c.text_top_k == 25 && c.audio_top_k == 250);
    CHECK_TEXT(c.lm_name, "model.safetensors");
    CHECK_TEXT(c.mimi_name, "tokenizer-e351c8d8-checkpoint125.safetensors");
    CHECK_TEXT(c.tokenizer_name, "tokenizer_spm_32k_3.model");
    CHECK_TEXT(c.mimi_config_name, "");
    CHECK_TEXT(c.lora_name, "");
    lm_config_free(&c);
    lm_config_free(NULL);
}

static void a_small_config_is_read(void)
{
    struct lm_config c;
    CHECK_OK(LM3(&c, "lm_gen_config", "{\"temp\":0.3,\"temp_text\":0,\"top_k\":50,\"x\":1}",
                 "mimi_config_name", "\"mimi_config.json\"", "model_type", "\"hibiki\""));
    CHECK(c.temporal.dim == 256 && c.temporal.feedforward == 704 && c.depth.feedforward == 264);
    CHECK(c.audio_temperature == 0.3f && c.text_temperature == 0 && c.audio_top_k == 50);
    CHECK(c.text_top_k == 25);
    CHECK_TEXT(c.mimi_config_name, "mimi_config.json");
    CHECK_TEXT(c.family, "hibiki");
    lm_config_free(&c);
}

static void defaults_are_upstreams_constructor_defaults(void)
{
    /* No key that has one, apart from those whose default isn't supported. */
    static const char text[] =
        "{\"num_layers\":2,\"context\":7,\"positional_embedding\":\"none\",\"dep_q\":0,"
        "\"delays\":[0,0,0,0,0,0,0,0,5], \"made_up\":[{}]}";
    struct lm_config c;
    CHECK_OK(lm_config_parse(text, sizeof text - 1, "config.json", &c));
    CHECK(c.n_q == 8 && c.card == 1024 && c.text_card == 32000 && c.max_delay == 5);
    CHECK(c.temporal.dim == 128 && c.temporal.heads == 8 && c.temporal.feedforward == 512);
    CHECK(!c.temporal.gated && c.temporal.norm == NORM_LAYER && c.temporal.norm_eps == 1e-5f);
    CHECK(c.temporal.position == POSITION_NONE && c.temporal.max_period == 10000);
    CHECK(c.depth.layers == 0 && c.depth.dim == 0);
    CHECK(c.audio_delay_seconds == 0 && c.audio_silence_prefix_seconds == 0);
    lm_config_free(&c);
}

static void hidden_units_follow_upstreams_rule(void)
{
    struct lm_config c;
    CHECK_OK(LM2(&c, "hidden_scale", "4", "depformer_dim_feedforward", "384"));
    CHECK(c.temporal.feedforward == 672 && c.depth.feedforward == 252); /* 21 / 8 */
    lm_config_free(&c);
    CHECK_OK(LM2(&c, "hidden_scale", "4", "depformer_dim_feedforward", NULL));
    CHECK(c.depth.feedforward == 252);
    lm_config_free(&c);
    CHECK_OK(LM1(&c, "depformer_dim_feedforward", "null"));
    CHECK(c.depth.feedforward == 264); /* 2 * int(4.125 * 96) / 3 */
    lm_config_free(&c);
    CHECK_OK(LM1(&c, "depformer_dim_feedforward", "[100,100,100,100,100,100,100,100]"));
    CHECK(c.depth.feedforward == 66);
    lm_config_free(&c);
    CHECK_OK(LM2(&c, "gating", "\"none\"", "hidden_scale", "1.999"));
    CHECK(!c.temporal.gated && c.temporal.feedforward == 511 && c.depth.gated);
    lm_config_free(&c);
}

static void norms_have_their_epsilons(void)
{
    static const struct {
        const char *name;
        enum norm_kind kind;
        float eps;
    } cases[] = {{"\"layer_norm\"", NORM_LAYER, 1e-5f},
                 {"\"layer_norm_f32\"", NORM_LAYER, 1e-8f},
                 {"\"rms_norm\"", NORM_RMS, 1e-5f},
                 {"\"rms_norm_f32\"", NORM_RMS, 1e-8f}};
    for (int i = 0; i < 4; i++) {
        struct lm_config c;
        CHECK_OK(LM2(&c, "norm", cases[i].name, "depformer_norm", cases[3 - i].name));
        CHECK(c.temporal.norm == cases[i].kind && c.temporal.norm_eps == cases[i].eps);
        CHECK(c.depth.norm == cases[i].kind && c.depth.norm_eps == cases[i].eps);
        CHECK(c.depth_norm == cases[3 - i].kind && c.depth_norm_eps == cases[3 - i].eps);
        lm_config_free(&c);
    }
}

static void the_depth_transformer_inherits_and_overrides(void)
{
    struct lm_config c;
    CHECK_OK(LM3(&c, "layer_scale", "0.1", "depformer_layer_scale", NULL, "depformer_num_layers",
                 NULL));
    CHECK(c.temporal.layer_scale && c.depth.layer_scale && c.depth.layers == 4);
    lm_config_free(&c);
    CHECK_OK(LM3(&c, "layer_scale", "0.1", "depformer_layer_scale", "null", "depformer_gating",
                 NULL));
    CHECK(c.temporal.layer_scale && !c.depth.layer_scale && c.depth.gated);
    lm_config_free(&c);
    CHECK_OK(LM3(&c, "kv_repeat", "2", "depformer_kv_repeat", "4", "max_period", "100000.0"));
    CHECK(c.temporal.kv_heads == 2 && c.depth.kv_heads == 1 && c.depth.max_period == 1e5);
    lm_config_free(&c);
    CHECK_OK(LM1(&c, "kv_repeat", "2"));
    CHECK(c.depth.kv_heads == 2);
    lm_config_free(&c);
    CHECK_OK(LM3(&c, "depformer_weights_per_step_schedule", "[0,1,2,3,3,3,3,1]",
                 "depformer_low_rank_embeddings", "32", "depformer_multi_linear", NULL));
    CHECK(c.depth.weight_sets == 4 && c.depth_schedule[6] == 3 && c.depth_schedule[7] == 1);
    CHECK(c.depth_low_rank == 32 && !c.depth_multi_linear);
    lm_config_free(&c);
}

static void flags_without_support_yet_are_still_read(void)
{
    struct lm_config c;
    CHECK_OK(LM2(&c, "cross_attention", "true", "demux_second_stream", "true"));
    CHECK(c.cross_attention && c.demux_second_stream);
    lm_config_free(&c);
    CHECK_OK(LM3(&c, "demux_second_text_stream", "true", "norm_emb", "true", "bias_proj", "true"));
    CHECK(c.demux_second_stream && c.norm_emb && c.bias_proj);
    lm_config_free(&c);
    CHECK_OK(LM3(&c, "extra_heads_num_heads", "4", "extra_heads_dim", "7", "text_card_out", "5"));
    CHECK(c.heads == 4 && c.head_dim == 7 && c.text_card_out == 5 && c.text_card == 320);
    lm_config_free(&c);
    CHECK_OK(LM3(&c, "stt_config",
                 "{\"audio_delay_seconds\":2.5,\"audio_silence_prefix_seconds\":1.0}", "lora_name",
                 "\"lora.safetensors\"", "text_card_out", "null"));
    CHECK(c.audio_delay_seconds == 2.5 && c.audio_silence_prefix_seconds == 1);
    CHECK(c.text_card_out == 320);
    CHECK_TEXT(c.lora_name, "lora.safetensors");
    lm_config_free(&c);
}

static void conditions_are_read_in_the_order_of_the_fuser(void)
{
    struct lm_config c;
    static const char conditioners[] =
        "{\"wav\":{\"type\":\"tensor\",\"tensor\":{\"dim\":512}},"
        "\"cfg\":{\"type\":\"lut\",\"lut\":{\"n_bins\":7,\"dim\":16,\"tokenizer\":\"noop\","
        "\"possible_values\":[\"1.0\",\"1.5\",\"\xC3\xA9\"]}},"
        "\"free\":{\"type\":\"lut\",\"lut\":{\"n_bins\":9,\"dim\":8,\"tokenizer\":\"noop\"}},"
        "\"unused\":{\"type\":\"lut\"}}";
    CHECK_OK(LM3(&c, "conditioners", conditioners, "fuser",
                 "{\"cross\":[\"wav\"],\"prepend\":[],\"sum\":[\"free\",\"cfg\"],"
                 "\"cross_attention_pos_emb\":true}",
                 "cross_attention", "true"));
    CHECK(c.has_conditions && c.n_conditions == 3);
    CHECK_TEXT(c.conditions[0].name, "free");
    CHECK(c.conditions[0].values == NULL && c.conditions[0].bins == 9 && c.conditions[0].summed);
    CHECK_TEXT(c.conditions[1].name, "cfg");
    CHECK(c.conditions[1].kind == CONDITION_LUT && c.conditions[1].bins == 7);
    CHECK(c.conditions[1].dim == 16 && c.conditions[1].n_values == 3 && c.conditions[1].summed);
    CHECK_TEXT(c.conditions[1].values[0], "1.0");
    CHECK_TEXT(c.conditions[1].values[2], "\xC3\xA9");
    CHECK_TEXT(c.conditions[2].name, "wav");
    CHECK(c.conditions[2].kind == CONDITION_TENSOR && !c.conditions[2].summed);
    lm_config_free(&c);
    lm_config_free(&c);
    CHECK_OK(LM2(&c, "conditioners", "{}", "fuser", "{\"sum\":[],\"cross\":[],\"prepend\":[]}"));
    CHECK(!c.has_conditions);
    lm_config_free(&c);
    CHECK_OK(LM2(&c, "conditioners", conditioners, "fuser", "null"));
    CHECK(c.has_conditions && c.n_conditions == 0);
    lm_config_free(&c);
}

#define LUT(rest) "{\"d\":{\"type\":\"lut\",\"lut\":{" rest "}}}"
#define LUT_OK LUT("\"n_bins\":3,\"dim\":4,\"tokenizer\":\"noop\"")

static void a_config_we_cannot_honour_names_its_key(void)
{
    static const struct {
        const char *key, *value, *key2, *value2, *piece;
    } cases[] = {
        {"dim", "0", 0, 0, "config.json: key 'dim' is 0, expected a whole number in 1..65536"},
        {"dim", "65537", 0, 0, "'dim' is 65537"},
        {"dim", "256.5", 0, 0, "'dim' is 256.5"},
        {"dim", "\"256\"", 0, 0, "'dim' is '256'"},
        {"dim", "null", 0, 0, "'dim' is null"},
        {"dim", "true", 0, 0, "'dim' is true"},
        {"dim", "[1]", 0, 0, "'dim' is a list of 1"},
        {"dim", "{}", 0, 0, "'dim' is an object"},
        {"dim", "1e30", 0, 0, "'dim' is 1e+30"},
        {"num_heads", "3", 0, 0, "'num_heads' is 3, expected a divisor of the width 256"},
        {"num_heads", "0", 0, 0, "'num_heads'"},
        {"num_heads", "256", 0, 0, "'num_heads' makes heads of 1 elements, expected an even"},
        {"num_layers", "513", 0, 0, "'num_layers'"},
        {"num_layers", NULL, 0, 0, "'num_layers' is missing"},
        {"hidden_scale", "0", 0, 0, "'hidden_scale'"},
        {"hidden_scale", "-1", 0, 0, "'hidden_scale'"},
        {"hidden_scale", "1e9", 0, 0, "'hidden_scale'"},
        {"hidden_scale", "0.001", 0, 0, "'hidden_scale' times the width 256"},
        {"hidden_scale", "1000", "dim", "4096", "'hidden_scale' times the width 4096"},
        {"causal", "false", 0, 0, "'causal' is false, expected true"},
        {"causal", "1", 0, 0, "'causal' is 1, expected true or false"},
        {"layer_scale", "true", 0, 0, "'layer_scale' is true"},
        {"context", NULL, 0, 0, "'context' is missing, expected a whole number in 1..1048576"},
        {"context", "null", 0, 0, "'context' is null"},
        {"context", "0", 0, 0, "'context'"},
        {"context", "1048577", 0, 0, "'context'"},
        {"max_period", "0", 0, 0, "'max_period'"},
        {"max_period", "-5", 0, 0, "'max_period'"},
        {"gating", "\"gelu\"", 0, 0, "'gating' is 'gelu', expected 'none' or 'silu'"},
        {"gating", "null", 0, 0, "'gating' is null"},
        {"norm", "\"batch_norm\"", 0, 0, "'norm' is 'batch_norm', expected 'layer_norm' or"},
        {"norm_emb", "0", 0, 0, "'norm_emb'"},
        {"positional_embedding", "\"sin\"", 0, 0, "'positional_embedding' is 'sin'"},
        {"positional_embedding", "\"sin_rope\"", 0, 0, "'positional_embedding'"},
        {"positional_embedding", "\"rope_concat\"", 0, 0, "'positional_embedding'"},
        {"positional_embedding", NULL, 0, 0, "'sin' by default, expected 'rope' or 'none'"},
        {"kv_repeat", "3", 0, 0, "'kv_repeat' is 3, expected a divisor of the 4 heads"},
        {"kv_repeat", "0", 0, 0, "'kv_repeat'"},
        {"skip_self_attn", "true", 0, 0, "'skip_self_attn'"},
        {"activation", "\"relu\"", 0, 0, "'activation' is 'relu', expected 'gelu'"},
        {"n_q", "0", 0, 0, "'n_q'"},
        {"n_q", "65", 0, 0, "'n_q'"},
        {"n_q", "15", 0, 0, "'delays' is a list of 17, expected a list of 16"},
        {"dep_q", "17", 0, 0, "'dep_q' is 17, expected a whole number in 0..16"},
        {"dep_q", "-1", 0, 0, "'dep_q'"},
        {"card", "16777217", 0, 0, "'card'"},
        {"card", "0", 0, 0, "'card'"},
        {"text_card", "16777217", 0, 0, "'text_card'"},
        {"text_card_out", "0", 0, 0, "'text_card_out'"},
        {"existing_text_padding_id", "321", 0, 0, "'existing_text_padding_id'"},
        {"existing_text_end_padding_id", "-1", 0, 0, "'existing_text_end_padding_id'"},
        {"delays", NULL, 0, 0, "'delays' is missing"},
        {"delays", "5", 0, 0, "'delays' is 5"},
        {"delays", "[0,0,1,1,1,1,1,1,1,0,1,1,1,1,1,1,-1]", 0, 0, "'delays' has the entry -1"},
        {"delays", "[0,0,1,1,1,1,1,1,1,0,1,1,1,1,1,1,1025]", 0, 0, "the entry 1025"},
        {"delays", "[0,0,1,1,1,1,1,1,1,0,1,1,1,1,1,1,\"1\"]", 0, 0, "the entry '1'"},
        {"depformer_dim", "65537", 0, 0, "'depformer_dim'"},
        {"depformer_num_heads", NULL, 0, 0, "'depformer_num_heads' is missing"},
        {"depformer_num_heads", "5", 0, 0, "'depformer_num_heads' is 5, expected a divisor"},
        {"depformer_num_layers", "0", 0, 0, "'depformer_num_layers'"},
        {"depformer_kv_repeat", "3", 0, 0, "'depformer_kv_repeat'"},
        {"depformer_dim_feedforward", "0", 0, 0, "'depformer_dim_feedforward'"},
        {"depformer_dim_feedforward", "[396]", 0, 0, "'depformer_dim_feedforward' is a list of 1"},
        {"depformer_dim_feedforward", "[9,9,9,9,9,9,9,8]", 0, 0, "different numbers"},
        {"depformer_dim_feedforward", "[9,9,9,9,9,9,9,null]", 0, 0, "the entry null"},
        {"depformer_layer_scale", "\"x\"", 0, 0, "'depformer_layer_scale'"},
        {"depformer_gating", "\"none\"", 0, 0, "'depformer_gating' is 'none', expected 'silu'"},
        {"depformer_gating", NULL, "gating", NULL, "'gating' is 'none' by default"},
        {"depformer_pos_emb", NULL, 0, 0, "'depformer_pos_emb' is 'sin' by default"},
        {"depformer_pos_emb", "\"sin\"", 0, 0, "'depformer_pos_emb'"},
        {"depformer_norm", "\"x\"", 0, 0, "'depformer_norm'"},
        {"depformer_weights_per_step", "false", 0, 0, "'depformer_weights_per_step' is false"},
        {"depformer_weights_per_step", NULL, 0, 0, "'depformer_weights_per_step' is false by"},
        {"depformer_weights_per_step_schedule", "[0]", 0, 0, "_schedule' is a list of 1"},
        {"depformer_weights_per_step_schedule", "[]", 0, 0, "_schedule' is a list of 0"},
        {"depformer_weights_per_step_schedule", "[0,1,2,3,4,5,6,8]", 0, 0, "the entry 8"},
        {"depformer_low_rank_embeddings", "0", 0, 0, "'depformer_low_rank_embeddings'"},
        {"depformer_activation", "\"relu\"", 0, 0, "'depformer_activation'"},
        {"extra_heads_num_heads", "17", 0, 0, "'extra_heads_num_heads'"},
        {"extra_heads_dim", "33", 0, 0, "'extra_heads_dim'"},
        {"cross_attention", "null", 0, 0, "'cross_attention'"},
        {"model_type", "\"a name of 16 byte\"", 0, 0, "'model_type'"},
        {"model_type", "null", 0, 0, "'model_type' is null"},
        {"moshi_name", "7", 0, 0, "'moshi_name' is 7"},
        {"moshi_name", "\"\"", 0, 0, "'moshi_name' is ''"},
        {"mimi_config_name", "7", 0, 0, "'mimi_config_name'"},
        {"lm_gen_config", "[]", 0, 0, "'lm_gen_config'"},
        {"lm_gen_config", "{\"temp\":\"hot\"}", 0, 0, "'lm_gen_config.temp' is 'hot'"},
        {"lm_gen_config", "{\"top_k\":-1}", 0, 0, "'lm_gen_config.top_k'"},
        {"stt_config", "{\"audio_delay_seconds\":-1}", 0, 0, "'stt_config.audio_delay_seconds'"},
        {"fuser", "[]", 0, 0, "'fuser'"},
        {"conditioners", "3", 0, 0, "'conditioners'"},
        {"fuser", "{\"prepend\":[\"d\"]}", 0, 0, "'fuser.prepend' is a list of 1"},
        {"fuser", "{\"sum\":\"d\"}", 0, 0, "'fuser.sum' is 'd'"},
        {"fuser", "{\"sum\":[\"d\"]}", 0, 0, "'fuser.sum' names the condition 'd', expected one"},
        {"fuser", "{\"sum\":[1]}", "conditioners", LUT_OK, "'fuser.sum'"},
        {"fuser", "{\"sum\":[\"d\",\"d\"]}", "conditioners", LUT_OK, "'d' again"},
        {"fuser", "{\"sum\":[\"d\"],\"cross\":[\"d\"]}", "conditioners", LUT_OK, "'d' again"},
        {"fuser", "{\"cross\":[\"d\"]}", "conditioners", LUT_OK, "'fuser.cross' is not empty"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners", "{\"d\":{}}",
         "'conditioners.d.type' is missing"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners", "{\"d\":{\"type\":\"wav\"}}",
         "'conditioners.d.type' is 'wav', expected 'lut' or 'tensor'"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners", "{\"d\":{\"type\":\"tensor\"}}",
         "'conditioners.d.tensor' is missing"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners", LUT("\"n_bins\":3,\"tokenizer\":\"noop\""),
         "'conditioners.d.dim'"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners", LUT("\"dim\":3,\"tokenizer\":\"noop\""),
         "'conditioners.d.n_bins'"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners",
         LUT("\"n_bins\":3,\"dim\":3,\"tokenizer\":\"t5\""), "'conditioners.d.tokenizer' is 't5'"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners",
         LUT("\"n_bins\":1,\"dim\":3,\"tokenizer\":\"noop\",\"possible_values\":[\"a\",\"b\"]"),
         "possible_values' is a list of 2"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners",
         LUT("\"n_bins\":9,\"dim\":3,\"tokenizer\":\"noop\",\"possible_values\":[\"a\",2]"),
         "not a text"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners",
         LUT("\"n_bins\":9,\"dim\":3,\"tokenizer\":\"noop\","
             "\"possible_values\":[\"a\",\"b\",\"a\"]"),
         "same text twice"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners",
         LUT("\"n_bins\":9,\"dim\":3,\"tokenizer\":\"noop\",\"learn_padding\":false"),
         "'conditioners.d.learn_padding'"},
        {"fuser", "{\"sum\":[\"d\"]}", "conditioners",
         LUT("\"n_bins\":9,\"dim\":256,\"tokenizer\":\"noop\",\"force_linear\":false"),
         "'conditioners.d.force_linear'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct lm_config c;
        CHECK_FAILS(LM2(&c, cases[i].key, cases[i].value, cases[i].key2, cases[i].value2),
                    MOSHI_ERROR_CHECKPOINT, cases[i].piece);
        CHECK(is_sentence() && strncmp(moshi_error_detail(), "config.json: ", 13) == 0);
        lm_config_free(&c);
    }
    struct lm_config c;
    CHECK_FAILS(lm_config_parse("[]", 2, "x.json", &c), MOSHI_ERROR_CHECKPOINT,
                "x.json: the file holds no JSON object");
    CHECK_FAILS(lm_config_parse("", 0, "x.json", &c), MOSHI_ERROR_CHECKPOINT, "x.json: JSON");
}

static void too_many_conditions_are_refused(void)
{
    char conditioners[2048] = "{", fuser[512] = "{\"sum\":[";
    for (int i = 0; i < CONFIG_MAX_CONDITIONS + 1; i++) {
        const char *comma = i > 0 ? "," : "";
        (void)sprintf(conditioners + strlen(conditioners),
                      "%s\"c%d\":{\"type\":\"tensor\",\"tensor\":{\"dim\":4}}", comma, i);
        (void)sprintf(fuser + strlen(fuser), "%s\"c%d\"", comma, i);
    }
    strcat(conditioners, "}");
    strcat(fuser, "]}");
    struct lm_config c;
    CHECK_FAILS(LM2(&c, "conditioners", conditioners, "fuser", fuser), MOSHI_ERROR_CHECKPOINT,
                "'fuser.sum' has too many conditions, expected at most 8");
}

static void without_depth_its_keys_do_not_matter(void)
{
    struct pair changes[] = {{"dep_q", "0"},
                             {"depformer_pos_emb", NULL},
                             {"depformer_num_heads", NULL},
                             {"depformer_weights_per_step", NULL},
                             {NULL, NULL}};
    struct lm_config c;
    CHECK_OK(parse_lm(changes, &c));
    CHECK(c.dep_q == 0 && c.depth.layers == 0);
    lm_config_free(&c);
}

static const struct pair mimi_top[] = {
    {"sample_rate", "24000"}, {"channels", "1"}, {"frame_rate", "12.5"}, {NULL, NULL}};
static const struct pair mimi_seanet[] = {{"channels", "1"},
                                          {"dimension", "128"},
                                          {"causal", "true"},
                                          {"n_filters", "12"},
                                          {"n_residual_layers", "1"},
                                          {"activation", "\"ELU\""},
                                          {"compress", "2"},
                                          {"dilation_base", "2"},
                                          {"kernel_size", "7"},
                                          {"residual_kernel_size", "3"},
                                          {"last_kernel_size", "3"},
                                          {"norm", "\"none\""},
                                          {"pad_mode", "\"constant\""},
                                          {"ratios", "[8, 6, 5, 4]"},
                                          {"true_skip", "true"},
                                          {NULL, NULL}};
static const struct pair mimi_quantizer[] = {
    {"dimension", "32"},         {"n_q", "8"}, {"bins", "512"}, {"input_dimension", "128"},
    {"output_dimension", "128"}, {NULL, NULL}};
static const struct pair mimi_transformer[] = {{"d_model", "128"},
                                               {"num_heads", "4"},
                                               {"num_layers", "2"},
                                               {"causal", "true"},
                                               {"layer_scale", "0.01"},
                                               {"context", "32"},
                                               {"conv_layout", "true"},
                                               {"max_period", "10000"},
                                               {"gating", "\"none\""},
                                               {"norm", "\"layer_norm\""},
                                               {"positional_embedding", "\"rope\""},
                                               {"dim_feedforward", "256"},
                                               {"input_dimension", "128"},
                                               {"output_dimensions", "[128]"},
                                               {NULL, NULL}};

static int parse_mimi(const char *key, const char *value, struct mimi_config *config)
{
    static char sections[3][2048];
    struct pair changes[] = {{key, value}, {NULL, NULL}};
    struct pair top[8] = {
        {"seanet", sections[0]}, {"quantizer", sections[1]}, {"transformer", sections[2]}};
    char text[8192];
    put_object(sections[0], mimi_seanet, changes, "seanet.");
    put_object(sections[1], mimi_quantizer, changes, "quantizer.");
    put_object(sections[2], mimi_transformer, changes, "transformer.");
    memcpy(top + 3, mimi_top, sizeof mimi_top);
    size_t bytes = put_object(text, top, changes, "");
    return mimi_config_parse(text, bytes, "mimi.json", config);
}

static void without_a_mimi_config_it_is_the_published_codec(void)
{
    struct mimi_config c;
    static const int ratios[] = {8, 6, 5, 4};
    CHECK_OK(mimi_config_parse(NULL, 0, NULL, &c));
    CHECK(c.sample_rate == 24000 && c.frame_rate == 12.5 && c.frame_size == 1920);
    CHECK(c.hop == 960 && c.stride == 2 && c.n_ratios == 4);
    CHECK(memcmp(c.ratios, ratios, sizeof ratios) == 0);
    CHECK(c.n_filters == 64 && c.dimension == 512 && c.compress == 2);
    CHECK(c.kernel == 7 && c.residual_kernel == 3 && c.last_kernel == 3);
    CHECK(c.quantizer_dim == 256 && c.bins == 2048 && c.n_q == 32);
    CHECK(c.transformer.dim == 512 && c.transformer.heads == 8 && c.transformer.kv_heads == 8);
    CHECK(c.transformer.layers == 8 && c.transformer.feedforward == 2048 && !c.transformer.gated);
    CHECK(c.transformer.norm == NORM_LAYER && c.transformer.norm_eps == 1e-5f);
    CHECK(c.transformer.position == POSITION_ROPE && c.transformer.max_period == 10000);
    CHECK(c.transformer.context == 250 && c.transformer.layer_scale);
    CHECK(c.transformer.weight_sets == 1);
}

static void a_small_mimi_config_is_read(void)
{
    struct mimi_config c;
    CHECK_OK(parse_mimi("made_up", "1", &c));
    CHECK(c.n_filters == 12 && c.dimension == 128 && c.n_q == 8 && c.stride == 2);
    CHECK_OK(parse_mimi("transformer.layer_scale", "null", &c));
    CHECK(!c.transformer.layer_scale);
    CHECK_OK(parse_mimi("frame_rate", "25", &c));
    CHECK(c.stride == 1 && c.frame_size == 960);
    CHECK_OK(parse_mimi("seanet.ratios", NULL, &c));
    CHECK(c.hop == 320 && c.stride == 6);
    CHECK_OK(parse_mimi("seanet.activation_params", "{\"alpha\":1.0}", &c));
}

static void a_mimi_config_we_cannot_honour_names_its_key(void)
{
    static const struct {
        const char *key, *value, *piece;
    } cases[] = {
        {"sample_rate", NULL, "mimi.json: key 'sample_rate' is missing"},
        {"sample_rate", "0", "'sample_rate'"},
        {"sample_rate", "24001", "'frame_rate' is 12.5, expected one that divides"},
        {"channels", "2", "'channels' is 2, expected 1"},
        {"frame_rate", NULL, "'frame_rate' is missing"},
        {"frame_rate", "0", "'frame_rate'"},
        {"frame_rate", "7", "'frame_rate'"},
        {"frame_rate", "1e-3", "'frame_rate'"},
        {"frame_rate", "50", "'seanet.ratios' multiply to 960 samples, expected a divisor"},
        {"seanet", "null", "'seanet' is null, expected an object"},
        {"quantizer", "[]", "'quantizer'"},
        {"transformer", NULL, "'transformer' is missing"},
        {"seanet.channels", "2", "'seanet.channels'"},
        {"seanet.dimension", "64", "'quantizer.input_dimension' differs"},
        {"seanet.causal", "false", "'seanet.causal' is false, expected true"},
        {"seanet.causal", NULL, "'seanet.causal' is false by default, expected true"},
        {"seanet.n_filters", "0", "'seanet.n_filters'"},
        {"seanet.n_filters", "8192", "'seanet.n_filters' doubled for each ratio"},
        {"seanet.n_residual_layers", "3", "'seanet.n_residual_layers' is 3, expected 1"},
        {"seanet.n_residual_layers", NULL, "'seanet.n_residual_layers' is 3 by default"},
        {"seanet.activation", "\"ReLU\"", "'seanet.activation' is 'ReLU', expected 'ELU'"},
        {"seanet.activation_params", "{\"alpha\":0.5}", "'seanet.activation_params.alpha'"},
        {"seanet.final_activation", "\"Tanh\"", "'seanet.final_activation'"},
        {"seanet.trim_right_ratio", "0.5", "'seanet.trim_right_ratio'"},
        {"seanet.compress", "13", "'seanet.compress'"},
        {"seanet.kernel_size", "0", "'seanet.kernel_size'"},
        {"seanet.residual_kernel_size", "1025", "'seanet.residual_kernel_size'"},
        {"seanet.last_kernel_size", "-1", "'seanet.last_kernel_size'"},
        {"seanet.norm", "\"weight_norm\"", "'seanet.norm' is 'weight_norm', expected 'none'"},
        {"seanet.pad_mode", "\"reflect\"", "'seanet.pad_mode'"},
        {"seanet.pad_mode", NULL, "'reflect' by default"},
        {"seanet.ratios", "[]", "'seanet.ratios'"},
        {"seanet.ratios", "[1,1,1,1,1,1,1,1,1]", "'seanet.ratios' is a list of 9"},
        {"seanet.ratios", "[8,0]", "'seanet.ratios' has the entry 0"},
        {"seanet.ratios", "[1024,1024,1024,1024,1024,1024,1024,1024]", "'seanet.ratios' multiply"},
        {"seanet.ratios", "[7]", "'seanet.ratios' multiply to 7 samples"},
        {"seanet.true_skip", "false", "'seanet.true_skip'"},
        {"quantizer.dimension", "0", "'quantizer.dimension'"},
        {"quantizer.n_q", "1", "'quantizer.n_q'"},
        {"quantizer.n_q", "65", "'quantizer.n_q'"},
        {"quantizer.n_q_semantic", "2", "'quantizer.n_q_semantic'"},
        {"quantizer.bins", "0", "'quantizer.bins'"},
        {"quantizer.input_dimension", NULL, "'quantizer.input_dimension' differs"},
        {"quantizer.output_dimension", "64", "'quantizer.output_dimension' differs"},
        {"transformer.d_model", "64", "'transformer.d_model' differs"},
        {"transformer.num_heads", "5", "'transformer.num_heads'"},
        {"transformer.num_heads", "128", "even number for rope"},
        {"transformer.num_layers", NULL, "'transformer.num_layers' is missing"},
        {"transformer.causal", NULL, "'transformer.causal' is false by default"},
        {"transformer.context", "null", "'transformer.context' is null"},
        {"transformer.context", NULL, "'transformer.context' is missing"},
        {"transformer.conv_layout", NULL, "'transformer.conv_layout'"},
        {"transformer.max_period", "\"x\"", "'transformer.max_period'"},
        {"transformer.gating", "\"silu\"", "'transformer.gating' is 'silu', expected 'none'"},
        {"transformer.norm", "\"rms_norm\"", "'transformer.norm'"},
        {"transformer.positional_embedding", "\"none\"", "'transformer.positional_embedding'"},
        {"transformer.dim_feedforward", "0", "'transformer.dim_feedforward'"},
        {"transformer.input_dimension", "64", "'transformer.input_dimension' differs"},
        {"transformer.output_dimensions", "[128,128]", "'transformer.output_dimensions'"},
        {"transformer.output_dimensions", "[64]", "'transformer.output_dimensions' differs"},
        {"transformer.cross_attention", "true", "'transformer.cross_attention'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct mimi_config c;
        CHECK_FAILS(parse_mimi(cases[i].key, cases[i].value, &c), MOSHI_ERROR_CHECKPOINT,
                    cases[i].piece);
        CHECK(is_sentence() && c.sample_rate == 0);
    }
}

/* Every key in turn with every odd value: a config within its limits, or a sentence. */
static void any_value_of_any_key_gives_a_config_or_a_sentence(void)
{
    static const char *const values[] = {NULL,
                                         "null",
                                         "true",
                                         "false",
                                         "0",
                                         "-1",
                                         "1",
                                         "2",
                                         "3",
                                         "7.5",
                                         "64",
                                         "65536",
                                         "1e18",
                                         "1e-300",
                                         "-1e300",
                                         "\"\"",
                                         "\"rope\"",
                                         "\"none\"",
                                         "\"silu\"",
                                         "\"layer_norm\"",
                                         "[]",
                                         "[0]",
                                         "[1,2,3,4,5,6,7,0]",
                                         "[[]]",
                                         "{}",
                                         "{\"sum\":[\"a\"]}",
                                         "{\"a\":{}}",
                                         "{\"temp\":[]}"};
    static const char *const more[] = {"text_card_out",
                                       "norm_emb",
                                       "fuser",
                                       "conditioners",
                                       "lm_gen_config",
                                       "stt_config",
                                       "kv_repeat",
                                       "depformer_kv_repeat",
                                       "depformer_norm",
                                       "depformer_max_period",
                                       "depformer_weights_per_step_schedule",
                                       "depformer_low_rank_embeddings",
                                       "quantize",
                                       "cross_attention",
                                       "lora_name",
                                       "moshi_name",
                                       "existing_text_padding_id"};
    size_t n_values = sizeof values / sizeof values[0], n_base = 0;
    size_t n_more = sizeof more / sizeof more[0];
    while (lm_base[n_base].key != NULL) {
        n_base++;
    }
    for (int round = 0; round < 3000; round++) {
        struct pair changes[4] = {{NULL, NULL}};
        int n = 1 + round % 3;
        for (int i = 0; i < n; i++) {
            size_t k = next_random() % (n_base + n_more);
            changes[i].key = k < n_base ? lm_base[k].key : more[k - n_base];
            changes[i].value = values[next_random() % n_values];
            for (int j = 0; j < i; j++) {
                if (strcmp(changes[j].key, changes[i].key) == 0) {
                    changes[i] = (struct pair){"made_up", "1"};
                    n = i + 1;
                }
            }
        }
        changes[n] = (struct pair){NULL, NULL};
        struct lm_config c;
        int status = parse_lm(changes, &c);
        CHECK(status == MOSHI_OK || (status == MOSHI_ERROR_CHECKPOINT && is_sentence()));
        if (status == MOSHI_OK) {
            const struct transformer_config *t = &c.temporal, *d = &c.depth;
            CHECK(t->dim % t->heads == 0 && t->heads % t->kv_heads == 0 && t->feedforward > 0);
            CHECK(c.dep_q == 0 || (d->dim % d->heads == 0 && d->heads % d->kv_heads == 0 &&
                                   d->feedforward > 0 && d->weight_sets <= c.dep_q));
        }
        lm_config_free(&c);
    }
}

static void every_prefix_of_a_config_is_refused(void)
{
    char text[8192];
    struct pair none[] = {{NULL, NULL}};
    size_t bytes = put_object(text, lm_base, none, "");
    for (size_t i = 0; i < bytes; i++) {
        struct lm_config c;
        char *copy = malloc(i > 0 ? i : 1);
        memcpy(copy, text, i);
        int status = lm_config_parse(copy, i, "cut", &c);
        free(copy);
        CHECK(status == MOSHI_ERROR_CHECKPOINT && is_sentence());
    }
}

/* ---- run --------------------------------------------------------------------------------- */

#define TEST(name) {#name, name}

static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    TEST(a_failure_returns_its_status_and_keeps_its_sentence),
    TEST(a_sentence_is_one_line_of_utf8),
    TEST(a_long_sentence_keeps_both_ends),
    TEST(a_sentence_belongs_to_its_thread),
    TEST(formats_have_names_both_ways),
    TEST(utf8_lengths_are_strict),
    TEST(a_mapped_file_equals_a_copied_one),
    TEST(what_is_no_file_gives_a_sentence),
    TEST(given_back_pages_read_as_zeros),
#ifdef __SANITIZE_ADDRESS__
    TEST(the_sanitizer_knows_where_reserved_memory_ends),
#endif
    TEST(the_machine_answers),
    TEST(one_wake_reaches_every_waiting_thread),
    TEST(json_values_are_read),
    TEST(broken_json_is_refused_with_its_place),
    TEST(every_prefix_of_json_is_refused),
    TEST(random_json_gives_a_tree_or_a_sentence),
    TEST(numbers_are_exact),
    TEST(integers_are_whole_and_below_2_to_53),
    TEST(deep_nesting_is_refused_and_64_levels_are_not),
    TEST(more_values_than_any_model_has_are_refused),
    TEST(a_key_twice_is_found_quickly_among_many),
    TEST(tensors_are_read_in_the_order_of_their_names),
    TEST(every_dtype_has_its_name_and_size),
    TEST(a_file_without_tensors_is_fine),
    TEST(each_lie_of_a_header_has_its_sentence),
    TEST(a_header_length_is_checked_before_use),
    TEST(every_truncation_of_a_tensor_file_is_refused),
    TEST(every_changed_byte_gives_a_table_or_a_sentence),
    TEST(shards_make_one_table),
    TEST(each_lie_of_an_index_has_its_sentence),
    TEST(a_hostile_name_stays_out_of_the_way_of_the_sentence),
    TEST(shape_texts_fit),
    TEST(without_a_config_it_is_the_7b),
    TEST(a_small_config_is_read),
    TEST(defaults_are_upstreams_constructor_defaults),
    TEST(hidden_units_follow_upstreams_rule),
    TEST(norms_have_their_epsilons),
    TEST(the_depth_transformer_inherits_and_overrides),
    TEST(flags_without_support_yet_are_still_read),
    TEST(conditions_are_read_in_the_order_of_the_fuser),
    TEST(a_config_we_cannot_honour_names_its_key),
    TEST(too_many_conditions_are_refused),
    TEST(without_depth_its_keys_do_not_matter),
    TEST(without_a_mimi_config_it_is_the_published_codec),
    TEST(a_small_mimi_config_is_read),
    TEST(a_mimi_config_we_cannot_honour_names_its_key),
    TEST(any_value_of_any_key_gives_a_config_or_a_sentence),
    TEST(every_prefix_of_a_config_is_refused),
};

static void remove_folder(void)
{
    static const char *const names[] = {"file",
                                        "empty",
                                        "pipe",
                                        "good.safetensors",
                                        "dtype.safetensors",
                                        "none.safetensors",
                                        "bad.safetensors",
                                        "short.safetensors",
                                        "cut.safetensors",
                                        "changed.safetensors",
                                        "one.safetensors",
                                        "two.safetensors",
                                        "same.safetensors",
                                        "name.safetensors",
                                        "model.safetensors.index.json",
                                        "bad.index.json"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        (void)unlink(in_folder(names[i]));
    }
    (void)rmdir(folder);
}

int main(void)
{
    const char *base = getenv("TMPDIR");
    (void)snprintf(folder, sizeof folder, "%s/moshi_base_XXXXXX",
                   base != NULL && base[0] != '\0' ? base : "/tmp");
    if (mkdtemp(folder) == NULL) {
        printf("FAIL cannot make a folder for files: %s\n", folder);
        return 1;
    }
    int passed = 0, failed = 0;
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        problem[0] = '\0';
        tests[i].run();
        if (problem[0] == '\0') {
            printf("ok %s\n", tests[i].name);
            passed++;
        } else {
            printf("FAIL %s: %s\n", tests[i].name, problem);
            failed++;
        }
        (void)fflush(stdout);
    }
    remove_folder();
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
