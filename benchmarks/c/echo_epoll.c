/* What may live here: the reference that every ratio is taken against, a careful echo server in plain C.
 *
 * One recv of up to 64 KiB per event, then send. As nothing is read while something is unsent, an end of input is only
 * ever seen once everything has been echoed: flush, then close, comes by itself.
 *
 *     echo_epoll           prints "listening PORT"; SIGTERM or SIGINT ends it
 *     echo_epoll --spin    never sleeps
 */
#include "server.h"

static struct unsent *connections;      /* by descriptor */
static size_t connection_count;
static char buffer[READ_SIZE];

static void end(int fd)
{
    free(connections[fd].data);
    memset(&connections[fd], 0, sizeof connections[fd]);
    close(fd);
}

static void opened(int fd)
{
    connections = with_room(connections, &connection_count, sizeof *connections, fd);
}

static void echo(int fd)
{
    ssize_t sent, got = recv(fd, buffer, sizeof buffer, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    sent = got > 0 ? try_send(fd, buffer, (size_t)got) : -1;
    if (sent < 0 || (sent < got && !keep(fd, &connections[fd], buffer + sent, (size_t)(got - sent))))
        end(fd);
}

static void ready(int fd)
{
    if (connections[fd].data == NULL)
        echo(fd);
    else if (!flush(fd, &connections[fd]))
        end(fd);
}

int main(int argc, char **argv)
{
    serve(argc == 2 && strcmp(argv[1], "--spin") == 0 ? 0 : -1);
    return 0;
}
