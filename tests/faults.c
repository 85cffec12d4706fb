/* Preloaded by test_faults.py: the n-th to m-th call of one function fails with one errno.
   FAULT=name:errno:n:m, counted from 1; "add" is epoll_ctl with EPOLL_CTL_ADD of a socket that was accepted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

static int fails(const char *name) {
    static char wanted[32];
    static int code, first, last, calls;
    const char *text = getenv("FAULT");
    if (text == NULL || (!wanted[0] && sscanf(text, "%31[^:]:%d:%d:%d", wanted, &code, &first, &last) != 4)) return 0;
    if (strcmp(wanted, name) != 0 || ++calls < first || calls > last) return 0;
    errno = code;
    return 1;
}

ssize_t send(int fd, const void *data, size_t size, int flags) {
    static ssize_t (*real)(int, const void *, size_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "send");
    return fails("send") ? -1 : real(fd, data, size, flags);
}

ssize_t recv(int fd, void *data, size_t size, int flags) {
    static ssize_t (*real)(int, void *, size_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "recv");
    return fails("recv") ? -1 : real(fd, data, size, flags);
}

int recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout) {
    static int (*real)(int, struct mmsghdr *, unsigned, int, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "recvmmsg");
    return fails("recvmmsg") ? -1 : real(fd, messages, count, flags, timeout);
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags) {
    static int (*real)(int, struct mmsghdr *, unsigned, int);
    if (!real) real = dlsym(RTLD_NEXT, "sendmmsg");
    return fails("sendmmsg") ? -1 : real(fd, messages, count, flags);
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
    static int (*real)(int, struct sockaddr *, socklen_t *, int);
    if (!real) real = dlsym(RTLD_NEXT, "accept4");
    return fails("accept4") ? -1 : real(fd, address, size, flags);
}

int epoll_ctl(int epfd, int op, int fd, struct epoll_event *event) {
    static int (*real)(int, int, int, struct epoll_event *);
    struct sockaddr_storage peer;
    socklen_t size = sizeof(peer);
    if (!real) real = dlsym(RTLD_NEXT, "epoll_ctl");
    if (op == EPOLL_CTL_ADD && getpeername(fd, (struct sockaddr *)&peer, &size) == 0 && peer.ss_family == AF_INET
        && fails("add")) return -1;
    if (op == EPOLL_CTL_MOD && fails("mod")) return -1;
    return real(epfd, op, fd, event);
}
