/* What may live here: the reference that every ratio is taken against, a careful echo server in plain C.
 *
 * One thread, level-triggered epoll, one recv of up to 64 KiB per event, then send. What a send does not take is kept
 * with the connection; until it is gone, only EPOLLOUT is watched and nothing more is read, so memory stays bounded.
 * An end of input is therefore only ever seen once everything has been echoed: flush, then close, comes by itself.
 *
 *     echo_epoll [PORT]        prints "listening PORT"; SIGTERM or SIGINT ends it
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

struct connection {         /* by descriptor; all zero while nothing is pending */
    char *pending;
    size_t start, end;
};

static struct connection *connections;
static size_t connection_count;
static char buffer[READ_SIZE];
static int epoll_fd, listen_fd, signal_fd;

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

static void end(int fd)
{
    free(connections[fd].pending);
    memset(&connections[fd], 0, sizeof connections[fd]);
    close(fd);
}

static void make_room(int fd)
{
    size_t count = 2 * (size_t)fd + 64;
    if ((size_t)fd < connection_count)
        return;
    connections = realloc(connections, count * sizeof *connections);
    if (connections == NULL)
        die("realloc");
    memset(connections + connection_count, 0, (count - connection_count) * sizeof *connections);
    connection_count = count;
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
        make_room(fd);
        if (control(EPOLL_CTL_ADD, fd, EPOLLIN) < 0) {
            perror("epoll_ctl");
            close(fd);
        }
    }
}

/* Bytes sent, 0 if it would block, -1 if the connection is broken. */
static ssize_t try_send(int fd, const char *data, size_t size)
{
    ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
    return n < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOBUFS) ? 0 : n;
}

static void echo(int fd)
{
    struct connection *c = &connections[fd];
    ssize_t sent, got = recv(fd, buffer, sizeof buffer, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    sent = got > 0 ? try_send(fd, buffer, (size_t)got) : -1;
    if (sent < 0) {
        end(fd);
    } else if (sent < got) {
        c->start = 0;
        c->end = (size_t)(got - sent);
        c->pending = malloc(c->end);
        if (c->pending == NULL || control(EPOLL_CTL_MOD, fd, EPOLLOUT) < 0) {
            end(fd);
            return;
        }
        memcpy(c->pending, buffer + sent, c->end);
    }
}

static void flush(int fd)
{
    struct connection *c = &connections[fd];
    ssize_t sent = try_send(fd, c->pending + c->start, c->end - c->start);
    if (sent < 0) {
        end(fd);
        return;
    }
    c->start += (size_t)sent;
    if (c->start < c->end)
        return;
    free(c->pending);
    memset(c, 0, sizeof *c);
    if (control(EPOLL_CTL_MOD, fd, EPOLLIN) < 0)
        end(fd);
}

static void start_listening(uint16_t port)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port) };
    socklen_t size = sizeof address;
    int one = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listen_fd < 0)
        die("socket");
    setsockopt(listen_fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
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

static void serve(void)
{
    static struct epoll_event events[MAX_EVENTS];
    for (;;) {
        int n = epoll_wait(epoll_fd, events, MAX_EVENTS, -1);
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listen_fd)
                accept_all();
            else if (fd == signal_fd)
                return;
            else if (connections[fd].pending != NULL)
                flush(fd);
            else
                echo(fd);
        }
    }
}

int main(int argc, char **argv)
{
    long port = argc > 1 ? strtol(argv[1], NULL, 10) : 0;
    if (argc > 2 || port < 0 || port > 65535) {
        fprintf(stderr, "usage: %s [PORT]\n", argv[0]);
        return 2;
    }
    start_catching_signals();
    start_listening((uint16_t)port);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0 || control(EPOLL_CTL_ADD, listen_fd, EPOLLIN) < 0 || control(EPOLL_CTL_ADD, signal_fd, EPOLLIN) < 0)
        die("epoll");
    serve();
    return 0;
}
