/* What may live here: the reference for broadcasts. Every line goes from its sender to all members, by a loop of sends;
 * a member that cannot accept it does not get it. The rest of a line that was sent in part is kept: lines stay whole.
 *
 *     broadcast_epoll each|block       prints "listening PORT"; SIGTERM or SIGINT ends it
 *
 * each: a send per line and member; block: one for all whole lines of a read.
 */
#include "messages.h"

enum { SEND_BUFFER = 65536 };

struct connection {         /* all zero while nothing is pending, but for its place */
    struct unsent unsent;
    struct unfinished unfinished;
    size_t place;           /* in members */
};

static struct connection *connections;      /* by descriptor */
static int *members;                        /* descriptors */
static size_t connection_count, member_room, member_count;
static bool line_by_line;

static void end(int fd)
{
    struct connection *c = &connections[fd];
    members[c->place] = members[--member_count];
    connections[members[c->place]].place = c->place;
    free(c->unsent.data);
    free(c->unfinished.data);
    memset(c, 0, sizeof *c);
    close(fd);
}

static void opened(int fd)
{
    int size = SEND_BUFFER;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    connections = with_room(connections, &connection_count, sizeof *connections, fd);
    members = with_room(members, &member_room, sizeof *members, (int)member_count);
    connections[fd].place = member_count;
    members[member_count++] = fd;
    if (try_send(fd, "hello\n", 6) != 6)
        end(fd);
}

/* A member that is broken is left to its own event. */
static void broadcast(const char *data, size_t size)
{
    for (size_t i = 0; i < member_count; i++) {
        int fd = members[i];
        struct unsent *unsent = &connections[fd].unsent;
        ssize_t sent = unsent->data == NULL ? try_send(fd, data, size) : 0;
        if (sent > 0 && (size_t)sent < size && !keep(fd, unsent, data + sent, size - (size_t)sent))
            shutdown(fd, SHUT_RDWR);
    }
}

/* Broadcast all whole lines; how many bytes they were. */
static size_t broadcast_lines(const char *data, size_t size)
{
    const char *line = data, *newline = memrchr(data, '\n', size);
    size_t whole = newline == NULL ? 0 : (size_t)(newline + 1 - data);
    if (!line_by_line && whole > 0)
        broadcast(data, whole);
    while (line_by_line && line < data + whole) {
        newline = memchr(line, '\n', whole - (size_t)(line - data));
        broadcast(line, (size_t)(newline + 1 - line));
        line = newline + 1;
    }
    return whole;
}

static void handle(int fd)
{
    ssize_t size = read_input(fd, &connections[fd].unfinished);
    size_t done = size > 0 ? broadcast_lines(input, (size_t)size) : 0;
    if (size < 0 || (size > 0 && !keep_unfinished(&connections[fd].unfinished, input + done, (size_t)size - done)))
        end(fd);
}

static void ready(int fd)
{
    if (connections[fd].unsent.data == NULL)
        handle(fd);
    else if (!flush(fd, &connections[fd].unsent))
        end(fd);
}

int main(int argc, char **argv)
{
    line_by_line = argc == 2 && strcmp(argv[1], "each") == 0;
    if (!line_by_line && !(argc == 2 && strcmp(argv[1], "block") == 0)) {
        fprintf(stderr, "usage: %s each|block\n", argv[0]);
        return 2;
    }
    serve(-1);
    return 0;
}
