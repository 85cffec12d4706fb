/* What may live here: clients that come and go: connect, one message to and fro, verified byte for byte, a FIN each way,
 * and the next connection. Nothing about the server.
 *
 * So many clients at a time are under way. A phase ends only when all of its connections have ended, so that the server
 * is idle whenever its CPU time is read, and connections and CPU time belong together.
 *
 *     warm-up  --warmup seconds, not counted
 *     measure  --seconds
 *
 * A client sends its FIN first, so its end is the one that stays in TIME_WAIT. Clients take turns with many source
 * addresses of loopback, so that their ports do not run out.
 *
 * If nothing happens for --patience seconds, what is missing counts as lost.
 */
#include "client.h"

enum { PERIOD = 65521, MAX_SIZE = 16384, MAX_EVENTS = 1024, SOURCES = 64 };

struct options {
    struct sockaddr_in address;
    size_t connections, size;
    double seconds, warmup, patience;
    int watch;
};

struct client {
    int fd;                                 /* -1: none at the moment */
    size_t offset, received;                /* where its message is in the pattern; bytes come back */
};

static struct options opt = { .connections = 50, .size = 256, .patience = 10 };
static struct client *clients;
static char pattern[PERIOD + MAX_SIZE], buffer[MAX_SIZE + 1];
static struct sockaddr_in source;           /* of the next connection */
static uint64_t begun, done, errors, lost_bytes;
static int epoll_fd;

static void fail(struct client *c, const char *why)
{
    if (errors++ < 5)
        fprintf(stderr, "churn: %s: %zu of %zu bytes back\n", why, c->received, opt.size);
    lost_bytes += opt.size - c->received;
    close(c->fd);
    c->fd = -1;
}

static void begin(struct client *c)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };
    source.sin_addr.s_addr = htonl((127u << 24 | 1u << 8 | 1u) + (uint32_t)(begun % SOURCES));   /* 127.0.1.1 and on */
    c->fd = connected(&opt.address, 0, &source);
    c->offset = begun++ * 40503u % PERIOD;
    c->received = 0;
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event) < 0)
        die("epoll_ctl");
    if (send(c->fd, pattern + c->offset, opt.size, MSG_NOSIGNAL) != (ssize_t)opt.size)
        fail(c, "send");                    /* it fits into any send buffer */
}

/* Read once; false as long as the connection has not ended. */
static bool ended(struct client *c)
{
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN)
        return false;
    if (n < 0)
        fail(c, strerror(errno));
    else if (n == 0 && c->received < opt.size)
        fail(c, "the server closed it");
    else if ((size_t)n > opt.size - c->received)
        fail(c, "more came back than was sent");
    else if (memcmp(buffer, pattern + c->offset + c->received, (size_t)n) != 0)
        fail(c, "a wrong byte came back");
    if (c->fd < 0)
        return true;
    c->received += (size_t)n;
    if (n == 0) {
        done++;
        close(c->fd);
        c->fd = -1;
    } else if (c->received == opt.size) {
        shutdown(c->fd, SHUT_WR);
    }
    return n == 0;
}

/* Connections until then, and until the last of them has ended; how many. */
static uint64_t run_phase(uint64_t until_ns)
{
    static struct epoll_event events[MAX_EVENTS];
    uint64_t before = done, last_ns = now_ns();
    size_t active = opt.connections;
    for (size_t i = 0; i < opt.connections; i++)
        begin(&clients[i]);
    while (active > 0 && (double)(now_ns() - last_ns) < opt.patience * 1e9) {
        int n = epoll_wait(epoll_fd, events, MAX_EVENTS, 100);
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        if (n > 0)
            last_ns = now_ns();
        for (int i = 0; i < n; i++) {
            struct client *c = events[i].data.ptr;
            if (!ended(c))
                continue;
            if (last_ns < until_ns && errors == 0)
                begin(c);
            else
                active--;
        }
    }
    for (size_t i = 0; i < opt.connections; i++)
        if (clients[i].fd >= 0)
            fail(&clients[i], "gave up waiting");
    return done - before;
}

/* --- options, report --------------------------------------------------------------------------- */

static void usage(const char *why)
{
    fprintf(stderr,
            "churn: %s\n"
            "usage: churn HOST PORT --seconds S [--connections N] [--size BYTES] [--warmup S] [--watch PID] [--patience S]\n",
            why);
    exit(2);
}

static void parse(int argc, char **argv)
{
    static const struct option names[] = {
        { "connections", 1, NULL, 'c' }, { "size", 1, NULL, 's' },  { "seconds", 1, NULL, 't' },
        { "warmup", 1, NULL, 'w' },      { "watch", 1, NULL, 'p' }, { "patience", 1, NULL, 'g' },
        { 0 },
    };
    int o;
    while ((o = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (o) {
        case 'c': opt.connections = (size_t)number(optarg, 1, MAX_EVENTS); break;
        case 's': opt.size = (size_t)number(optarg, 1, MAX_SIZE); break;
        case 't': opt.seconds = number(optarg, 0, 3600); break;
        case 'w': opt.warmup = number(optarg, 0, 3600); break;
        case 'p': opt.watch = (int)number(optarg, 1, 1 << 30); break;
        case 'g': opt.patience = number(optarg, 0.1, 3600); break;
        default: usage("unknown option");
        }
    }
    if (argc - optind != 2 || opt.seconds == 0)
        usage("HOST, PORT and --seconds are needed");
    opt.address = address_of(argv[optind], argv[optind + 1]);
}

static uint64_t after(double seconds)
{
    return now_ns() + (uint64_t)(seconds * 1e9);
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    fill_randomly(pattern, sizeof pattern);
    source.sin_family = AF_INET;
    clients = calloc(opt.connections, sizeof *clients);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (clients == NULL || epoll_fd < 0)
        die("prepare");
    run_phase(after(opt.warmup));

    struct cpu server = cpu_of(opt.watch), own = cpu_of(getpid());
    uint64_t start_ns = now_ns(), count = run_phase(after(opt.seconds));
    double seconds = (double)(now_ns() - start_ns) / 1e9;
    server = cpu_since(server, opt.watch);
    own = cpu_since(own, getpid());

    printf("{\"messages\": %" PRIu64 ", \"seconds\": %.6f, \"messages_per_s\": %.1f, ", count, seconds,
           (double)count / seconds);
    print_cpu(server, own);
    printf(", \"lost_bytes\": %" PRIu64 ", \"errors\": %" PRIu64 "}\n", lost_bytes, errors);
    return errors > 0 || lost_bytes > 0;
}
