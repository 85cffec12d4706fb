/* What may live here: the echo server of echo_epoll.c, but one that finds every message in what it reads, and copies
 * each to the output on its own: what a server written in C does that has messages to handle. One send per read.
 *
 *     framing_epoll lines|length       prints "listening PORT"; SIGTERM or SIGINT ends it
 */
#include "messages.h"

struct connection {         /* all zero while nothing is pending */
    struct unsent unsent;
    struct unfinished unfinished;
};

static struct connection *connections;      /* by descriptor */
static size_t connection_count;
static char output[sizeof input];           /* what goes back is never more */
static size_t output_size;
static size_t (*handle_all)(const char *data, size_t size);

static void end(int fd)
{
    struct connection *c = &connections[fd];
    free(c->unsent.data);
    free(c->unfinished.data);
    memset(c, 0, sizeof *c);
    close(fd);
}

static void opened(int fd)
{
    connections = with_room(connections, &connection_count, sizeof *connections, fd);
}

static void append(const void *data, size_t size)
{
    memcpy(output + output_size, data, size);
    output_size += size;
}

/* Echo every whole line, "\n" or "\r\n" after it; how many bytes they were. */
static size_t handle_lines(const char *data, size_t size)
{
    const char *line = data, *newline;
    while ((newline = memchr(line, '\n', size - (size_t)(line - data))) != NULL) {
        size_t length = (size_t)(newline - line);
        append(line, length > 0 && newline[-1] == '\r' ? length - 1 : length);
        append("\n", 1);
        line = newline + 1;
    }
    return (size_t)(line - data);
}

/* Echo every whole message with its four bytes of length before it; how many bytes they were. */
static size_t handle_lengths(const char *data, size_t size)
{
    size_t position = 0;
    while (size - position >= 4) {
        uint32_t header;
        memcpy(&header, data + position, 4);
        size_t length = ntohl(header);
        if (size - position - 4 < length)
            break;
        append(&header, 4);
        append(data + position + 4, length);
        position += 4 + length;
    }
    return position;
}

static void echo(int fd)
{
    struct connection *c = &connections[fd];
    ssize_t sent, size = read_input(fd, &c->unfinished);
    if (size < 0) {
        end(fd);
    } else if (size > 0) {
        output_size = 0;
        size_t done = handle_all(input, (size_t)size);
        sent = output_size > 0 ? try_send(fd, output, output_size) : 0;
        if (sent < 0 || !keep_unfinished(&c->unfinished, input + done, (size_t)size - done)
            || ((size_t)sent < output_size && !keep(fd, &c->unsent, output + sent, output_size - (size_t)sent)))
            end(fd);
    }
}

static void ready(int fd)
{
    if (connections[fd].unsent.data == NULL)
        echo(fd);
    else if (!flush(fd, &connections[fd].unsent))
        end(fd);
}

int main(int argc, char **argv)
{
    bool lines = argc == 2 && strcmp(argv[1], "lines") == 0;
    if (!lines && !(argc == 2 && strcmp(argv[1], "length") == 0)) {
        fprintf(stderr, "usage: %s lines|length\n", argv[0]);
        return 2;
    }
    handle_all = lines ? handle_lines : handle_lengths;
    serve(-1);
    return 0;
}
