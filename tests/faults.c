/* Preloaded into the process of tests/faults.py, which makes chosen calls fail or fall short while it runs.

   A call counts while `faults_on` is set and if it comes from the code between `from` and `to`: those of the core under
   test, and not those of the clients in the same process; or if it is one that only Python's sockets make, on behalf of
   any core. close and EPOLL_CTL_DEL are carried out before they fail, as
   in Linux, where the descriptor is gone in any case. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define CALLS(X) X(epoll_create1) X(epoll_add) X(epoll_mod) X(epoll_del) X(epoll_wait) X(epoll_pwait2) X(eventfd) \
    X(read) X(write) X(timerfd_create) X(timerfd_settime) X(accept4) X(recv) X(send) X(sendmsg) X(recvmsg) X(recvmmsg) \
    X(sendmmsg) X(recvfrom) X(sendto) X(sendfile) X(pread) X(shutdown) X(setsockopt) X(getsockopt) X(ioctl) X(fcntl) X(close) X(poll) \
    X(select) X(socket) X(bind) X(listen) X(connect) X(getsockname) X(getpeername) X(malloc) X(realloc) X(python) \
    X(SSL_read) X(SSL_write) X(SSL_shutdown) X(BIO_write)

#define NUMBER(name) n_##name,
#define NAME(name) #name,
enum { CALLS(NUMBER) COUNT };
const char *const faults_names[] = { CALLS(NAME) NULL };

int faults_on;              /* 2: allocations of Python, too */
long faults_calls[COUNT];   /* since the last faults_arm */
long faults_injected;
long faults_held;           /* pieces of memory that the core has, by malloc and free */
static uintptr_t from, to = UINTPTR_MAX;
static int armed = -1, how;
static long first, last;

void faults_range(uintptr_t start, uintptr_t end) { from = start; to = end; }

/* From the first-th call of it to the last-th: fail with errno `code`, or handle at most -code bytes (or events). */
void faults_arm(int call, long one, long other, int code) {
    memset(faults_calls, 0, sizeof(faults_calls));
    faults_injected = 0;
    armed = call; first = one; last = other; how = code;
}

static int is_ours(void *caller) { return (uintptr_t)caller - from < to - from; }

/* 0: the call is to be carried out; else an errno, or less than 0: minus the most that it may handle. */
static int fault(int call, void *caller) {
    if (!faults_on || !is_ours(caller)) return 0;
    faults_calls[call]++;
    if (call != armed || faults_calls[call] < first || faults_calls[call] > last) return 0;
    faults_injected++;
    if (how > 0) errno = how;
    return how;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CALLER __builtin_return_address(0)
#define SHORT(size, f) ((f) < 0 && (size) > (size_t)-(f) ? (size_t)-(f) : (size))
#define PLAIN(name, parameters, ...) \
    int name parameters { REAL(name); return fault(n_##name, CALLER) > 0 ? -1 : real(__VA_ARGS__); }
#define OF_ANYBODY(name, parameters, ...) \
    int name parameters { REAL(name); return fault(n_##name, (void *)from) > 0 ? -1 : real(__VA_ARGS__); }
#define SIZED(name, parameters, size, ...) \
    ssize_t name parameters { \
        REAL(name); \
        int f = fault(n_##name, CALLER); \
        size = SHORT(size, f); \
        return f > 0 ? -1 : real(__VA_ARGS__); \
    }

PLAIN(epoll_create1, (int flags), flags)
PLAIN(eventfd, (unsigned int value, int flags), value, flags)
PLAIN(timerfd_create, (clockid_t clock, int flags), clock, flags)
PLAIN(timerfd_settime, (int fd, int flags, const struct itimerspec *value, struct itimerspec *before),
      fd, flags, value, before)
PLAIN(accept4, (int fd, struct sockaddr *address, socklen_t *size, int flags), fd, address, size, flags)
PLAIN(shutdown, (int fd, int side), fd, side)
PLAIN(setsockopt, (int fd, int level, int name, const void *value, socklen_t size), fd, level, name, value, size)
PLAIN(getsockopt, (int fd, int level, int name, void *value, socklen_t *size), fd, level, name, value, size)
PLAIN(poll, (struct pollfd *fds, nfds_t count, int timeout), fds, count, timeout)
PLAIN(select, (int count, fd_set *r, fd_set *w, fd_set *e, struct timeval *timeout), count, r, w, e, timeout)
OF_ANYBODY(socket, (int family, int type, int protocol), family, type, protocol)
OF_ANYBODY(bind, (int fd, const struct sockaddr *address, socklen_t size), fd, address, size)
OF_ANYBODY(listen, (int fd, int backlog), fd, backlog)
OF_ANYBODY(connect, (int fd, const struct sockaddr *address, socklen_t size), fd, address, size)
OF_ANYBODY(getsockname, (int fd, struct sockaddr *address, socklen_t *size), fd, address, size)
OF_ANYBODY(getpeername, (int fd, struct sockaddr *address, socklen_t *size), fd, address, size)
SIZED(recvfrom, (int fd, void *data, size_t size, int flags, struct sockaddr *address, socklen_t *room),
      size, fd, data, size, flags, address, room)
SIZED(sendto, (int fd, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t room),
      size, fd, data, size, flags, address, room)
SIZED(read, (int fd, void *data, size_t size), size, fd, data, size)
SIZED(write, (int fd, const void *data, size_t size), size, fd, data, size)
SIZED(recv, (int fd, void *data, size_t size, int flags), size, fd, data, size, flags)
SIZED(send, (int fd, const void *data, size_t size, int flags), size, fd, data, size, flags)
SIZED(sendfile, (int out, int in, off_t *offset, size_t size), size, out, in, offset, size)
SIZED(pread, (int fd, void *to, size_t size, off_t offset), size, fd, to, size, offset)
ssize_t pread64(int fd, void *to, size_t size, off64_t offset) __attribute__((alias("pread")));
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) __attribute__((alias("sendfile")));

int epoll_wait(int epfd, struct epoll_event *events, int room, int timeout) {
    REAL(epoll_wait);
    int f = fault(n_epoll_wait, CALLER);
    return f > 0 ? -1 : real(epfd, events, SHORT((size_t)room, f), timeout);
}

int recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout) {
    REAL(recvmmsg);
    int f = fault(n_recvmmsg, CALLER);
    return f > 0 ? -1 : real(fd, messages, SHORT((size_t)count, f), flags, timeout);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags) {
    REAL(sendmmsg);
    int f = fault(n_sendmmsg, CALLER);
    return f > 0 ? -1 : real(fd, messages, SHORT((size_t)count, f), flags);
}

int epoll_pwait2(int epfd, struct epoll_event *events, int room, const struct timespec *timeout,
                 const sigset_t *mask) {
    REAL(epoll_pwait2);
    int f = fault(n_epoll_pwait2, CALLER);
    return f > 0 ? -1 : real(epfd, events, SHORT((size_t)room, f), timeout, mask);
}

int epoll_ctl(int epfd, int op, int fd, struct epoll_event *event) {
    REAL(epoll_ctl);
    int f = fault(op == EPOLL_CTL_ADD ? n_epoll_add : op == EPOLL_CTL_MOD ? n_epoll_mod : n_epoll_del, CALLER);
    if (f > 0 && op == EPOLL_CTL_DEL) { real(epfd, op, fd, event); errno = f; }
    return f > 0 ? -1 : real(epfd, op, fd, event);
}

int ioctl(int fd, unsigned long request, ...) {
    REAL(ioctl);
    va_list arguments;
    va_start(arguments, request);
    void *value = va_arg(arguments, void *);
    va_end(arguments);
    return fault(n_ioctl, CALLER) > 0 ? -1 : real(fd, request, value);
}

int fcntl(int fd, int command, ...) {
    REAL(fcntl);
    va_list arguments;
    va_start(arguments, command);
    void *value = va_arg(arguments, void *);
    va_end(arguments);
    return fault(n_fcntl, CALLER) > 0 ? -1 : real(fd, command, value);
}
int fcntl64(int fd, int command, ...) __attribute__((alias("fcntl")));

int close(int fd) {
    REAL(close);
    int f = fault(n_close, CALLER), r = real(fd);
    if (f > 0) errno = f;
    return f > 0 ? -1 : r;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    REAL(sendmsg);
    int f = fault(n_sendmsg, CALLER);
    struct msghdr less = *message;
    struct iovec part;
    if (f < 0 && message->msg_iovlen) {  /* the first piece, or some of it */
        part = message->msg_iov[0];
        part.iov_len = SHORT(part.iov_len, f);
        less.msg_iov = &part;
        less.msg_iovlen = 1;
    }
    return f > 0 ? -1 : real(fd, &less, flags);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags) {
    REAL(recvmsg);
    return fault(n_recvmsg, CALLER) > 0 ? -1 : real(fd, message, flags);
}

/* --- OpenSSL --- */

/* The core looks its functions up, and only the core gets these. A call that fails does nothing else, and SSL_get_error
   then has the code. */
static void *openssl[COUNT], *openssl_get_error;
static int openssl_failed;

static int openssl_fails(int call) {
    int f = fault(call, (void *)from);
    if (f > 0) openssl_failed = f;
    return f > 0;
}

#define MOVES(name) static int faulty_##name(void *one, void *data, int size) { \
        return openssl_fails(n_##name) ? -1 : ((int (*)(void *, void *, int))openssl[n_##name])(one, data, size); \
    }
MOVES(SSL_read)
MOVES(SSL_write)
MOVES(BIO_write)

static int faulty_SSL_shutdown(void *ssl) {
    return openssl_fails(n_SSL_shutdown) ? -1 : ((int (*)(void *))openssl[n_SSL_shutdown])(ssl);
}

static int faulty_SSL_get_error(const void *ssl, int value) {
    int failed = openssl_failed;
    openssl_failed = 0;
    return failed ? failed : ((int (*)(const void *, int))openssl_get_error)(ssl, value);
}

void *dlsym(void *library, const char *name) {
    static void *(*real)(void *, const char *);
    static void *const faulty[COUNT] = {
        [n_SSL_read] = faulty_SSL_read, [n_SSL_write] = faulty_SSL_write, [n_SSL_shutdown] = faulty_SSL_shutdown,
        [n_BIO_write] = faulty_BIO_write,
    };
    for (const char *const *version = (const char *const []){"GLIBC_2.34", "GLIBC_2.17", "GLIBC_2.2.5", NULL};
         !real && *version; version++)
        real = (void *(*)(void *, const char *))dlvsym(RTLD_NEXT, "dlsym", *version);
    void *found = real(library, name);
    if (found == NULL || from == 0 || !is_ours(CALLER)) return found;
    for (int call = 0; call < COUNT; call++)
        if (faulty[call] && strcmp(name, faults_names[call]) == 0) {
            openssl[call] = found;
            return faulty[call];
        }
    if (strcmp(name, "SSL_get_error") == 0) {
        openssl_get_error = found;
        return faulty_SSL_get_error;
    }
    return found;
}

/* --- memory --- */

void *malloc(size_t size) {
    REAL(malloc);
    void *memory = fault(n_malloc, CALLER) > 0 ? NULL : real(size);
    if (memory != NULL && is_ours(CALLER)) faults_held++;
    return memory;
}

void *realloc(void *before, size_t size) {
    REAL(realloc);
    void *memory = fault(n_realloc, CALLER) > 0 ? NULL : real(before, size);
    if (memory != NULL && before == NULL && is_ours(CALLER)) faults_held++;
    return memory;
}

void free(void *memory) {
    REAL(free);
    if (memory != NULL && is_ours(CALLER)) faults_held--;
    real(memory);
}

/* PyMemAllocatorEx of CPython's documentation, in front of the allocators of its three domains. */
struct allocator {
    void *context;
    void *(*malloc)(void *, size_t);
    void *(*calloc)(void *, size_t, size_t);
    void *(*realloc)(void *, void *, size_t);
    void (*free)(void *, void *);
};
static struct allocator pythons[3];

static int python_fails(void) {
    if (faults_on < 2) return 0;
    faults_calls[n_python]++;
    if (armed != n_python || faults_calls[n_python] < first || faults_calls[n_python] > last) return 0;
    faults_injected++;
    return 1;
}

static void *python_malloc(void *context, size_t size) {
    struct allocator *python = context;
    return python_fails() ? NULL : python->malloc(python->context, size);
}

static void *python_calloc(void *context, size_t count, size_t size) {
    struct allocator *python = context;
    return python_fails() ? NULL : python->calloc(python->context, count, size);
}

static void *python_realloc(void *context, void *memory, size_t size) {
    struct allocator *python = context;
    return python_fails() ? NULL : python->realloc(python->context, memory, size);
}

static void python_free(void *context, void *memory) {
    struct allocator *python = context;
    python->free(python->context, memory);
}

void faults_hook_python(void) {
    void (*get)(int, struct allocator *) = (void (*)(int, struct allocator *))dlsym(RTLD_DEFAULT, "PyMem_GetAllocator");
    void (*set)(int, struct allocator *) = (void (*)(int, struct allocator *))dlsym(RTLD_DEFAULT, "PyMem_SetAllocator");
    for (int domain = 0; domain < 3; domain++) {
        struct allocator ours = { &pythons[domain], python_malloc, python_calloc, python_realloc, python_free };
        get(domain, &pythons[domain]);
        set(domain, &ours);
    }
}
