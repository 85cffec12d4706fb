/* What may live here: the load generator: closed-loop echo clients over epoll that verify every byte and time every
 * message. Nothing about the server.
 *
 * Each connection sends an endless stream that is a pattern of random bytes, repeated with a prime period, entered at
 * a place of its own; --frame makes messages of it that a line or length framer can find. What comes back must be that
 * same stream: a lost, doubled, reordered or foreign byte shows in one memcmp. A run is a row of phases, and a phase
 * ends only when everything that was sent in it has come back, so that the server is idle whenever its CPU time is
 * read, and messages and CPU time belong together exactly.
 *
 *     open     every connection exchanges one message, 256 at a time
 *     hold     with --hold: says "holding" and waits for a line on stdin
 *     warm-up  --warmup seconds, not counted
 *     measure  --seconds or --messages
 *     finish   every connection sends its FIN, and must get the server's, and not a byte more
 *
 * If nothing comes back for --patience seconds, what is missing counts as lost.
 */
#include "client.h"
#include <poll.h>

enum {
    PERIOD = 65521,             /* of the pattern; prime, so that no message size ever falls into step with it */
    CHUNK = 262144,             /* at most this much per send and recv */
    MAX_EVENTS = 1024,
    OPEN_AT_ONCE = 256,
    SUB_BITS = 6,               /* of the histogram: 64 steps per power of two, 1.6% each */
    BUCKETS = (64 - SUB_BITS + 1) << SUB_BITS,
    HOLD_MS = 120000,
};

struct options {
    struct sockaddr_in address;
    size_t connections, idle, size, depth;
    uint64_t messages;
    double seconds, warmup, patience;
    int watch;
    enum { UNFRAMED, LINES, LENGTHS } frame;
    bool burst, hold, spin;
};

struct connection {
    int fd;
    bool write_armed;
    size_t offset;                          /* where its stream enters the pattern */
    uint64_t wanted, sent, received;        /* bytes: to be sent so far, sent, come back */
    uint64_t issued, done;                  /* messages */
    uint64_t *issued_ns;                    /* of the messages in flight, by number modulo depth */
};

struct phase {
    uint64_t most;                          /* messages; UINT64_MAX: no limit */
    uint64_t until_ns;                      /* UINT64_MAX: no limit */
    uint64_t issued, done, given_up;
    bool record;
};

static struct options opt = { .connections = 1, .size = 256, .depth = 1, .patience = 10 };
static struct connection *connections;
static size_t connection_count;
static char pattern[PERIOD + CHUNK], buffer[CHUNK];
static size_t period = PERIOD;              /* with --frame less, a multiple of the message size */
static uint64_t histogram[BUCKETS], recorded, errors, lost_bytes;
static bool finishing;
static size_t open_count;
static int epoll_fd;

/* --- histogram --------------------------------------------------------------------------------- */

static void record(uint64_t ns)
{
    unsigned shift = ns >> SUB_BITS ? 63 - SUB_BITS - (unsigned)__builtin_clzll(ns) : 0;
    /* below 128 ns buckets are 1 ns wide; then each power of two has 64 */
    histogram[((size_t)shift << SUB_BITS) + (ns >> shift)]++;
    recorded++;
}

static double percentile_us(double fraction)
{
    uint64_t rank = (uint64_t)((double)recorded * fraction), seen = 0;
    for (size_t i = 0; i < BUCKETS; i++) {
        seen += histogram[i];
        if (seen > rank) {
            size_t shift = i >> SUB_BITS ? (i >> SUB_BITS) - 1 : 0;
            size_t step = i - (shift << SUB_BITS);
            return ((double)step + 0.5) * (double)((uint64_t)1 << shift) / 1000;
        }
    }
    return 0;
}

/* --- connections ------------------------------------------------------------------------------- */

static const char *stream(const struct connection *c, uint64_t position)
{
    return pattern + (c->offset + position) % period;
}

static void close_connection(struct connection *c)
{
    close(c->fd);
    c->fd = -1;
    open_count--;
}

static void fail(struct connection *c, struct phase *phase, const char *why)
{
    if (errors++ < 5)
        fprintf(stderr, "load: connection %zu: %s: %" PRIu64 " bytes sent, %" PRIu64 " back\n",
                (size_t)(c - connections), why, c->sent, c->received);
    lost_bytes += c->wanted - c->received;
    if (phase != NULL)
        phase->given_up += c->issued - c->done;
    close_connection(c);
}

static void arm(struct connection *c, bool write)
{
    struct epoll_event event = { .events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = c };
    if (write != c->write_armed && epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event) < 0)
        die("epoll_ctl");
    c->write_armed = write;
}

static void push(struct connection *c, struct phase *phase)
{
    while (c->sent < c->wanted) {
        uint64_t left = c->wanted - c->sent;
        size_t size = left < CHUNK ? (size_t)left : CHUNK;
        ssize_t n = send(c->fd, stream(c, c->sent), size, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN && errno != ENOBUFS) {
            fail(c, phase, strerror(errno));
            return;
        }
        c->sent += n > 0 ? (uint64_t)n : 0;
        if (n < (ssize_t)size)
            break;
    }
    arm(c, c->sent < c->wanted);
}

/* Start as many more messages as are allowed, up to `count`. */
static void issue(struct connection *c, struct phase *phase, uint64_t count, uint64_t now)
{
    if (now >= phase->until_ns)
        return;
    if (count > phase->most - phase->issued)
        count = phase->most - phase->issued;
    if (count == 0)
        return;
    for (uint64_t i = 0; i < count; i++)
        c->issued_ns[c->issued++ % opt.depth] = now;
    c->wanted += count * opt.size;
    phase->issued += count;
    push(c, phase);
}

static void pull(struct connection *c, struct phase *phase)
{
    uint64_t now, before = c->done;
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0) {
        if (errno != EAGAIN)
            fail(c, phase, strerror(errno));
        return;
    }
    if (n == 0) {
        if (finishing && c->received == c->wanted)
            close_connection(c);
        else
            fail(c, phase, "the server closed it");
        return;
    }
    if ((uint64_t)n > c->wanted - c->received) {
        fail(c, phase, "more came back than was sent");
        return;
    }
    if (memcmp(buffer, stream(c, c->received), (size_t)n) != 0) {
        fail(c, phase, "a wrong byte came back");
        return;
    }
    now = now_ns();
    c->received += (uint64_t)n;
    while (c->received >= (c->done + 1) * opt.size) {
        uint64_t took = now - c->issued_ns[c->done++ % opt.depth];
        if (phase->record)
            record(took);
    }
    phase->done += c->done - before;
    if (opt.burst && c->done == c->issued)
        issue(c, phase, opt.depth, now);
    else if (!opt.burst && c->done > before)
        issue(c, phase, c->done - before, now);
}

static void connect_one(struct connection *c)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = c };
    size_t unit = opt.frame == UNFRAMED ? 1 : opt.size;
    int fd = connected(&opt.address, 0, NULL);
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
    c->fd = fd;
    c->offset = (size_t)(c - connections) * 40503u % (period / unit) * unit;
    c->issued_ns = calloc(opt.depth, sizeof *c->issued_ns);
    if (c->issued_ns == NULL)
        die("calloc");
    open_count++;
}

/* --- phases ------------------------------------------------------------------------------------ */

/* Wait for events and handle them; false once nothing has come for so long that we give up. */
static bool turn(struct phase *phase, uint64_t *last_ns)
{
    static struct epoll_event events[MAX_EVENTS];
    int n = epoll_wait(epoll_fd, events, MAX_EVENTS, opt.spin ? 0 : 100);
    if (n < 0 && errno != EINTR)
        die("epoll_wait");
    for (int i = 0; i < n; i++) {
        struct connection *c = events[i].data.ptr;
        if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP))
            pull(c, phase);
        if (c->fd >= 0 && events[i].events & EPOLLOUT)
            push(c, phase);
    }
    if (n > 0) {
        *last_ns = now_ns();
        return true;
    }
    return (double)(now_ns() - *last_ns) < opt.patience * 1e9;
}

static void run_phase(struct phase *phase, size_t first, size_t count, size_t depth)
{
    uint64_t last_ns = now_ns();
    for (size_t i = first; i < first + count; i++)
        if (connections[i].fd >= 0)
            issue(&connections[i], phase, depth, now_ns());
    while (phase->done + phase->given_up < phase->issued)
        if (!turn(phase, &last_ns))
            break;
    for (size_t i = first; i < first + count; i++)
        if (connections[i].fd >= 0 && connections[i].done < connections[i].issued)
            fail(&connections[i], phase, "gave up waiting");
}

static void run_open(void)
{
    for (size_t i = 0; i < connection_count; i += OPEN_AT_ONCE) {
        size_t count = connection_count - i < OPEN_AT_ONCE ? connection_count - i : OPEN_AT_ONCE;
        struct phase phase = { .most = count, .until_ns = UINT64_MAX };
        for (size_t j = i; j < i + count; j++)
            connect_one(&connections[j]);
        run_phase(&phase, i, count, 1);
    }
}

static void run_hold(void)
{
    struct pollfd in = { .fd = 0, .events = POLLIN };
    printf("holding\n");
    fflush(stdout);
    poll(&in, 1, HOLD_MS);
}

static void run_finish(void)
{
    uint64_t last_ns = now_ns();
    struct phase phase = { 0 };
    finishing = true;
    for (size_t i = 0; i < connection_count; i++)
        if (connections[i].fd >= 0)
            shutdown(connections[i].fd, SHUT_WR);
    while (open_count > 0)
        if (!turn(&phase, &last_ns))
            break;
    for (size_t i = 0; i < connection_count; i++)
        if (connections[i].fd >= 0)
            fail(&connections[i], NULL, "no FIN came back");
}

/* --- options, report --------------------------------------------------------------------------- */

static void usage(const char *why)
{
    fprintf(stderr,
            "load: %s\n"
            "usage: load HOST PORT [--connections N] [--size BYTES] [--depth N] (--seconds S | --messages M)\n"
            "            [--frame lines|length] [--burst] [--warmup S] [--idle K] [--hold] [--watch PID] [--patience S]\n"
            "--size includes a newline or four bytes of length; --burst: the next messages go out when all have come back\n",
            why);
    exit(2);
}

static int frame(const char *name)
{
    if (strcmp(name, "lines") != 0 && strcmp(name, "length") != 0)
        usage("--frame is lines or length");
    return strcmp(name, "lines") == 0 ? LINES : LENGTHS;
}

static void parse(int argc, char **argv)
{
    static const struct option names[] = {
        { "connections", 1, NULL, 'c' }, { "size", 1, NULL, 's' },    { "depth", 1, NULL, 'd' },
        { "seconds", 1, NULL, 't' },     { "messages", 1, NULL, 'm' }, { "warmup", 1, NULL, 'w' },
        { "idle", 1, NULL, 'i' },        { "hold", 0, NULL, 'h' },    { "watch", 1, NULL, 'p' },
        { "patience", 1, NULL, 'g' },    { "frame", 1, NULL, 'f' },   { "burst", 0, NULL, 'b' },
        { "spin", 0, NULL, 'n' },
        { 0 },
    };
    int o;
    while ((o = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (o) {
        case 'c': opt.connections = (size_t)number(optarg, 0, 60000); break;
        case 's': opt.size = (size_t)number(optarg, 1, 1 << 30); break;
        case 'd': opt.depth = (size_t)number(optarg, 1, 65536); break;
        case 't': opt.seconds = number(optarg, 0, 3600); break;
        case 'm': opt.messages = (uint64_t)number(optarg, 0, 1e12); break;
        case 'w': opt.warmup = number(optarg, 0, 3600); break;
        case 'i': opt.idle = (size_t)number(optarg, 0, 60000); break;
        case 'h': opt.hold = true; break;
        case 'f': opt.frame = frame(optarg); break;
        case 'b': opt.burst = true; break;
        case 'n': opt.spin = true; break;
        case 'p': opt.watch = (int)number(optarg, 1, 1 << 30); break;
        case 'g': opt.patience = number(optarg, 0.1, 3600); break;
        default: usage("unknown option");
        }
    }
    if (argc - optind != 2)
        usage("HOST and PORT are needed");
    opt.address = address_of(argv[optind], argv[optind + 1]);
    if (opt.connections + opt.idle == 0)
        usage("no connections");
    if (opt.seconds > 0 && opt.messages > 0)
        usage("--seconds and --messages exclude each other");
    if (opt.frame != UNFRAMED && (opt.size < 5 || opt.size > PERIOD))
        usage("--size is too small or too large for --frame");
}

/* Make messages of the pattern: without a newline but at their ends, or with their lengths before them. */
static void frame_pattern(void)
{
    uint32_t header = htonl((uint32_t)opt.size - sizeof header);
    period = PERIOD / opt.size * opt.size;
    for (size_t i = 0; i < period && opt.frame == LINES; i++)
        if (pattern[i] == '\n' || pattern[i] == '\r')
            pattern[i] = ' ';
    for (size_t i = 0; i < period; i += opt.size) {
        if (opt.frame == LINES)
            pattern[i + opt.size - 1] = '\n';
        else
            memcpy(pattern + i, &header, sizeof header);
    }
}

static void prepare(void)
{
    fill_randomly(pattern, PERIOD);
    if (opt.frame != UNFRAMED)
        frame_pattern();
    for (size_t i = period; i < sizeof pattern; i++)
        pattern[i] = pattern[i - period];
    raise_descriptor_limit();
    connection_count = opt.connections + opt.idle;
    connections = calloc(connection_count, sizeof *connections);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (connections == NULL || epoll_fd < 0)
        die("prepare");
}

static void report(uint64_t messages, double seconds, struct cpu server, struct cpu own)
{
    printf("{\"messages\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"seconds\": %.6f, \"messages_per_s\": %.1f, "
           "\"p50_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f, ",
           messages, messages * opt.size, seconds, seconds > 0 ? (double)messages / seconds : 0,
           percentile_us(0.5), percentile_us(0.99), percentile_us(0.999));
    print_cpu(server, own);
    printf(", \"lost_bytes\": %" PRIu64 ", \"errors\": %" PRIu64 "}\n", lost_bytes, errors);
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    prepare();
    run_open();
    if (opt.hold)
        run_hold();

    struct phase warmup = { .most = UINT64_MAX, .until_ns = now_ns() + (uint64_t)(opt.warmup * 1e9) };
    if (opt.warmup > 0)
        run_phase(&warmup, 0, opt.connections, opt.depth);

    struct cpu server = cpu_of(opt.watch), own = cpu_of(getpid());
    uint64_t start_ns = now_ns();
    struct phase measure = { .most = opt.seconds > 0 ? UINT64_MAX : opt.messages, .until_ns = UINT64_MAX, .record = true };
    if (opt.seconds > 0)
        measure.until_ns = start_ns + (uint64_t)(opt.seconds * 1e9);
    run_phase(&measure, 0, opt.connections, opt.depth);
    double seconds = (double)(now_ns() - start_ns) / 1e9;
    server = cpu_since(server, opt.watch);
    own = cpu_since(own, getpid());

    run_finish();
    report(measure.done, seconds, server, own);
    return errors > 0 || lost_bytes > 0;
}
