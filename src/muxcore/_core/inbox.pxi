# What may live here: what a connection receives: reading, framing, and handing out messages.
#
# Where there is no framer, recv fills a bytes object that becomes the message. Where there is one, it fills a window
# that all connections share, behind the unfinished message that the connection may have; complete ones are cut out of
# it, and what is left is copied into memory of the connection's own. So nothing is scanned or copied twice but the ends
# of reads, and an idle connection has no buffer. Only a long unfinished message grows in its own memory.

cdef enum:
    WINDOW_HEAD = 4096      # bytes of an unfinished message that are put in front of the next read
    GROWTH = 4096           # room that a longer one gets at least
    LARGE_READS = 4         # times read_size, after a read that filled the buffer
    SPARED_SIZE = 512       # messages below this are used again: CompiledCore.spares has the sizes, 16 bytes apart

cdef object NO_MESSAGE = _frame.NOTHING


# --- the inbox -------------------------------------------------------------------------------------

cdef inline void free_inbox(CompiledCore m, Inbox* inbox) noexcept:
    if inbox == &m.in_window:
        return
    if inbox.owner != NULL:
        DECREF(<PyObject*>inbox.owner)
    free(inbox)

cdef inline void discard_inbox(CompiledCore m, Connection c) noexcept:
    cdef Inbox* inbox = c.inbox
    if inbox != NULL:
        c.inbox = NULL
        free_inbox(m, inbox)

cdef object inbox_bytes(Connection c):
    """What is in the inbox, which stays as it is."""
    cdef Inbox* inbox = c.inbox
    if inbox == NULL:
        return b""
    if inbox.owner != NULL and <Py_ssize_t>inbox.size == PyBytes_GET_SIZE(<object>inbox.owner):
        return <object>inbox.owner
    return PyBytes_FromStringAndSize(inbox.data, inbox.size)

cdef int set_inbox(CompiledCore m, Connection c, object data) except -1:
    """Put bytes, one at least, into the inbox in place of what is there."""
    cdef Inbox* inbox = inbox_reference(<void*>data, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    if inbox == NULL:
        raise MemoryError()
    Py_INCREF(data)
    discard_inbox(m, c)
    c.inbox = inbox
    return 0

cdef int grow_inbox(CompiledCore m, Connection c, size_t room) except -1:
    """Make room for more behind what is in the inbox."""
    cdef Inbox* inbox = c.inbox
    # If more were moved than was delivered meanwhile, reading a long inbox bit by bit would cost quadratic time.
    if inbox.room < room and 2 * inbox.size <= inbox.total:
        inbox_shift(inbox)
    if inbox.room < room:
        inbox = inbox_copy(c.inbox, max(room, c.inbox.size))
        if inbox == NULL:
            raise MemoryError()
        free_inbox(m, c.inbox)
        c.inbox = inbox
    return 0

cdef int add_to_inbox(CompiledCore m, Connection c, Py_ssize_t size) except -1:
    """Keep what recv has just read into the scratch object."""
    cdef PyObject* data
    if c.inbox == NULL:
        data = take_scratch(m, &m.scratch, size)
        if data == NULL:
            raised()
        try:
            return set_inbox(m, c, <object>data)
        finally:
            DECREF(data)
    grow_inbox(m, c, size)
    memcpy(<char*>c.inbox.data + c.inbox.size, bytes_data(m.scratch), size)
    c.inbox.size += size
    c.inbox.room -= size
    c.inbox.frame.whole = 0
    return 0

cdef inline PyObject* take_scratch(CompiledCore m, PyObject** scratch, Py_ssize_t size) noexcept:
    """What recv has just read, as a bytes object of its own; NULL, with MemoryError raised, when memory is out. A small
    read is copied out; a large one keeps the buffer itself, cut to size, which saves a copy."""
    cdef PyObject* message
    if size < SPARED_SIZE or 2 * size < m.read_size:
        return new_message(m, bytes_data(scratch[0]), size)
    message = scratch[0]
    scratch[0] = NULL
    if size != bytes_size(message):
        _PyBytes_Resize(&message, size)  # sets it to NULL when it fails
    return message


# --- reading ---------------------------------------------------------------------------------------

cdef int read_turn(CompiledCore m, Connection c, uint32_t events) except -1:
    """Read and deliver once, and again while reads fill the buffer, up to the read budget. The kernel reports the
    remaining input at the next wait, since the interest is level-triggered; so no connection starves, and no list of
    ready ones is needed. In pull style there is one read per turn: a second one would be copied behind the first.

    Without a framer, a full read indicates bulk input, so the next read is larger. But an echo of it must not exceed
    the high-water mark by more than read_size."""
    cdef Py_ssize_t budget = 0 if c.policy.pull else m.read_budget
    cdef Py_ssize_t room = m.read_size
    cdef PyObject** scratch = &m.scratch
    cdef ssize_t r
    cdef char* target
    cdef bint more
    if c.flags & (F_PENDING | F_WIRE):
        if waits_for_run_pending(c):
            return 0
        if c.flags & F_WIRE:
            return read_wire(m, c, events)
    while True:
        target = read_target(m, c, scratch, &room)
        m.n.recv_calls += 1
        r = sys_recv(c.fd, target, room)
        if r <= 0:
            return read_ended(m, c, r, events)
        m.n.bytes_in += r
        c.heard_ns = m.now_ns
        if c.flags & F_CLOSING:
            pass  # discarded
        elif c.policy.framing.kind == CHUNKS and not c.policy.pull and c.inbox == NULL:
            deliver_chunk(m, c, scratch, r)
        else:
            keep_input(m, c, target, r)
        budget -= r
        # A short read has emptied the queue, so another recv would return EAGAIN; but behind a FIN or an error it
        # returns the end at once.
        more = (
            budget > 0 and (r == room or events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
            and not waits_for_run_pending(c)
        )
        if more:
            send_out(m, c)  # which may pause or end it
        if not may_read(c) or m.close_requested:
            schedule(m, c)
            return 0
        if not more or tick(m):
            return 0
        room = m.read_size
        scratch = &m.scratch
        if c.policy.framing.kind == CHUNKS and c.inbox == NULL and c.out_head == NULL and budget > room:
            room = min(budget, room + <Py_ssize_t>min(c.policy.high, <size_t>((LARGE_READS - 1) * room)))
            scratch = &m.large_scratch

cdef inline bint waits_for_run_pending(Connection c) noexcept:
    """Whether a turn that lasted too long has left messages, or on_open, which go first."""
    return c.flags & F_PENDING and (
        not c.flags & F_OPENED or ((c.inbox != NULL or c.reader is not None) and not c.policy.pull)
    )

cdef inline bint uses_window(Connection c) noexcept:
    return c.policy.framing.kind != CHUNKS and c.policy.framing.kind != CUSTOM

cdef inline char* read_target(CompiledCore m, Connection c, PyObject** scratch, Py_ssize_t* room) except NULL:
    """The buffer of the next recv. `room`: in, the bytes wanted; out, the bytes that fit."""
    if not uses_window(c):
        if scratch[0] == NULL:
            scratch[0] = make_bytes(NULL, room[0])
            if scratch[0] == NULL:
                raised()
        room[0] = min(room[0], bytes_size(scratch[0]))
        return bytes_data(scratch[0])
    if c.inbox == NULL or c.inbox.size <= WINDOW_HEAD:
        if m.window == NULL:
            m.window = <char*>malloc(WINDOW_HEAD + m.read_size)
            if m.window == NULL:
                raise MemoryError()
        return m.window + WINDOW_HEAD
    grow_inbox(m, c, GROWTH)
    room[0] = min(room[0], <Py_ssize_t>c.inbox.room)
    return <char*>c.inbox.data + c.inbox.size

cdef int keep_input(CompiledCore m, Connection c, char* target, Py_ssize_t size) except -1:
    """Add the bytes that recv has just read to the inbox, and deliver complete messages (pull style: report them)."""
    try:
        if not uses_window(c):
            add_to_inbox(m, c, size)
        elif c.inbox != NULL and target == c.inbox.data + c.inbox.size:
            c.inbox.size += size
            c.inbox.room -= size
            c.inbox.frame.whole = 0
        else:
            join_in_window(m, c, size)
    except MemoryError as error:
        return input_failed(m, c, error)  # the stream has a hole now
    if not c.policy.pull:
        return deliver_messages(m, c)
    leave_window(m, c)
    return report_message(m, c)

cdef inline int deliver_chunk(CompiledCore m, Connection c, PyObject** scratch, Py_ssize_t size) except -1:
    """Without a framer, the bytes of a read are one message."""
    cdef PyObject* new = take_scratch(m, scratch, size)
    if new == NULL:
        return no_memory_for_input(m, c)
    message = <object>new
    DECREF(new)
    if c.policy.on_messages is not None:
        return deliver_chunk_in_list(m, c, message)
    m.n.messages_in += 1
    c.received_ns = m.now_ns
    if c.policy.on_message is not None:
        call_handler(m, c, c.policy.on_message, message, 2)
    spare(m, <PyObject*>message)
    return 0

cdef int deliver_chunk_in_list(CompiledCore m, Connection c, object message) except -1:
    try:
        messages = [message]  # on CPython 3.11 to make a list may start the collector, and with it anything
        check_fork(m)
        if not may_deliver(c) or c.policy.framing.kind != CHUNKS or m.close_requested:
            return 0 if c.flags & (F_CLOSING | F_ENDED) else set_inbox(m, c, message)
    except MemoryError as error:
        return input_failed(m, c, error)
    m.n.messages_in += 1
    c.received_ns = m.now_ns
    return call_handler(m, c, c.policy.on_messages, messages, 2)

cdef inline int join_in_window(CompiledCore m, Connection c, Py_ssize_t size) except -1:
    """Join the two parts of a message that spans reads: copy the unfinished message in front of the bytes that recv has
    just read into the window. The window is the inbox then."""
    cdef Inbox* inbox = c.inbox
    inbox_set(&m.in_window, NULL, m.window + WINDOW_HEAD, size)
    if inbox != NULL:
        m.in_window.data -= inbox.size
        m.in_window.size += inbox.size
        memcpy(<char*>m.in_window.data, inbox.data, inbox.size)
        m.in_window.frame = inbox.frame
        m.in_window.frame.whole = 0
        free_inbox(m, inbox)
    c.inbox = &m.in_window
    return 0

cdef inline int leave_window(CompiledCore m, Connection c) except -1:
    """The next connection uses the window: copy the unfinished message into an inbox of its own."""
    if c.inbox == &m.in_window:
        c.inbox = inbox_copy(&m.in_window, 0)
        if c.inbox == NULL:
            no_memory()
            return no_memory_for_input(m, c)
    return 0

cdef int read_ended(CompiledCore m, Connection c, ssize_t r, uint32_t events) except -1:
    """recv brought no bytes: nothing there, the peer's FIN, or an error."""
    if err_would_block(r):
        if c.flags & F_PEER_GONE:
            return end(m, c, None)
        if events & EPOLLERR:  # not the connection's error, but a time stamp or the like: it would be reported for ever
            sys_discard_error_queue(c.fd)
        return 0
    if r < 0:
        # Behind the wire's end a reset is no error: with a FIN in its place nothing more would have been read.
        return end(m, c, None if c.flags & F_FIN_UNREAD and c.out_head == NULL else os_error(r))
    if c.flags & F_PEER_GONE:
        return end(m, c, None)
    if c.flags & F_WIRE:
        return wire_eof(m, c)
    return set_eof(m, c)

cdef int set_eof(CompiledCore m, Connection c) except -1:
    c.flags |= F_EOF
    if c.inbox != NULL:
        c.inbox.frame.whole = 0  # to be looked at again: the last line needs no end
        report_message(m, c)
    return schedule(m, c)


# --- messages --------------------------------------------------------------------------------------

# Most handlers keep no message, and the next one is as long: the object is filled again, which costs a third of what it
# takes to free it and make another. Whatever new_message() makes below SPARED_SIZE has room for the longest of its 16
# sizes; pymalloc would round it up to that anyway.

cdef inline PyObject* new_message(CompiledCore m, const char* data, size_t size) noexcept:
    """A bytes object; NULL, with MemoryError raised, when memory is out."""
    cdef Spares* spares
    cdef PyObject* message
    if not 1 < size < SPARED_SIZE:
        return make_bytes(data, size)  # CPython has those of 0 and 1 byte
    spares = &m.spares[size // 16]
    if spares.count:
        spares.count -= 1
        message = spares.messages[spares.count]
    else:
        message = make_bytes(NULL, size | 15)
        if message == NULL:
            return NULL
    muxcore_refill(message, data, size)
    return message

cdef inline bint makes_bytes(Connection c) noexcept:
    """Whether its messages come from new_message()."""
    return c.reader is None and CHUNKS < c.policy.framing.kind < RESP

cdef inline void spare(CompiledCore m, PyObject* message) noexcept:
    """Keep a message of new_message()'s for one to come, if only the caller has it."""
    cdef size_t size = bytes_size(message)
    cdef Spares* spares
    if 1 < size < SPARED_SIZE and muxcore_is_lone(message):
        spares = &m.spares[size // 16]
        if spares.count < SPARES_KEPT:
            INCREF(message)
            spares.messages[spares.count] = message
            spares.count += 1

cdef inline bint peek(CompiledCore m, Connection c) except -1:
    """Whether a complete message is there, and may be delivered. Raises FrameError if there is none and never will be,
    and whatever a user's framer raises."""
    cdef size_t skipped = 0
    if c.reader is not None:
        return peek_reader(m, c)
    while c.inbox != NULL:
        if c.inbox.frame.whole == 0:
            frame_scan(&c.policy.framing, c.inbox.data, c.inbox.size, &c.inbox.frame)
        if c.inbox.frame.whole <= 0:
            return peek_failed(m, c)
        if not c.inbox.frame.empty:
            return True
        drop_front(m, c)
        skipped += 1
        if skipped % 64 == 0:
            look_at_clock(m)  # skipping many may last so long that the others have their turn
    return False

cdef int peek_failed(CompiledCore m, Connection c) except -1:
    """There is no complete message at the front of the inbox: it is malformed, more has to come, or this is the end."""
    cdef Inbox* inbox = c.inbox
    cdef Frame* f = &inbox.frame
    framer = c.policy.framer
    if f.whole < 0:
        raise frame_error(framer, -f.whole, f.at)
    if not c.flags & F_EOF:
        return False
    if c.policy.framing.kind != LINES:
        needed = frame_needed(&c.policy.framing, inbox.data, inbox.size)
        raise frame_error(framer, UNFINISHED, 0, inbox.size, needed)
    frame_found(f, inbox.size, 0, inbox.size - (inbox.data[inbox.size - 1] == c'\r'))
    return True

cdef bint peek_reader(CompiledCore m, Connection c) except -1:
    """As peek(), where messages are found in Python, which may do anything to the connection meanwhile."""
    while c.reader is not None:
        reader = c.reader
        if type(reader) is Found and not reader.found:
            set_policy(c, c.policy, reader.behind)
            continue
        if type(reader) is CustomReader and reader.left:
            if reader.feeding:
                return False
            hand_on(c, reader)
            continue
        found = peek_again(c, reader)
        check_fork(m)
        if c.flags & F_CLOSING or (c.flags & F_ENDED and not c.policy.pull) or m.close_requested:
            return False
        if c.reader is reader and (type(reader) is Found or not reader.left):
            if c.inbox != NULL:
                c.inbox.frame.whole = found
            if type(reader) is not Found or found:
                return found and may_deliver(c)
    return c.policy.framing.kind != CUSTOM and may_deliver(c) and peek(m, c)

cdef bint peek_again(Connection c, object reader) except -1:
    """Let a reader look at what it has, then at what has come since."""
    cdef bint found = reader.peek(False) is not NO_MESSAGE
    if found or c.reader is not reader or reader.left:
        return found
    if c.inbox != NULL:
        reader.data += inbox_bytes(c)  # no call of Python: what leaves the inbox is here before anything else runs
        discard_inbox(c.mux, c)
        reader.changes += 1
        found = reader.peek(False) is not NO_MESSAGE
    if not found and c.reader is reader and not reader.left and c.flags & F_EOF:
        found = reader.peek(True) is not NO_MESSAGE
    return found

cdef int hand_on(Connection c, object reader) except -1:
    """Another framer was set amid a call of this one, which has returned: its messages go first, and the next framer
    gets the rest."""
    rest = reader.last_rest()
    check_fork(c.mux)
    behind = reader.behind
    front = Found(reader.found, reader.encode, behind)
    if c.reader is not reader or reader.behind is not behind or c.flags & F_CLOSING:
        return 0
    if behind is not None:
        behind.data = rest + behind.data
    elif rest:
        set_inbox(c.mux, c, rest + inbox_bytes(c))
    set_policy(c, c.policy, front)
    if c.inbox != NULL:
        frame_clear(&c.inbox.frame)
    reader.behind = None
    reader.forget()  # may run finalizers
    return 0

cdef object take_found(object reader):
    """The first message that a reader has found; NO_MESSAGE if that is gone."""
    cdef list found = reader.found
    if PyList_GET_SIZE(found) == 0:
        return NO_MESSAGE
    message = found[0]
    reader.changes += 1
    PyList_SetSlice(found, 0, 1, NULL)
    return message

cdef int put_in_front(Connection c, list messages, object reader) except -1:
    """Put messages in front of all others: messages that were removed, or that a former reader (else framer) found."""
    behind = c.reader
    encode_found = reader.encode if type(reader) is CustomReader or type(reader) is Found else partial(encode, reader)
    return set_policy(c, c.policy, Found(messages, encode_found, behind))

cdef int give_back(Connection c, list messages, object framer, object reader) except -1:
    """Return messages to the inbox that `reader`, or else `framer`, has found: an interrupt, or code that has run
    meanwhile, prevents their delivery."""
    c.mux.n.messages_in -= PyList_GET_SIZE(messages)
    if not messages or c.flags & F_CLOSING:
        return 0
    schedule(c.mux, c)
    if reader is not None and reader is c.reader:
        reader.put_back(messages, 0)
        return 0
    return put_in_front(c, messages, framer if reader is None else reader)

cdef inline int drop_front(CompiledCore m, Connection c) except -1:
    """Remove the first message, which is complete, from the inbox."""
    cdef Inbox* inbox = c.inbox
    cdef size_t whole = inbox.frame.whole
    if whole == inbox.size:
        discard_inbox(m, c)
        return 0
    inbox.data += whole
    inbox.size -= whole
    frame_clear(&inbox.frame)
    return 0

cdef inline object take_message(CompiledCore m, Connection c):
    """The message that peek() has found; NO_MESSAGE if code that ran since has removed it: then peek() has to look
    again. Nothing runs between the last look and the end of this."""
    if makes_bytes(c):
        return take_bytes(m, c)
    if c.reader is not None:
        message = take_found(c.reader)
        if c.inbox != NULL:
            c.inbox.frame.whole = 0
    elif c.policy.framing.kind == RESP:
        message = request(m, c)
    else:
        message = inbox_bytes(c)
    if message is NO_MESSAGE:
        return message
    m.n.messages_in += 1
    c.received_ns = m.now_ns
    if c.reader is None:
        drop_front(m, c)
    return message

cdef inline object take_bytes(CompiledCore m, Connection c):
    """As take_message(), for a connection that makes_bytes(): nothing else runs here."""
    cdef PyObject* new = new_message(m, c.inbox.data + c.inbox.frame.start, c.inbox.frame.size)
    if new == NULL:
        return raised()
    m.n.messages_in += 1
    c.received_ns = m.now_ns
    drop_front(m, c)
    return taken(new)

cdef object request(CompiledCore m, Connection c):
    """The strings of a request of RESP, which scan_request() has found complete; NO_MESSAGE if it is gone."""
    cdef list parts
    cdef const char* data = c.inbox.data
    cdef size_t count = 0, still = 0, length = 0, at, i
    if data[0] != c'*':
        return inline_request(c)
    skip_number(data, 1, &count)
    parts = PyList_New(count)  # CPython 3.11 may start the collector here, and with it anything: look again
    check_fork(m)
    if not has_request(c):
        return NO_MESSAGE
    data = c.inbox.data
    if data[0] != c'*':
        return NO_MESSAGE
    at = skip_number(data, 1, &still)
    if still != count:
        return NO_MESSAGE
    for i in range(count):
        at = skip_number(data, at + 1, &length)
        part = command_name(m, data + at, length) if i == 0 else PyBytes_FromStringAndSize(data + at, length)
        Py_INCREF(part)
        PyList_SET_ITEM(parts, i, part)
        at += length + 2
    return parts

cdef object inline_request(Connection c):
    """The words of an inline command, which are split in Python, where anything may run."""
    line = PyBytes_FromStringAndSize(c.inbox.data, c.inbox.frame.size)
    words = split_inline(line)
    check_fork(c.mux)
    if (not has_request(c) or c.inbox.frame.size != <size_t>PyBytes_GET_SIZE(line)
            or memcmp(c.inbox.data, PyBytes_AS_STRING(line), c.inbox.frame.size) != 0):
        return NO_MESSAGE
    return words

cdef inline bint has_request(Connection c) noexcept:
    """Whether a complete request is still at the front of the inbox, and may be delivered."""
    return (may_deliver(c) and c.reader is None and c.inbox != NULL and c.policy.framing.kind == RESP
            and c.inbox.frame.whole > 0 and not c.inbox.frame.empty)

cdef inline object command_name(CompiledCore m, const char* data, size_t length):
    """The first string of a request. It is one of few, mostly: to find the object that it was the last time, with its
    hash, is cheaper than to make one."""
    cdef PyObject** place
    if not 1 < length < 16:
        return PyBytes_FromStringAndSize(data, length)
    place = &m.names[(<size_t>data[0] * 8 + <size_t>data[length - 1] * 2 + length) % 64]
    if (place[0] == NULL or bytes_size(place[0]) != <Py_ssize_t>length
            or memcmp(bytes_data(place[0]), data, length) != 0):
        name = PyBytes_FromStringAndSize(data, length)
        Py_XDECREF(place[0])
        Py_INCREF(name)
        place[0] = <PyObject*>name
    return <object>place[0]

cdef inline bint has_message(CompiledCore m, Connection c) except -1:
    """Whether a message may be received now. Malformed input is left to run_pending(): the user may be about to change
    the framer."""
    if not may_deliver(c) or (c.inbox == NULL and c.reader is None):
        return False
    if c.reader is None and c.inbox.frame.whole > 0 and not c.inbox.frame.empty:
        return True
    try:
        return peek(m, c)
    except Exception as error:
        check_fork(m)
        schedule(m, c)
        without_frames(error)  # its frames hold the reader, which holds it
        return False

cdef inline object next_message(CompiledCore m, Connection c):
    """Pull style: remove and return the next message; NO_MESSAGE if there is none."""
    cdef bint was_full
    while has_message(m, c):
        was_full = c.inbox != NULL and c.inbox.size > c.policy.max_inbox
        message = take_message(m, c)
        if message is NO_MESSAGE:
            continue
        if c.policy.idle_ns and not m.in_turn:
            c.received_ns = sys_clock_ns(CLOCK_MONOTONIC)  # the last turn may be long ago, and the peer waited for us
        if was_full or c.inbox != NULL or c.reader is not None or c.flags & F_EOF:
            schedule(m, c)
        return message
    return NO_MESSAGE

cdef list take_all(CompiledCore m, Connection c):
    """All messages, for their user."""
    cdef list messages = []
    framer, reader = c.policy.framer, c.reader
    try:
        while True:
            message = next_message(m, c)
            if message is NO_MESSAGE:
                return messages
            messages.append(message)
    except BaseException:
        give_back(c, messages, framer, reader)
        raise

cdef int deliver_messages(CompiledCore m, Connection c) except -1:
    """Hand complete messages to the handler as long as that is allowed. What it sends to `c` goes out together."""
    m.in_handler = <PyObject*>c
    try:
        if c.policy.on_messages is not None:
            deliver_batch(m, c)
        else:
            deliver_one_by_one(m, c)
    except Exception as error:
        check_fork(m)
        input_failed(m, c, error)
    finally:
        m.in_handler = NULL
        leave_window(m, c)
    return send_replies(m, c)

cdef int deliver_one_by_one(CompiledCore m, Connection c) except -1:
    cdef bint ours
    while may_deliver(c) and not m.close_requested and peek(m, c):
        ours = makes_bytes(c)  # the handler may change the framer
        message = take_bytes(m, c) if ours else take_message(m, c)
        if not ours and message is NO_MESSAGE:
            continue
        if c.policy.on_message is not None:
            invoke(m, c, c.policy.on_message, message, 2)
        if ours:
            spare(m, <PyObject*>message)
        else:
            message = None  # its finalizer, or that of what the handler has put into it, runs here
            check_fork(m)
        if tick(m):
            schedule(m, c)
            return 0
    return 0

cdef int look_into_inbox(CompiledCore m, Connection c) except -1:
    """Deliver what a pause has held back, or the last line; in pull style, find out whether what is left is good."""
    if not c.policy.pull:
        return deliver_messages(m, c)
    try:
        peek(m, c)
    except Exception as error:
        check_fork(m)
        input_failed(m, c, error)
    return 0

cdef int deliver_batch(CompiledCore m, Connection c) except -1:
    cdef Spares made
    cdef bint more = True
    made.count = 0
    while more and may_deliver(c) and not m.close_requested:
        try:
            more = deliver_list(m, c, &made)
        finally:
            while made.count:  # its list is gone, so those that the handler has not kept are ours alone
                made.count -= 1
                spare(m, made.messages[made.count])
                DECREF(made.messages[made.count])
        if more and m.turn_over:
            schedule(m, c)
            return 0
    return 0

cdef bint deliver_list(CompiledCore m, Connection c, Spares* made) except -1:
    """Hand out all complete messages in one list, if there are any; those before something wrong come first, too."""
    cdef list messages = []
    cdef bint ours = makes_bytes(c)
    failure = judged = None
    framer, reader = c.policy.framer, c.reader
    try:
        while ours and peek(m, c):
            message = take_bytes(m, c)
            messages.append(message)
            if made.count < SPARES_KEPT:
                Py_INCREF(message)
                made.messages[made.count] = <PyObject*>message
                made.count += 1
            elif PyList_GET_SIZE(messages) % 64 == 0 and look_at_clock(m):
                break
        while not ours and may_deliver(c) and peek(m, c):
            message = take_message(m, c)
            if message is NO_MESSAGE:
                continue
            messages.append(message)
            if tick(m):
                break
    except Exception as error:
        check_fork(m)
        failure = without_frames(error)  # its frames hold the reader, which holds it
        judged = c.policy.framer  # its rest() may have set another at the end of the stream
    except BaseException:
        give_back(c, messages, framer, reader)
        raise
    if not may_deliver(c) or m.close_requested:  # what has found or split them has closed or paused the connection
        give_back(c, messages, framer, reader)
        return False
    if messages:
        invoke(m, c, c.policy.on_messages, messages, 2)
    # Another framer may be able to read it; else it is found again when what is there may be delivered.
    if failure is not None and c.policy.framer is judged and may_deliver(c) and not m.close_requested:
        raise failure
    return PyList_GET_SIZE(messages) != 0

cdef int input_failed(CompiledCore m, Connection c, object error) except -1:
    """The input cannot be read on: it is malformed, its user's framer has failed, or memory is out. The connection
    closes as by close(): what was accepted for sending still goes out."""
    if PyErr_GivenExceptionMatches(error, FrameError):
        if c in m.offloaded:
            without_frames(error)  # it is found again once the messages before it are replied to
            return 0
        return peer_failed(m, c, error)
    keep_error(c, error)
    discard_inbox(m, c)
    close_connection(m, c)
    m.n.handler_errors += 1
    return log_error("%r cannot continue to read", c, error)

cdef int no_memory_for_input(CompiledCore m, Connection c) except -1:
    """A C call has raised MemoryError."""
    try:
        raised()
    except MemoryError as error:
        return input_failed(m, c, error)

cdef int make_reader(CompiledCore m, Connection c) except -1:
    """What an accepted connection needs if its framer is a user's own. An interrupt leaves it to run_pending()."""
    try:
        reader = CustomReader(c.policy.framer)
    except Exception as error:
        check_fork(m)
        return input_failed(m, c, error)
    check_fork(m)
    if c.policy.framing.kind == CUSTOM and c.reader is None and not c.flags & F_ENDED:
        set_policy(c, c.policy, reader)
    return 0

cdef int set_framer(CompiledCore m, Connection c, object framer) except -1:
    """What is not delivered yet is for the new framer."""
    former = change_framer(m, c, framer)
    if c.inbox != NULL:
        report_message(m, c)
    if former is not None:
        former[0].forget()  # may run finalizers
    return 0

cdef tuple change_framer(CompiledCore m, Connection c, object framer):
    """Move what is not delivered yet into the inbox, for the new framer. Returns the reader of a user's framer, to be
    forgotten, and its messages: to drop them may run finalizers."""
    cdef Policy before = None, policy = None
    reader = CustomReader(framer) if type(framer) not in FRAMERS else None
    cdef bint gone
    old = rest = changes = None
    nothing = []
    # Each of these calls may run anything, which may read, or set a framer, too. Behind the last look nothing runs.
    while c.policy is not before or c.reader is not old or (old is not None and old.changes != changes):
        before, old, rest = c.policy, c.reader, None
        policy = changed_policy(before, before.limits, before.timeouts, framer)
        if old is not None:
            changes = old.changes
            rest = rest_for_next(old)
    # What a peer has sent before its end is still there in pull style, as in finish().
    gone = c.flags & (F_CLOSING | F_FAILED) or (c.flags & F_ENDED and not c.policy.pull)
    if rest and not gone:
        set_inbox(m, c, rest + inbox_bytes(c))
    if c.inbox != NULL:
        frame_clear(&c.inbox.frame)
    schedule(m, c)
    if old is not None and old.feeding and not gone:
        old = leave(c, policy, old, reader)
        return None if old is None else (old, nothing)
    if old is not None:
        nothing, old.found = old.found, nothing
    set_policy(c, policy, None if c.flags & F_ENDED and gone else reader)
    return None if old is None else (old, nothing)
