# What may live here: one connection: what it is at the moment, the notification of its user, and the steps of its life.

# What a connection is at the moment.
cdef enum Flag:
    F_OPENED = 1 << 0       # on_open was called
    F_PENDING = 1 << 1      # on the Mux's pending list
    F_PAUSED = 1 << 2       # pause_reading()
    F_ABOVE_HIGH = 1 << 3   # the outbox was above high and is not back at low
    F_DRAIN_OWED = 1 << 4   # it is back, and not reported yet
    F_BLOCKED = 1 << 5      # the socket's send buffer is full: wait for EPOLLOUT
    F_STARVED = 1 << 6      # the kernel had no memory for the last send: wait for a timer
    F_EOF = 1 << 7          # the peer's FIN was read
    F_EOF_NOTIFIED = 1 << 8
    F_WRITE_EOF = 1 << 9    # write_eof(): shut down once the outbox is empty
    F_CLOSING = 1 << 10     # close(): nothing more is accepted or delivered
    F_WRITE_SHUT = 1 << 11  # SHUT_WR was done
    F_PEER_GONE = 1 << 12   # the peer is gone for sending; what it sent before may still be read
    F_ENDED = 1 << 13       # over: only the descriptor and on_close are left to do
    F_CLOSED = 1 << 14      # the descriptor is gone
    F_CLOSE_NOTIFIED = 1 << 15
    F_REPORT = 1 << 16      # times a Report: what poll() is to say
    F_REPORT_MASK = 31 << 16
    F_CONNECTING = 1 << 21  # by connect(): there is no socket yet
    F_HELD = 1 << 22        # by Threaded, whose queue is full; apart from the user's F_PAUSED
    F_TIMED_OUT = 1 << 23   # closed by an idle or silence timeout
    F_FAILED = 1 << 24      # the peer has sent malformed input: it closes, perhaps behind on_error
    F_WIRE = 1 << 25        # what it sends and receives passes a wire: see wire.pxi
    F_HANDSHAKE = 1 << 26   # and that is not open yet
    F_HANDSHAKING = 1 << 27  # on the Mux's list of handshakes
    F_FIN_UNREAD = 1 << 28  # F_EOF is the wire's: the peer's FIN was not read yet
    F_WIRE_SHUT = 1 << 29   # the wire has ended our side of the stream

cdef enum Report:
    R_OPENED = 1
    R_READABLE = 2
    R_DRAINED = 4
    R_EOF = 8
    R_CLOSED = 16

cdef enum:
    REFUSES_OUTPUT = F_CLOSING | F_ENDED | F_PEER_GONE | F_WRITE_EOF

cdef int64_t CLOSING_STALL_NS = 30_000_000_000
cdef int64_t FAILED_LINGER_NS = 500_000_000

# The operations that another thread may queue.
cdef enum Operation:
    OP_SEND
    OP_SEND_ABOVE               # OP_SEND that returned False: its sender waits for the drain
    OP_OVERFLOW
    OP_CLOSE
    OP_ABORT
    OP_CALL

# Any thread may read these, while the Mux's thread writes them with plain stores: atomic ones would slow its hot path.
# Both are aligned words, so no thread reads half of one. An old value is harmless: the flags that matter are never
# cleared again, and code that needs the newest value reads it in a critical section.

cdef inline uint32_t seen_flags(Connection c) noexcept:
    return load_word(&c.flags)

cdef inline size_t seen_outbox(Connection c) noexcept:
    return load_size(&c.outbox_bytes)

# --- pause and autopause: whether a connection is read, and its messages are delivered ----------------

cdef inline bint may_deliver(Connection c) noexcept:
    """Whether messages may be delivered now: not paused, and not above the high-water mark with autopause."""
    if c.flags & (F_PAUSED | F_HELD | F_CLOSING | F_FAILED):
        return False
    return not (c.flags & F_ABOVE_HIGH and c.policy.autopause)

cdef inline bint may_read(Connection c) noexcept:
    """Whether to read: to deliver the input or, while closing, to discard it (unread input would make close(2) send a
    RST, which destroys output on its way to the peer)."""
    if c.flags & (F_EOF | F_ENDED | F_CONNECTING):
        return c.flags & (F_FIN_UNREAD | F_CLOSING | F_ENDED) == F_FIN_UNREAD | F_CLOSING
    if c.flags & (F_CLOSING | F_HANDSHAKE):
        return True
    return may_deliver(c) and (c.inbox == NULL or c.inbox.size <= c.policy.max_inbox or c.inbox.frame.whole == 0)

cdef inline int schedule(CompiledCore m, Connection c) noexcept:
    """Put this connection on `pending`, for run_pending() before the next wait."""
    if not c.flags & F_PENDING:
        if append_or_fail(m.pending, c) < 0:
            PyErr_Clear()
            m.schedule_failed = True
        else:
            c.flags |= F_PENDING
        if m.flush_at_once and not m.in_turn:
            sys_eventfd_signal(m.wake_fd)
    return 0

cdef int schedule_or_raise(CompiledCore m, Connection c) except -1:
    """Put it on `pending` before it is removed from all other tables: on_close is still owed."""
    schedule(m, c)
    if not c.flags & F_PENDING:
        raise MemoryError()
    return 0

cdef inline int keep_error(Connection c, object error) except -1:
    """The first reason stays. Its frames, which may hold the connection, go with finish() at the latest."""
    if c.error is None:
        c.error = error
    return 0

cdef inline int set_ended(Connection c, object error) except -1:
    if not c.flags & F_ENDED:
        c.flags |= F_ENDED
        keep_error(c, error)
    return 0

cdef int end(CompiledCore m, Connection c, object error) except -1:
    """It is over; run_pending() completes it. With an error the peer gets a RST: after a FIN it would regard what it
    has got, perhaps half a file, as the whole."""
    if error is not None and not c.flags & F_ENDED:
        sys_reset_on_close(c.fd)  # a socket that has no such option is closed all the same
    set_ended(c, error)
    return schedule(m, c)


# --- notifying the user ----------------------------------------------------------------------------

cdef inline int invoke(CompiledCore m, Connection c, object fn, object arg, size_t count) except -1:
    """Call fn(c) or fn(c, arg)."""
    cdef PyObject* args[4]
    cdef PyObject* result
    args[2] = <PyObject*>c
    args[3] = <PyObject*>arg
    m.notified = True
    result = muxcore_call(<PyObject*>fn, &args[2], count)
    if result == NULL:
        return handler_raised(m, c)
    DECREF(result)
    if m.forks != forks:  # the handler forked, and this is the child: it must not use the parent's sockets
        check_fork(m)
    return 0

cdef inline int call_handler(CompiledCore m, Connection c, object fn, object arg, size_t count) except -1:
    """Call fn(c) or fn(c, arg). Its output to `c` leaves together: with its group, or else when it returns."""
    m.in_handler = <PyObject*>c
    invoke(m, c, fn, arg, count)
    m.in_handler = NULL
    return send_replies(m, c)

cdef int handler_raised(CompiledCore m, Connection c) except -1:
    """A handler that raises closes its connection, as close() does: output that was accepted before is still sent."""
    if m.forks != forks:
        raised()
    try:
        raised()
    except Exception as error:  # any other ends the turn, and the next one looks at everything
        handler_failed(m, c, error)
    return 0

cdef int handler_failed(CompiledCore m, Connection c, object error) except -1:
    if PyErr_GivenExceptionMatches(error, FrameError):  # without a lookup of its __class__, unlike isinstance()
        return peer_failed(m, c, error)
    m.n.handler_errors += 1
    if not c.flags & F_CLOSE_NOTIFIED:
        keep_error(c, error)
        close_connection(m, c)
    return log_error("handler of %r raised", c, error)

cdef int peer_failed(CompiledCore m, Connection c, object error) except -1:
    """The peer has sent malformed input. The handler may send a last reply, then the connection closes."""
    cdef bint first = c.error is None and not c.flags & (F_CLOSING | F_ENDED)
    if c.flags & F_CLOSE_NOTIFIED:
        without_frames(error)
        return 0
    c.flags |= F_FAILED
    keep_error(c, error)
    discard_inbox(m, c)
    try:
        without_frames(error)
        about(error, c)  # a class of the user's may do anything
        if first and c.policy.on_error is not None and may_still_fail(m, c):
            call_handler(m, c, c.policy.on_error, error, 2)
    except BaseException:
        without_frames(error)  # an interrupt may have come before they were gone
        raise
    finally:
        close_connection(m, c)
    return 0

cdef inline bint may_still_fail(CompiledCore m, Connection c) noexcept:
    """Whether on_error may be called: the connection is not closed, and neither is its Mux."""
    return not c.flags & (F_CLOSING | F_ENDED) and not m.close_requested

cdef int log_error(str text, Connection c, object error) except -1:
    """The last step of its caller, since a log handler may do anything."""
    try:
        log.error(text, c, exc_info=error)
    finally:
        without_frames(error)
    return 0

cdef int report_message(CompiledCore m, Connection c) except -1:
    """Pull style: report messages that a pause held back."""
    return report(m, c, R_READABLE) if c.policy.pull and has_message(m, c) else 0

cdef inline int report(CompiledCore m, Connection c, uint32_t what) except -1:
    if not c.flags & F_REPORT_MASK:
        m.ready.append(c)
    c.flags |= what * F_REPORT
    m.reports += 1
    return 0

cdef int notify(CompiledCore m, Connection c, object fn, uint32_t what, uint32_t done) except -1:
    """`done` is the flag that prevents a second call. A report without memory for it is repeated in the next turn; a
    handler is not called again, even if it raises."""
    if c.policy.pull:
        report(m, c, what)
    c.flags |= done
    return 0 if fn is None else call_handler(m, c, fn, None, 1)

cdef int notify_drain(CompiledCore m, Connection c) except -1:
    if c.policy.pull:
        report(m, c, R_DRAINED | (R_READABLE if has_message(m, c) else 0))
    c.flags &= ~F_DRAIN_OWED
    return 0 if c.policy.on_drain is None else call_handler(m, c, c.policy.on_drain, None, 1)

cdef int notify_eof(CompiledCore m, Connection c) except -1:
    if c.flags & F_WIRE and c.error is not None:
        return close_connection(m, c)  # that was no orderly end
    notify(m, c, c.policy.on_eof, R_EOF, F_EOF_NOTIFIED)
    if not c.policy.pull and c.policy.on_eof is None and not c.policy.half_open:
        begin_close(m, c)  # run_pending() goes on with it
    return 0

cdef int notify_close(CompiledCore m, Connection c) except -1:
    if c.policy.pull:
        report(m, c, R_CLOSED)
    c.flags |= F_CLOSE_NOTIFIED
    return 0 if c.policy.on_close is None else call_handler(m, c, c.policy.on_close, c.error, 2)


# --- the steps of its life -------------------------------------------------------------------------

cdef inline int on_ready(CompiledCore m, Connection c, uint32_t events) except -1:
    """The kernel reports `events`. Send first, since that may end an autopause. Then read, also at ERR or HUP: input
    that came before a reset can still be read, and recv returns the error as well."""
    cdef int r
    if events & EPOLLOUT and c.flags & F_BLOCKED:
        c.flags &= ~F_BLOCKED
        send_out(m, c)
        if not c.flags & F_BLOCKED:
            schedule(m, c)
    if events & ~<uint32_t>EPOLLOUT and c.fd >= 0:
        if may_read(c):
            return read_turn(m, c, events)
        if events & EPOLLERR:  # it is paused: no recv would see the error
            r = sys_pending_error(c.fd)
            if r < 0:
                return end_behind_messages(m, c, os_error(r))
            sys_discard_error_queue(c.fd)
    return 0

cdef int end_behind_messages(CompiledCore m, Connection c, object error) except -1:
    """An error, which the kernel reports once. Messages that wait for their turn go first."""
    if not waits_for_run_pending(c):
        return end(m, c, error)
    c.flags |= F_PEER_GONE
    keep_error(c, error)
    sys_reset_on_close(c.fd)  # as end() does
    return 0

cdef int run_pending(CompiledCore m, Connection c) except -1:
    """Do all work that is due on a connection, in the order of callbacks that the promises guarantee."""
    c.flags &= ~F_PENDING
    if c.flags & (F_CONNECTING | F_HANDSHAKE):
        return run_pending_connect(m, c) if c.flags & F_CONNECTING else run_pending_handshake(m, c)
    if not c.flags & F_OPENED:
        if c.policy.framing.kind == CUSTOM and c.reader is None and not c.flags & (F_CLOSING | F_ENDED):
            make_reader(m, c)
        notify(m, c, c.policy.on_open, R_OPENED, F_OPENED)
    if c.flags & F_WIRE:
        if c.flags & F_HANDSHAKE:
            return run_pending_handshake(m, c)  # on_open has begun it
        run_wire(m, c)  # an interrupt may have come amid its work
    send_out(m, c)
    if c.flags & F_DRAIN_OWED and not c.flags & (F_CLOSING | F_ENDED | F_PEER_GONE):
        notify_drain(m, c)
    if (c.inbox != NULL or c.reader is not None) and may_deliver(c) and not c.flags & F_ENDED:
        look_into_inbox(m, c)
    if c.flags & (F_PEER_GONE | F_ENDED) == F_PEER_GONE:
        read_what_is_left(m, c)
    # (Not while its messages are in threads: each look for a message would find the same malformed input again.)
    if (c.flags & (F_EOF | F_EOF_NOTIFIED | F_ENDED) == F_EOF and may_deliver(c)
            and not (m.offloaded and c in m.offloaded)):
        if not has_message(m, c) and may_deliver(c):
            notify_eof(m, c)
    if not c.flags & F_ENDED:
        advance_close(m, c)
    if c.flags & F_ENDED:
        return finish(m, c)
    return apply_interest(m, c)

cdef int run_pending_connect(CompiledCore m, Connection c) except -1:
    """Output waits for the socket; only the end can come before."""
    cdef bint owed
    with cython.critical_section(c):  # as in advance_close()
        owed = c.out_head != NULL or c.foreign != 0
    if c.flags & F_CLOSING and not owed:
        set_ended(c, None)
    return finish(m, c) if c.flags & F_ENDED else 0

cdef int read_what_is_left(CompiledCore m, Connection c) except -1:
    """The peer is gone for sending: read until the end of what it sent before, without a wait for readiness."""
    if waits_for_run_pending(c):
        return 0
    if not may_read(c):
        return set_ended(c, None)
    read_turn(m, c, EPOLLHUP)
    return 0 if c.flags & F_ENDED else schedule(m, c)

cdef inline uint32_t wanted_interest(Connection c) noexcept:
    """Mask 0 would still report ERR and HUP, for ever; with bare EPOLLET they are reported once."""
    cdef uint32_t wanted = 0
    if may_read(c):
        wanted = EPOLLIN | EPOLLRDHUP
    if c.flags & F_BLOCKED:
        wanted |= EPOLLOUT
    return wanted if wanted else EPOLLET

cdef int apply_interest(CompiledCore m, Connection c) except -1:
    """Set the interest in the kernel, if it has changed."""
    cdef uint32_t wanted = wanted_interest(c)
    cdef int r
    if wanted == c.interest:
        return 0
    r = sys_epoll_ctl(m.epoll.fd, EPOLL_CTL_MOD, c.fd, wanted, token(m, c.fd))
    if r < 0:
        return end(m, c, os_error(r))
    c.interest = wanted
    return 0

cdef int close_connection(CompiledCore m, Connection c) except -1:
    if not c.flags & (F_CLOSING | F_ENDED):
        begin_close(m, c)
        schedule(m, c)
    return 0

cdef int close_for(CompiledCore m, Connection c, object reason) except -1:
    if reason is not None and not c.flags & (F_CLOSING | F_ENDED):
        keep_error(c, reason)
    return close_connection(m, c)

cdef inline void begin_close(CompiledCore m, Connection c) noexcept:
    c.flags = (c.flags | F_CLOSING) & ~(F_PAUSED | F_DRAIN_OWED)
    discard_inbox(m, c)

cdef int advance_close(CompiledCore m, Connection c) except -1:
    """The next step of write_eof() or close(): flush, shut down, wait for the peer's FIN. run_pending() calls it."""
    cdef bint owed
    if not c.flags & (F_CLOSING | F_WRITE_EOF):
        return 0
    if c.flags & (F_HANDSHAKE | F_CLOSING) == F_HANDSHAKE:
        return 0  # write_eof() waits for it
    # Another thread that has looked at the flags and not counted its bytes yet is in such a section, too. So what was
    # accepted from it is waited for, and behind this section everything is refused.
    with cython.critical_section(c):
        owed = c.out_head != NULL or c.foreign != 0
    if owed:
        if c.flags & F_CLOSING and c.deadline is None:
            return set_closing_due(m, c, m.now_ns + closing_stall_ns(c), 0)
        return 0
    if c.flags & (F_WIRE | F_HANDSHAKE | F_WIRE_SHUT | F_WRITE_SHUT) == F_WIRE:
        return shut_wire(m, c)
    if c.flags & F_EOF and c.flags & (F_CLOSING | F_EOF_NOTIFIED) and not c.flags & F_FIN_UNREAD:
        return set_ended(c, None)
    if not c.flags & F_WRITE_SHUT:
        drop_deadline(c)
        c.flags |= F_WRITE_SHUT
        if sys_shutdown_write(c.fd) < 0:  # a reset by the peer: recv returns the input before it, then the error
            c.flags |= F_PEER_GONE
            schedule(m, c)
    if c.flags & F_CLOSING and c.deadline is None:
        # A timeout closed it, and all is sent: do not wait for the FIN of a peer that sends nothing.
        if c.policy.linger_ns == 0 or c.flags & F_TIMED_OUT:
            return set_ended(c, None)
        return set_closing_due(m, c, m.now_ns + linger_ns(c), sys_unsent(c.fd))
    return 0

cdef inline int64_t linger_ns(Connection c) noexcept:
    """After a failed handshake the peer has less time: for the alert, which says why."""
    return min(c.policy.linger_ns, FAILED_LINGER_NS) if c.flags & F_HANDSHAKE else c.policy.linger_ns

cdef int set_closing_due(CompiledCore m, Connection c, int64_t due, int unsent) except -1:
    c.deadline = add_timer(m, due, _closing_due, (c, unsent, due))
    return 0

cdef inline int64_t closing_stall_ns(Connection c) noexcept:
    return c.policy.write_ns if 0 < c.policy.write_ns < CLOSING_STALL_NS else CLOSING_STALL_NS

cdef int drop_deadline(Connection c) except -1:
    if c.deadline is not None:
        c.deadline.cancel()  # may raise, out of memory: then the step is repeated
        c.deadline = None
    return 0

def _closing_due(Connection c, int unsent, int64_t due):
    """A closing connection has had its time; it gets more while the peer accepts queued output. `unsent` is what
    the kernel had not got through when the linger began."""
    cdef CompiledCore m = c.mux
    cdef int left
    c.deadline = None
    if c.flags & F_ENDED:
        return
    if c.out_head != NULL or c.foreign:
        due = c.wrote_ns + closing_stall_ns(c)
        if has_judged(m, due):
            write_timeout(m, c, closing_stall_ns(c))
        else:
            set_closing_due(m, c, due, 0)
        return
    if not has_judged(m, due):
        set_closing_due(m, c, due, unsent)
        return
    left = sys_unsent(c.fd)
    if 0 < left < unsent:
        set_closing_due(m, c, m.now_ns + linger_ns(c), left)
    else:
        end(m, c, None)

cdef int write_timeout(CompiledCore m, Connection c, int64_t limit_ns) except -1:
    limit = limit_ns / 1e9
    text = f"the peer accepted none of {c.outbox_bytes} bytes for {limit:g} s"
    m.n.timeouts += 1
    return abort_for(m, c, WriteTimeout(text, conn=c, limit=limit))

cdef int idle_timeout(CompiledCore m, Connection c) except -1:
    limit = c.policy.idle_ns / 1e9
    m.n.timeouts += 1
    keep_error(c, IdleTimeout(f"no message received for {limit:g} s", conn=c, limit=limit))
    c.flags |= F_TIMED_OUT
    return close_connection(m, c)

cdef int silence_timeout(CompiledCore m, Connection c) except -1:
    limit = c.policy.silence_ns / 1e9
    error = IdleTimeout(f"no byte in either direction for {limit:g} s", conn=c, limit=limit)
    m.n.timeouts += 1
    if c.out_head != NULL:  # the peer accepts no output
        return abort_for(m, c, error)
    keep_error(c, error)
    c.flags |= F_TIMED_OUT
    return close_connection(m, c)

cdef int abort(CompiledCore m, Connection c) except -1:
    """End it with a RST, at once; on_close follows from the loop."""
    if c.flags & F_CLOSED:
        return 0
    c.flags |= F_CLOSING | F_ENDED
    discard_inbox(m, c)
    sys_reset_on_close(c.fd)
    schedule(m, c)
    if c.flags & F_PENDING:  # else only the descriptor leads to it: run_everything() drops it
        drop_descriptor(m, c, True)
    return 0

cdef int abort_for(CompiledCore m, Connection c, object error) except -1:
    keep_error(c, error)
    return abort(m, c)

cdef int finish(CompiledCore m, Connection c) except -1:
    if c.flags & (F_HANDSHAKE | F_CONNECTING | F_CLOSE_NOTIFIED) == F_HANDSHAKE and c.error is not None:
        m.n.handshake_failures += 1
    if c.deadline is not None:
        drop_deadline(c)
    if not c.flags & F_CLOSED:
        drop_descriptor(m, c, True)
    if not c.flags & F_CLOSE_NOTIFIED:
        notify_close(m, c)
    if c.error is not None:
        without_frames(c.error)  # a reason of close() had them, since its user may have been about to log it
    if c.flags & F_CLOSING or not c.policy.pull:  # else it may have messages yet
        discard_inbox(m, c)
        reader = c.reader
        set_policy(c, c.policy, None)
        if reader is not None:
            reader.forget()
    if c.flags & F_WIRE:
        forget_wire(c)
    return 0

cdef int drop_descriptor(CompiledCore m, Connection c, bint close) except -1:
    """Remove the descriptor from the set and, except for detach(), close it. Input of pull style stays for recv()."""
    cdef Listener listener = c.policy.listener
    cdef int fd = c.fd
    if c.flags & F_CONNECTING:
        drop_deadline(c)
        m.connecting.discard(c)
    c.flags |= F_CLOSED
    if fd >= 0:
        c.fd = -1
        unregister(m, fd)
        if close:
            sys_close(fd)
    discard_outbox(m, c)
    m.n.connections -= 1
    if c.policy.pull:
        m.pull_count -= 1
    if listener is not None:
        listener.connections -= 1
    if m.accept_paused:
        resume_accepts(m)
    return 0


# --- how it begins ----------------------------------------------------------------------------------

cdef Connection new_connection(CompiledCore m, Policy policy):
    cdef Connection c = <Connection>(<PyTypeObject*>Connection).tp_new(Connection, <PyObject*>BY_US, NULL)
    c.mux = m
    c.policy = policy
    if policy.wiring is not None:
        c.flags = F_HANDSHAKE
    m.last_id += 1
    c.id = m.last_id
    c.received_ns = c.heard_ns = m.now_ns if m.in_turn else sys_clock_ns(CLOCK_MONOTONIC)
    return c

cdef int watch_connection(CompiledCore m, Connection c) except? -2:
    c.interest = EPOLLIN | EPOLLRDHUP
    return register(m, c, c.fd, CONNECTION, c.interest)

cdef int count_connection(CompiledCore m, Connection c) except -1:
    """It is open: from here on it gets on_open and on_close."""
    m.n.connections += 1
    if m.n.connections > m.n.peak_connections:
        m.n.peak_connections = m.n.connections
    if c.policy.pull:
        m.pull_count += 1
    if m.draining:
        close_connection(m, c)
    return 0


# --- the class -------------------------------------------------------------------------------------

@cython.final
@cython.no_gc_clear  # see clear_connection()
cdef class Connection:
    """A connected stream socket, with a bounded queue of messages in each direction.

    Made by a Listener, by `Mux.connect` or by `Mux.attach`. Its methods never block and never call a callback. Any
    thread may use `send`, `send_many`, `write`, `writelines`, `close`, `abort`, `id`, `peer`, `closing`, `closed` and
    `data`. Use anything else in the Mux's thread only: most methods raise RuntimeError in another thread.

    id: its number, which is never reused. data: yours, None at first. error: the exception that ended it, or None.
    """

    def __cinit__(self, token=None):
        self.fd = -1
        check_token(token, "connections are made by Mux.listen, Mux.connect and Mux.attach")

    def __dealloc__(self):
        # Reached with an open descriptor only when an unclosed Mux is collected, or at exit: close(2) and no more,
        # which is also all that a forked child may do.
        if self.fd >= 0:
            sys_close(self.fd)
        while self.out_head != NULL:
            chunk = self.out_head
            self.out_head = chunk.next
            free_chunk(chunk)
        if self.inbox != NULL:
            free_inbox(self.mux, self.inbox)

    def __repr__(self):
        state = "closed" if self.flags & F_CLOSED else "closing" if self.closing else "open"
        if self.flags & F_CONNECTING and state == "open":
            state = "connecting"
        return f"<muxcore.Connection {self.id} {state}, peer={self.peer!r}>"

    # -- identity

    @property
    def mux(self):
        """The Mux that serves it."""
        return self.mux

    @classmethod
    def __class_getitem__(cls, item):
        return GenericAlias(cls, item)

    @property
    def data(self):
        """For your state of this connection; None at first. Any thread may use it."""
        with cython.critical_section(self):
            return self.data_

    @data.setter
    def data(self, value):
        with cython.critical_section(self):
            self.data_ = value

    @property
    def listener(self) -> Listener | None:
        """The Listener that accepted it; None if it was not accepted."""
        return policy_of(self).listener

    @property
    def peer(self):
        """The peer's address, as `socket.getpeername` gives it, or, until `connect` has found it, as it was given; it
        stays valid after the end."""
        with cython.critical_section(self):
            if self.peer_tuple is None:
                self.peer_tuple = address_tuple(self)
            elif type(self.peer_tuple) is bytes:
                self.peer_tuple = unix_name(self.peer_tuple)
            return self.peer_tuple

    @property
    def local(self):
        """The local address, as `socket.getsockname` returns it; None before it is open and after it is closed."""
        check_thread(self.mux)
        return address_module.shown(with_socket(self, "getsockname", ())) if self.fd >= 0 else None

    @property
    def peer_credentials(self) -> PeerCredentials:
        """The process at the other end of a Unix connection: its pid, uid and gid as they were when it connected.

        Raises ValueError if this is no Unix connection, or if the system has no SO_PEERCRED (Linux has it), and
        ConnectionClosed once closed.
        """
        check_thread(self.mux)
        sock = borrowed_socket(self, "peer_credentials")
        try:
            return peer_credentials(sock)
        finally:
            socket_type.detach(sock)

    @property
    def eof(self) -> bool:
        """Whether the peer's FIN was read."""
        return self.flags & F_EOF != 0

    @property
    def closing(self) -> bool:
        """Whether `close` was called or the connection has ended. Output is refused from then on."""
        with cython.critical_section(self):
            return self.close_asked or seen_flags(self) & (F_CLOSING | F_ENDED) != 0

    @property
    def closed(self) -> bool:
        """Whether it has ended and its descriptor is closed."""
        return seen_flags(self) & F_CLOSED != 0

    def fileno(self) -> int:
        """The descriptor; -1 before the connection is open and after it is closed."""
        return self.fd

    # -- messages out

    def send(self, message, /) -> bool:
        """Queue a message with its framing; True while the outbox is at or below `Limits.high`.

        `bytes` are kept by reference; any other buffer is copied before this returns. It never blocks, and never raises
        because of the peer: on a closing or closed connection it counts a drop and returns False. At `max_outbox`,
        `Limits.overflow` decides. Raises TypeError for a type that the framer cannot send (bytes-like, except with Resp
        or a framer of your own), ValueError for a message that the peer could not parse as one (a newline with Lines).
        """
        return send(self, message, False) != 0

    def send_many(self, messages, /) -> bool:
        """`send` each message of an iterable; returns what the last `send` returns."""
        return send_each(self, messages, False)

    def write(self, data, /) -> bool:
        """Queue bytes without framing; otherwise as `send`."""
        return send(self, data, True) != 0

    def writelines(self, parts, /) -> bool:
        """`write` each element of an iterable; returns what the last `write` returns."""
        return send_each(self, parts, True)

    def sendfile(self, file, /, offset=0, count=None) -> bool:
        """Queue a part of a regular file after what is queued already; returns what `send` returns.

        file: a file object or a descriptor, open for reading; you may close it as soon as this returns.
        offset: bytes of the file before the part.
        count: bytes of the part; None is up to the end of the file.

        A part of at most 64 KiB is read at once, and counts as if `write` had sent it. A larger part stays in the file
        until it is sent, with a descriptor of its own. Its bytes count for the water marks, but not for `max_outbox`,
        since they use no memory. A connection keeps at most 32 such parts; `Limits.overflow` decides about the next. If
        the file has become too short when the part is due, the connection is reset.

        A file that reports a size of 0, as in /proc, is read at once. It may have at most 1 MiB.

        Raises TypeError or ValueError if the file is not a regular one, is not open for reading or does not have the
        whole part, and OSError if the system cannot read it.
        """
        cdef CompiledCore m = self.mux
        check_thread(m)
        fd, size, data = file_part(file, offset, count)
        if data is not None:
            return enqueue(m, self, data, True) != 0
        return enqueue_file(m, self, fd, offset, size) != 0

    def write_eof(self) -> None:
        """Half-close: send a FIN once the outbox is empty. Input continues; further output is refused."""
        check_thread(self.mux)
        if not self.flags & REFUSES_OUTPUT:
            self.flags |= F_WRITE_EOF
            schedule(self.mux, self)

    def flush(self) -> int:
        """Send as much of the outbox as the kernel accepts now; returns the number of bytes that remain queued.

        It is seldom needed: the output of a handler leaves when the handlers of its group have returned, which is up to
        sixteen events of a batch (compiled core).
        """
        cdef CompiledCore m = self.mux
        check_thread(m)
        begin_stall(m)
        send_out(m, self)
        return self.outbox_bytes

    @property
    def outbox_size(self) -> int:
        """Bytes accepted by `send` and not yet accepted by the kernel."""
        return seen_outbox(self) + foreign_bytes(self)

    # -- messages in (pull style)

    def recv(self, default=None):
        """The next queued message (pull style); `default` if there is none, or while the connection is paused.

        Unlike `socket.recv` it has no size argument: the framer decides where a message ends.
        """
        cdef CompiledCore m = self.mux
        check_thread(m)
        message = next_message(m, self)
        return default if message is NO_MESSAGE else message

    def recv_all(self) -> list:
        """A list of all queued messages (pull style)."""
        cdef CompiledCore m = self.mux
        check_thread(m)
        return take_all(m, self)

    def __iter__(self):
        """Receive queued messages one by one. `for message in conn` ends when the queue is empty."""
        return self

    def __next__(self):
        cdef CompiledCore m = self.mux
        check_thread(m)
        message = next_message(m, self)
        if message is NO_MESSAGE:
            raise StopIteration
        return message

    @property
    def inbox_size(self) -> int:
        """Bytes received and not yet delivered."""
        check_thread(self.mux)
        size = len(unread_by_reader(self))
        return size if self.inbox == NULL else size + self.inbox.size

    @property
    def unread(self) -> bytes:
        """The bytes received and not yet delivered, unframed. They stay in the inbox."""
        check_thread(self.mux)
        rest = unread_by_reader(self)
        return rest + inbox_bytes(self) if rest else inbox_bytes(self)

    def pause_reading(self) -> None:
        """Stop reading and delivery at once. The kernel's buffers fill up, and then the peer cannot send."""
        check_thread(self.mux)
        if not self.flags & (F_PAUSED | F_CLOSING | F_ENDED):
            self.flags |= F_PAUSED
            schedule(self.mux, self)

    def resume_reading(self) -> None:
        """Undo `pause_reading`."""
        check_thread(self.mux)
        if self.flags & F_PAUSED:
            self.flags &= ~F_PAUSED
            self.received_ns = self.heard_ns = sys_clock_ns(CLOCK_MONOTONIC)
            report_message(self.mux, self)
            schedule(self.mux, self)

    def is_reading(self) -> bool:
        """Whether muxcore reads from it now. False while it is paused (by you, by autopause or by a full inbox), at EOF
        or closing."""
        check_thread(self.mux)
        return may_read(self) and not self.flags & F_CLOSING

    # -- what stands between the socket and the framer

    def start_tls(self, context, *, server_side=None, server_hostname=None) -> None:
        """Begin TLS on an open connection, as after STARTTLS of SMTP: the handshake follows.

        context: an `ssl.SSLContext`.
        server_side: whether this is the server's end. None: True for an accepted connection, False for one that
            `connect` made. Required for an attached one.
        server_hostname: the name that the server's certificate must have, if the context checks it, and that SNI sends.

        Output that was queued before is sent in plaintext; output from now on waits for the handshake. Bytes that were
        received and not delivered yet belong to TLS: plaintext that a peer has sent behind its STARTTLS never counts as
        a command. A failed handshake ends the connection with an `ssl.SSLError`.

        Raises ConnectionClosed if the connection is not open, RuntimeError if it has TLS already or its framer's
        `feed` is running (as a signal handler may find it), TypeError or ValueError for a bad argument.
        """
        check_thread(self.mux)
        check_is_plain(self)
        policy = policy_of(self)
        side = None if policy.listener is None and not policy.outbound else not policy.outbound
        wire = tls_wire(context, server_side, server_hostname, side)
        check_is_plain(self)  # the context may be of a class of the user's
        if self.reader is not None and self.reader.feeding:
            raise RuntimeError("start_tls: the framer's feed() is running")  # it may hold what belongs to TLS
        begin_wire(self.mux, self, wire, True)

    @property
    def tls(self):
        """The `ssl.SSLObject` of a connection with TLS, for `version()`, `cipher()`, `getpeercert()`,
        `selected_alpn_protocol()` and `session`; None without TLS, and after `on_close`."""
        check_thread(self.mux)
        return self.wired.wire.tls if self.flags & F_WIRE else None

    @property
    def proxy(self):
        """What a load balancer's PROXY header said (see `muxcore.proxy_protocol.Proxy`); None without one."""
        check_thread(self.mux)
        return None if self.wired is None else self.wired.proxy

    # -- the end

    def close(self, reason=None, /) -> None:
        """Send all queued output, then a FIN; wait for the peer's FIN (`Timeouts.linger`); close.

        reason: the exception that `on_close` gets; None is an orderly end.

        From now on no message is delivered, and none is accepted. Input is read and discarded: unread input would make
        the kernel send a RST, which could destroy the last output. A connection that is still connecting continues only
        if output is queued. No effect on a closing connection. Raises TypeError for a reason that is no exception.
        """
        check_reason(reason)
        check_fork(self.mux)
        if on_owner_thread(self.mux):
            close_for(self.mux, self, reason)
        else:
            end_from_any_thread(self.mux, self, OP_CLOSE, reason)

    def abort(self) -> None:
        """Reset the connection now (RST), and discard the outbox. `on_close` is called in the next turn."""
        check_fork(self.mux)
        if on_owner_thread(self.mux):
            abort(self.mux, self)
        else:
            end_from_any_thread(self.mux, self, OP_ABORT, None)

    def detach(self):
        """Remove the socket from the Mux and return it, nonblocking. The connection ends with `on_close(conn, None)`.

        Read `unread` before it, and `flush`. Raises RuntimeError while output is queued, ConnectionClosed if the
        connection is not open.
        """
        check_thread(self.mux)
        if self.flags & (F_CLOSING | F_ENDED | F_CONNECTING):
            raise ConnectionClosed("detach: the connection is not open", conn=self)
        if self.flags & F_WIRE:
            raise RuntimeError("detach: a connection with TLS cannot be detached")
        cdef bint gone
        schedule_or_raise(self.mux, self)
        sock = borrowed_socket(self, "detach", True)
        with cython.critical_section(self):  # as in advance_close()
            gone = self.flags & (F_CLOSING | F_ENDED) != 0
            unsent = self.outbox_bytes + foreign_bytes(self)
            if unsent == 0 and not gone:
                self.flags |= F_CLOSING | F_ENDED
        if unsent or gone:
            socket_type.detach(sock)
        if gone:  # closed by what has run while the socket object was made
            raise ConnectionClosed("detach: the connection is not open", conn=self)
        if unsent:
            raise RuntimeError(f"detach: {unsent} bytes are unsent")
        drop_descriptor(self.mux, self, False)
        sock.setblocking(False)
        return sock

    # -- settings

    @property
    def framer(self):
        """The framer. It may be set at any moment: the new framer gets every byte that was not delivered yet (in
        `on_messages`: every byte after those of the list)."""
        return policy_of(self).framer

    @framer.setter
    def framer(self, value):
        check_thread(self.mux)
        check_framer(value)
        set_framer(self.mux, self, value)

    @property
    def limits(self) -> Limits:
        """The memory bounds of this connection. Settable."""
        return policy_of(self).limits

    @limits.setter
    def limits(self, value):
        check_thread(self.mux)
        change_policy(self, as_limits(value), None)
        report_message(self.mux, self)  # perhaps autopause held it back so far
        schedule(self.mux, self)

    def set_limits(self, **changes) -> None:
        """Change some limits of this connection: `conn.set_limits(high=4096, low=1024)`."""
        self.limits = self.policy.limits.__replace__(**changes)

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts of this connection. Settable."""
        return policy_of(self).timeouts

    @timeouts.setter
    def timeouts(self, value):
        check_thread(self.mux)
        value = as_timeouts(value)
        cdef int64_t stall_ns = closing_stall_ns(self), linger_ns = self.policy.linger_ns
        change_policy(self, None, value)
        need_sweep(self.mux, self.policy)
        if (self.flags & (F_CLOSING | F_CONNECTING) == F_CLOSING
                and (closing_stall_ns(self) < stall_ns or self.policy.linger_ns < linger_ns)):
            schedule(self.mux, self)
            drop_deadline(self)  # advance_close() sets another

    def set_timeouts(self, **changes) -> None:
        """Change some timeouts of this connection: `conn.set_timeouts(idle=5.0)`."""
        self.timeouts = self.policy.timeouts.__replace__(**changes)

    def getsockopt(self, level, name, size=0, /):
        """As `socket.getsockopt`."""
        check_thread(self.mux)
        return asked_option(self, level, name, size)

    def setsockopt(self, level, name, value, /) -> None:
        """As `socket.setsockopt`. Raises ValueError for SO_LINGER with a time, with which close(2) would stop the loop:
        `Timeouts.linger` is that time here."""
        check_thread(self.mux)
        value = address_module.as_option_value(value)
        level, name = address_module.as_option(level, name)
        address_module.check_no_linger(level, name, value)
        with_socket(self, "setsockopt", (level, name, value))

# The collector clears what it finds unreachable, and __release_buffer__ of an object that goes with it may still call a
# method of a connection (CPython 3.12+). Methods read through `mux` and `policy`, and do not check whether they are
# None.
# So of our classes only Policy and Wired are cleared; lists, and the objects of users, break the cycles, and `data`,
# which may be a tuple that leads back here.

cdef int clear_connection(object conn) except -1:
    (<Connection>conn).data_ = None
    return 0

(<PyTypeObject*>Connection).tp_clear = clear_connection

# The owner changes policy and reader, and any thread may read them, to encode what it sends. In a critical section, so
# that no thread sees a new one beside an old one, or gets a reference to one that is just being freed.

cdef Policy policy_of(Connection c):
    with cython.critical_section(c):
        return c.policy

cdef int change_policy(Connection c, object limits, object timeouts) except -1:
    """Other limits or timeouts (None: the same) for this connection alone."""
    cdef Policy before = None, policy = None
    while c.policy is not before:  # making one calls Python code, which may set the framer
        before = c.policy
        policy = changed_policy(before, limits or before.limits, timeouts or before.timeouts, before.framer)
    return set_policy(c, policy, c.reader)

cdef bytes unread_by_reader(Connection c):
    """What a user's framer holds. Its rest() may do anything; if it sets another framer, that one holds it."""
    reader = rest = None
    while c.reader is not None and c.reader is not reader and not c.flags & (F_CLOSING | F_FAILED):
        reader = c.reader
        rest = reader.rest()
    return rest if c.reader is not None and rest is not None and not c.flags & (F_CLOSING | F_FAILED) else b""

cdef int set_policy(Connection c, Policy policy, object reader) except -1:
    with cython.critical_section(c):
        c.policy = policy
        c.reader = reader
    return 0

cdef object leave(Connection c, Policy policy, object reader, object behind):
    """Another policy, whose framer gets nothing before a call of the present one has returned (see CustomReader).
    Returns the reader that was behind it, to be forgotten."""
    former = reader.behind
    set_policy(c, policy, reader)
    reader.behind = behind
    reader.left = True
    return former

cdef int check_is_plain(Connection c) except -1:
    """Of start_tls()."""
    if c.flags & (F_CLOSING | F_ENDED | F_CONNECTING | F_EOF | F_WRITE_EOF):
        raise ConnectionClosed("start_tls: the connection is not open", conn=c)
    if c.flags & F_WIRE:
        raise RuntimeError("start_tls: the connection has TLS already")
    return 0

cdef inline int send(Connection c, object message, bint raw) except -1:
    cdef CompiledCore m = c.mux
    check_fork(m)
    if on_owner_thread(m):
        return enqueue(m, c, message, raw)
    return enqueue_from_any_thread(m, c, message, raw)

cdef bint send_each(Connection c, object messages, bint raw) except -1:
    cdef CompiledCore m = c.mux
    cdef bint here = on_owner_thread(m)
    cdef bint below = not seen_flags(c) & (F_ABOVE_HIGH | REFUSES_OUTPUT)
    check_fork(m)
    for message in messages:
        check_fork(m)  # what yields them may be anything
        below = enqueue(m, c, message, raw) if here else enqueue_from_any_thread(m, c, message, raw)
    return below

cdef object asked_option(object owner, object level, object name, object size):
    args = address_module.as_option(level, name, size) if size else address_module.as_option(level, name)
    return with_socket(owner, "getsockopt", args)

cdef object with_socket(object owner, str method, tuple args):
    """Call a method of a socket on the descriptor of a connection or a datagram socket, which stays theirs. `args` run
    no code of the user's."""
    sock = borrowed_socket(owner, method)
    try:
        return getattr(sock, method)(*args)
    finally:
        socket_type.detach(sock)

cdef inline int descriptor_of(object owner) noexcept:
    return (<Datagram>owner).fd if type(owner) is Datagram else (<Connection>owner).fd

cdef object borrowed_socket(object owner, str method, bint plain=False):
    """To be detached before it is forgotten. Made in C: amid the Python code of socket.socket, a signal handler may
    close the descriptor, and an interrupt would close it with what is half-made. `plain`: a socket.socket."""
    cdef int fd = descriptor_of(owner)
    if fd >= 0:
        sock = plain_socket(fd) if plain else socket_type(fileno=fd)
        if descriptor_of(owner) == fd:
            return sock
        socket_type.detach(sock)  # an audit hook or a finaliser has closed it, and the number may be another's
    raise ConnectionClosed(f"{method}: {owner!r} is not open", conn=owner)

cdef object plain_socket(int fd):
    """As socket.socket(fileno=fd), whose __init__ is Python's."""
    sock = plain_type.__new__(plain_type)
    sock._io_refs, sock._closed = 0, False
    socket_type.__init__(sock, -1, -1, -1, fd)
    return sock

cdef object address_tuple(Connection c):
    if c.family == AF_UNIX:
        return ""  # a client that is bound to no name
    return internet_address(c.family, c.host, c.port, 0, 0)

cdef object internet_address(int family, const uint8_t* host, uint16_t port, uint32_t flowinfo, uint32_t scope):
    """An address as Python's sockets give it; port and flowinfo come in network order."""
    cdef char[INET6_ADDRSTRLEN] text
    if inet_ntop(family, host, text, sizeof(text)) == NULL:  # it has room, and both families are known
        raise SystemError(f"inet_ntop does not know address family {family}")
    name = text.decode("ascii")
    if family == AF_INET:
        return name, ntohs(port)
    return name, ntohs(port), ntohl(flowinfo), scope

cdef object unix_address(sockaddr_storage* address, socklen_t size):
    """The path, or after a NUL the abstract name, that a Unix socket is bound to; see _address.shown()."""
    return unix_name((<char*>address)[2:size])

cdef object unix_name(bytes name):
    return os.fsdecode(name if name[0] == 0 else name.rstrip(b"\0"))
