# What may live here: what is true of a Mux between two turns. A build with MUXCORE_ASSERT=1 checks it at the end of
# each turn, and ends the process where it is not so; in any other build the compiler leaves all of this out.

cdef extern from *:
    """
    #ifdef MUXCORE_ASSERT
    #define MUXCORE_CHECKS 1
    #else
    #define MUXCORE_CHECKS 0
    #endif
    #define MUXCORE_TEXT(what) MUXCORE_TEXT_OF(what)
    #define MUXCORE_TEXT_OF(what) #what
    #define MUXCORE_WHERE __FILE__ ":" MUXCORE_TEXT(__LINE__)  // the C file has the lines of this one in its comments
    #define muxcore_require(condition) ((condition) ? (void)0 : Py_FatalError("this is not so: " MUXCORE_WHERE))
    """
    const bint MUXCORE_CHECKS
    int PyGC_Disable()
    int PyGC_Enable()
    void require "muxcore_require"(bint condition)

cdef enum:
    CHECK_ALWAYS = 256      # slots; with more, only one turn in CHECK_SELDOM is checked, since a check looks at all
    CHECK_SELDOM = 64

# What is counted on the way through the connections, to be compared with what the Mux has counted.
cdef struct Seen:
    uint64_t open
    Py_ssize_t pull, pending, reported

cdef int check_turn(CompiledCore m) except -1:
    if m.close_requested or m.is_closed or (m.slot_count > CHECK_ALWAYS and m.n.waits % CHECK_SELDOM):
        return 0
    if m.schedule_failed:
        return 0  # an owner is missing on `pending`; the next turn looks at all of them
    cdef bint collects = PyGC_Disable()  # a finalizer would change what is counted here
    check_core(m)
    check_blocks(m)
    check_owners(m)
    if collects:
        PyGC_Enable()
    return 0

cdef int check_core(CompiledCore m) except -1:
    require(0 <= m.epoll.next and m.epoll.next <= m.epoll.count and m.epoll.count <= m.epoll.capacity)
    require(PyList_GET_SIZE(m.objects) == <Py_ssize_t>m.slot_count)
    require(m.n.connections <= m.n.peak_connections)
    require(m.in_handler == NULL and m.group_tail == NULL and m.group_count == 0)
    require(m.sleeping == 0)
    require(m.wake_fd >= 0 and m.slots[m.wake_fd].kind == WAKEUP)
    require(m.driven == (m.timer_fd >= 0))
    return 0

cdef int check_blocks(CompiledCore m) except -1:
    cdef Chunk* block = m.blocks
    cdef size_t count = 0
    while block != NULL:
        require(block.total == BLOCK_SIZE and block.size == 0 and block.room == BLOCK_SIZE - sizeof(Chunk))
        count += 1
        block = block.next
    require(count == m.block_count and count <= BLOCKS_KEPT)
    return 0

cdef int check_owners(CompiledCore m) except -1:
    """The slots, their owners, and the counters for these."""
    cdef Seen seen
    cdef dict by_listener = {}
    cdef size_t fd
    memset(&seen, 0, sizeof(seen))
    for fd in range(m.slot_count):
        owner = m.objects[fd]
        require((m.slots[fd].kind == NOTHING) == (owner is None))
        if m.slots[fd].kind == CONNECTION:
            require((<Connection>owner).fd == <int>fd)
            check_connection(m, <Connection>owner, &seen, by_listener)
        elif m.slots[fd].kind == LISTENER:
            require((<Listener>owner).fd == <int>fd and (<Listener>owner).listening)
        elif m.slots[fd].kind == DATAGRAM:
            require((<Datagram>owner).fd == <int>fd)
            check_datagram(m, <Datagram>owner, &seen)
        elif m.slots[fd].kind == WATCHED:
            require(owner.fd == <int>fd and len(owner.calls) > 0)
        elif m.slots[fd].kind == WAKEUP:
            require(<int>fd == m.wake_fd or <int>fd == m.timer_fd)
    # Those without a slot are not open yet, or over.
    for owner in {*m.pending, *m.pending_now[m.pending_done:], *m.ready, *m.connecting}:
        if type(owner) is Datagram:
            if (<Datagram>owner).fd < 0:
                check_datagram(m, <Datagram>owner, &seen)
        elif (<Connection>owner).fd < 0 or m.objects[(<Connection>owner).fd] is not owner:
            check_connection(m, <Connection>owner, &seen, by_listener)
    require(seen.open == m.n.connections)
    require(seen.pending == PyList_GET_SIZE(m.pending) + PyList_GET_SIZE(m.pending_now) - m.pending_done)
    require(seen.reported == PyList_GET_SIZE(m.ready))
    for listener in m._listeners():
        require((<Listener>listener).listening != (<Listener>listener).accept_paused)
        require((<Listener>listener).connections == by_listener.get(listener, 0))
        seen.pull += (<Listener>listener).policy.pull
    require(seen.pull == m.pull_count)
    return 0

cdef int check_connection(CompiledCore m, Connection c, Seen* seen, dict by_listener) except -1:
    cdef bint pending = c.flags & F_PENDING != 0
    require(c.mux is m)
    seen.pending += pending
    seen.reported += c.flags & F_REPORT_MASK != 0
    if not c.flags & F_CLOSED:
        seen.open += 1
        seen.pull += c.policy.pull
        if c.policy.listener is not None:
            by_listener[c.policy.listener] = by_listener.get(c.policy.listener, 0) + 1
    check_outbox(c)
    check_inbox(m, c)
    check_flags(c)
    if pending:
        return 0
    # Nothing is left to do but what the kernel, a timer or the user will call for.
    require(not c.flags & F_ENDED or c.flags & F_CLOSE_NOTIFIED)
    if c.flags & F_CONNECTING:
        require(c.flags & F_ENDED or not c.flags & F_CLOSING or c.out_head != NULL or c.foreign)
    else:
        require(c.flags & F_OPENED)
        require(not c.flags & F_DRAIN_OWED or c.flags & (F_CLOSING | F_ENDED))  # then it is not reported
        require(c.out_head == NULL or c.flags & CANNOT_FLUSH)
        require(c.flags & F_ENDED or c.interest == wanted_interest(c))
        require(c.policy.pull or c.inbox == NULL or c.inbox.frame.whole == 0 or not may_deliver(c))
    return 0

cdef int check_datagram(CompiledCore m, Datagram d, Seen* seen) except -1:
    cdef size_t size = 0
    cdef Py_ssize_t i
    require(d.mux is m)
    seen.pending += d.pending
    require(0 <= d.out_at <= PyList_GET_SIZE(d.out) and (PyList_GET_SIZE(d.out) - d.out_at) % 2 == 0)
    for i in range(d.out_at, PyList_GET_SIZE(d.out), 2):
        size += PyBytes_GET_SIZE(d.out[i]) + PACKET_COST
    require(d.outbox_bytes == size)
    require(not (d.blocked or d.starved or d.above) or size != 0)
    require(d.fd >= 0 or size == 0)
    if not d.pending:
        require(not can_flush(d) and not d.drain_owed and PyList_GET_SIZE(d.errors) == 0)
        require(d.fd < 0 or d.interest == (EPOLLIN | (EPOLLOUT if d.blocked else 0)))
    return 0

cdef int check_flags(Connection c) except -1:
    require(not c.flags & F_CLOSED or (c.flags & F_ENDED and c.fd < 0 and c.out_head == NULL))
    require(not c.flags & F_CLOSE_NOTIFIED or c.flags & F_CLOSED)
    require(not c.flags & F_EOF_NOTIFIED or c.flags & F_EOF)
    require(not c.flags & F_WRITE_SHUT or c.flags & (F_CLOSING | F_WRITE_EOF))
    require(not c.flags & (F_BLOCKED | F_STARVED | F_ABOVE_HIGH) or c.out_head != NULL)
    require(not c.flags & F_CLOSING or c.flags & F_CLOSED or c.inbox == NULL)
    require(c.deadline is None or c.flags & (F_CLOSING | F_CONNECTING))
    require(not c.flags & F_CONNECTING or (c.fd < 0 and not c.flags & F_OPENED))
    require((c in c.mux.connecting) == (c.flags & (F_CONNECTING | F_CLOSED) == F_CONNECTING))
    return 0

cdef int check_outbox(Connection c) except -1:
    cdef Chunk* chunk = c.out_head
    cdef Chunk* last = NULL
    cdef size_t total = 0, in_files = 0
    while chunk != NULL:
        require(chunk.size > 0)
        if chunk.data == NULL:
            require(chunk.owner == NULL and (<FileChunk*>chunk).fd >= 0)
            in_files += chunk.size
        elif chunk.owner != NULL:
            require(chunk.room == 0 and chunk.total == 0)
            require(chunk.data >= PyBytes_AS_STRING(<object>chunk.owner))
            require(chunk.data + chunk.size <= PyBytes_AS_STRING(<object>chunk.owner)
                    + PyBytes_GET_SIZE(<object>chunk.owner))
        else:
            require(chunk.data >= <char*>(chunk + 1))
            require(chunk.data + chunk.size + chunk.room == <char*>chunk + chunk.total)
        total += chunk.size
        last = chunk
        chunk = chunk.next
    require(c.out_head == NULL or c.out_head.last == last)
    require(c.outbox_bytes == total)
    require(c.file_bytes == in_files)
    return 0

cdef int check_inbox(CompiledCore m, Connection c) except -1:
    cdef Inbox* inbox = c.inbox
    if inbox == NULL:
        return 0
    require(inbox != &m.in_window)
    require(inbox.size > 0)
    require(inbox.frame.whole <= <Py_ssize_t>inbox.size and inbox.frame.at <= inbox.size)
    if inbox.owner != NULL:
        require(inbox.total == 0 and inbox.room == 0)
        require(inbox.data >= PyBytes_AS_STRING(<object>inbox.owner))
        require(inbox.data + inbox.size == PyBytes_AS_STRING(<object>inbox.owner)
                + PyBytes_GET_SIZE(<object>inbox.owner))
    else:
        require(inbox.data >= <char*>(inbox + 1))
        require(inbox.data + inbox.size + inbox.room == <char*>(inbox + 1) + inbox.total)
    return 0
