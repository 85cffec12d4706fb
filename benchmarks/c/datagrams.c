/* What may live here: the load generator for datagrams: an open loop that sends at a given rate, or as fast as it can,
 * and at the end requests from the server what it has received.
 *
 *     datagrams HOST PORT --seconds S [--rate N] [--burst N] [--sockets N] [--size BYTES] [--watch PID]
 *
 * A datagram of one byte is a request; the reply is two native 64-bit integers, how many other datagrams came and how
 * many bytes they had. It stands behind all others in the server's queue, so the server is idle once it has replied,
 * and datagrams and CPU time belong together exactly. What was sent and not received is lost.
 */
#include "client.h"
#include <netinet/udp.h>
#include <poll.h>

enum { MOST_SOCKETS = 1000, MOST_BURST = 64, MOST_SIZE = 65507, ANSWER_MS = 100, ASK_AT_MOST = 100 };

struct options {
    struct sockaddr_in address;
    size_t sockets, burst, size;
    double seconds, rate;
    int watch;
};

struct counts {
    uint64_t messages, bytes;
};

static struct options opt = { .sockets = 100, .burst = 1, .size = 64 };
static int fds[MOST_SOCKETS];
static char data[MOST_SIZE];

static void usage(const char *why)
{
    fprintf(stderr, "datagrams: %s\n"
                    "usage: datagrams HOST PORT --seconds S [--rate N] [--burst N] [--sockets N] [--size BYTES] "
                    "[--watch PID]\n", why);
    exit(2);
}

static void parse(int argc, char **argv)
{
    static const struct option names[] = {
        { "sockets", 1, NULL, 'c' }, { "size", 1, NULL, 's' }, { "seconds", 1, NULL, 't' }, { "rate", 1, NULL, 'r' },
        { "burst", 1, NULL, 'b' },   { "watch", 1, NULL, 'p' }, { 0 },
    };
    int o;
    while ((o = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (o) {
        case 'c': opt.sockets = (size_t)number(optarg, 1, MOST_SOCKETS); break;
        case 's': opt.size = (size_t)number(optarg, 2, MOST_SIZE); break;
        case 't': opt.seconds = number(optarg, 0.001, 3600); break;
        case 'r': opt.rate = number(optarg, 0, 1e9); break;
        case 'b': opt.burst = (size_t)number(optarg, 1, MOST_BURST); break;
        case 'p': opt.watch = (int)number(optarg, 1, 1 << 30); break;
        default: usage("unknown option");
        }
    }
    if (argc - optind != 2)
        usage("HOST and PORT are needed");
    if (opt.burst * opt.size > MOST_SIZE)
        usage("--burst times --size is too large");
    if (opt.seconds == 0)
        usage("--seconds is needed");
    opt.address = address_of(argv[optind], argv[optind + 1]);
}

static void prepare(void)
{
    int size = (int)opt.size;
    fill_randomly(data, sizeof data);
    for (size_t i = 0; i < opt.sockets; i++) {
        fds[i] = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (fds[i] < 0 || connect(fds[i], (struct sockaddr *)&opt.address, sizeof opt.address) < 0)
            die("socket");
        if (opt.burst > 1 && setsockopt(fds[i], IPPROTO_UDP, UDP_SEGMENT, &size, sizeof size) < 0)
            die("UDP_SEGMENT");
    }
}

/* What the server has received so far. A request may be lost as any datagram, so it is repeated. */
static struct counts ask(void)
{
    struct counts counts;
    struct pollfd in = { .fd = fds[0], .events = POLLIN };
    while (recv(fds[0], &counts, sizeof counts, MSG_DONTWAIT) >= 0)
        continue;                           /* replies to earlier requests */
    for (int i = 0; i < ASK_AT_MOST; i++) {
        if (send(fds[0], data, 1, 0) < 0)
            die("send");
        if (poll(&in, 1, ANSWER_MS) > 0 && recv(fds[0], &counts, sizeof counts, 0) == sizeof counts)
            return counts;
    }
    fprintf(stderr, "datagrams: the server does not reply\n");
    exit(1);
}

/* Send for that long; how many datagrams. */
static uint64_t blast(uint64_t start_ns)
{
    uint64_t sent = 0, until_ns = start_ns + (uint64_t)(opt.seconds * 1e9);
    double apart_ns = opt.rate > 0 ? 1e9 * (double)opt.burst / opt.rate : 0;
    for (uint64_t i = 0, now; (now = now_ns()) < until_ns;) {
        if ((double)(now - start_ns) < (double)i * apart_ns)
            continue;                       /* it has a core of its own */
        ssize_t n = send(fds[i++ % opt.sockets], data, opt.burst * opt.size, 0);
        if (n < 0 && errno != ENOBUFS)
            die("send");
        sent += n > 0 ? opt.burst : 0;
    }
    return sent;
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    prepare();
    struct counts before = ask();
    struct cpu server = cpu_of(opt.watch), own = cpu_of(getpid());
    uint64_t start_ns = now_ns(), sent = blast(start_ns);
    struct counts after = ask();
    double seconds = (double)(now_ns() - start_ns) / 1e9;
    server = cpu_since(server, opt.watch);
    own = cpu_since(own, getpid());

    uint64_t received = after.messages - before.messages;
    printf("{\"messages\": %" PRIu64 ", \"sent\": %" PRIu64 ", \"seconds\": %.6f, ", received, sent, seconds);
    print_cpu(server, own);
    printf("}\n");
    if (received > sent || after.bytes - before.bytes != received * opt.size) {
        fprintf(stderr, "datagrams: %" PRIu64 " bytes in %" PRIu64 " datagrams are not what was sent\n",
                after.bytes - before.bytes, received);
        return 1;
    }
    return 0;
}
