/* What may live here: the reference for datagrams: a loop that waits in recvmmsg, receives up to 64 at a time, and
 * counts them. A datagram of one byte requests the counts.
 *
 *     recvmmsg        prints "listening PORT"; a signal ends it
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { BATCH = 64, SIZE = 2048 };

static char buffers[BATCH][SIZE];
static struct sockaddr_in names[BATCH];
static struct iovec parts[BATCH];
static struct mmsghdr headers[BATCH];
static struct { uint64_t messages, bytes; } counts;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int bound(void)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) < 0
        || getsockname(fd, (struct sockaddr *)&address, &size) < 0)
        die("bind");
    printf("listening %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void handle(int fd, int i)
{
    if (headers[i].msg_len == 1) {
        sendto(fd, &counts, sizeof counts, 0, (struct sockaddr *)&names[i], headers[i].msg_hdr.msg_namelen);
        return;
    }
    counts.messages++;
    counts.bytes += headers[i].msg_len;
}

int main(void)
{
    int fd = bound();
    for (;;) {
        for (int i = 0; i < BATCH; i++) {
            parts[i] = (struct iovec){ buffers[i], SIZE };
            headers[i].msg_hdr = (struct msghdr){ .msg_name = &names[i], .msg_namelen = sizeof names[i],
                                                  .msg_iov = &parts[i], .msg_iovlen = 1 };
        }
        int n = recvmmsg(fd, headers, BATCH, MSG_WAITFORONE, NULL);
        if (n < 0 && errno != EINTR)
            die("recvmmsg");
        for (int i = 0; i < n; i++)
            handle(fd, i);
    }
}
