# What may live here: the wire of a connection, which stands between its socket and its framer. (_wire.py says what a
# wire is.)
#
# The outbox of such a connection begins with bytes that are for the socket as they are (`ready` of them); plaintext
# follows. So a wire needs no queue of its own, and what it makes of the plaintext is counted like anything else.

cdef enum:
    GATHERED = 1 << 16      # bytes of small pieces of the outbox that a wire gets at once
    LARGE_PIECE = 1 << 14   # a piece that it gets without a copy, as ...
    LARGEST_GIVEN = 1 << 18  # ... so many bytes at once
    WARY_READ = 4096        # bytes of a read if the last one was fruitless: a change of keys has 27, and costs 10 us

# A handshake takes a millisecond of the processor, and hundreds may begin at once: those of one turn take so long.
cdef int64_t HANDSHAKES_NS = 1_000_000


# --- how it begins ---------------------------------------------------------------------------------

cdef int make_wire(CompiledCore m, Connection c) except -1:
    """A new connection begins with a handshake; F_HANDSHAKE is set since it was made."""
    failure = wire = None
    schedule(m, c)
    try:
        wire = c.policy.wiring.make(c.peer)
    except Exception as error:
        failure = error
    check_fork(m)
    if c.flags & (F_WIRE | F_ENDED):
        return 0
    if failure is None:
        return begin_wire(m, c, wire, False)
    return abort_for(m, c, failure)

cdef int begin_wire(CompiledCore m, Connection c, object wire, bint in_the_stream) except -1:
    """From now on the socket's bytes are the wire's: those that were received already, and not delivered, too.
    in_the_stream: what is queued already goes out as it is."""
    cdef Wired wired = Wired()
    cdef list received = wire.received
    former = None
    if c.reader is not None:
        former = change_framer(m, c, c.policy.framer)  # which moves what a user's framer holds into the inbox
    check_fork(m)
    if c.flags & (F_ENDED | F_WIRE):
        return 0
    if c.inbox != NULL:
        received.append(inbox_bytes(c))
    wired.wire, wired.due = wire, wire.speaks_first or PyList_GET_SIZE(received) != 0
    wired.proxy = None if c.wired is None else c.wired.proxy
    if in_the_stream and c.out_head != NULL:
        wired.ready = c.outbox_bytes
        c.out_head.last.room = 0  # what is queued from now on is plaintext
    c.wired = wired
    c.flags = (c.flags | F_WIRE | F_HANDSHAKE) & ~F_WIRE_SHUT
    discard_inbox(m, c)
    schedule(m, c)
    if former is not None:
        former[0].forget()  # may run finalizers
    return 0

cdef int queue_handshake(CompiledCore m, Connection c) except -1:
    if not c.flags & F_HANDSHAKING:
        m.handshakes.append(c)
        c.flags |= F_HANDSHAKING
    return 0

cdef int run_handshakes(CompiledCore m) except -1:
    """The next step of some that are not open yet."""
    cdef Connection c
    cdef int64_t end = sys_clock_ns(CLOCK_MONOTONIC) + HANDSHAKES_NS
    for _ in range(len(m.handshakes)):
        c = <Connection>m.handshakes.popleft()
        c.flags &= ~F_HANDSHAKING
        if c.flags & (F_WIRE | F_ENDED) == F_WIRE:
            run_wire(m, c)
        if m.close_requested or sys_clock_ns(CLOCK_MONOTONIC) > end:
            break
    return 0

cdef int run_pending_handshake(CompiledCore m, Connection c) except -1:
    """As run_pending(), before the wire is open: only the end can come."""
    cdef int64_t limit
    if not c.flags & (F_WIRE | F_ENDED):
        make_wire(m, c)
    if c.flags & F_WIRE and c.wired.due:
        queue_handshake(m, c)
    limit = handshake_limit(c)
    if c.deadline is None and limit and (not c.flags & (F_CLOSING | F_ENDED) or c.out_head != NULL):
        set_handshake_due(m, c, m.now_ns + limit)
    send_out(m, c)
    if c.flags & (F_PEER_GONE | F_ENDED) == F_PEER_GONE:
        read_what_is_left(m, c)
    if not c.flags & F_ENDED:
        advance_close(m, c)
    return finish(m, c) if c.flags & F_ENDED else apply_interest(m, c)

cdef int64_t handshake_limit(Connection c) except -1:
    cdef int64_t own
    if not c.flags & F_WIRE:
        return c.policy.handshake_ns
    own = c.wired.wire.limit_ns
    return min(c.policy.handshake_ns, own) if c.policy.handshake_ns and own else c.policy.handshake_ns + own

cdef int set_handshake_due(CompiledCore m, Connection c, int64_t due) except -1:
    c.deadline = add_timer(m, due, _handshake_due, (c, due))
    return 0

def _handshake_due(Connection c, int64_t due):
    cdef CompiledCore m = c.mux
    c.deadline = None
    if c.flags & (F_ENDED | F_HANDSHAKE) != F_HANDSHAKE:
        schedule(m, c)
        return
    if not has_judged(m, due):
        set_handshake_due(m, c, due)
        return
    limit = handshake_limit(c) / 1e9
    step = Wire.step if not c.flags & F_WIRE else c.wired.wire.step
    m.n.timeouts += 1
    abort_for(m, c, HandshakeTimeout(f"the {step} took longer than {limit:g} s", conn=c, limit=limit))

cdef int set_open(CompiledCore m, Connection c) except -1:
    """The wire is open, and so is the connection."""
    c.received_ns = m.now_ns
    schedule(m, c)
    drop_deadline(c)
    if not c.policy.outbound:
        sys_acknowledge(c.fd)
    c.flags &= ~F_HANDSHAKE
    return 0


# --- input -----------------------------------------------------------------------------------------

cdef int read_wire(CompiledCore m, Connection c, uint32_t events) except -1:
    """As read_turn()."""
    cdef Py_ssize_t budget = 0 if c.policy.pull or c.flags & F_HANDSHAKE else m.read_budget
    cdef Py_ssize_t room
    cdef ssize_t r
    cdef char* target
    cdef bint ours = is_direct(c, c.wired)
    cdef Wired wired
    cdef size_t before
    if c.flags & F_HANDSHAKING or c.flags & (F_WIRE | F_ENDED) != F_WIRE:
        return 0  # the former: what came before goes first
    while True:
        wired = c.wired
        if ours:
            target, room = records(m), m.read_size
        else:
            if m.scratch == NULL:
                m.scratch = make_bytes(NULL, m.read_size)
                if m.scratch == NULL:
                    raised()
            target, room = bytes_data(m.scratch), bytes_size(m.scratch)
        if not wired.fruitful:
            room = min(room, WARY_READ)
        before = wired.plain
        m.n.recv_calls += 1
        r = sys_recv(c.fd, target, room)
        if r <= 0:
            return read_ended(m, c, r, events)
        m.n.bytes_in += r
        c.heard_ns = m.now_ns
        if not discards_input(c):
            decrypt(m, c, r) if ours else give_wire(m, c, r)
        wired.fruitful = 2 * (wired.plain - before) >= <size_t>r
        look_at_clock(m)  # it may have taken long, whatever came of it
        budget -= r
        if budget > 0 and r == room:
            send_out(m, c)  # which may pause or end it
        if not may_read(c) or m.close_requested or not c.flags & F_WIRE:
            return schedule(m, c)
        if budget <= 0 or (r < room and not events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) or tick(m):
            return 0

cdef inline bint discards_input(Connection c) noexcept:
    """Whether input is dropped: behind the end of the stream, and while closing, unless output waits for the
    handshake."""
    if c.flags & F_EOF or c.flags & (F_CLOSING | F_WIRE_SHUT) == F_CLOSING | F_WIRE_SHUT:
        return True
    return c.flags & F_CLOSING and not (c.flags & F_HANDSHAKE and c.out_head != NULL)

cdef int give_wire(CompiledCore m, Connection c, Py_ssize_t size) except -1:
    """What recv has just read."""
    cdef list received = c.wired.wire.received
    cdef PyObject* new = take_scratch(m, &m.scratch, size)
    if new == NULL:
        return no_memory_for_input(m, c)
    data = <object>new
    DECREF(new)
    if append_or_fail(received, data) < 0:
        return no_memory_for_input(m, c)
    c.wired.due = True
    return queue_handshake(m, c) if c.flags & F_HANDSHAKE else run_wire(m, c)

cdef int run_wire(CompiledCore m, Connection c) except -1:
    """Let the wire work through what was received, and go on with what it makes of it."""
    cdef Wired wired = c.wired
    if wired.busy or not wired.due:
        return 0
    if wired.failure is None:
        wired.busy = True
        try:
            wired.wire.advance()
        except Exception as error:
            check_is_its_own(wired.wire, error)
            keep_failure(m, c, wired, error)
        finally:
            wired.busy = False
        check_fork(m)
        if c.flags & F_ENDED or c.wired is not wired:
            return 0
    return go_on(m, c, wired)

cdef int keep_failure(CompiledCore m, Connection c, Wired wired, object error) except -1:
    """Before anything else: an interrupt, or no memory again, leaves the rest to run_pending()."""
    wired.failure = error
    schedule(m, c)
    without_frames(error)
    return 0

cdef int go_on(CompiledCore m, Connection c, Wired wired) except -1:
    """The wire has worked, and may have failed in the end. It stays due until all that came of it is dealt with: an
    interrupt may come, or memory be out."""
    wire = wired.wire
    take_output(c, wired)
    if wire.proxy is not None:
        set_proxy(c, wired, wire.proxy)
    if wire.opened and c.flags & F_HANDSHAKE:
        set_open(m, c)  # then on_open may come
    if c.flags & F_HANDSHAKE and wired.failure is not None:
        return handshake_failed(m, c, wired)
    if wire.over:
        replace_wire(m, c, wired)
        if wired.wire is not None:
            return 0
    elif not c.flags & (F_OPENED | F_HANDSHAKE):
        return schedule(m, c)  # on_open goes first
    if wire.plain:
        keep_plain(m, c, wire.plain)
    if c.flags & (F_ENDED | F_WIRE) != F_WIRE or c.wired is not wired:
        return 0
    if wired.failure is not None:
        return stream_failed(m, c, wired)
    if wire.ended and not c.flags & F_EOF:
        c.flags |= F_FIN_UNREAD
        set_eof(m, c)
    wired.due = False
    flush_wire(m, c)
    return look_at_bounds(m, c)

cdef int look_at_bounds(CompiledCore m, Connection c) except -1:
    """What a wire sends for itself (replies to changes of keys, say) counts as any output: a peer that causes it and
    reads nothing is not read from any more, and is given up in the end."""
    if c.outbox_bytes <= c.policy.high or c.flags & (F_CLOSING | F_ENDED):
        return 0
    if held(c) >= c.policy.max_outbox + c.policy.high:
        limit = c.policy.max_outbox
        return abort_for(m, c, OutboxFull(f"outbox holds {held(c)} bytes, max_outbox is {limit}", conn=c, limit=limit))
    if not c.flags & F_ABOVE_HIGH:
        c.flags = (c.flags | F_ABOVE_HIGH) & ~F_DRAIN_OWED
        m.n.high_water_hits += 1
        schedule(m, c)
    return 0

cdef int set_proxy(Connection c, Wired wired, object proxy) except -1:
    source = proxy.source
    wired.proxy = proxy
    if source is not None:
        with cython.critical_section(c):  # other threads may be reading it
            c.peer_tuple = source
    return 0

cdef int replace_wire(CompiledCore m, Connection c, Wired wired) except -1:
    """A wire that had only the beginning of the stream to do with is done: the next one follows, or none."""
    drop_deadline(c)  # the successor has its own
    wired.wire = wired.wire.successor
    if wired.wire is None:
        c.flags &= ~F_WIRE
    else:
        queue_handshake(m, c)
    return schedule(m, c)

cdef int keep_plain(CompiledCore m, Connection c, list plain) except -1:
    """Add what the wire has decrypted to the inbox, and deliver complete messages (pull style: report them)."""
    try:
        if PyList_GET_SIZE(plain) > 1:
            joined = [b"".join(plain)]
            PyList_SetSlice(plain, 0, PyList_GET_SIZE(plain), <PyObject*>joined)
        while plain and not c.flags & (F_CLOSING | F_ENDED):
            add_plain(m, c, plain[0])
            PyList_SetSlice(plain, 0, 1, NULL)
    except MemoryError as error:
        return input_failed(m, c, error)  # the stream has a hole now
    plain.clear()
    if not c.flags & F_OPENED:
        return schedule(m, c)  # of a PROXY header: run_pending() goes on
    if c.policy.pull:
        return report_message(m, c)
    deliver_messages(m, c)
    return shrink_inbox(m, c)

cdef int add_plain(CompiledCore m, Connection c, bytes data) except -1:
    cdef size_t size = PyBytes_GET_SIZE(data)
    if size == 0:
        return 0
    c.wired.plain += size
    if c.inbox == NULL:
        return set_inbox(m, c, data)
    grow_inbox(m, c, size)
    memcpy(<char*>c.inbox.data + c.inbox.size, PyBytes_AS_STRING(data), size)
    c.inbox.size += size
    c.inbox.room -= size
    c.inbox.frame.whole = 0
    return 0

cdef int shrink_inbox(CompiledCore m, Connection c) except -1:
    """A small unfinished message does not keep the object that it came in."""
    cdef Inbox* inbox = c.inbox
    cdef Inbox* small
    if inbox == NULL or inbox.owner == NULL or 2 * inbox.size > <size_t>PyBytes_GET_SIZE(<object>inbox.owner):
        return 0
    small = inbox_copy(inbox, 0)
    if small != NULL:
        c.inbox = small
        free_inbox(m, inbox)
    return 0

cdef int wire_eof(CompiledCore m, Connection c) except -1:
    """The peer's FIN was read."""
    cdef Wired wired = c.wired
    c.flags &= ~F_FIN_UNREAD
    if c.flags & F_EOF or c.flags & (F_CLOSING | F_HANDSHAKE) == F_CLOSING:
        return set_eof(m, c)
    try:
        wired.failure = wired.wire.eof()
    except Exception as error:
        check_is_its_own(wired.wire, error)
        keep_failure(m, c, wired, error)
    check_fork(m)
    if c.flags & F_ENDED or c.wired is not wired:
        return 0
    if c.flags & F_HANDSHAKE:
        c.flags |= F_EOF
        return handshake_failed(m, c, wired)
    if wired.failure is not None:
        keep_error(c, wired.failure)
    return set_eof(m, c)

cdef int handshake_failed(CompiledCore m, Connection c, Wired wired) except -1:
    """It was never open. The wire may have a last word for the peer; plaintext is not sent."""
    c.flags |= F_WIRE_SHUT
    keep_error(c, wired.failure)
    discard_plaintext(m, c)
    close_connection(m, c)
    schedule(m, c)
    wired.due = False
    about(wired.failure, c)
    return flush_wire(m, c)

cdef int stream_failed(CompiledCore m, Connection c, Wired wired) except -1:
    """The wire cannot go on: the stream has ended here, in both directions. What came before is delivered first."""
    c.flags |= F_WIRE_SHUT | F_WRITE_EOF
    keep_error(c, wired.failure)
    discard_plaintext(m, c)
    if not c.flags & F_EOF:
        c.flags |= F_FIN_UNREAD
        set_eof(m, c)
    schedule(m, c)
    wired.due = False
    about(wired.failure, c)
    return flush_wire(m, c)


# --- output ----------------------------------------------------------------------------------------

cdef int flush_wire(CompiledCore m, Connection c) except -1:
    """As flush(); and like a file, a long output leaves the others their turn."""
    cdef uint64_t enough = m.n.bytes_out + FILE_BURST
    cdef bint direct
    while c.flags & F_WIRE and not c.flags & NOTHING_GOES:
        direct = is_direct(c, c.wired)  # may run signal handlers, which may do the same
        if c.flags & NOTHING_GOES or not c.flags & F_WIRE:
            break
        if c.wired.ready == 0 and direct:
            if not encrypt_and_send(m, c, c.wired):
                break
        elif (c.wired.ready == 0 and not encrypt_more(m, c)) or not send_ready(m, c):
            break
        if m.n.bytes_out > enough and c.out_head != NULL:
            wait_writable(m, c)
    return look_for_drain(m, c)

cdef bint send_ready(CompiledCore m, Connection c) except -1:
    """Send the first chunk; whether all of it went, else this flush is over."""
    cdef Chunk* chunk = c.out_head
    cdef size_t wanted = chunk.size
    cdef ssize_t r
    if chunk.data == NULL:
        return flush_file(m, c)
    m.n.send_calls += 1
    r = sys_send(c.fd, chunk.data, wanted)
    if r < 0:
        send_failed(m, c, r)
        return False
    m.n.bytes_out += r
    c.wrote_ns = m.now_ns
    c.wired.ready -= r
    consume(m, c, r)
    if <size_t>r < wanted:
        wait_writable(m, c)
        return False
    return True

cdef bint encrypt_more(CompiledCore m, Connection c) except -1:
    """Let the wire work on plaintext of the outbox; whether there is something for the socket now."""
    cdef Wired wired = c.wired
    failure = None
    wire = wired.wire
    if wired.busy:
        return False
    if (c.out_head == NULL or c.flags & (F_HANDSHAKE | F_WIRE_SHUT) or wire.over
            or (wired.due and wired.failure is not None)):
        take_output(c, wired)  # there is some if memory was out before
        return wired.ready != 0
    if wired.given == 0 and not give_plaintext(m, c, wired):  # else an interrupt came amid this
        return False
    wired.busy = True
    try:
        wire.encrypt()
    except Exception as error:
        check_is_its_own(wire, error)
        failure = without_frames(error)
    finally:
        wired.busy = False
    check_fork(m)
    if c.flags & F_ENDED or c.wired is not wired:
        return False
    if failure is None:
        consume_plaintext(m, c, wired.given)
    wired.given = 0
    take_output(c, wired)
    if failure is not None:
        wired.failure = failure
        stream_failed(m, c, wired)
    return wired.ready != 0

cdef bint give_plaintext(CompiledCore m, Connection c, Wired wired) except -1:
    """Whether there is some. A memoryview may start the collector, and with it anything but another encryption."""
    cdef size_t size = 0
    wired.busy = True
    try:
        data = gathered(m, c, &size)
    finally:
        wired.busy = False
    check_fork(m)
    if size == 0 or c.flags & (F_ENDED | F_WIRE_SHUT) or c.wired is not wired:
        return False
    wired.wire.given = data
    wired.given = size
    return True

cdef object gathered(CompiledCore m, Connection c, size_t* size):
    """Plaintext from the front of the outbox: a large piece, a part of a file, or small pieces together."""
    cdef Chunk* chunk = c.out_head
    cdef size_t total = 0
    if chunk.data == NULL:
        return read_file(m, c, <FileChunk*>chunk, size)
    if chunk.owner != NULL and chunk.size >= LARGE_PIECE:
        return large_piece(chunk, size)
    while chunk != NULL and chunk.data != NULL and total < GATHERED:
        total += chunk.size
        chunk = chunk.next
    size[0] = total = min(total, <size_t>GATHERED)
    data = PyBytes_FromStringAndSize(NULL, total)
    copy_chunks(c.out_head, <char*>PyBytes_AS_STRING(data), total)
    return data

cdef inline void copy_chunks(const Chunk* chunk, char* to, size_t total) noexcept:
    cdef size_t size
    while total:
        size = min(total, chunk.size)
        memcpy(to, chunk.data, size)
        to += size
        total -= size
        chunk = chunk.next

cdef object large_piece(Chunk* chunk, size_t* size):
    owner = <object>chunk.owner
    cdef Py_ssize_t start = chunk.data - PyBytes_AS_STRING(owner)
    size[0] = min(chunk.size, <size_t>LARGEST_GIVEN)
    return memoryview(owner)[start:start + <Py_ssize_t>size[0]]

cdef object read_file(CompiledCore m, Connection c, FileChunk* part, size_t* size):
    """A part of a file is read and encrypted bit by bit."""
    cdef ssize_t r
    data = PyBytes_FromStringAndSize(NULL, min(part.chunk.size, <size_t>GATHERED))
    r = sys_pread(part.fd, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), part.offset)
    if r < 0:
        abort_for(m, c, os_error(r))
        return None
    if r == 0:
        abort_for(m, c, OSError(f"sendfile: the file ended {part.chunk.size} bytes before the end of the queued part"))
        return None
    size[0] = r
    return data if r == PyBytes_GET_SIZE(data) else data[:r]

cdef int consume_plaintext(CompiledCore m, Connection c, size_t size) except -1:
    cdef Chunk* chunk = c.out_head
    if chunk.data != NULL:
        consume(m, c, size)
        return 0
    (<FileChunk*>chunk).offset += size
    with cython.critical_section(c):  # for held()
        c.outbox_bytes -= size
        c.file_bytes -= size
    chunk.size -= size
    if chunk.size == 0:
        drop_chunk(m, c)
    return 0

cdef int take_output(Connection c, Wired wired) except -1:
    """Put what the wire has for the socket behind what is ready, in front of the plaintext. Behind the end of our side
    nothing is sent: a reply to a change of keys, say, is dropped."""
    cdef list output = wired.wire.output
    if c.flags & F_WIRE_SHUT:
        output.clear()
    while output:
        if PyBytes_GET_SIZE(output[0]):
            insert_ready(c, wired, output[0])
        PyList_SetSlice(output, 0, 1, NULL)
    return 0

cdef int insert_ready(Connection c, Wired wired, bytes data) except -1:
    cdef Chunk* chunk = make_reference(data)
    cdef Chunk* before = last_ready(c, wired)
    if before == NULL:
        chunk.next = c.out_head
        chunk.last = chunk if c.out_head == NULL else c.out_head.last
        c.out_head = chunk
    else:
        chunk.next = before.next
        before.next = chunk
        if chunk.next == NULL:
            c.out_head.last = chunk
    wired.ready += chunk.size
    c.outbox_bytes += chunk.size
    return 0

cdef inline Chunk* last_ready(Connection c, Wired wired) noexcept:
    """The last chunk that is ready; NULL if none is."""
    cdef Chunk* chunk = c.out_head
    cdef size_t size
    if wired.ready == 0:
        return NULL
    size = chunk.size
    while size < wired.ready:
        chunk = chunk.next
        size += chunk.size
    return chunk

cdef int discard_plaintext(CompiledCore m, Connection c) except -1:
    """What can be encrypted no more."""
    cdef Chunk* before = last_ready(c, c.wired)
    cdef Chunk* chunk = c.out_head if before == NULL else before.next
    cdef Chunk* following
    cdef size_t size = 0, files = 0
    if chunk == NULL:
        return 0
    if before == NULL:
        c.out_head = NULL
    else:
        before.next = NULL
        c.out_head.last = before
    m.n.unsent += 1
    while chunk != NULL:
        following = chunk.next
        size += chunk.size
        files += chunk.size if chunk.data == NULL else 0
        release_chunk(m, chunk)
        chunk = following
    with cython.critical_section(c):  # for held()
        c.outbox_bytes -= size
        c.file_bytes -= files
    return 0


# --- the end ---------------------------------------------------------------------------------------

cdef int shut_wire(CompiledCore m, Connection c) except -1:
    """All is sent: let the wire end our side of the stream, before the socket does."""
    cdef Wired wired = c.wired
    try:
        finish_directly(c, wired) if wired.ssl != NULL else wired.wire.finish()
    except Exception as error:
        check_is_its_own(wired.wire, error)
        without_frames(error)  # the peer will see a stream without an end
    check_fork(m)
    if c.flags & F_ENDED or c.wired is not wired:
        return 0
    take_output(c, wired)
    c.flags |= F_WIRE_SHUT
    return schedule(m, c)

cdef int forget_wire(Connection c) except -1:
    c.flags &= ~F_WIRE
    wired = c.wired
    if wired.proxy is None:
        c.wired = None
    wired.wire = wired.owner = None
    wired.ssl = NULL
    return 0
