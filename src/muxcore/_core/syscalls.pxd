# What may live here: inline wrappers of libc's system calls that return >= 0 or -errno, and the
# classification of errnos. Nothing else in the package looks at `errno` or retries on EINTR.
#
# The core calls libc's wrappers, never syscall(), so that a fault can be injected by LD_PRELOAD.

from libc.errno cimport (
    EAGAIN, ECONNABORTED, ECONNRESET, EHOSTDOWN, EHOSTUNREACH, EINTR, EMFILE, ENETDOWN, ENETUNREACH, ENFILE,
    ENOBUFS, ENOENT, ENOMEM, ENOPROTOOPT, ENOSYS, EOPNOTSUPP, EPERM, EPIPE, EPROTO, ETIMEDOUT, errno,
)
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

cdef extern from "<sys/types.h>" nogil:
    ctypedef long ssize_t
    ctypedef long long off_t

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)
    ssize_t c_read "read"(int fd, void* buf, size_t count)
    ssize_t c_write "write"(int fd, const void* buf, size_t count)

cdef extern from "<fcntl.h>" nogil:
    int c_fcntl "fcntl"(int fd, int command, ...)
    enum: F_GETFL
    enum: F_SETFL
    enum: F_DUPFD_CLOEXEC
    enum: O_NONBLOCK

cdef extern from "<sys/ioctl.h>" nogil:
    int c_ioctl "ioctl"(int fd, unsigned long request, int* value)

cdef extern from "<errno.h>" nogil:
    enum: ENONET  # Linux only, so not in Cython's list

cdef extern from "<linux/sockios.h>" nogil:
    enum: SIOCOUTQ

cdef extern from "<sys/eventfd.h>" nogil:
    int c_eventfd "eventfd"(unsigned int initval, int flags)
    enum: EFD_NONBLOCK
    enum: EFD_CLOEXEC

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* ts)
    enum: CLOCK_MONOTONIC

cdef extern from "<sys/timerfd.h>" nogil:
    struct itimerspec:
        timespec it_value
    int c_timerfd_create "timerfd_create"(int clock, int flags)
    int c_timerfd_settime "timerfd_settime"(int fd, int flags, const itimerspec* value, itimerspec* before)
    enum: TFD_NONBLOCK
    enum: TFD_CLOEXEC
    enum: TFD_TIMER_ABSTIME

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    ctypedef unsigned short sa_family_t
    struct sockaddr:
        sa_family_t sa_family
    struct sockaddr_storage:
        sa_family_t ss_family
    struct iovec:
        void* iov_base
        size_t iov_len
    struct msghdr:
        void* msg_name
        socklen_t msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    struct c_linger "linger":
        int l_onoff
        int l_linger
    int c_accept4 "accept4"(int fd, sockaddr* address, socklen_t* size, int flags)
    ssize_t c_recv "recv"(int fd, void* buf, size_t size, int flags)
    ssize_t c_send "send"(int fd, const void* buf, size_t size, int flags)
    ssize_t c_sendmsg "sendmsg"(int fd, const msghdr* message, int flags)
    ssize_t c_recvmsg "recvmsg"(int fd, msghdr* message, int flags)
    int c_recvmmsg "recvmmsg"(int fd, mmsghdr* messages, unsigned int count, int flags, timespec* timeout)
    int c_sendmmsg "sendmmsg"(int fd, mmsghdr* messages, unsigned int count, int flags)
    int c_shutdown "shutdown"(int fd, int how)
    int c_setsockopt "setsockopt"(int fd, int level, int name, const void* value, socklen_t size)
    int c_getsockopt "getsockopt"(int fd, int level, int name, void* value, socklen_t* size)
    enum: AF_INET
    enum: AF_INET6
    enum: AF_UNIX
    enum: SOCK_NONBLOCK
    enum: SOCK_CLOEXEC
    enum: MSG_NOSIGNAL
    enum: MSG_ERRQUEUE
    enum: MSG_DONTWAIT
    enum: MSG_TRUNC
    enum: SHUT_WR
    enum: SOL_SOCKET
    enum: SO_DOMAIN
    enum: SO_ERROR
    enum: SO_LINGER

cdef extern from "<sys/sendfile.h>" nogil:
    ssize_t c_pread "pread"(int fd, void* to, size_t size, off_t offset)
    ssize_t c_sendfile "sendfile"(int out, int file, off_t* offset, size_t size)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigemptyset(sigset_t* signals)
    int sigaddset(sigset_t* signals, int signal)
    int pthread_sigmask(int how, const sigset_t* signals, sigset_t* before)
    int sigtimedwait(const sigset_t* signals, void* info, const timespec* timeout)
    enum: SIGPIPE
    enum: SIG_BLOCK
    enum: SIG_SETMASK

cdef extern from "<pthread.h>" nogil:
    unsigned long this_thread "(unsigned long)pthread_self"()

cdef extern from "<arpa/inet.h>" nogil:
    const char* inet_ntop(int family, const void* host, char* text, socklen_t size)
    enum: INET6_ADDRSTRLEN

cdef extern from "<netinet/in.h>" nogil:
    struct sockaddr_in6:
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        uint32_t sin6_scope_id
    uint16_t ntohs(uint16_t value)
    uint32_t ntohl(uint32_t value)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int c_epoll_create1 "epoll_create1"(int flags)
    int c_epoll_ctl "epoll_ctl"(int epfd, int op, int fd, epoll_event* event)
    int c_epoll_wait "epoll_wait"(int epfd, epoll_event* events, int maxevents, int timeout)
    enum: EPOLL_CLOEXEC
    enum: EPOLL_CTL_ADD
    enum: EPOLL_CTL_MOD
    enum: EPOLL_CTL_DEL
    uint32_t EPOLLIN
    uint32_t EPOLLOUT
    uint32_t EPOLLERR
    uint32_t EPOLLHUP
    uint32_t EPOLLRDHUP
    uint32_t EPOLLET
    uint32_t EPOLLEXCLUSIVE
    uint32_t EPOLLPRI

cdef extern from *:
    """
    #include <dlfcn.h>
    #include <signal.h>
    #include <sys/epoll.h>
    #include <time.h>
    /* epoll_pwait2 is GLIBC_2.35, and the wheels are built against older ones: found at run time. */
    typedef int (*muxcore_pwait2)(int, struct epoll_event *, int, const struct timespec *, const sigset_t *);
    static inline muxcore_pwait2 muxcore_find_pwait2(void)
    {
        return (muxcore_pwait2)dlsym(RTLD_DEFAULT, "epoll_pwait2");
    }
    static inline int muxcore_exchange(int *flag, int value) {
        return __atomic_exchange_n(flag, value, __ATOMIC_SEQ_CST);
    }
    /* One word that several threads look at, read and written whole. Relaxed, which costs what a plain access costs:
       what has to come in order is ordered by muxcore_exchange or by a critical section. */
    #define muxcore_load(place) __atomic_load_n(place, __ATOMIC_RELAXED)
    #define muxcore_store(place, value) __atomic_store_n(place, value, __ATOMIC_RELAXED)
    #define muxcore_add(place, value) ((void)__atomic_fetch_add(place, value, __ATOMIC_RELAXED))
    """
    ctypedef int (*muxcore_pwait2)(int epfd, epoll_event* events, int maxevents, const timespec* timeout,
                                   const void* sigmask) noexcept nogil
    muxcore_pwait2 muxcore_find_pwait2() noexcept nogil
    int muxcore_exchange(int* flag, int value) noexcept nogil
    bint load_flag "muxcore_load"(bint* place) noexcept nogil
    uint32_t load_word "muxcore_load"(uint32_t* place) noexcept nogil
    size_t load_size "muxcore_load"(size_t* place) noexcept nogil
    uint64_t load_count "muxcore_load"(uint64_t* place) noexcept nogil
    unsigned long load_thread "muxcore_load"(unsigned long* place) noexcept nogil
    void store_flag "muxcore_store"(bint* place, bint value) noexcept nogil
    void store_thread "muxcore_store"(unsigned long* place, unsigned long value) noexcept nogil
    void add_count "muxcore_add"(uint64_t* place, uint64_t value) noexcept nogil


# --- time ------------------------------------------------------------------------------------------

cdef inline int64_t sys_clock_ns(int clock) noexcept nogil:
    cdef timespec ts
    clock_gettime(clock, &ts)  # cannot fail for these two clocks and a valid pointer
    return <int64_t>ts.tv_sec * 1000000000 + ts.tv_nsec


# --- epoll -----------------------------------------------------------------------------------------

cdef inline int sys_epoll_create() noexcept nogil:
    cdef int r = c_epoll_create1(EPOLL_CLOEXEC)
    return r if r >= 0 else -errno

cdef inline int sys_epoll_ctl(int epfd, int op, int fd, uint32_t events, uint64_t token) noexcept nogil:
    cdef epoll_event event
    event.events = events
    event.data.u64 = token
    return 0 if c_epoll_ctl(epfd, op, fd, &event) == 0 else -errno

cdef inline int sys_epoll_wait(int epfd, epoll_event* events, int capacity, int64_t timeout_ns,
                               muxcore_pwait2 pwait2) noexcept nogil:
    """Wait; a negative timeout is forever. A signal ends the wait with 0 events, exactly as a timeout does:
    the caller runs Python's signal handlers, looks at its deadline and comes back."""
    cdef int r
    cdef timespec ts
    cdef int64_t ms
    if timeout_ns > 0 and pwait2 != NULL:
        ts.tv_sec = timeout_ns // 1000000000
        ts.tv_nsec = timeout_ns % 1000000000
        r = pwait2(epfd, events, capacity, &ts, NULL)
        if r >= 0:
            return r
        if errno != ENOSYS and errno != EPERM:  # EPERM: a sandbox that does not know the call
            return 0 if errno == EINTR else -errno
    # Rounded up, since a timer is never early; and epoll_wait takes an int.
    ms = -1 if timeout_ns < 0 else (timeout_ns + 999999) // 1000000
    r = c_epoll_wait(epfd, events, capacity, <int>(ms if ms < 0x7fffffff else 0x7fffffff))
    if r >= 0:
        return r
    return 0 if errno == EINTR else -errno


# --- sockets ---------------------------------------------------------------------------------------

cdef inline ssize_t sys_recv(int fd, void* buf, size_t size) noexcept nogil:
    cdef ssize_t r
    while True:
        r = c_recv(fd, buf, size, MSG_DONTWAIT)
        if r >= 0:
            return r
        if errno != EINTR:
            return -errno

cdef inline ssize_t sys_send(int fd, const void* buf, size_t size) noexcept nogil:
    cdef ssize_t r
    while True:
        r = c_send(fd, buf, size, MSG_NOSIGNAL | MSG_DONTWAIT)
        if r >= 0:
            return r
        if errno != EINTR:
            return -errno

cdef inline ssize_t sys_sendmsg(int fd, iovec* parts, size_t count) noexcept nogil:
    # writev would raise SIGPIPE after a reset: it takes no MSG_NOSIGNAL.
    cdef ssize_t r
    cdef msghdr message
    memset(&message, 0, sizeof(message))
    message.msg_iov = parts
    message.msg_iovlen = count
    while True:
        r = c_sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        if r >= 0:
            return r
        if errno != EINTR:
            return -errno

cdef inline int sys_recvmmsg(int fd, mmsghdr* messages, unsigned int count) noexcept nogil:
    """Receive datagrams and return their number. An error after the first datagram is returned by the next call."""
    cdef int r
    while True:
        r = c_recvmmsg(fd, messages, count, MSG_DONTWAIT, NULL)
        if r >= 0:
            return r
        if errno != EINTR:
            return -errno

cdef inline int sys_sendmmsg(int fd, mmsghdr* messages, unsigned int count) noexcept nogil:
    """Send datagrams and return their number. An error of a later datagram is returned when it is the first."""
    cdef int r
    while True:
        r = c_sendmmsg(fd, messages, count, MSG_NOSIGNAL | MSG_DONTWAIT)
        if r >= 0:
            return r
        if errno != EINTR:
            return -errno

cdef inline int sys_ensure_nonblocking(int fd) noexcept nogil:
    """For calls that take no MSG_DONTWAIT: set O_NONBLOCK again, if it was cleared. It belongs to the open file, which
    dup and fork share with others; and Python's socket.dup() clears it for a listening socket."""
    cdef int flags = c_fcntl(fd, F_GETFL)
    if flags >= 0 and (flags & O_NONBLOCK or c_fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0):
        return 0
    return -errno

cdef inline int sys_dup(int fd) noexcept nogil:
    cdef int r = c_fcntl(fd, F_DUPFD_CLOEXEC, 0)
    return r if r >= 0 else -errno

cdef inline void sys_acknowledge(int fd) noexcept nogil:
    """Acknowledge at once what was received, which the kernel delays for 40 ms. A server of TLS 1.3 may have nothing to
    send behind the client's Finished, and a client with Nagle's algorithm would wait for the ACK with its first
    message. A socket that is not of TCP has no such option, and needs none."""
    cdef int on = 1
    c_setsockopt(fd, 6, 12, &on, sizeof(on))  # IPPROTO_TCP, TCP_QUICKACK of Linux

cdef inline ssize_t sys_pread(int fd, char* to, size_t size, int64_t offset) noexcept nogil:
    cdef ssize_t r
    while True:
        r = c_pread(fd, to, size, offset)
        if r >= 0:
            return r
        if errno != EINTR:
            return -errno

cdef inline ssize_t sys_sendfile(int fd, int file, int64_t* offset, size_t size) noexcept nogil:
    """Send a part of a file and move `offset`; 0 if it has no byte there."""
    # It takes no MSG_DONTWAIT, so the socket itself has to be nonblocking.
    # It takes no MSG_NOSIGNAL either, so the thread blocks SIGPIPE, and removes the one that an EPIPE has left.
    cdef ssize_t r
    cdef off_t at = offset[0]
    cdef sigset_t pipe, before
    cdef timespec at_once
    r = sys_ensure_nonblocking(fd)
    if r < 0:
        return r
    memset(&at_once, 0, sizeof(at_once))
    sigemptyset(&pipe)
    sigaddset(&pipe, SIGPIPE)
    pthread_sigmask(SIG_BLOCK, &pipe, &before)
    while True:
        r = c_sendfile(fd, file, &at, size)
        if r >= 0:
            offset[0] = at
            break
        if errno != EINTR:
            r = -errno
            break
    if r == -EPIPE:
        sigtimedwait(&pipe, NULL, &at_once)  # EAGAIN if SIGPIPE is ignored: none was left
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return r

cdef inline int sys_accept(int fd, sockaddr_storage* address, socklen_t* size) noexcept nogil:
    cdef int r
    while True:
        size[0] = sizeof(sockaddr_storage)
        r = c_accept4(fd, <sockaddr*>address, size, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if r >= 0:
            return r
        if errno != EINTR:
            return -errno

cdef inline int sys_shutdown_write(int fd) noexcept nogil:
    return 0 if c_shutdown(fd, SHUT_WR) == 0 else -errno

cdef inline void sys_reset_on_close(int fd) noexcept nogil:
    """SO_LINGER {on, 0}: close(2) sends RST and drops what is unsent. A socket without the option is only closed."""
    cdef c_linger value
    value.l_onoff = 1
    value.l_linger = 0
    c_setsockopt(fd, SOL_SOCKET, SO_LINGER, &value, sizeof(value))

cdef inline int sys_pending_error(int fd) noexcept nogil:
    """-errno of the socket's pending error, which this consumes; 0 if there is none."""
    cdef int value = 0
    cdef socklen_t size = sizeof(value)
    if c_getsockopt(fd, SOL_SOCKET, SO_ERROR, &value, &size) != 0:
        return -errno
    return -value

cdef inline void sys_discard_error_queue(int fd) noexcept nogil:
    """Forget time stamps and the like (SO_TIMESTAMPING, IP_RECVERR), which EPOLLERR reports until they are read. Only
    the Internet's sockets have such a queue: a Unix socket ignores MSG_ERRQUEUE, and would give its input."""
    cdef char buf[256]
    cdef msghdr message
    cdef iovec part
    cdef int family = 0
    cdef socklen_t size = sizeof(family)
    if c_getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &family, &size) != 0 or family not in (AF_INET, AF_INET6):
        return
    while True:
        memset(&message, 0, sizeof(message))
        part.iov_base = buf
        part.iov_len = sizeof(buf)
        message.msg_iov = &part
        message.msg_iovlen = 1
        if c_recvmsg(fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0 and errno != EINTR:
            return

cdef inline int sys_unsent(int fd) noexcept nogil:
    """Bytes in the socket's send queue that the peer has not acknowledged."""
    cdef int value = 0
    return value if c_ioctl(fd, SIOCOUTQ, &value) == 0 else -errno

cdef inline int sys_close(int fd) noexcept nogil:
    # Never retried: Linux frees the descriptor before it can return EINTR or EIO, so a second close could hit a
    # descriptor that another thread has just been given.
    return 0 if c_close(fd) == 0 else -errno


# --- eventfd and timerfd ---------------------------------------------------------------------------

cdef inline int sys_eventfd() noexcept nogil:
    cdef int r = c_eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    return r if r >= 0 else -errno

cdef inline int sys_eventfd_signal(int fd) noexcept nogil:
    """Make the eventfd readable. EAGAIN (its counter is full) means that it is readable already."""
    cdef uint64_t one = 1
    while c_write(fd, &one, sizeof(one)) < 0:
        if errno == EAGAIN:
            return 0
        if errno != EINTR:
            return -errno
    return 0

cdef inline int sys_discard(int fd) noexcept nogil:
    """Read and forget the counter of an eventfd or a timerfd."""
    cdef uint64_t counter
    while c_read(fd, &counter, sizeof(counter)) < 0:
        if errno != EINTR:
            return -errno
    return 0


cdef inline int sys_timerfd() noexcept nogil:
    cdef int r = c_timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
    return r if r >= 0 else -errno

cdef inline void sys_timerfd_set(int fd, int64_t when_ns) noexcept nogil:
    """Make the timerfd readable at that time of the monotonic clock, also if it has passed; -1: never."""
    cdef itimerspec value
    memset(&value, 0, sizeof(value))
    if when_ns >= 0:
        value.it_value.tv_sec = when_ns // 1000000000
        value.it_value.tv_nsec = when_ns % 1000000000
    c_timerfd_settime(fd, TFD_TIMER_ABSTIME, &value, NULL)


# --- what an -errno means --------------------------------------------------------------------------

cdef inline bint err_would_block(ssize_t r) noexcept nogil:
    return r == -EAGAIN

cdef inline bint err_not_there(ssize_t r) noexcept nogil:
    """epoll_ctl: this file is not in the set; the one that was there under its number is closed."""
    return r == -ENOENT

cdef inline bint err_try_later(ssize_t r) noexcept nogil:
    """send: the kernel is short of memory; readiness does not report when that ends."""
    return r == -ENOBUFS or r == -ENOMEM

cdef inline bint err_peer_gone(ssize_t r) noexcept nogil:
    """send: the peer's end is closed or reset."""
    return r == -EPIPE or r == -ECONNRESET

cdef inline bint err_no_resources(ssize_t r) noexcept nogil:
    """accept: no descriptor or no memory for the next connection, which stays in the backlog."""
    return r == -EMFILE or r == -ENFILE or r == -ENOBUFS or r == -ENOMEM

cdef inline bint err_client_gone(ssize_t r) noexcept nogil:
    """accept: this client failed before it was accepted, or its packet was refused; the next one may do. Linux
    passes pending network errors of the new socket through accept (accept(2), "Error handling")."""
    return (r == -ECONNABORTED or r == -EPROTO or r == -EPERM or r == -ETIMEDOUT or r == -ENETDOWN
            or r == -ENOPROTOOPT or r == -EHOSTDOWN or r == -ENONET or r == -EHOSTUNREACH or r == -EOPNOTSUPP
            or r == -ENETUNREACH)
