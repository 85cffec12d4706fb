/* What may live here: thousands of subscribers of a server that sends each line it gets to all clients, the sender
 * included; they verify every byte. Nothing about the server.
 *
 * The first reader is also the publisher. It publishes a block of lines, and the next block only when every reader has
 * got the whole of the last one, so that the server is (almost) idle whenever its CPU time is read. The slow ones
 * read nothing until the end: the server may drop lines for them, but only whole lines.
 *
 *     open     all subscribers connect, 256 at a time, and are greeted with "hello\n"
 *     fill     the slow ones' buffers, with long lines, until a multiple of what they can hold was published; prints
 *              one line of JSON about the server's memory
 *     measure  for each line "SECONDS BURST" on stdin: blocks of BURST lines for so long; prints one line of JSON
 *     recover  when stdin ends, the slow ones read all there is, and must then get the next line; prints JSON
 *
 * Whatever is wrong ends it at once, with exit code 1.
 */
#include "client.h"
#include <poll.h>

enum {
    MAX_EVENTS = 1024,
    OPEN_AT_ONCE = 256,
    FILL_SIZE = 8192,               /* of a line */
    MAX_BLOCK = 65536,
    PERIOD = 65521,
    DIGITS = 8,                     /* of a line's number, which it starts with */
    SLOW_RECEIVE_BUFFER = 4096,
    PATIENCE_MS = 20000,
    QUIET_MS = 500,
};

struct subscriber {
    int fd;
    size_t received;                /* readers: of the block; slow ones: of the unfinished line */
    char *line;                     /* slow ones: the unfinished line */
    uint64_t last, lines;           /* slow ones: the number of the last line they got, and how many it were */
};

static struct options {
    struct sockaddr_in address;
    size_t readers, slow, size, fill;
    int watch;
} opt = { .readers = 9500, .slow = 500, .size = 128, .fill = 40 };

static const char greeting[] = "hello\n";
static struct subscriber *readers, *slow;
static char pattern[PERIOD + FILL_SIZE], block[MAX_BLOCK], buffer[MAX_BLOCK];
static size_t block_size, behind;   /* of the block; subscribers that have not got all of it */
static uint64_t published;          /* lines */
static int epoll_fd;

static void broken(const char *why)
{
    fprintf(stderr, "subscribers: %s\n", why);
    exit(1);
}

/* --- lines -------------------------------------------------------------------------------------- */

/* Every line has a number, and the rest of it follows from that. */
static void make_line(char *line, uint64_t number, size_t size)
{
    char digits[DIGITS + 1];
    snprintf(digits, sizeof digits, "%08" PRIx64, number);
    memcpy(line, digits, DIGITS);
    memcpy(line + DIGITS, pattern + number * 40503u % PERIOD, size - DIGITS);
    line[size - 1] = '\n';
}

/* A line that a slow one got must be one that was published, later than the one before. */
static void check_line(struct subscriber *s, size_t size)
{
    static char wanted[FILL_SIZE];
    char digits[DIGITS + 1] = { 0 };
    uint64_t number;
    if (s->lines++ == 0) {
        if (size != sizeof greeting - 1 || memcmp(s->line, greeting, size) != 0)
            broken("a slow one was not greeted");
        return;
    }
    if (size != opt.size && size != FILL_SIZE)
        broken("a slow one got a line of a wrong length");
    memcpy(digits, s->line, DIGITS);
    number = strtoull(digits, NULL, 16);
    make_line(wanted, number, size);
    if (number <= s->last || number > published || memcmp(s->line, wanted, size) != 0)
        broken("a slow one got a wrong line");
    s->last = number;
}

/* --- events ------------------------------------------------------------------------------------- */

static void watch(struct subscriber *s)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = s };
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, s->fd, &event) < 0)
        die("epoll_ctl");
}

static void pull(struct subscriber *s)
{
    ssize_t n = recv(s->fd, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0)
        broken(n < 0 ? strerror(errno) : "the server closed a connection");
    if (s->line != NULL) {
        for (ssize_t i = 0; i < n; i++) {
            if (s->received == FILL_SIZE)
                broken("a slow one got too long a line");
            s->line[s->received++] = buffer[i];
            if (buffer[i] == '\n') {
                check_line(s, s->received);
                s->received = 0;
                behind -= s->last == published;
            }
        }
        return;
    }
    if ((size_t)n > block_size - s->received)
        broken("more came than was published");
    if (memcmp(buffer, block + s->received, (size_t)n) != 0)
        broken("a wrong byte came");
    s->received += (size_t)n;
    behind -= s->received == block_size;
}

/* False if nothing came for so long. */
static bool turn(int timeout_ms)
{
    static struct epoll_event events[MAX_EVENTS];
    int n = epoll_wait(epoll_fd, events, MAX_EVENTS, timeout_ms);
    if (n < 0 && errno != EINTR)
        die("epoll_wait");
    for (int i = 0; i < n; i++)
        pull(events[i].data.ptr);
    return n != 0;
}

static void catch_up(void)
{
    while (behind > 0)
        if (!turn(PATIENCE_MS))
            broken("some did not get everything");
}

/* --- what they do ------------------------------------------------------------------------------- */

static void open_all(void)
{
    block_size = sizeof greeting - 1;
    memcpy(block, greeting, block_size);
    for (size_t i = 0; i < opt.slow; i++)
        slow[i].fd = connected(&opt.address, SLOW_RECEIVE_BUFFER, NULL);
    for (size_t i = 0; i < opt.readers; i++) {
        readers[i].fd = connected(&opt.address, 0, NULL);
        watch(&readers[i]);
        behind++;
        if (behind == OPEN_AT_ONCE || i + 1 == opt.readers)
            catch_up();
    }
}

static void publish(size_t count, size_t size)
{
    block_size = count * size;
    for (size_t i = 0; i < count; i++)
        make_line(block + i * size, ++published, size);
    for (size_t i = 0; i < opt.readers; i++)
        readers[i].received = 0;
    behind = opt.readers;
    for (size_t sent = 0; sent < block_size;) {
        struct pollfd out = { .fd = readers[0].fd, .events = POLLOUT };
        ssize_t n = send(out.fd, block + sent, block_size - sent, MSG_NOSIGNAL);
        if (n < 0 && (errno != EAGAIN || poll(&out, 1, PATIENCE_MS) <= 0))
            die("send");
        sent += n > 0 ? (size_t)n : 0;
    }
}

static void measure(double seconds, size_t burst)
{
    struct cpu server = cpu_of(opt.watch), own = cpu_of(getpid());
    uint64_t start_ns = now_ns(), before = published;
    double took;
    do {
        publish(burst, opt.size);
        catch_up();
        took = (double)(now_ns() - start_ns) / 1e9;
    } while (took < seconds);
    printf("{\"messages\": %" PRIu64 ", \"seconds\": %.6f, ", (published - before) * opt.readers, took);
    print_cpu(cpu_since(server, opt.watch), cpu_since(own, getpid()));
    printf("}\n");
}

static uint64_t recover(void)
{
    uint64_t lines = 0;
    for (size_t i = 0; i < opt.slow; i++) {
        int size = 65536;
        setsockopt(slow[i].fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
        slow[i].line = calloc(1, FILL_SIZE);
        if (slow[i].line == NULL)
            die("calloc");
        watch(&slow[i]);
    }
    while (turn(QUIET_MS))
        ;
    publish(1, opt.size);
    behind += opt.slow;
    catch_up();
    for (size_t i = 0; i < opt.slow; i++)
        lines += slow[i].lines - 1;
    return lines;
}

/* Kilobytes of the server's memory: what it alone has written to, and all that is resident. */
static void print_memory(void)
{
    char text[4096], *private, *resident;
    if (!read_proc(opt.watch, "smaps_rollup", text, sizeof text) || (private = strstr(text, "Private_Dirty:")) == NULL
        || (resident = strstr(text, "Rss:")) == NULL)
        broken("no smaps_rollup of the server");
    printf("{\"private_kb\": %ld, \"resident_kb\": %ld}", strtol(private + 14, NULL, 10), strtol(resident + 4, NULL, 10));
}

/* --- options ------------------------------------------------------------------------------------ */

static void usage(const char *why)
{
    fprintf(stderr,
            "subscribers: %s\n"
            "usage: subscribers HOST PORT --watch PID [--readers N] [--slow N] [--size BYTES] [--fill LINES]\n"
            "then, on stdin, any number of lines SECONDS BURST\n",
            why);
    exit(2);
}

static void parse(int argc, char **argv)
{
    static const struct option names[] = {
        { "readers", 1, NULL, 'r' }, { "slow", 1, NULL, 's' },  { "size", 1, NULL, 'b' },
        { "fill", 1, NULL, 'f' },    { "watch", 1, NULL, 'p' }, { 0 },
    };
    int o;
    while ((o = getopt_long(argc, argv, "", names, NULL)) != -1) {
        switch (o) {
        case 'r': opt.readers = (size_t)number(optarg, 1, 60000); break;
        case 's': opt.slow = (size_t)number(optarg, 0, 60000); break;
        case 'b': opt.size = (size_t)number(optarg, DIGITS + 1, FILL_SIZE - 1); break;
        case 'f': opt.fill = (size_t)number(optarg, 0, 65536); break;
        case 'p': opt.watch = (int)number(optarg, 1, 1 << 30); break;
        default: usage("unknown option");
        }
    }
    if (argc - optind != 2 || opt.watch == 0)
        usage("HOST, PORT and --watch are needed");
    opt.address = address_of(argv[optind], argv[optind + 1]);
}

static void prepare(void)
{
    fill_randomly(pattern, sizeof pattern);
    for (size_t i = 0; i < sizeof pattern; i++)
        if (pattern[i] == '\n' || pattern[i] == '\r')
            pattern[i] = ' ';
    raise_descriptor_limit();
    readers = calloc(opt.readers, sizeof *readers);
    slow = calloc(opt.slow + 1, sizeof *slow);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (readers == NULL || slow == NULL || epoll_fd < 0)
        die("prepare");
    setvbuf(stdout, NULL, _IOLBF, BUFSIZ);
}

int main(int argc, char **argv)
{
    char text[64];
    parse(argc, argv);
    prepare();
    open_all();
    printf("{\"connected\": ");
    print_memory();
    for (size_t i = 0; i < opt.fill; i++) {
        publish(1, FILL_SIZE);
        catch_up();
    }
    printf(", \"filled\": ");
    print_memory();
    printf("}\n");
    while (fgets(text, sizeof text, stdin) != NULL) {
        double seconds;
        size_t burst;
        if (sscanf(text, "%lf %zu", &seconds, &burst) != 2 || burst == 0 || burst > MAX_BLOCK / opt.size)
            usage("on stdin, SECONDS BURST");
        measure(seconds, burst);
    }
    printf("{\"ended\": ");
    print_memory();
    uint64_t got = recover();
    printf(", \"published\": %" PRIu64 ", \"slow_got\": %" PRIu64 "}\n", published * opt.slow, got);
    return 0;
}
