# What may live here: one connection: its outbox, its input, and the steps of its life.

# What a connection is at the moment.
cdef enum Flag:
    F_OPENED = 1 << 0       # on_open was told
    F_PENDING = 1 << 1      # on the Mux's pending list
    F_PAUSED = 1 << 2       # pause_reading()
    F_ABOVE = 1 << 3        # the outbox was above high and is not back at low
    F_DRAIN_OWED = 1 << 4   # it is back, and nobody was told yet
    F_BLOCKED = 1 << 5      # the socket's send buffer is full: wait for EPOLLOUT
    F_STARVED = 1 << 6      # the kernel had no memory for the last send: wait for a timer
    F_EOF = 1 << 7          # the peer's FIN was read
    F_EOF_TOLD = 1 << 8
    F_WRITE_EOF = 1 << 9    # write_eof(): shut down once the outbox is empty
    F_CLOSING = 1 << 10     # close(): nothing more is accepted or delivered
    F_SHUT = 1 << 11        # SHUT_WR was done
    F_BROKEN = 1 << 12      # the peer is gone for sending; what it sent before may still be read
    F_ENDED = 1 << 13       # over: only the descriptor and on_close are left to do
    F_CLOSED = 1 << 14      # the descriptor is gone
    F_CLOSE_TOLD = 1 << 15
    F_REPORT = 1 << 16      # times a Report: what poll() is to say
    F_REPORT_MASK = 31 << 16

cdef enum Report:
    R_OPENED = 1
    R_READABLE = 2
    R_DRAINED = 4
    R_EOF = 8
    R_CLOSED = 16

OPENED, READABLE, DRAINED, EOF, CLOSED = R_OPENED, R_READABLE, R_DRAINED, R_EOF, R_CLOSED

cdef enum:
    REFUSES_OUTPUT = F_CLOSING | F_ENDED | F_BROKEN | F_WRITE_EOF
    CANNOT_FLUSH = F_BLOCKED | F_STARVED | F_ENDED | F_BROKEN
    BLOCKS_KEPT = 64

cdef int64_t STARVED_NS = 10_000_000
cdef int64_t CLOSING_STALL_NS = 30_000_000_000

# What another thread may ask for.
cdef enum Operation:
    OP_SEND
    OP_SEND_ABOVE               # OP_SEND whose sender was told to wait for the drain
    OP_OVERFLOW
    OP_CLOSE
    OP_ABORT
    OP_CALL

cdef inline bint delivers(Connection c) noexcept:
    """Whether messages may be handed out now."""
    return not c.flags & (F_PAUSED | F_CLOSING) and not (c.flags & F_ABOVE and c.policy.autopause)

cdef inline bint receives(Connection c) noexcept:
    """Whether input is wanted: to be delivered or, while closing, to be discarded (unread input would make close(2)
    send RST and destroy what is still on its way to the peer)."""
    if c.flags & (F_EOF | F_ENDED):
        return False
    if c.flags & F_CLOSING:
        return True
    return delivers(c) and (c.inbox == NULL or c.inbox.size <= c.policy.max_inbox)

cdef inline int mark(Core m, Connection c) except -1:
    """See to this connection before the next wait."""
    if not c.flags & F_PENDING:
        m.pending.append(c)
        c.flags |= F_PENDING
        if m.direct and not m.in_turn:
            sys_eventfd_signal(m.wake_fd)
    return 0

cdef inline int set_ended(Connection c, object error) except -1:
    if not c.flags & F_ENDED:
        c.flags |= F_ENDED
        if c.error is None:
            c.error = error
    return 0

cdef int end(Core m, Connection c, object error) except -1:
    """It is over; settle() does the rest."""
    set_ended(c, error)
    return mark(m, c)


# --- the outbox ------------------------------------------------------------------------------------

cdef inline void free_chunk(Chunk* chunk) noexcept:
    if chunk.owner != NULL:
        DECREF(<PyObject*>chunk.owner)
    free(chunk)

cdef inline void release_chunk(Core m, Chunk* chunk) noexcept:
    """Free a chunk, or keep its block for the next one who needs it."""
    if chunk.total == BLOCK_SIZE and m.block_count < BLOCKS_KEPT:
        chunk_clear(chunk)
        chunk.next = m.blocks
        m.blocks = chunk
        m.block_count += 1
    else:
        free_chunk(chunk)

cdef inline Chunk* take_block(Core m) except NULL:
    cdef Chunk* block = m.blocks
    if block != NULL:
        m.blocks = block.next
        m.block_count -= 1
        block.next = NULL
        return block
    block = chunk_block(BLOCK_SIZE - sizeof(Chunk))
    if block == NULL:
        raise MemoryError()
    return block

cdef inline void link_chunk(Connection c, Chunk* chunk) noexcept:
    if c.out_tail == NULL:
        c.out_head = chunk
    else:
        c.out_tail.next = chunk
    c.out_tail = chunk

cdef inline int push(Core m, Connection c, object data) except -1:
    """Put bytes at the end of the outbox: small pieces next to each other, a large one by reference."""
    cdef const char* start = PyBytes_AS_STRING(data)
    cdef size_t size = PyBytes_GET_SIZE(data)
    cdef Chunk* chunk = c.out_tail
    if size >= SMALL_PIECE:
        chunk = chunk_reference(<void*>data, start, size)
        if chunk == NULL:
            raise MemoryError()
        Py_INCREF(data)
        link_chunk(c, chunk)
    else:
        if chunk == NULL or chunk.room < size:
            chunk = take_block(m)
            link_chunk(c, chunk)
        chunk_append(chunk, start, size)
    c.outbox_bytes += size
    return 0

cdef inline void consume(Core m, Connection c, size_t size) noexcept:
    """Drop what the kernel has taken from the front of the outbox."""
    cdef Chunk* chunk
    c.outbox_bytes -= size
    while c.out_head != NULL and size >= c.out_head.size:
        chunk = c.out_head
        size -= chunk.size
        c.out_head = chunk.next
        release_chunk(m, chunk)
    if c.out_head == NULL:
        c.out_tail = NULL
    else:
        c.out_head.data += size
        c.out_head.size -= size

cdef void compact(Core m, Connection c) noexcept:
    """Move a small lone leftover out of its block, which is worth more to the next connection."""
    cdef Chunk* chunk = c.out_head
    cdef Chunk* small
    if chunk.next != NULL or chunk.total != BLOCK_SIZE or chunk.size >= COMPACT_BELOW:
        return
    small = chunk_block(chunk.size)
    if small != NULL:
        chunk_append(small, chunk.data, chunk.size)
        c.out_head = c.out_tail = small
        release_chunk(m, chunk)

cdef void discard_outbox(Core m, Connection c) noexcept:
    if c.out_head != NULL:
        m.n.unsent += 1
        consume(m, c, c.outbox_bytes)
    c.flags &= ~(F_ABOVE | F_DRAIN_OWED | F_BLOCKED | F_STARVED)

cdef int flush(Core m, Connection c) except -1:
    """Send what is in the outbox until it is empty or the kernel takes no more. Only for one that can be flushed."""
    cdef iovec parts[MAX_PARTS]
    cdef size_t wanted
    cdef size_t count
    cdef ssize_t r
    while c.out_head != NULL:
        if c.out_head.next == NULL:
            wanted = c.out_head.size
            m.n.send_calls += 1
            r = sys_send(c.fd, c.out_head.data, wanted)
        else:
            count = chunk_parts(c.out_head, parts, &wanted)
            m.n.sendmsg_calls += 1
            r = sys_sendmsg(c.fd, parts, count)
        if r < 0:
            return send_failed(m, c, r)
        m.n.bytes_out += r
        c.wrote_ns = m.now_ns
        consume(m, c, r)
        if <size_t>r < wanted:  # the send buffer is full; epoll tells when it is not, level-triggered
            wait_writable(m, c)
            break
    if c.flags & F_ABOVE and c.outbox_bytes <= c.policy.low:
        c.flags = (c.flags & ~F_ABOVE) | F_DRAIN_OWED
        mark(m, c)
    return 0

cdef int wait_writable(Core m, Connection c) except -1:
    m.n.would_blocks += 1
    c.flags |= F_BLOCKED
    compact(m, c)
    return mark(m, c)

cdef int send_failed(Core m, Connection c, ssize_t r) except -1:
    if err_would_block(r):
        c.wrote_ns = m.now_ns  # a stall begins when the outbox has to wait, not with the last send before that
        return wait_writable(m, c)
    if err_try_later(r):  # the socket may be writable all the same: waiting for EPOLLOUT would spin
        c.flags |= F_STARVED
        m.timers.add(sys_clock_ns(CLOCK_MONOTONIC) + STARVED_NS, _retry_send, (c,))
        return 0
    error = os_error(r)
    discard_outbox(m, c)
    if not err_peer_gone(r) or c.flags & F_CLOSING:
        return end(m, c, error)
    # After a peer's RST or full close, what it sent before still waits in the receive queue: read that first, and
    # end with this error when it is dry (4.7: nothing that was received is lost).
    c.flags |= F_BROKEN
    c.error = error
    return mark(m, c)

def _retry_send(Connection c):
    c.flags &= ~F_STARVED
    mark(c.mux, c)

cdef inline object as_bytes(object data):
    """`data` itself if it is bytes, else a copy: the caller may change its buffer the moment `send` returns, and a
    subclass of bytes may have a finalizer, which would run in the middle of consume()."""
    if PyBytes_CheckExact(data):
        return data
    try:
        return memoryview(data).tobytes()
    except TypeError:
        raise TypeError(f"message must be bytes-like, not {type(data).__name__}") from None

cdef int enqueue(Core m, Connection c, object message) except -1:
    """Accept or refuse one message, on the Mux's thread: 1 below the high-water mark, 0 refused or above it."""
    if not PyBytes_CheckExact(message):
        message = as_bytes(message)
    if c.flags & REFUSES_OUTPUT:
        m.n.drops += 1
        return 0
    if c.outbox_bytes + c.foreign_bytes >= c.policy.max_outbox:
        return overflow(m, c)
    return accept_message(m, c, message)

cdef inline int accept_message(Core m, Connection c, object data) except -1:
    if PyBytes_GET_SIZE(data):
        push(m, c, data)
    m.n.messages_out += 1
    if c.outbox_bytes > c.policy.high:
        return above_high(m, c)
    if m.corked != <PyObject*>c and c.out_head != NULL and not c.flags & (F_PENDING | F_BLOCKED):
        if m.direct and not m.in_turn and not c.flags & CANNOT_FLUSH:
            flush(m, c)
        else:
            mark(m, c)
    return not c.flags & F_ABOVE

cdef int above_high(Core m, Connection c) except -1:
    if not c.flags & CANNOT_FLUSH:
        flush(m, c)
    if c.outbox_bytes <= c.policy.high:
        return not c.flags & F_ABOVE
    if not c.flags & F_ABOVE:
        c.flags = (c.flags | F_ABOVE) & ~F_DRAIN_OWED
        m.n.pauses += 1
        mark(m, c)
    return 0

cdef int overflow(Core m, Connection c) except -1:
    """The outbox is full: do what the policy says."""
    cdef size_t limit = c.policy.max_outbox
    if c.policy.overflow == OVERFLOW_DROP:
        m.n.drops += 1
        return 0
    held = c.outbox_bytes + c.foreign_bytes
    error = OutboxFull(f"outbox holds {held} bytes, max_outbox is {limit}", conn=c, limit=limit)
    if c.policy.overflow == OVERFLOW_RAISE:
        raise error
    m.n.drops += 1
    if is_foreign(m):
        call_foreign(m, OP_OVERFLOW, c, error)
    else:
        c.error = c.error or error
        abort(m, c)
    return 0

cdef int enqueue_foreign(Core m, Connection c, object message) except -1:
    """Accept or refuse one message from another thread. It is counted at once, and queued for the Mux's thread."""
    cdef object data = as_bytes(message)
    cdef size_t total = c.outbox_bytes + c.foreign_bytes
    if c.close_asked or c.flags & REFUSES_OUTPUT:
        m.n.drops += 1
        return 0
    if total >= c.policy.max_outbox:
        return overflow(m, c)
    c.foreign_bytes += PyBytes_GET_SIZE(data)
    if total + PyBytes_GET_SIZE(data) > c.policy.high:
        call_foreign(m, OP_SEND_ABOVE, c, data)
        return 0
    call_foreign(m, OP_SEND, c, data)
    return 1


# --- input -----------------------------------------------------------------------------------------

cdef inline PyObject* take_scratch(Core m, Py_ssize_t size) noexcept:
    """What recv has just read, as a bytes object of its own; NULL, with MemoryError raised, when memory is out. A small
    read is copied out; a large one takes the buffer itself, cut to size, which saves copying it."""
    cdef PyObject* message
    if 2 * size < m.read_size:
        return make_bytes(PyBytes_AS_STRING(<object>m.scratch), size)
    message = m.scratch
    m.scratch = NULL
    if size != m.read_size:
        _PyBytes_Resize(&message, size)  # sets it to NULL when it fails
    return message

cdef int input_lost(Core m, Connection c) except -1:
    """There was no memory for what recv has just read. The stream has a hole now, so the connection ends."""
    try:
        raised()
    except MemoryError as error:
        discard_inbox(m, c)
        end(m, c, error)
    return 0

cdef int fill_inbox(Core m, Connection c, Py_ssize_t size) except -1:
    """Keep what recv has just read until the user asks for it."""
    cdef PyObject* data
    cdef Chunk* chunk
    if c.inbox == NULL:
        data = take_scratch(m, size)
        if data == NULL:
            return input_lost(m, c)
        c.inbox = chunk_reference(<void*>data, PyBytes_AS_STRING(<object>data), size)
        if c.inbox == NULL:
            DECREF(data)
            no_memory()
            return input_lost(m, c)
        return report(m, c, R_READABLE)
    if <Py_ssize_t>c.inbox.room < size:
        chunk = chunk_block(2 * (c.inbox.size + size))
        if chunk == NULL:
            no_memory()
            return input_lost(m, c)
        chunk_append(chunk, c.inbox.data, c.inbox.size)
        release_chunk(m, c.inbox)
        c.inbox = chunk
    chunk_append(c.inbox, PyBytes_AS_STRING(<object>m.scratch), size)
    return report(m, c, R_READABLE)

cdef inline void discard_inbox(Core m, Connection c) noexcept:
    if c.inbox != NULL:
        release_chunk(m, c.inbox)
        c.inbox = NULL

cdef object inbox_bytes(Connection c):
    if c.inbox == NULL:
        return b""
    if c.inbox.owner != NULL:
        return <object>c.inbox.owner
    return PyBytes_FromStringAndSize(c.inbox.data, c.inbox.size)

cdef inline bint has_message(Connection c) noexcept:
    return c.inbox != NULL and delivers(c)

cdef object next_message(Connection c):
    """Take the next message out of the inbox, which has one."""
    cdef Core m = c.mux
    cdef object message = inbox_bytes(c)
    cdef bint was_full = c.inbox.size > c.policy.max_inbox
    discard_inbox(m, c)
    m.n.messages_in += 1
    if was_full or c.flags & F_EOF:
        mark(m, c)
    return message

cdef int read_turn(Core m, Connection c, uint32_t events) except -1:
    """Read and deliver once, and again while reads come back full, up to the read budget. The kernel reports what is
    left the next time, since the interest is level-triggered: nobody starves, and no list of ready sockets is kept.
    In pull style there is one read a turn: a second one would have to be copied behind the first."""
    cdef Py_ssize_t budget = 0 if c.policy.pull else m.read_budget
    cdef ssize_t r
    while True:
        if m.scratch == NULL:
            m.scratch = make_bytes(NULL, m.read_size)
            if m.scratch == NULL:
                raised()
        m.n.recv_calls += 1
        r = sys_recv(c.fd, PyBytes_AS_STRING(<object>m.scratch), m.read_size)
        if r <= 0:
            return read_ended(m, c, r, events)
        m.n.bytes_in += r
        c.received_ns = m.now_ns
        if not c.flags & F_CLOSING:
            deliver(m, c, r)
        if not receives(c) or m.unwinding:
            mark(m, c)
            return 0
        budget -= r
        # A short read has emptied the queue, so another recv would only say EAGAIN; but behind a FIN or an error it
        # tells about the end at once.
        if budget <= 0 or (r < m.read_size and not events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)):
            return 0

cdef inline int deliver(Core m, Connection c, Py_ssize_t size) except -1:
    """Hand what recv has just read to the handler, or keep it for recv()."""
    cdef Policy policy = c.policy
    cdef object message
    cdef PyObject* new
    if policy.pull:
        return fill_inbox(m, c, size)
    new = take_scratch(m, size)
    if new == NULL:
        return input_lost(m, c)
    message = <object>new
    DECREF(new)
    m.n.messages_in += 1
    if policy.on_messages is not None:
        return call_handler(m, c, policy.on_messages, [message], 2)
    if policy.on_message is not None:
        return call_handler(m, c, policy.on_message, message, 2)
    return 0

cdef int read_ended(Core m, Connection c, ssize_t r, uint32_t events) except -1:
    """recv brought no bytes: nothing there, the peer's FIN, or an error."""
    if err_would_block(r):
        if c.flags & F_BROKEN:
            return end(m, c, None)
        if events & EPOLLERR:  # not the connection's error, but a time stamp or the like: it would be reported for ever
            sys_discard_error_queue(c.fd)
        return 0
    if r < 0:
        return end(m, c, os_error(r))
    if c.flags & F_BROKEN:
        return end(m, c, None)
    c.flags |= F_EOF
    return mark(m, c)


# --- telling the user ------------------------------------------------------------------------------

cdef inline int call_handler(Core m, Connection c, object fn, object arg, size_t count) except -1:
    """Call fn(c) or fn(c, arg); what it sends to `c` goes out together when it returns."""
    cdef PyObject* args[3]
    cdef PyObject* result
    args[1] = <PyObject*>c
    args[2] = <PyObject*>arg
    m.corked = <PyObject*>c
    m.told = True
    result = PyObject_Vectorcall(<PyObject*>fn, &args[1], count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL)
    m.corked = NULL
    if result == NULL:
        return handler_raised(m, c)
    DECREF(result)
    if m.forks != forks:  # the handler forked, and this is the child: not one step further with the parent's sockets
        check_fork(m)
    if c.out_head != NULL and not c.flags & (CANNOT_FLUSH | F_PENDING):
        flush(m, c)
    return 0

cdef int handler_raised(Core m, Connection c) except -1:
    """The handler loses its connection, which closes as by close(): what was accepted before still goes out."""
    if m.forks != forks:
        raised()
    if c.out_head != NULL:
        mark(m, c)
    try:
        raised()
    except Exception as error:
        m.n.handler_errors += 1
        if not c.flags & F_CLOSE_TOLD:
            c.error = c.error or error
            close_connection(m, c)
        log.error("handler of %r raised", c, exc_info=error)
    return 0

cdef inline int report(Core m, Connection c, uint32_t what) except -1:
    if not c.flags & F_REPORT_MASK:
        m.ready.append(c)
    c.flags |= what * F_REPORT
    return 0

cdef int tell(Core m, Connection c, object fn, uint32_t what) except -1:
    if c.policy.pull:
        return report(m, c, what)
    return 0 if fn is None else call_handler(m, c, fn, None, 1)

cdef int tell_drained(Core m, Connection c) except -1:
    c.flags &= ~F_DRAIN_OWED
    return tell(m, c, c.policy.on_drain, R_DRAINED | (R_READABLE if c.inbox != NULL else 0))

cdef int tell_eof(Core m, Connection c) except -1:
    c.flags |= F_EOF_TOLD
    tell(m, c, c.policy.on_eof, R_EOF)
    if not c.policy.pull and c.policy.on_eof is None and not c.policy.half_open:
        close_connection(m, c)
    return 0

cdef int tell_closed(Core m, Connection c) except -1:
    c.flags |= F_CLOSE_TOLD
    if c.policy.pull:
        return report(m, c, R_CLOSED)
    return 0 if c.policy.on_close is None else call_handler(m, c, c.policy.on_close, c.error, 2)


# --- the steps of its life -------------------------------------------------------------------------

cdef int on_ready(Core m, Connection c, uint32_t events) except -1:
    """The kernel reports `events`: send first, since that may end a pause; then read before believing ERR or HUP,
    since what the peer sent before its reset is still there and recv tells the error, too."""
    cdef int r
    if events & EPOLLOUT and c.flags & F_BLOCKED:
        c.flags &= ~F_BLOCKED
        flush(m, c)
        if not c.flags & F_BLOCKED:
            mark(m, c)
    if events & ~<uint32_t>EPOLLOUT and c.fd >= 0:
        if receives(c):
            return read_turn(m, c, events)
        if events & EPOLLERR:  # it is paused: nobody would see recv's error
            r = sys_pending_error(c.fd)
            if r < 0:
                return end(m, c, os_error(r))
            sys_discard_error_queue(c.fd)
    return 0

cdef int settle(Core m, Connection c) except -1:
    """Whatever has come to be due on a connection, in the order in which the user is promised it."""
    c.flags &= ~F_PENDING
    if not c.flags & F_OPENED:
        c.flags |= F_OPENED
        tell(m, c, c.policy.on_open, R_OPENED)
    if c.out_head != NULL and not c.flags & CANNOT_FLUSH:
        flush(m, c)
    if c.flags & F_BROKEN and not receives(c):
        set_ended(c, None)
    if c.flags & F_DRAIN_OWED and not c.flags & (F_CLOSING | F_ENDED):
        tell_drained(m, c)
    if c.flags & (F_EOF | F_EOF_TOLD | F_ENDED) == F_EOF and c.inbox == NULL and delivers(c):
        tell_eof(m, c)
    if not c.flags & F_ENDED:
        advance_close(m, c)
    if c.flags & F_ENDED:
        return finish(m, c)
    return apply_interest(m, c)

cdef int apply_interest(Core m, Connection c) except -1:
    """Tell the kernel what is wanted, if that has changed. Mask 0 would still report ERR and HUP, for ever; with bare
    EPOLLET they are reported once."""
    cdef uint32_t wanted = 0
    cdef int r
    if receives(c):
        wanted = EPOLLIN | EPOLLRDHUP
    if c.flags & F_BLOCKED:
        wanted |= EPOLLOUT
    if wanted == 0:
        wanted = EPOLLET
    if wanted == c.interest:
        return 0
    r = sys_epoll_ctl(m.epoll.fd, EPOLL_CTL_MOD, c.fd, wanted, token(m, c.fd))
    if r < 0:
        return end(m, c, os_error(r))
    c.interest = wanted
    return 0

cdef int close_connection(Core m, Connection c) except -1:
    if not c.flags & (F_CLOSING | F_ENDED):
        c.flags = (c.flags | F_CLOSING) & ~(F_PAUSED | F_DRAIN_OWED)
        discard_inbox(m, c)
        mark(m, c)
    return 0

cdef int advance_close(Core m, Connection c) except -1:
    """The next step of write_eof() or close(): flush, shut down, wait for the peer's FIN. Only settle() calls it."""
    if not c.flags & (F_CLOSING | F_WRITE_EOF):
        return 0
    if c.out_head != NULL or c.foreign_bytes:
        if c.flags & F_CLOSING and c.closing_timer is None:
            c.wrote_ns = m.now_ns
            c.closing_timer = m.timers.add(m.now_ns + closing_stall_ns(c), _closing_due, (c, 0))
        return 0
    if c.flags & F_EOF and c.flags & (F_CLOSING | F_EOF_TOLD):
        return set_ended(c, None)
    if not c.flags & F_SHUT:
        c.flags |= F_SHUT
        if sys_shutdown_write(c.fd) < 0:  # the peer has reset it: recv tells what it sent before, and the reason
            c.flags |= F_BROKEN
        stop_closing_timer(c)
    if c.flags & F_CLOSING and c.closing_timer is None:
        if c.policy.linger_ns == 0:
            return set_ended(c, None)
        c.closing_timer = m.timers.add(m.now_ns + c.policy.linger_ns, _closing_due, (c, sys_unsent(c.fd)))
    return 0

cdef inline int64_t closing_stall_ns(Connection c) noexcept:
    return c.policy.write_ns if 0 < c.policy.write_ns < CLOSING_STALL_NS else CLOSING_STALL_NS

cdef int stop_closing_timer(Connection c) except -1:
    if c.closing_timer is not None:
        c.closing_timer.cancel()
        c.closing_timer = None
    return 0

def _closing_due(Connection c, int unsent):
    """A closing connection has had its time; it gets more while the peer keeps taking what we owe it. `unsent` is what
    the kernel had not got through when the linger began."""
    cdef Core m = c.mux
    cdef int64_t due
    cdef int left
    c.closing_timer = None
    if c.flags & F_ENDED:
        return
    if c.out_head != NULL:
        due = c.wrote_ns + closing_stall_ns(c)
        if due > m.now_ns:
            c.closing_timer = m.timers.add(due, _closing_due, (c, 0))
        else:
            write_timeout(m, c, closing_stall_ns(c))
        return
    left = sys_unsent(c.fd)
    if 0 < left < unsent:
        c.closing_timer = m.timers.add(m.now_ns + c.policy.linger_ns, _closing_due, (c, left))
    else:
        end(m, c, None)

cdef int write_timeout(Core m, Connection c, int64_t limit_ns) except -1:
    limit = limit_ns / 1e9
    text = f"the peer took nothing of {c.outbox_bytes} bytes for {limit:g} s"
    m.n.timeouts += 1
    c.error = c.error or WriteTimeout(text, conn=c, limit=limit)
    return abort(m, c)

cdef int idle_timeout(Core m, Connection c) except -1:
    limit = c.policy.idle_ns / 1e9
    m.n.timeouts += 1
    c.error = c.error or IdleTimeout(f"nothing received for {limit:g} s", conn=c, limit=limit)
    return close_connection(m, c)

cdef int abort(Core m, Connection c) except -1:
    """End it with a RST, at once; on_close follows from the loop."""
    if c.flags & F_CLOSED:
        return 0
    c.flags |= F_CLOSING | F_ENDED
    discard_inbox(m, c)
    sys_reset_on_close(c.fd)  # a socket that has no such option is closed all the same
    drop_descriptor(m, c, True)
    return mark(m, c)

cdef int finish(Core m, Connection c) except -1:
    stop_closing_timer(c)
    if not c.flags & F_CLOSED:
        drop_descriptor(m, c, True)
    if not c.flags & F_CLOSE_TOLD:
        tell_closed(m, c)
    return 0

cdef int drop_descriptor(Core m, Connection c, bint close) except -1:
    """Take the descriptor out of the set and, mostly, close it. Input of pull style stays until it is taken."""
    cdef Listener listener = c.policy.listener
    cdef int fd = c.fd
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
    if m.resting:
        wake_resting(m)
    return 0


# --- the class -------------------------------------------------------------------------------------

@cython.final
cdef class Connection:
    """One connected stream socket: a queue of messages in, and a queue of messages out.

    Made by a Listener or by `Mux.attach`. Its methods never block and never call a callback. `send`, `send_many`,
    `write`, `writelines`, `close`, `abort`, `id`, `peer`, `closing` and `closed` may be used from any thread; anything
    else raises RuntimeError outside the Mux's thread.
    """

    def __cinit__(self, token=None):
        self.fd = -1
        check_token(token, "connections are made by Mux.listen and Mux.attach")

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
            free_chunk(self.inbox)

    def __repr__(self):
        state = "closed" if self.flags & F_CLOSED else "closing" if self.closing else "open"
        return f"<muxcore.Connection {self.id} {state}, peer={self.peer!r}>"

    # -- who it is

    @property
    def mux(self):
        return self.mux

    @property
    def listener(self) -> Listener | None:
        """The Listener that accepted it; None if it was attached."""
        return self.policy.listener

    @property
    def peer(self):
        """The peer's address, as `socket.getpeername` gives it; it stays valid after the end."""
        if self.peer_tuple is None:
            self.peer_tuple = address_tuple(self)
        return self.peer_tuple

    @property
    def local(self):
        """Our own address, as `socket.getsockname` gives it; None once closed."""
        check_thread(self.mux)
        return with_socket(self, "getsockname", ()) if self.fd >= 0 else None

    @property
    def eof(self) -> bool:
        """Whether the peer's FIN was read."""
        return self.flags & F_EOF != 0

    @property
    def closing(self) -> bool:
        """Whether `close` was called or the connection is over; nothing is accepted for sending any more."""
        return self.close_asked or self.flags & (F_CLOSING | F_ENDED) != 0

    @property
    def closed(self) -> bool:
        """Whether it is over and its descriptor closed."""
        return self.flags & F_CLOSED != 0

    def fileno(self) -> int:
        """The descriptor; -1 once closed."""
        return self.fd

    # -- messages out

    def send(self, message, /) -> bool:
        """Queue a message; True while the outbox is at or below `Limits.high` bytes.

        `bytes` are kept by reference, any other buffer is copied before this returns. Never blocks, and never raises
        because of the peer: on a closing or closed connection it counts a drop and returns False. Beyond `max_outbox`
        `Limits.overflow` decides. Raises TypeError if `message` is not bytes-like.
        """
        cdef Core m = self.mux
        check_fork(m)
        if is_foreign(m):
            return enqueue_foreign(m, self, message) != 0
        return enqueue(m, self, message) != 0

    def send_many(self, messages, /) -> bool:
        """`send` each; the last answer."""
        cdef bint below = not self.flags & (F_ABOVE | REFUSES_OUTPUT)
        for message in messages:
            below = self.send(message)
        return below

    def write(self, data, /) -> bool:
        """`send` bytes as they are, whatever the framer."""
        return self.send(data)

    def writelines(self, parts, /) -> bool:
        """`write` each; the last answer."""
        return self.send_many(parts)

    def write_eof(self) -> None:
        """Send a FIN once the outbox is empty; input goes on. Further messages are refused."""
        check_thread(self.mux)
        if not self.flags & REFUSES_OUTPUT:
            self.flags |= F_WRITE_EOF
            mark(self.mux, self)

    def flush(self) -> int:
        """Send what the kernel takes now; how many bytes are still queued."""
        cdef Core m = self.mux
        check_thread(m)
        if self.out_head != NULL and not self.flags & CANNOT_FLUSH:
            m.now_ns = sys_clock_ns(CLOCK_MONOTONIC)
            flush(m, self)
        return self.outbox_bytes

    @property
    def outbox_size(self) -> int:
        """Bytes accepted for sending that the kernel has not taken yet."""
        return self.outbox_bytes + self.foreign_bytes

    # -- messages in (pull style)

    def recv(self, default=None):
        """The next queued message; `default` when there is none, or while the connection is paused."""
        check_thread(self.mux)
        return next_message(self) if has_message(self) else default

    def recv_all(self) -> list:
        """All queued messages."""
        check_thread(self.mux)
        return [next_message(self)] if has_message(self) else []

    def __iter__(self):
        """Take queued messages one by one; `for message in conn` ends when there is none left for now."""
        return self

    def __next__(self):
        check_thread(self.mux)
        if has_message(self):
            return next_message(self)
        raise StopIteration

    @property
    def inbox_size(self) -> int:
        """Bytes received and not delivered."""
        return 0 if self.inbox == NULL else self.inbox.size

    @property
    def unread(self) -> bytes:
        """The bytes received and not delivered; they stay."""
        check_thread(self.mux)
        return inbox_bytes(self)

    def pause_reading(self) -> None:
        """Stop reading and delivering, at once. The kernel's buffers fill up and the peer has to wait."""
        check_thread(self.mux)
        if not self.flags & (F_PAUSED | F_CLOSING | F_ENDED):
            self.flags |= F_PAUSED
            mark(self.mux, self)

    def resume_reading(self) -> None:
        check_thread(self.mux)
        if self.flags & F_PAUSED:
            self.flags &= ~F_PAUSED
            if self.inbox != NULL:
                report(self.mux, self, R_READABLE)
            mark(self.mux, self)

    def is_reading(self) -> bool:
        """Whether it is read from now: not paused, held back by its own output, full, at EOF or closing."""
        return receives(self) and not self.flags & F_CLOSING

    # -- the end

    def close(self) -> None:
        """Send everything accepted so far, then a FIN, then wait for the peer's (`Timeouts.linger`), then close.

        Nothing is delivered or accepted from now on; input is read and discarded, since unread input would turn the
        end into a reset and destroy output on its way. No effect on a closing connection.
        """
        check_fork(self.mux)
        if is_foreign(self.mux):
            self.close_asked = True
            call_foreign(self.mux, OP_CLOSE, self, None)
        else:
            close_connection(self.mux, self)

    def abort(self) -> None:
        """Reset the connection now; what is queued is lost."""
        check_fork(self.mux)
        if is_foreign(self.mux):
            self.close_asked = True
            call_foreign(self.mux, OP_ABORT, self, None)
        else:
            abort(self.mux, self)

    def detach(self) -> socket.socket:
        """Give the socket away, nonblocking, and end here with `on_close(conn, None)`; see `unread` first.

        Raises RuntimeError while there is unsent output, ConnectionClosed if the connection is closing or over.
        """
        check_thread(self.mux)
        if self.flags & (F_CLOSING | F_ENDED):
            raise ConnectionClosed("detach: the connection is closing or closed", conn=self)
        if self.outbox_size:
            raise RuntimeError(f"detach: {self.outbox_size} bytes are unsent")
        sock = socket.socket(fileno=self.fd)
        sock.setblocking(False)
        self.flags |= F_CLOSING | F_ENDED
        drop_descriptor(self.mux, self, False)
        mark(self.mux, self)
        return sock

    # -- settings

    @property
    def limits(self) -> Limits:
        return self.policy.limits

    @limits.setter
    def limits(self, value):
        check_thread(self.mux)
        self.policy = changed_policy(self.policy, as_limits(value), self.policy.timeouts)
        if has_message(self):  # perhaps autopause held it back so far
            report(self.mux, self, R_READABLE)
        mark(self.mux, self)

    def set_limits(self, **changes) -> None:
        """Change some of the limits of this connection alone."""
        self.limits = dataclasses.replace(self.policy.limits, **changes)

    @property
    def timeouts(self) -> Timeouts:
        return self.policy.timeouts

    @timeouts.setter
    def timeouts(self, value):
        check_thread(self.mux)
        self.policy = changed_policy(self.policy, self.policy.limits, as_timeouts(value))
        need_sweep(self.mux, self.policy)

    def set_timeouts(self, **changes) -> None:
        """Change some of the timeouts of this connection alone."""
        self.timeouts = dataclasses.replace(self.policy.timeouts, **changes)

    def getsockopt(self, level, name, size=0, /):
        """As `socket.getsockopt`."""
        check_thread(self.mux)
        return with_socket(self, "getsockopt", (level, name, size) if size else (level, name))

    def setsockopt(self, level, name, value, /) -> None:
        """As `socket.setsockopt`."""
        check_thread(self.mux)
        with_socket(self, "setsockopt", (level, name, value))

cdef object with_socket(Connection c, str method, tuple args):
    """Call a method of Python's socket on our descriptor, which stays ours."""
    if c.fd < 0:
        raise ConnectionClosed(f"{method}: the connection is closed", conn=c)
    sock = socket.socket(fileno=c.fd)
    try:
        return getattr(sock, method)(*args)
    finally:
        sock.detach()

cdef object address_tuple(Connection c):
    if c.family == AF_INET:
        return socket.inet_ntop(socket.AF_INET, c.host[:4]), ntohs(c.port)
    if c.family == AF_INET6:
        return socket.inet_ntop(socket.AF_INET6, c.host[:16]), ntohs(c.port), ntohl(c.flowinfo), c.scope
    return ""  # a Unix client that is bound to no name
