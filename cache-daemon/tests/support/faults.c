/* A drive that is ill on command, under a real daemon: preloaded, it stands between the process and libc.
 *
 * Calls on files under $FAULTS_DIR are looked at; the others pass. $FAULTS_CONTROL holds one line:
 *   none          as the drive is
 *   slow N        N bytes a second, reads and writes together
 *   read E        reads fail with errno E
 *   write E       writes and syncs fail with errno E
 * What it cannot reach: system calls that do not go through libc (fallocate by rustix). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum side { READ, WRITE };

static pthread_mutex_t drive = PTHREAD_MUTEX_INITIALIZER;

static int is_ours(int fd) {
    const char *dir = getenv("FAULTS_DIR");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!dir || length < 0) return 0;
    path[length] = 0;
    size_t prefix = strlen(dir);
    return strncmp(path, dir, prefix) == 0 && path[prefix] == '/';
}

/* 0, or the errno that the call has to fail with; waits as long as a slow drive takes. */
static int fault(int fd, enum side side, size_t bytes) {
    const char *control = getenv("FAULTS_CONTROL");
    char line[64] = {0}, what[16] = {0};
    long number = 0;
    int saved = errno;
    if (!control || !is_ours(fd)) return errno = saved, 0;
    int file = syscall(SYS_openat, AT_FDCWD, control, O_RDONLY | O_CLOEXEC, 0);
    if (file < 0) return errno = saved, 0;
    ssize_t length = syscall(SYS_read, file, line, sizeof line - 1);
    syscall(SYS_close, file);
    errno = saved;
    if (length <= 0 || sscanf(line, "%15s %ld", what, &number) < 1) return 0;
    if (strcmp(what, side == READ ? "read" : "write") == 0) return (int)number;
    if (strcmp(what, "slow") == 0 && number > 0 && bytes > 0) {
        double seconds = (double)bytes / (double)number;
        struct timespec pause = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
        pthread_mutex_lock(&drive); /* One head. */
        nanosleep(&pause, NULL);
        pthread_mutex_unlock(&drive);
        errno = saved;
    }
    return 0;
}

static size_t total(const struct iovec *parts, int count) {
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
    return bytes;
}

#define PASS(name, type, fd, side, bytes, ...)                                                     \
    static type next;                                                                              \
    if (!next) next = (type)dlsym(RTLD_NEXT, name);                                                \
    int error = fault(fd, side, bytes);                                                            \
    if (error) return errno = error, -1;                                                           \
    return next(__VA_ARGS__)

typedef ssize_t (*at_call)(int, void *, size_t, off_t);
typedef ssize_t (*const_at_call)(int, const void *, size_t, off_t);
typedef ssize_t (*parts_call)(int, const struct iovec *, int, off_t);
typedef ssize_t (*write_call)(int, const void *, size_t);
typedef int (*sync_call)(int);

ssize_t pread(int fd, void *to, size_t n, off_t at) { PASS("pread", at_call, fd, READ, n, fd, to, n, at); }
ssize_t pread64(int fd, void *to, size_t n, off_t at) { PASS("pread64", at_call, fd, READ, n, fd, to, n, at); }
ssize_t preadv(int fd, const struct iovec *p, int n, off_t at) { PASS("preadv", parts_call, fd, READ, total(p, n), fd, p, n, at); }
ssize_t preadv64(int fd, const struct iovec *p, int n, off_t at) { PASS("preadv64", parts_call, fd, READ, total(p, n), fd, p, n, at); }
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) { PASS("pwrite", const_at_call, fd, WRITE, n, fd, from, n, at); }
ssize_t pwrite64(int fd, const void *from, size_t n, off_t at) { PASS("pwrite64", const_at_call, fd, WRITE, n, fd, from, n, at); }
ssize_t pwritev(int fd, const struct iovec *p, int n, off_t at) { PASS("pwritev", parts_call, fd, WRITE, total(p, n), fd, p, n, at); }
ssize_t pwritev64(int fd, const struct iovec *p, int n, off_t at) { PASS("pwritev64", parts_call, fd, WRITE, total(p, n), fd, p, n, at); }
ssize_t write(int fd, const void *from, size_t n) { PASS("write", write_call, fd, WRITE, n, fd, from, n); }
int fsync(int fd) { PASS("fsync", sync_call, fd, WRITE, 0, fd); }
int fdatasync(int fd) { PASS("fdatasync", sync_call, fd, WRITE, 0, fd); }
