/* Strikes processes at one of this process's file operations.
 *
 * Preloaded, these functions stand before the C library's. They count what is done below one
 * folder, by Python, by Rust, by whatever is linked, and at the first of the operations that
 * `strike` names they send a signal, set the clock, or tell of a full disk. What a loading
 * worker inherits counts for itself. Linux and 64 bits only.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char below[4096];
static size_t length;
static atomic_long count;
static long first, last;
static int number, fault, half;
static int pids[64], victims;
static long jump;
static _Atomic long ahead;        /* seconds that the clock has been set on */
static unsigned char ours[65536]; /* descriptors of what lies below the folder */

/* Args: the folder; the operations to strike at, from 1; the signal or 0; whom it is sent to;
 * whether a write is half done then; the error or 0; seconds by which the clock jumps. */
void strike(const char *folder, long from, long to, int sent, const int *to_whom, int how_many,
            int torn, int error, long seconds) {
    strncpy(below, folder, sizeof below - 1);
    length = strlen(below);
    first = from, last = to, number = sent, victims = how_many;
    memcpy(pids, to_whom, how_many * sizeof *pids);
    half = torn, fault = error, jump = seconds;
    count = 0;
}

long operations(void) { return count; }

static int is_ours(int at, const char *path) {
    if (!length || !path) return 0;
    if (path[0] == '/') return !strncmp(path, below, length);
    return at >= 0 && at < (int)sizeof ours && ours[at];
}

static int is_open(int file) { return length && file >= 0 && file < (int)sizeof ours && ours[file]; }

/* Gives the error with which the operation is to fail, or 0. */
static int struck(int fills) {
    long now = ++count;
    if (now == first) {
        ahead += jump;
        for (int i = 0; number && i < victims; i++)
            if (pids[i] > 0 && pids[i] != getpid()) kill(pids[i], number);
        for (int i = 0; number && i < victims; i++)
            if (pids[i] == getpid()) kill(pids[i], number);
    }
    return fault && fills && now >= first && now <= last ? fault : 0;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define STRIKE(mine, fills) \
    if (mine) { \
        int wrong = struck(fills); \
        if (wrong) { errno = wrong; return -1; } \
    }

static int opened(int file, int mine) {
    if (file >= 0 && file < (int)sizeof ours) ours[file] = mine;
    return file;
}

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE int mine = is_ours(-1, path); \
        STRIKE(mine, flags & O_CREAT) \
        return opened(real(path, flags, mode), mine); \
    }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(name); \
        MODE int mine = is_ours(at, path); \
        STRIKE(mine, flags & O_CREAT) \
        return opened(real(at, path, flags, mode), mine); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int file) {
    REAL(close);
    if (file >= 0 && file < (int)sizeof ours) ours[file] = 0;
    return real(file);
}

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    int mine = is_open(file);
    if (mine && half && count + 1 == first) (void)!real(file, data, size / 2);
    STRIKE(mine, 1)
    return real(file, data, size);
}

#define ON_FILE(result, name, fills, args, given) \
    result name args { \
        REAL(name); \
        STRIKE(is_open(file), fills) \
        return real given; \
    }
ON_FILE(ssize_t, pwrite, 1, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
ON_FILE(ssize_t, pwrite64, 1, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
ON_FILE(ssize_t, writev, 1, (int file, const struct iovec *parts, int many), (file, parts, many))
ON_FILE(int, fsync, 1, (int file), (file))
ON_FILE(int, fdatasync, 1, (int file), (file))
ON_FILE(int, ftruncate, 1, (int file, off_t size), (file, size))
ON_FILE(int, ftruncate64, 1, (int file, off64_t size), (file, size))
ON_FILE(int, futimens, 0, (int file, const struct timespec times[2]), (file, times))

#define ON_PATH(name, fills, at, path, args, given) \
    int name args { \
        REAL(name); \
        STRIKE(is_ours(at, path), fills) \
        return real given; \
    }
ON_PATH(mkdir, 1, -1, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, 1, at, path, (int at, const char *path, mode_t mode), (at, path, mode))
ON_PATH(rmdir, 0, -1, path, (const char *path), (path))
ON_PATH(unlink, 0, -1, path, (const char *path), (path))
ON_PATH(unlinkat, 0, at, path, (int at, const char *path, int flags), (at, path, flags))
ON_PATH(rename, 1, -1, to, (const char *from, const char *to), (from, to))
ON_PATH(renameat, 1, at, to, (int from_at, const char *from, int at, const char *to), (from_at, from, at, to))
ON_PATH(renameat2, 1, at, to, (int from_at, const char *from, int at, const char *to, unsigned int flags), (from_at, from, at, to, flags))
ON_PATH(link, 1, -1, to, (const char *from, const char *to), (from, to))
ON_PATH(linkat, 1, at, to, (int from_at, const char *from, int at, const char *to, int flags), (from_at, from, at, to, flags))
ON_PATH(symlink, 1, -1, to, (const char *from, const char *to), (from, to))
ON_PATH(symlinkat, 1, at, to, (const char *from, int at, const char *to), (from, at, to))
ON_PATH(utimensat, 0, at, path, (int at, const char *path, const struct timespec times[2], int flags), (at, path, times, flags))

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += ahead;
    return result;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec, now->tv_usec = found.tv_nsec / 1000;
    return 0;
}
