/* What may live here: what the reference servers share: listen, accept, wait, send, end on a signal. One thread,
 * level-triggered epoll. What an event means is the including program's.
 *
 * What a send does not accept is kept; until it is gone, only EPOLLOUT is watched and nothing more is read from that
 * peer, so memory stays bounded.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { READ_SIZE = 65536, MAX_EVENTS = 1024, BACKLOG = 4096 };

struct unsent {             /* all zero while there is nothing */
    char *data;
    size_t start, end;
};

static int epoll_fd, listen_fd, signal_fd;

/* The program's: a connection was accepted, and is watched; it is readable, or writable while it has something unsent. */
static void opened(int fd);
static void ready(int fd);

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int control(int op, int fd, uint32_t events)
{
    struct epoll_event event = { .events = events, .data.fd = fd };
    return epoll_ctl(epoll_fd, op, fd, &event);
}

/* An array by descriptor that has room for `fd`; what is new in it is zero. */
static void *with_room(void *array, size_t *count, size_t size, int fd)
{
    size_t more = 2 * (size_t)fd + 64;
    if ((size_t)fd < *count)
        return array;
    array = realloc(array, more * size);
    if (array == NULL)
        die("realloc");
    memset((char *)array + *count * size, 0, (more - *count) * size);
    *count = more;
    return array;
}

/* Bytes sent, 0 if it would block, -1 if the connection is broken. */
static ssize_t try_send(int fd, const char *data, size_t size)
{
    ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
    return n < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOBUFS) ? 0 : n;
}

/* Keep it until flush() has sent it; false if the connection must end. */
static bool keep(int fd, struct unsent *unsent, const char *data, size_t size)
{
    unsent->start = 0;
    unsent->end = size;
    unsent->data = malloc(size);
    if (unsent->data == NULL || control(EPOLL_CTL_MOD, fd, EPOLLOUT) < 0)
        return false;
    memcpy(unsent->data, data, size);
    return true;
}

/* Send what was kept; false if the connection must end. */
static bool flush(int fd, struct unsent *unsent)
{
    ssize_t sent = try_send(fd, unsent->data + unsent->start, unsent->end - unsent->start);
    if (sent < 0)
        return false;
    unsent->start += (size_t)sent;
    if (unsent->start < unsent->end)
        return true;
    free(unsent->data);
    memset(unsent, 0, sizeof *unsent);
    return control(EPOLL_CTL_MOD, fd, EPOLLIN) == 0;
}

static void accept_all(void)
{
    for (;;) {
        int fd = accept4(listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == ECONNABORTED || errno == EINTR))
            continue;
        if (fd < 0) {
            if (errno != EAGAIN)
                die("accept4");
            return;
        }
        if (control(EPOLL_CTL_ADD, fd, EPOLLIN) < 0) {
            perror("epoll_ctl");
            close(fd);
        } else {
            opened(fd);
        }
    }
}

static void start_listening(void)
{
    struct sockaddr_in address = { .sin_family = AF_INET };
    socklen_t size = sizeof address;
    int one = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listen_fd < 0)
        die("socket");
    setsockopt(listen_fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);      /* Linux: inherited by what it accepts */
    if (bind(listen_fd, (struct sockaddr *)&address, size) < 0 || listen(listen_fd, BACKLOG) < 0)
        die("listen");
    if (getsockname(listen_fd, (struct sockaddr *)&address, &size) < 0)
        die("getsockname");
    printf("listening %d\n", ntohs(address.sin_port));
    fflush(stdout);
}

static void start_catching_signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    if (signal_fd < 0)
        die("signalfd");
}

/* Print "listening PORT" and serve until SIGTERM or SIGINT; `wait_ms` -1 sleeps until there is something to do, 0
 * spins. */
static void serve(int wait_ms)
{
    static struct epoll_event events[MAX_EVENTS];
    start_catching_signals();
    start_listening();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0 || control(EPOLL_CTL_ADD, listen_fd, EPOLLIN) < 0 || control(EPOLL_CTL_ADD, signal_fd, EPOLLIN) < 0)
        die("epoll");
    for (;;) {
        int n = epoll_wait(epoll_fd, events, MAX_EVENTS, wait_ms);
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listen_fd)
                accept_all();
            else if (fd == signal_fd)
                return;
            else
                ready(fd);
        }
    }
}
