/* What may live here: the reference for TLS, an echo server in plain C on OpenSSL with memory BIOs: one recv of up to 64 KiB
 * per event, and one send for all that it becomes.
 *
 *     tls_epoll CERTIFICATE KEY           prints "listening PORT"; SIGTERM or SIGINT ends it
 */
#include "server.h"
#include <openssl/err.h>
#include <openssl/ssl.h>

struct connection {
    SSL *ssl;
    BIO *in, *out;              /* the SSL's */
    struct unsent unsent;
};

static SSL_CTX *context;
static struct connection *connections;  /* by descriptor */
static size_t connection_count;
static char buffer[READ_SIZE];

static void end(int fd)
{
    struct connection *c = &connections[fd];
    SSL_free(c->ssl);
    free(c->unsent.data);
    memset(c, 0, sizeof *c);
    close(fd);
}

static void opened(int fd)
{
    struct connection *c;
    connections = with_room(connections, &connection_count, sizeof *connections, fd);
    c = &connections[fd];
    c->ssl = SSL_new(context);
    c->in = BIO_new(BIO_s_mem());
    c->out = BIO_new(BIO_s_mem());
    if (c->ssl == NULL || c->in == NULL || c->out == NULL)
        die("OpenSSL");
    SSL_set_bio(c->ssl, c->in, c->out);
    SSL_set_accept_state(c->ssl);
}

/* Send what OpenSSL has for the peer; false if the connection must end. */
static bool send_all(int fd, struct connection *c)
{
    char *data;
    long size = BIO_get_mem_data(c->out, &data);
    ssize_t sent = size > 0 ? try_send(fd, data, (size_t)size) : 0;
    bool good = sent >= 0 && (sent == size || keep(fd, &c->unsent, data + sent, (size_t)(size - sent)));
    (void)BIO_reset(c->out);
    return good;
}

/* Echo what has come; false at the end of the stream. */
static bool echo(int fd, struct connection *c)
{
    int plain, error = SSL_ERROR_NONE;
    ssize_t got = recv(fd, buffer, sizeof buffer, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    if (got <= 0 || BIO_write(c->in, buffer, (int)got) != got)
        return false;
    ERR_clear_error();
    while (error == SSL_ERROR_NONE && (SSL_in_init(c->ssl) || BIO_pending(c->in) > 0)) {
        plain = SSL_read(c->ssl, buffer, sizeof buffer);
        if (plain > 0)
            SSL_write(c->ssl, buffer, plain);
        else
            error = SSL_get_error(c->ssl, plain);
    }
    if (error == SSL_ERROR_ZERO_RETURN)
        SSL_shutdown(c->ssl);
    return send_all(fd, c) && (error == SSL_ERROR_NONE || error == SSL_ERROR_WANT_READ);
}

static void ready(int fd)
{
    struct connection *c = &connections[fd];
    if (c->unsent.data != NULL ? !flush(fd, &c->unsent) : !echo(fd, c))
        end(fd);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    context = SSL_CTX_new(TLS_server_method());
    if (context == NULL || SSL_CTX_use_certificate_chain_file(context, argv[1]) != 1
            || SSL_CTX_use_PrivateKey_file(context, argv[2], SSL_FILETYPE_PEM) != 1)
        die("OpenSSL");
    SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
    serve(-1);
    return 0;
}
