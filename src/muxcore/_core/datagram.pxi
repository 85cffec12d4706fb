# What may live here: one datagram socket: receiving and sending in batches, errors, its addresses, and the class.
#
# What is sent goes out at the end of the batch of events, 64 datagrams to a sendmmsg; errors of a send are reported
# from the loop, too. A connected socket gets ICMP errors ("port unreachable") at its next call, whichever that is:
# recvmmsg, where it ends the call, or sendmmsg, where it keeps back a datagram that is not to blame. The kernel then
# forgets it, so a datagram is given up only when it meets the same error twice running.
#
# Making an object may start the collector, and so run finalisers, which may do anything to the socket or the Mux. So
# the buffers that the kernel fills are removed from the Mux meanwhile, no object of the user's own class is the key of
# a dictionary, and the queue is changed with no Python in between.

cdef enum:
    RECEIVE_ROUNDS = 4      # full batches for one socket before the others have their turn
    ADDRESSES_KEPT = 1024
    ERRORS_KEPT = 64
    PACKET_COST = 64        # bytes that a queued datagram counts beside its data, so that empty ones are bounded

cdef inline int schedule_datagram(CompiledCore m, Datagram d) noexcept:
    """Put this socket on `pending`, for run_pending_datagram() before the next wait."""
    if not d.pending:
        if append_or_fail(m.pending, d) < 0:
            PyErr_Clear()
            m.schedule_failed = True
        else:
            d.pending = True
        if m.flush_at_once and not m.in_turn:
            sys_eventfd_signal(m.wake_fd)
    return 0

cdef int report_error(CompiledCore m, Datagram d, object error, bint of_close=False) except -1:
    """Call the handler's on_error soon. More errors than one turn reports are only counted. `error` has no frames.
    `of_close`: it is why the socket was closed; no other is reported behind that."""
    if d.fd < 0 and not of_close:
        return 0  # a finaliser has closed it while the error was made
    m.n.datagram_errors += 1
    if PyList_GET_SIZE(d.errors) < ERRORS_KEPT:
        d.errors.append(error)
    return schedule_datagram(m, d)

cdef int notify_error(CompiledCore m, Datagram d) except -1:
    """Report the first error."""
    error = d.errors[0]
    arguments = (d, error)
    if PyList_GET_SIZE(d.errors) == 0 or d.errors[0] is not error:
        return 0  # a finaliser has closed it: no callback comes after that
    del d.errors[0]
    m.notified = True
    if d.on_error is not None:
        return call_plain(m, d.on_error, arguments)
    if not d.warned:
        d.warned = True
        log.warning("%r has no on_error, so later errors are only counted: %s", d, error)
    return 0


# --- addresses -------------------------------------------------------------------------------------

cdef inline object address_of(Datagram d, sockaddr_storage* name, socklen_t size):
    """A sender as its user sees it; None for a Unix socket that has no name."""
    if size <= sizeof(name.ss_family):
        return None
    # Most come in bursts. A lookup in a dictionary (a bytes object, its hash) is a third of our cost per datagram.
    if PyBytes_GET_SIZE(d.last_name) == size and memcmp(PyBytes_AS_STRING(d.last_name), name, size) == 0:
        return d.last_address
    key = PyBytes_FromStringAndSize(<char*>name, size)
    address = d.names.get(key)
    if address is None:
        address = made_address(name, size)
        if name.ss_family == AF_UNIX or (<sockaddr_in6*>name).sin6_port != 0:  # else see destination()
            keep_address(d, address, key)
            d.names[key] = address
    d.last_name, d.last_address = key, address
    return address

cdef object made_address(sockaddr_storage* name, socklen_t size):
    cdef sockaddr_in6* six = <sockaddr_in6*>name
    if name.ss_family == AF_UNIX:
        return unix_address(name, size)
    if name.ss_family == AF_INET:
        return internet_address(AF_INET, <uint8_t*>name + 4, six.sin6_port, 0, 0)
    return internet_address(AF_INET6, <uint8_t*>name + 8, six.sin6_port, six.sin6_flowinfo, six.sin6_scope_id)

cdef int keep_address(Datagram d, object address, object sockaddr) except -1:
    """Keep the address, so that a reply needs no parsing. A flood from a million addresses does not fill the memory."""
    if len(d.sockaddrs) >= ADDRESSES_KEPT:
        d.names.clear()
        d.sockaddrs.clear()
    d.sockaddrs[address] = sockaddr
    return 0

cdef inline bint is_plain(object address) noexcept:
    """Whether it is as as_address() makes them: a key that runs no code of the user's."""
    cdef Py_ssize_t i
    if type(address) is not tuple:
        return type(address) is str
    for i in range(PyTuple_GET_SIZE(address)):
        item = <object>PyTuple_GET_ITEM(address, i)
        if type(item) is not int and type(item) is not str:
            return False
    return True

cdef object sockaddr_of(Datagram d, object address):
    """The sockaddr of a destination: None on a connected socket, b"" for an address that cannot be sent to.
    `address` may run code of the user's."""
    if d.remotes:
        if address is not None and not (is_plain(address) and address in d.remotes):
            address_module.check_is_remote(d.family, address, d.remotes)
        return None
    sockaddr = d.sockaddrs.get(address) if is_plain(address) else None
    if sockaddr is None:
        target = address_module.destination(d.family, address)
        if type(target) is bytes:
            return target
        sockaddr = address_module.sockaddr(d.family, target)
        if is_plain(address) and not (type(address) is tuple and "%" in address[0]):  # a zone's number may change
            keep_address(d, address, sockaddr)
    return sockaddr


# --- receiving -------------------------------------------------------------------------------------

cdef int datagram_ready(CompiledCore m, Datagram d, uint32_t events) except -1:
    if events & EPOLLOUT and d.blocked:
        d.blocked = False
        schedule_datagram(m, d)
    if events & ~<uint32_t>EPOLLOUT:
        return receive_datagrams(m, d, events)
    return 0

cdef int receive_datagrams(CompiledCore m, Datagram d, uint32_t events) except -1:
    """Hand what has come to the handler, batch by batch; the kernel reports what is left the next time."""
    cdef uint64_t enough = m.n.bytes_in + m.read_budget
    cdef Packets* p
    cdef int i, r
    for i in range(RECEIVE_ROUNDS):
        p = taken_packets(m, d.max_size)
        try:
            packets_offer(p, d.max_size)
            m.n.recv_calls += 1
            r = sys_recvmmsg(d.fd, p.headers, PACKETS)
            messages = taken_datagrams(m, d, p, r)
        finally:
            give_back_packets(m, p)
        if r < 0:
            return receive_failed(m, d, r, events)
        hand_out(m, d, messages)
        if r < PACKETS or d.fd < 0 or m.close_requested or m.n.bytes_in >= enough:
            return 0
    return 0

cdef list taken_datagrams(CompiledCore m, Datagram d, Packets* p, int count):
    """What the kernel has received, as (data, address). What is lost to an interrupt or a lack of memory is counted."""
    cdef list messages = []
    cdef int i = 0
    try:
        while i < count:
            take_datagram(m, d, messages, &p.names[i], &p.headers[i], <char*>p.parts[i].iov_base)
            i += 1
    except BaseException:
        count_drops(m, PyList_GET_SIZE(messages) + count - i)
        raise
    return messages

cdef int take_datagram(CompiledCore m, Datagram d, list messages, sockaddr_storage* name, mmsghdr* header,
                       char* data) except -1:
    address = address_of(d, name, header.msg_hdr.msg_namelen)
    if header.msg_hdr.msg_flags & MSG_TRUNC:
        report_error(m, d, datagram_too_large(address, d.max_size))
        count_drop(m)
        return 0
    messages.append((PyBytes_FromStringAndSize(data, header.msg_len), address))
    m.n.bytes_in += header.msg_len
    return 0

cdef int hand_out(CompiledCore m, Datagram d, list messages) except -1:
    cdef Py_ssize_t count = PyList_GET_SIZE(messages)
    if count == 0:
        return 0
    try:
        arguments = (d, messages)
    except MemoryError:
        count_drops(m, count)
        raise
    if d.fd < 0:  # a finaliser has closed it: no callback comes after that
        count_drops(m, count)
        return 0
    m.n.messages_in += count
    m.notified = True
    return call_plain(m, d.on_datagrams, arguments)

cdef int receive_failed(CompiledCore m, Datagram d, int r, uint32_t events) except -1:
    if not err_would_block(r):
        return report_error(m, d, os_error(r))
    if events & EPOLLERR:  # time stamps or the like, which would be reported for ever
        sys_discard_error_queue(d.fd)
    return 0


# --- sending ---------------------------------------------------------------------------------------

cdef int send_datagram(CompiledCore m, Datagram d, object data, object address) except -1:
    """Accept or refuse a datagram: 1 below the high-water mark, 0 refused or above it."""
    cdef size_t size
    if not PyBytes_CheckExact(data):
        data = as_bytes(data)
    size = PyBytes_GET_SIZE(data)
    if size > d.largest_sent:
        raise ValueError(f"data must be at most {d.largest_sent} bytes, the largest datagram, not {size}")
    sockaddr = sockaddr_of(d, address)
    if d.fd < 0 or (sockaddr is not None and PyBytes_GET_SIZE(sockaddr) == 0):
        count_drop(m)
        return 0
    if d.outbox_bytes >= d.max_outbox:
        return datagrams_overflow(m, d)
    d.out.append(data)
    try:  # no list of CPython grows at an odd size; if one did, data would be read as addresses
        d.out.append(sockaddr)
    except MemoryError:
        d.out.pop()
        raise
    d.outbox_bytes += size + PACKET_COST
    m.n.messages_out += 1
    if d.outbox_bytes > d.high or (m.flush_at_once and not m.in_turn):
        return send_at_once(m, d)
    schedule_datagram(m, d)
    return not d.above

cdef int send_at_once(CompiledCore m, Datagram d) except -1:
    flush_datagrams(m, d)
    if d.outbox_bytes > d.high and not d.above:
        d.above = True
        d.drain_owed = False
        m.n.high_water_hits += 1
    return not d.above

cdef int datagrams_overflow(CompiledCore m, Datagram d) except -1:
    """The queue is full: do what the limits say."""
    if d.overflow == OVERFLOW_DROP:
        count_drop(m)
        return 0
    error = OutboxFull(f"{d.outbox_bytes} bytes are queued, max_outbox is {d.max_outbox}", conn=d, limit=d.max_outbox)
    if d.overflow == OVERFLOW_RAISE:
        raise error
    count_drop(m)
    try:
        close_datagram(m, d)
    finally:
        report_error(m, d, error, of_close=True)
    return 0

cdef inline bint can_flush(Datagram d) noexcept:
    return d.out_at < PyList_GET_SIZE(d.out) and not (d.blocked or d.starved)

cdef int flush_datagrams(CompiledCore m, Datagram d) except -1:
    """Send queued datagrams until the queue is empty or the kernel accepts no more."""
    cdef mmsghdr headers[PACKETS]
    cdef iovec parts[PACKETS]
    cdef int r
    while can_flush(d):
        m.n.sendmsg_calls += 1
        r = sys_sendmmsg(d.fd, headers, offer_datagrams(d, headers, parts))
        if r < 0:
            datagram_refused(m, d, r)
        else:
            m.n.bytes_out += forget_datagrams(d, r)
    if d.above and d.outbox_bytes <= d.low:
        d.above = False
        d.drain_owed = True
        schedule_datagram(m, d)
    return 0

cdef unsigned int offer_datagrams(Datagram d, mmsghdr* headers, iovec* parts) noexcept:
    cdef Py_ssize_t at = d.out_at
    cdef unsigned int count = 0
    cdef object data, name
    while count < PACKETS and at < PyList_GET_SIZE(d.out):
        data = <object>PyList_GET_ITEM(d.out, at)
        name = <object>PyList_GET_ITEM(d.out, at + 1)
        packet_set(&headers[count], &parts[count], PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data),
                   NULL if name is None else PyBytes_AS_STRING(name), 0 if name is None else PyBytes_GET_SIZE(name))
        count += 1
        at += 2
    return count

cdef size_t forget_datagrams(Datagram d, Py_ssize_t count) except? 0:
    """Remove `count` datagrams from the front of the queue, and return their bytes."""
    cdef size_t size = 0
    cdef Py_ssize_t i
    for i in range(d.out_at, d.out_at + 2 * count, 2):
        size += PyBytes_GET_SIZE(<object>PyList_GET_ITEM(d.out, i))
    d.outbox_bytes -= size + PACKET_COST * count
    d.out_at += 2 * count
    d.refused = 0
    if 2 * d.out_at >= PyList_GET_SIZE(d.out):  # else it would be moved again and again
        try:
            PyList_SetSlice(d.out, 0, d.out_at, NULL)  # of bytes: no finaliser runs
            d.out_at = 0
        except MemoryError:  # more than eight are set aside in memory of their own before they go
            pass
    return size

cdef int datagram_refused(CompiledCore m, Datagram d, int r) except -1:
    """The kernel did not accept the first datagram of the queue."""
    # A Unix socket whose receiver is full is writable all the same, unless it is connected to it.
    if err_would_block(r) and (d.remote is not None or d.family != AF_UNIX):
        m.n.would_blocks += 1
        d.blocked = True
        return schedule_datagram(m, d)
    if err_would_block(r) or err_try_later(r):
        return starve(m, d)
    if d.refused != r:
        d.refused = r
        return report_error(m, d, os_error(r))
    count_drop(m)
    forget_datagrams(d, 1)
    return 0

cdef int starve(CompiledCore m, Datagram d) except -1:
    """Try again after a pause: readiness does not report when the kernel has memory again."""
    cdef int64_t retry_ns = sys_clock_ns(CLOCK_MONOTONIC) + STARVED_NS
    schedule_datagram(m, d)  # if there is no memory for the timer, or an interrupt comes, the next turn tries again
    m.timers.add(retry_ns, _retry_datagrams, (d,))
    d.starved, d.retry_ns = True, retry_ns
    return 0

def _retry_datagrams(Datagram d):
    schedule_datagram(d.mux, d)


# --- the steps of its life -------------------------------------------------------------------------

cdef int run_pending_datagram(CompiledCore m, Datagram d) except -1:
    """Do all work that is due on a socket."""
    d.pending = False
    if d.starved and sys_clock_ns(CLOCK_MONOTONIC) >= d.retry_ns:
        d.starved = False
    flush_datagrams(m, d)
    for _ in range(len(d.errors)):
        if d.errors:  # a callback may have closed it
            notify_error(m, d)
        if look_at_clock(m):
            schedule_datagram(m, d)
            break
    if d.drain_owed:
        notify_datagram_drain(m, d)
    return watch_datagrams(m, d)

cdef int notify_datagram_drain(CompiledCore m, Datagram d) except -1:
    arguments = (d,)
    if not d.drain_owed:
        return 0  # a finaliser has closed it: no callback comes after that
    m.notified = True
    d.drain_owed = False
    if d.on_drain is not None:
        call_plain(m, d.on_drain, arguments)
    return 0

cdef int watch_datagrams(CompiledCore m, Datagram d) except -1:
    """Set the interest in the kernel, if it has changed."""
    cdef uint32_t wanted = EPOLLIN | (EPOLLOUT if d.blocked else 0)
    if d.fd < 0 or wanted == d.interest:
        return 0
    if sys_epoll_ctl(m.epoll.fd, EPOLL_CTL_MOD, d.fd, wanted, token(m, d.fd)) == 0:
        d.interest = wanted
    elif d.blocked:
        d.blocked = False
        starve(m, d)
    return 0

cdef int close_datagram(CompiledCore m, Datagram d) except -1:
    """Send as much as the kernel accepts at once, then end."""
    if d.fd < 0:
        return 0
    try:
        flush_datagrams(m, d)
    finally:
        end_datagram(m, d)
    return 0

cdef int end_datagram(CompiledCore m, Datagram d) except -1:
    """Whatever is raised, the descriptor is closed."""
    cdef int fd = d.fd
    if fd < 0:
        return 0  # a finaliser has closed it meanwhile
    d.fd = -1
    unregister(m, fd)
    try:
        discard_datagrams(m, d)
        if d.file is not None:
            d.file.remove()
    finally:
        sys_close(fd)
    return 0

cdef int discard_datagrams(CompiledCore m, Datagram d) except -1:
    """Discard the queue and the errors: after close() no callback is called."""
    cdef Py_ssize_t count = (PyList_GET_SIZE(d.out) - d.out_at) // 2
    m.n.unsent += count != 0
    count_drops(m, count)
    d.out_at = d.outbox_bytes = 0
    d.above = d.drain_owed = d.blocked = d.starved = False
    d.out.clear()
    d.errors.clear()
    return 0

cdef Packets* taken_packets(CompiledCore m, size_t size) except NULL:
    """Room for one recvmmsg of datagrams of that size, out of the Mux while it is in use; to be given back."""
    cdef Packets* packets = m.packets
    m.packets = NULL
    if packets != NULL and packets.size < size:
        free(packets)
        packets = NULL
    if packets == NULL:
        packets = packets_new(size)
        if packets == NULL:
            raise MemoryError()
    return packets

cdef int give_back_packets(CompiledCore m, Packets* packets) except -1:
    """All sockets of the Mux share it. A finaliser may have made one that needs a larger one meanwhile."""
    if m.packets != NULL and m.packets.size > packets.size:
        free(packets)
    else:
        free(m.packets)
        m.packets = packets
    return 0


# --- the class -------------------------------------------------------------------------------------

@cython.final
@cython.no_gc_clear  # as Connection
cdef class Datagram:
    """A datagram socket, UDP or Unix; made by `Mux.datagram`. Its methods never block and never call a callback.

    Use it from the Mux's thread only.

    address: its local address, as `socket.getsockname` returns it; with port 0 as argument, it has the actual port.
    remote: the address that it is connected to, or None. limits: those of the output queue. mux: its Mux. closed:
    whether it is closed. data: yours, None at first.
    """

    def __cinit__(self, token=None):
        self.fd = -1
        check_token(token, "datagram sockets are made by Mux.datagram")

    def __dealloc__(self):
        if self.fd >= 0:
            sys_close(self.fd)

    def __repr__(self):
        return f"<muxcore.Datagram {'closed' if self.closed else 'open'}, address={self.address!r}>"

    @property
    def mux(self):
        return self.mux

    @property
    def closed(self) -> bool:
        return self.fd < 0

    def fileno(self) -> int:
        """The descriptor; -1 after it is closed."""
        return self.fd

    def send(self, data, address=None) -> bool:
        """Queue a datagram; True while the queue is at or below `Limits.high`. It is sent at the end of the batch.

        address: the destination, with a numeric host; None, or the remote, on a socket with a remote.

        `bytes` are kept by reference; any other buffer is copied before this returns. It never blocks, and never raises
        because of the network. On a closed socket, and for a sender that cannot get a reply (port 0, or None for an
        unbound Unix socket), it counts a drop and returns False. At `max_outbox`, `Limits.overflow` decides. Raises
        TypeError or ValueError for a bad address, or for more data than a datagram can hold.
        """
        check_thread(self.mux)
        return send_datagram(self.mux, self, data, address) != 0

    def close(self) -> None:
        """Send as much as the kernel accepts at once, drop the remaining output, and close. No callback follows."""
        check_thread(self.mux)
        close_datagram(self.mux, self)

    def getsockopt(self, level, name, size=0, /):
        """As `socket.getsockopt`."""
        check_thread(self.mux)
        return asked_option(self, level, name, size)

    def setsockopt(self, level, name, value, /) -> None:
        """As `socket.setsockopt`."""
        check_thread(self.mux)
        value = address_module.as_option_value(value)
        level, name = address_module.as_option(level, name)
        with_socket(self, "setsockopt", (level, name, value))

cdef int clear_datagram(object datagram) except -1:
    (<Datagram>datagram).data = None
    return 0

(<PyTypeObject*>Datagram).tp_clear = clear_datagram  # see clear_connection()
