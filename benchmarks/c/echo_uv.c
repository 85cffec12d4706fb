/* What may live here: the program of echo_epoll.c on libuv, the library that uvloop is made of.
 *
 * One read of up to 64 KiB, then a write that is tried at once; what it does not accept is kept, and nothing more is
 * read from that peer until it is gone.
 *
 *     echo_uv          prints "listening PORT"; SIGTERM or SIGINT ends it
 */
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <uv.h>

enum { READ_SIZE = 65536, BACKLOG = 4096 };

struct unsent {
    uv_write_t request;
    char data[];
};

static uv_loop_t *loop;
static char buffer[READ_SIZE];

static void must(int status, const char *what)
{
    if (status < 0) {
        fprintf(stderr, "echo_uv: %s: %s\n", what, uv_strerror(status));
        exit(1);
    }
}

static void closed(uv_handle_t *client)
{
    free(client);
}

static void end(uv_stream_t *client)
{
    if (!uv_is_closing((uv_handle_t *)client))
        uv_close((uv_handle_t *)client, closed);
}

static void lend(uv_handle_t *client, size_t suggested, uv_buf_t *lent)
{
    (void)client, (void)suggested;
    *lent = uv_buf_init(buffer, sizeof buffer);
}

static void received(uv_stream_t *client, ssize_t size, const uv_buf_t *lent);

static void flushed(uv_write_t *request, int status)
{
    uv_stream_t *client = request->handle;
    free(request->data);
    if (status < 0 || uv_read_start(client, lend, received) < 0)
        end(client);
}

static void keep(uv_stream_t *client, const char *data, size_t size)
{
    struct unsent *unsent = malloc(sizeof *unsent + size);
    if (unsent == NULL) {
        end(client);
        return;
    }
    uv_buf_t rest = uv_buf_init(unsent->data, (unsigned)size);
    memcpy(unsent->data, data, size);
    unsent->request.data = unsent;
    uv_read_stop(client);
    if (uv_write(&unsent->request, client, &rest, 1, flushed) < 0) {
        free(unsent);
        end(client);
    }
}

static void received(uv_stream_t *client, ssize_t size, const uv_buf_t *lent)
{
    if (size == 0)
        return;                             /* there was nothing to read */
    if (size < 0) {
        end(client);
        return;
    }
    uv_buf_t all = uv_buf_init(lent->base, (unsigned)size);
    int sent = uv_try_write(client, &all, 1);
    if (sent == UV_EAGAIN)
        sent = 0;
    if (sent < 0)
        end(client);
    else if (sent < size)
        keep(client, lent->base + sent, (size_t)(size - sent));
}

static void connected(uv_stream_t *server, int status)
{
    must(status, "listen");
    uv_tcp_t *client = malloc(sizeof *client);
    if (client == NULL)
        must(UV_ENOMEM, "accept");
    must(uv_tcp_init(loop, client), "uv_tcp_init");
    if (uv_accept(server, (uv_stream_t *)client) < 0 || uv_tcp_nodelay(client, 1) < 0
        || uv_read_start((uv_stream_t *)client, lend, received) < 0)
        end((uv_stream_t *)client);
}

static void stop(uv_signal_t *handle, int number)
{
    (void)handle, (void)number;
    uv_stop(loop);
}

int main(void)
{
    static const int numbers[] = { SIGTERM, SIGINT };
    static uv_signal_t signals[2];
    static uv_tcp_t server;
    struct sockaddr_in address;
    int size = sizeof address;
    loop = uv_default_loop();
    for (int i = 0; i < 2; i++) {
        must(uv_signal_init(loop, &signals[i]), "uv_signal_init");
        must(uv_signal_start(&signals[i], stop, numbers[i]), "uv_signal_start");
    }
    must(uv_ip4_addr("127.0.0.1", 0, &address), "uv_ip4_addr");
    must(uv_tcp_init(loop, &server), "uv_tcp_init");
    must(uv_tcp_bind(&server, (struct sockaddr *)&address, 0), "bind");
    must(uv_listen((uv_stream_t *)&server, BACKLOG, connected), "listen");
    must(uv_tcp_getsockname(&server, (struct sockaddr *)&address, &size), "getsockname");
    printf("listening %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return uv_run(loop, UV_RUN_DEFAULT) < 0;
}
