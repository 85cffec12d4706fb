# What may live here: what a connection sends: the chain of chunks, framing, flushing, messages from other threads.

cdef enum:
    NOTHING_GOES = F_BLOCKED | F_STARVED | F_ENDED | F_PEER_GONE | F_CONNECTING
    CANNOT_FLUSH = NOTHING_GOES | F_WIRE | F_HANDSHAKE
    BLOCKS_KEPT = 64
    SMALL_REPLY = 64        # bytes of a reply of RESP that is put together on the stack
    TEXT_KEPT = 1 << 16     # of the memory for a longer one: more is given back at once
    FILE_BURST = 1 << 20    # bytes of a file for one connection before the others have their turn
    FOREIGN_COST = 192      # bytes of memory of an entry of the queue of other threads, without its data
    FOREIGN_MOST = 1 << 23  # of which the Mux has not seen any yet, whatever max_outbox is: there are 24 bits to count

cdef int64_t STARVED_NS = 10_000_000

cdef object RESP_FRAMER = Resp()


# --- the chain -------------------------------------------------------------------------------------

cdef inline void free_chunk(Chunk* chunk) noexcept:
    if chunk.owner != NULL:
        DECREF(<PyObject*>chunk.owner)
    elif chunk.data == NULL:
        sys_close((<FileChunk*>chunk).fd)
    free(chunk)

cdef inline void release_chunk(CompiledCore m, Chunk* chunk) noexcept:
    """Free a chunk, or keep its block for reuse."""
    if chunk.total == BLOCK_SIZE and m.block_count < BLOCKS_KEPT:
        chunk_clear(chunk)
        chunk.next = m.blocks
        m.blocks = chunk
        m.block_count += 1
    else:
        free_chunk(chunk)

cdef inline Chunk* take_block(CompiledCore m) except NULL:
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
    if c.out_head == NULL:
        c.out_head = chunk
    else:
        c.out_head.last.next = chunk
    c.out_head.last = chunk

cdef inline void drop_chunk(CompiledCore m, Connection c) noexcept:
    """Remove the first chunk from the outbox."""
    cdef Chunk* chunk = c.out_head
    c.out_head = chunk.next
    if chunk.next != NULL:
        chunk.next.last = chunk.last
    release_chunk(m, chunk)

cdef inline Chunk* make_room(CompiledCore m, Connection c, size_t size) except NULL:
    """The chunk at the end of the outbox, with room for a small piece."""
    cdef Chunk* chunk = c.out_head
    if chunk != NULL:
        chunk = chunk.last
    if chunk == NULL or chunk.room < size:
        chunk = take_block(m)
        link_chunk(c, chunk)
    return chunk

cdef inline int push(CompiledCore m, Connection c, object data) except -1:
    """Put bytes at the end of the outbox: small pieces next to each other, a large one by reference."""
    cdef size_t size = PyBytes_GET_SIZE(data)
    if size >= SMALL_PIECE:
        return push_reference(c, data)
    return push_piece(m, c, PyBytes_AS_STRING(data), size)

cdef inline int push_reference(Connection c, object data) except -1:
    link_reference(c, make_reference(data))
    return 0

cdef inline Chunk* make_reference(object data) except NULL:
    cdef Chunk* chunk = chunk_reference(<void*>data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    if chunk == NULL:
        raise MemoryError()
    Py_INCREF(data)
    return chunk

cdef inline void link_reference(Connection c, Chunk* chunk) noexcept:
    link_chunk(c, chunk)
    c.outbox_bytes += chunk.size

cdef inline int push_piece(CompiledCore m, Connection c, const char* data, size_t size) except -1:
    """Put a small piece, such as a header, at the end of the outbox."""
    chunk_append(make_room(m, c, size), data, size)
    c.outbox_bytes += size
    return 0

cdef inline int push_between(
    CompiledCore m, Connection c, const char* head, size_t head_size, object data, const char* tail, size_t tail_size
) except -1:
    """Put bytes between a header and a trailer, both small, at the end of the outbox: all of it or, when memory is out,
    nothing."""
    cdef size_t size = PyBytes_GET_SIZE(data)
    cdef Chunk* chunk
    if size >= SMALL_PIECE:
        return push_large_between(m, c, head, head_size, data, tail, tail_size)
    chunk = make_room(m, c, head_size + size + tail_size)
    if head_size:
        chunk_append(chunk, head, head_size)
    chunk_append(chunk, PyBytes_AS_STRING(data), size)
    if tail_size == 1:
        chunk_append_byte(chunk, tail[0])
    elif tail_size:
        chunk_append(chunk, tail, tail_size)
    c.outbox_bytes += head_size + size + tail_size
    return 0

cdef int push_large_between(
    CompiledCore m, Connection c, const char* head, size_t head_size, object data, const char* tail, size_t tail_size
) except -1:
    # Blocks of their own size: with one of BLOCK_SIZE on either side, a message of 1 KiB would hold 5 KiB.
    cdef Chunk* first = NULL
    cdef Chunk* last = NULL
    cdef Chunk* reference = chunk_reference(<void*>data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    cdef bint made = reference != NULL
    if head_size and (c.out_head == NULL or c.out_head.last.room < head_size):
        first = chunk_block(max(head_size, <size_t>SMALL_ROOM))
        made = made and first != NULL
    if tail_size:
        last = chunk_block(max(tail_size, <size_t>SMALL_ROOM))
        made = made and last != NULL
    if not made:
        free(first)
        free(last)
        free(reference)
        raise MemoryError()
    Py_INCREF(data)
    if first != NULL:
        link_chunk(c, first)
    if head_size:
        chunk_append(c.out_head.last, head, head_size)
    link_chunk(c, reference)
    if tail_size:
        chunk_append(last, tail, tail_size)
        link_chunk(c, last)
    c.outbox_bytes += head_size + reference.size + tail_size
    return 0

cdef inline void consume(CompiledCore m, Connection c, size_t size) noexcept:
    """Remove `size` bytes, which the kernel has accepted, from the front of the outbox."""
    c.outbox_bytes -= size
    while c.out_head != NULL and size >= c.out_head.size:
        size -= c.out_head.size
        drop_chunk(m, c)
    if c.out_head != NULL:
        c.out_head.data += size
        c.out_head.size -= size

cdef void compact(CompiledCore m, Connection c) noexcept:
    """Move a small lone leftover out of its block, which is worth more to the next connection."""
    cdef Chunk* chunk = c.out_head
    cdef Chunk* small
    if chunk.next != NULL or chunk.total != BLOCK_SIZE or chunk.size >= COMPACT_BELOW:
        return
    small = chunk_block(chunk.size)
    if small != NULL:
        chunk_append(small, chunk.data, chunk.size)
        drop_chunk(m, c)
        link_chunk(c, small)

cdef void discard_outbox(CompiledCore m, Connection c) noexcept:
    if c.out_head != NULL:
        m.n.unsent += 1
    while c.out_head != NULL:
        drop_chunk(m, c)
    with cython.critical_section(c):  # for held()
        c.outbox_bytes = c.file_bytes = 0
    if c.wired is not None:
        c.wired.ready = 0
    c.flags &= ~(F_ABOVE_HIGH | F_DRAIN_OWED | F_BLOCKED | F_STARVED)


# --- flushing --------------------------------------------------------------------------------------

cdef int flush(CompiledCore m, Connection c) except -1:
    """Send until the outbox is empty or the kernel accepts no more. Only if the connection can be flushed."""
    cdef iovec parts[MAX_PARTS]
    cdef size_t wanted
    cdef size_t count
    cdef ssize_t r
    while c.out_head != NULL:
        if c.out_head.data == NULL:
            if not flush_file(m, c):
                return 0
            continue
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
        if <size_t>r < wanted:  # the send buffer is full; epoll reports when it has room, level-triggered
            wait_writable(m, c)
            break
    return look_for_drain(m, c)

cdef inline int look_for_drain(CompiledCore m, Connection c) except -1:
    if c.flags & F_ABOVE_HIGH and c.outbox_bytes <= c.policy.low:
        c.flags = (c.flags & ~F_ABOVE_HIGH) | F_DRAIN_OWED
        c.received_ns = m.now_ns  # until now we may not have listened
        schedule(m, c)
    return 0

cdef inline void begin_stall(CompiledCore m) noexcept:
    """Before a flush outside of a turn: the time of the last turn may be long ago, and a stall begins now."""
    if not m.in_turn:
        m.now_ns = sys_clock_ns(CLOCK_MONOTONIC)

cdef inline int send_out(CompiledCore m, Connection c) except -1:
    """flush(), if there is something and it can be."""
    if c.out_head != NULL and not c.flags & CANNOT_FLUSH:
        return flush(m, c)
    return flush_wire(m, c) if c.flags & F_WIRE else 0

cdef inline int send_replies(CompiledCore m, Connection c) except -1:
    """Send what a handler has sent to its own connection now, unless its group (dispatch()) or run_pending() does."""
    return 0 if m.group_tail == <PyObject*>c or c.flags & F_PENDING else send_out(m, c)

cdef int flush_file(CompiledCore m, Connection c) except -1:
    """Send from the file at the front of the outbox; 1 if all of it went, else this flush is over."""
    cdef FileChunk* part = <FileChunk*>c.out_head
    cdef Chunk* chunk = &part.chunk
    cdef ssize_t r = sys_sendfile(c.fd, part.fd, &part.offset, min(chunk.size, <size_t>FILE_BURST))
    m.n.send_calls += 1
    if r == 0:
        abort_for(m, c, OSError(f"sendfile: the file ended {chunk.size} bytes before the end of the queued part"))
        return 0
    if r < 0:
        send_failed(m, c, r)
        return 0
    m.n.bytes_out += r
    c.wrote_ns = m.now_ns
    with cython.critical_section(c):  # for held()
        c.outbox_bytes -= r
        c.file_bytes -= r
    chunk.size -= r
    if c.flags & F_WIRE:
        c.wired.ready -= r
    if chunk.size:
        wait_writable(m, c)  # the kernel accepts no more, or this was enough for one turn
        return 0
    drop_chunk(m, c)
    return 1

cdef int wait_writable(CompiledCore m, Connection c) except -1:
    m.n.would_blocks += 1
    c.flags |= F_BLOCKED
    compact(m, c)
    return schedule(m, c)

cdef int send_failed(CompiledCore m, Connection c, ssize_t r) except -1:
    if err_would_block(r):
        c.wrote_ns = m.now_ns  # a stall begins when the outbox has to wait, not with the last send before that
        return wait_writable(m, c)
    if err_try_later(r):  # the socket may be writable all the same: waiting for EPOLLOUT would spin
        c.flags |= F_STARVED
        add_timer(m, sys_clock_ns(CLOCK_MONOTONIC) + STARVED_NS, _retry_send, (c,))
        return 0
    error = os_error(r)
    if c.flags & F_ENDED:
        return 0
    discard_outbox(m, c)
    if not err_peer_gone(r) or c.flags & F_CLOSING:
        return end(m, c, error)
    # After a peer's RST or full close, what it sent before still waits in the receive queue: read that first, and
    # end with this error when it is dry (Promise peer-gone: nothing that was received is lost).
    c.flags |= F_PEER_GONE
    keep_error(c, error)
    sys_reset_on_close(c.fd)  # as end() does
    return schedule(m, c)

def _retry_send(Connection c):
    c.flags &= ~F_STARVED
    schedule(c.mux, c)


# --- queueing --------------------------------------------------------------------------------------

cdef inline int enqueue(CompiledCore m, Connection c, object message, bint raw) except -1:
    """Accept or refuse one message, on the Mux's thread: 1 below the high-water mark, 0 refused or above it."""
    cdef FramerKind kind = CHUNKS if raw else c.policy.framing.kind
    if kind < RESP and PyBytes_CheckExact(message):
        return enqueue_bytes(m, c, message, kind)
    return enqueue_object(m, c, message, kind, raw)

cdef inline int enqueue_bytes(CompiledCore m, Connection c, object data, FramerKind kind) except -1:
    if kind != CHUNKS:
        check_message(c, &c.policy.framing, data)
    if not may_queue(m, c):
        return 0
    if kind != CHUNKS:
        push_framed(m, c, &c.policy.framing, data)
    elif PyBytes_GET_SIZE(data):
        push(m, c, data)
    return queued(m, c)

cdef inline bint may_queue(CompiledCore m, Connection c) except -1:
    """Whether one more message is accepted; if not, the drop is counted or overflow() called."""
    if c.flags & REFUSES_OUTPUT:
        count_drop(m)
        return False
    if held(c) >= c.policy.max_outbox:
        overflow(m, c)
        return False
    return True

# What other threads have sent is one word, so that its bytes (40 bits) and the entries of the queue that they are in
# (24 bits) change together.

cdef inline uint64_t foreign_word(size_t size) noexcept:
    """One entry of so many bytes."""
    return <uint64_t>1 << 40 | size

cdef inline size_t foreign_bytes(Connection c) noexcept:
    return load_count(&c.foreign) & ((<uint64_t>1 << 40) - 1)

cdef inline size_t foreign_entries(Connection c) noexcept:
    return load_count(&c.foreign) >> 40

cdef inline size_t held(Connection c) noexcept:
    """Bytes of memory that the outbox uses, without the chunks' heads. For another thread: in a critical section, and
    what is in the chain may be as much as it was before the last send(2), or will be after it."""
    cdef size_t ours = seen_outbox(c) - c.file_bytes
    return ours + foreign_bytes(c) + foreign_entries(c) * FOREIGN_COST if load_count(&c.foreign) else ours

cdef inline int queued(CompiledCore m, Connection c) except -1:
    """Schedule the flush of new output. Returns 1 below the high-water mark, else 0."""
    m.n.messages_out += 1
    if c.outbox_bytes > c.policy.high:
        return above_high(m, c)
    if m.in_handler != <PyObject*>c and c.out_head != NULL and not c.flags & F_BLOCKED:
        if m.flush_at_once and not m.batches and not m.in_turn and not c.flags & NOTHING_GOES:
            begin_stall(m)
            send_out(m, c)
        else:
            schedule(m, c)
    return not c.flags & F_ABOVE_HIGH

cdef int above_high(CompiledCore m, Connection c) except -1:
    begin_stall(m)
    send_out(m, c)
    if c.outbox_bytes <= c.policy.high:
        return not c.flags & F_ABOVE_HIGH
    if not c.flags & F_ABOVE_HIGH:
        c.flags = (c.flags | F_ABOVE_HIGH) & ~F_DRAIN_OWED
        m.n.high_water_hits += 1
        schedule(m, c)
    return 0

cdef int overflow(CompiledCore m, Connection c, bint of_files=False) except -1:
    """The outbox is full: do what the policy says."""
    cdef Policy policy = policy_of(c)
    cdef size_t limit = policy.max_outbox
    cdef size_t size
    if policy.overflow == OVERFLOW_DROP or c.close_asked:
        count_drop(m)
        return 0
    with cython.critical_section(c):
        size = held(c)
    if of_files:
        limit = _file.FILES_KEPT
        error = OutboxFull(f"outbox holds {limit} parts of files, the most it may", conn=c, limit=limit)
    else:
        error = OutboxFull(f"outbox holds {size} bytes, max_outbox is {limit}", conn=c, limit=limit)
    if policy.overflow == OVERFLOW_RAISE:
        raise error
    count_drop(m)
    if on_other_thread(m):
        call_foreign(m, OP_OVERFLOW, c, error)
        c.close_asked = True  # the next send is refused without another error, which would need memory, too
    else:
        abort_for(m, c, error)
    return 0

cdef int enqueue_file(CompiledCore m, Connection c, int fd, int64_t offset, size_t size) except -1:
    """Accept or refuse a part of a file, whose descriptor stays its user's."""
    cdef Chunk* chunk
    cdef int own
    if not may_queue(m, c):
        return 0
    if c.file_bytes and chunk_files(c.out_head) >= <size_t>_file.FILES_KEPT:
        return overflow(m, c, True)
    own = sys_dup(fd)
    if own < 0:
        raise os_error(own)
    chunk = chunk_file(own, offset, size)
    if chunk == NULL:
        sys_close(own)
        raise MemoryError()
    link_chunk(c, chunk)
    with cython.critical_section(c):  # for held()
        c.outbox_bytes += size
        c.file_bytes += size
    return queued(m, c)

cdef int enqueue_from_any_thread(CompiledCore m, Connection c, object message, bint raw) except -1:
    """Accept or refuse one message outside of the Mux's thread, or before it has one."""
    cdef object data = as_bytes(message) if raw else encoded(c, message)
    if data is None:
        count_drop(m)
        return 0
    if not on_other_thread(m):
        with cython.critical_section(m):  # see bind()
            if not on_other_thread(m):
                return enqueue(m, c, data, True)
    return enqueue_foreign(m, c, data)

cdef int enqueue_foreign(CompiledCore m, Connection c, object data) except -1:
    """Accept or refuse bytes from another thread. They are counted at once, and queued for the Mux's thread."""
    cdef size_t size = PyBytes_GET_SIZE(data)
    cdef bint refused, full, above = False
    with cython.critical_section(c):  # as in advance_close()
        refused = c.close_asked or seen_flags(c) & REFUSES_OUTPUT
        full = held(c) >= c.policy.max_outbox or foreign_entries(c) >= FOREIGN_MOST
        if not refused and not full:
            add_count(&c.foreign, foreign_word(size))
            above = seen_outbox(c) + foreign_bytes(c) > c.policy.high
    if refused:
        count_drop(m)
        return 0
    if full:
        return overflow(m, c)
    try:
        call_foreign(m, OP_SEND_ABOVE if above else OP_SEND, c, data)
    except MemoryError:  # it is not in the queue; wake() needs no memory
        add_count(&c.foreign, -foreign_word(size))
        raise
    return not above

cdef int offer_shared(CompiledCore m, Connection c, object data) except -1:
    """Accept or refuse an encoded message that many connections get: 1 if it is accepted."""
    cdef size_t size = PyBytes_GET_SIZE(data)
    if not may_queue(m, c):
        return 0
    # A block of their own for each of 10,000 would be 40 MB to write through; but many small references would cost
    # more memory than the messages.
    if c.out_head == NULL and size:
        push_reference(c, data)
    elif size:
        push(m, c, data)
    queued(m, c)
    return 1


cdef object broadcast(CompiledCore m, list connections, object message):
    """Send one message to all of them; how many accepted it."""
    cdef Connection c
    cdef Policy policy = None
    cdef dict by_framer = {}
    cdef Py_ssize_t accepted = 0
    for conn in connections:  # nothing is sent unless it can be sent to all of them
        if type(conn) is not Connection:
            raise TypeError(f"connections must be an iterable of connections, not of {type(conn).__name__}")
        c = <Connection>conn
        if c.mux is not m:
            raise ValueError(f"connections must be connections of this Mux, not {conn!r}")
        if c.policy is not policy:
            policy = c.policy
            if policy.framing.kind != CUSTOM and policy.framer not in by_framer:
                by_framer[policy.framer] = encode(policy.framer, message)
    failure = policy = None
    for conn in connections:
        c = <Connection>conn
        if is_newcomer(c):
            continue
        try:
            if c.policy is not policy:
                policy = c.policy
                data = by_framer.get(policy.framer) if policy.framing.kind != CUSTOM else None
                if data is None:  # a user's own framer; or what was called on the way has set another one
                    policy = None
                    data = encoded(c, message)
            if data is None:
                count_drop(m)
            else:
                accepted += offer_shared(m, c, data)
        except Exception as error:
            failure = error if failure is None else failure
    if failure is not None:
        raise failure
    return accepted


cdef inline bint is_newcomer(Connection c) noexcept:
    """Whether it was accepted, and its handshake is not done: a broadcast is not for it."""
    return c.flags & (F_HANDSHAKE | F_OPENED) == F_HANDSHAKE and c.policy.listener is not None


# --- framing ---------------------------------------------------------------------------------------

cdef object encoded(Connection c, object message):
    """A message as it goes onto the wire, or None if its framer is not there: it could not be made, or the connection
    has ended. For any thread."""
    cdef Policy policy = None, before
    reader = None
    while reader is None:  # another framer may be set as this looks for the last reader
        before = policy
        with cython.critical_section(c):
            policy, reader = c.policy, c.reader
        if policy is before:
            return None
        if policy.framing.kind != CUSTOM:
            return encode(policy.framer, message)
        while reader is not None and reader.left:
            reader = reader.behind
    return reader.encode(message)

cdef inline int check_message(Connection c, Framing* g, object data) except -1:
    """ValueError for a message that the peer could not read as one."""
    cdef const char* start = PyBytes_AS_STRING(data)
    cdef size_t size = PyBytes_GET_SIZE(data)
    if g.kind == FIXED:
        if size != g.size:
            encode(c.policy.framer, data)  # raises
    elif size > g.max_sent:
        raise message_too_large(c.policy.framer, size)
    elif g.kind == LINES:
        if memchr(start, c'\n', size) != NULL:
            raise delimiter_inside(b"\n")
    elif g.kind == DELIMITED:
        if frame_delimiter_within(g, start, size):
            raise delimiter_inside(c.policy.framer.delimiter)
    return 0

cdef inline int push_framed(CompiledCore m, Connection c, Framing* g, object data) except -1:
    cdef char header[MAX_HEADER]
    if g.kind == LINES:
        return push_between(m, c, NULL, 0, data, b"\n", 1)
    if g.kind == DELIMITED:
        return push_between(m, c, NULL, 0, data, g.delimiter, g.size)
    if g.kind == PREFIXED:
        return push_between(m, c, header, put_length(g, PyBytes_GET_SIZE(data), header), data, NULL, 0)
    return push(m, c, data)

cdef int enqueue_object(CompiledCore m, Connection c, object message, FramerKind kind, bint raw) except -1:
    """As enqueue(), for a message that is not bytes, or with a framer that accepts other types."""
    if kind < RESP:
        return enqueue(m, c, as_bytes(message), raw)  # which may have run anything: a look at the framer again
    if kind == RESP:
        return enqueue_reply(m, c, message)
    data = encoded(c, message)
    if data is None:
        count_drop(m)
        return 0
    return enqueue_bytes(m, c, data, CHUNKS)

cdef int enqueue_reply(CompiledCore m, Connection c, object message) except -1:
    """As enqueue(), for RESP."""
    cdef char small[SMALL_REPLY]
    cdef size_t size
    if PyBytes_CheckExact(message):
        if not may_queue(m, c):
            return 0
        size = put_number(c'$', PyBytes_GET_SIZE(message), small)
        push_between(m, c, small, size, message, b"\r\n", 2)
        return queued(m, c)
    size = small_reply(message, small)
    if size == 0:
        return enqueue_written(m, c, message)
    if not may_queue(m, c):
        return 0
    push_piece(m, c, small, size)
    return queued(m, c)

cdef int enqueue_written(CompiledCore m, Connection c, object message) except -1:
    """A reply that is put together first. A part of it may call anything (an error's __str__, say), which may send
    replies, too: so the text is removed from the Mux meanwhile."""
    cdef Text text = m.text
    m.text.data = NULL
    m.text.room = 0
    text.size = 0
    try:
        write_reply(&text, message)
        if not may_queue(m, c):
            return 0
        if text.size < SMALL_PIECE:
            push_piece(m, c, text.data, text.size)
        else:
            push_reference(c, PyBytes_FromStringAndSize(text.data, text.size))
    finally:
        if m.text.data == NULL and text.room <= TEXT_KEPT:
            m.text = text
        else:
            free(text.data)
    return queued(m, c)

cdef inline size_t small_reply(object value, char* to) except? 0:
    """Write None, an int or a short str as a reply of RESP2; how many bytes, 0 if it is something else."""
    cdef int too_large = 0
    cdef long long number
    cdef Py_ssize_t size, i
    cdef const char* text
    if value is None:
        memcpy(to, b"$-1\r\n", 5)
        return 5
    if PyLong_CheckExact(value):
        number = PyLong_AsLongLongAndOverflow(value, &too_large)
        return 0 if too_large else put_number(c':', number, to)
    if not PyUnicode_CheckExact(value) or not PyUnicode_IS_COMPACT_ASCII(value):
        return 0
    text, size = <const char*>PyUnicode_1BYTE_DATA(value), PyUnicode_GET_LENGTH(value)
    if size > SMALL_REPLY - 3:
        return 0
    to[0] = c'+'
    for i in range(size):
        if text[i] == c'\r' or text[i] == c'\n':
            return 0
        to[1 + i] = text[i]
    to[1 + size], to[2 + size] = c'\r', c'\n'
    return size + 3

cdef int write_text(Text* text, const char* data, size_t size) except -1:
    cdef size_t room
    cdef char* larger
    if text.room - text.size < size:
        room = 2 * (text.size + size)
        larger = <char*>realloc(text.data, room)
        if larger == NULL:
            raise MemoryError()
        text.data = larger
        text.room = room
    memcpy(text.data + text.size, data, size)
    text.size += size
    return 0

cdef inline int write_header(Text* text, char sign, long long number) except -1:
    cdef char header[MAX_HEADER]
    return write_text(text, header, put_number(sign, number, header))

cdef int write_reply(Text* text, object value) except -1:
    """Write a value as a reply of RESP2; _frame.encode_reply does the same."""
    cdef char small[SMALL_REPLY]
    cdef size_t size
    if isinstance(value, (list, tuple)):
        return write_array(text, tuple(value))  # of its own: nothing that is called on the way can change it
    size = small_reply(value, small)
    if size:
        return write_text(text, small, size)
    if not PyBytes_CheckExact(value):
        value = encode(RESP_FRAMER, value)
        return write_text(text, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
    write_header(text, c'$', PyBytes_GET_SIZE(value))
    write_text(text, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
    return write_text(text, b"\r\n", 2)

cdef int write_array(Text* text, tuple items) except -1:
    if is_too_deep(b" in a reply"):
        raised()
    try:
        write_header(text, c'*', len(items))
        for item in items:
            write_reply(text, item)
    finally:
        Py_LeaveRecursiveCall()
    return 0
