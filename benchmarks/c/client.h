/* What may live here: what the programs that put load on a server share: connecting, random bytes, command line numbers,
 * and what a process has used of its core.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

struct cpu {                                /* seconds */
    double total, user, system;             /* used; total is the finer one */
    double waited;                          /* ready to run, but another process had the core */
};

static void usage(const char *why);         /* the program's; ends it */

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double number(const char *text, double least, double most)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != 0 || !(value >= least && value <= most))
        usage("a number is missing, malformed or out of range");
    return value;
}

static struct sockaddr_in address_of(const char *host, const char *port)
{
    struct sockaddr_in address = { .sin_family = AF_INET };
    address.sin_port = htons((uint16_t)number(port, 1, 65535));
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        usage("HOST must be an IPv4 address");
    return address;
}

/* The same bytes in every run. */
static void fill_randomly(char *bytes, size_t size)
{
    uint64_t x = 88172645463325252u;        /* xorshift64 */
    for (size_t i = 0; i < size; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        bytes[i] = (char)(x >> 32);
    }
}

static inline void raise_descriptor_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* A nonblocking connection; receive_buffer 0 and source NULL leave that to the kernel. */
static inline int connected(const struct sockaddr_in *address, int receive_buffer, const struct sockaddr_in *source)
{
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("socket");
    if (receive_buffer > 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    if (source != NULL) {                   /* the port is chosen by connect, among those free for this pair of ends */
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        if (bind(fd, (const struct sockaddr *)source, sizeof *source) < 0)
            die("bind");
    }
    if (connect(fd, (const struct sockaddr *)address, sizeof *address) < 0)
        die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(fd, F_SETFL, O_NONBLOCK);     /* only now: on loopback, waiting for the connection is short and simple */
    return fd;
}

static bool read_proc(int pid, const char *name, char *text, size_t size)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return false;
    size_t n = fread(text, 1, size - 1, file);
    text[n] = 0;
    fclose(file);
    return n > 0;
}

/* schedstat counts nanoseconds, of the main thread; stat counts ticks, of all threads, and splits them by mode. */
static struct cpu cpu_of(int pid)
{
    char text[1024], *end;
    unsigned long user, system;
    unsigned long long used_ns, waited_ns;
    struct cpu cpu = { 0 };
    if (pid == 0 || !read_proc(pid, "stat", text, sizeof text) || (end = strrchr(text, ')')) == NULL)
        return cpu;
    if (sscanf(end + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) == 2) {
        cpu.user = (double)user / (double)sysconf(_SC_CLK_TCK);
        cpu.system = (double)system / (double)sysconf(_SC_CLK_TCK);
    }
    cpu.total = cpu.user + cpu.system;
    if (read_proc(pid, "schedstat", text, sizeof text) && sscanf(text, "%llu %llu", &used_ns, &waited_ns) == 2
        && used_ns > 0) {
        cpu.total = (double)used_ns / 1e9;
        cpu.waited = (double)waited_ns / 1e9;
    }
    return cpu;
}

static struct cpu cpu_since(struct cpu before, int pid)
{
    struct cpu now = cpu_of(pid);
    return (struct cpu){ now.total - before.total, now.user - before.user, now.system - before.system,
                         now.waited - before.waited };
}

/* Members of a JSON object; both programs are on cores of their own. */
static void print_cpu(struct cpu server, struct cpu own)
{
    printf("\"server_cpu_s\": %.9f, \"server_user_s\": %.2f, \"server_system_s\": %.2f, "
           "\"server_waited_s\": %.6f, \"load_waited_s\": %.6f",
           server.total, server.user, server.system, server.waited, own.waited);
}
