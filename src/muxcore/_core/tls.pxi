# What may live here: TLS's hot path in C. tls.py does all of it, and the handshake always. After that, on most Pythons,
# OpenSSL is called from here, without Python's ssl in between: through the SSL* of CPython's own object, which remains
# what Connection.tls returns.
#
# A call of OpenSSL here runs no Python. Where it might (a callback for messages; another handshake, up to TLS 1.2),
# tls.py goes on.

cdef enum:
    RECORDS = GATHERED + 4096  # what GATHERED bytes of plaintext become, at most

cdef OpenSSL openssl
cdef object openssl_found = None  # whether; None: not looked for yet
cdef object SSLError = None

cdef bint find_openssl() except -1:
    global openssl_found, SSLError
    if openssl_found is None:
        module = sys.modules["_ssl"]
        path = getattr(module, "__file__", None)
        SSLError = module.SSLError
        openssl_found = not MUXCORE_FREE_THREADED and path is not None and openssl_find(&openssl, os.fsencode(path))
    return openssl_found

cdef inline bint is_direct(Connection c, Wired wired) except -1:
    """Whether OpenSSL is called here."""
    return wired.ssl != NULL or (not wired.asked and call_directly(c, wired))

cdef bint call_directly(Connection c, Wired wired) except -1:
    """From now on OpenSSL is called here, if this is TLS, and open, and what CPython has where is as expected."""
    wire = wired.wire
    if wired.busy or wired.due or wired.given or c.flags & (F_OPENED | F_HANDSHAKE | F_WIRE_SHUT) != F_OPENED:
        return False
    parts = wire.parts() if type(wire).__module__ == "muxcore.tls" and find_openssl() else None
    wired.asked = True  # behind the call: an interrupt may have come amid it
    check_fork(c.mux)
    if wired.ssl != NULL:
        return True  # a signal handler has been here amid that
    if parts is None or c.wired is not wired or wired.due or wired.given or c.flags & (F_ENDED | F_WIRE_SHUT):
        return False
    owner, context, incoming, outgoing = parts
    ssl = ssl_of(owner, context)
    if (ssl == NULL or openssl.get_rbio(ssl) != field(incoming, 0)
            or openssl.get_wbio(ssl) != field(outgoing, 0)):
        return False
    partial, wired.tickets = wire._partial, wire._tickets
    wired.rbio, wired.wbio = openssl.get_rbio(ssl), openssl.get_wbio(ssl)
    size = PyBytes_GET_SIZE(partial)
    if size and openssl.bio_write(wired.rbio, PyBytes_AS_STRING(partial), size) != size:
        return False
    wire._partial = b""
    wired.owner, wired.ssl = owner, ssl
    return True

# CPython 3.11 to 3.15, _ssl.c: behind the header of an object, an _SSLSocket has the weak reference of a socket, its
# SSL* and its context; an _SSLContext its SSL_CTX*; a MemoryBIO its BIO*.

cdef inline void* field(object owner, size_t number) noexcept:
    cdef void* value
    memcpy(&value, <char*><PyObject*>owner + sizeof(PyObject) + number * sizeof(void*), sizeof(void*))
    return value

cdef void* ssl_of(object owner, object context) noexcept:
    """The SSL* of CPython's object, if it is where it should be: in front of its context, whose SSL_CTX* it has."""
    if field(owner, 2) != <void*>context:
        return NULL
    ssl = field(owner, 1)
    return ssl if ssl != NULL and openssl.get_context(ssl) == field(context, 0) else NULL

cdef char* records(CompiledCore m) except NULL:
    """The buffer that recv fills with records, and that output is gathered and encrypted in."""
    if m.records == NULL:
        m.records = <char*>malloc(max(m.read_size, <Py_ssize_t>RECORDS))
        if m.records == NULL:
            raise MemoryError()
    return m.records


# --- input -----------------------------------------------------------------------------------------

cdef int decrypt(CompiledCore m, Connection c, Py_ssize_t size) except -1:
    """What recv has just read into `records`. All of it is decrypted, even if a pause holds it back: the kernel will
    not report it again."""
    cdef Wired wired = c.wired
    cdef Py_ssize_t got, room
    cdef char* target
    cdef int r = 1
    if openssl.bio_write(wired.rbio, m.records, size) != size:
        no_memory()
        return no_memory_for_input(m, c)
    try:
        while r > 0:
            room = m.read_size
            target = read_target(m, c, &m.scratch, &room)
            got = 0
            r = decrypt_into(wired, target, room, &got)
            if r < 0:
                return decrypted_last(m, c, wired, target, got)
            if got:
                deliver_plain(m, c, target, got)
                if c.wired is not wired or not c.flags & F_WIRE or discards_input(c):
                    return 0
    except BaseException:  # no memory, or what a handler raises to end the loop: run_pending() goes on
        wired.due = True
        schedule(m, c)
        raise
    return send_own(m, c, wired)

cdef int decrypt_into(Wired wired, char* target, Py_ssize_t room, Py_ssize_t* got) noexcept:
    """As much as there is room for. 1: there may be more; 0: it needs more records; -1: the stream has ended."""
    cdef int r
    openssl.clear_errors()  # else SSL_get_error would find an older one
    while got[0] < room:
        r = openssl.read(wired.ssl, target + got[0], room - got[0])
        if r <= 0:
            wired.ssl_error = openssl.get_error(wired.ssl, r)
            return 0 if wired.ssl_error == SSL_ERROR_WANT_READ else -1
        got[0] += r
        if got[0] < room and bio_pending(&openssl, wired.rbio) == 0:
            return 0
    return 1

cdef int deliver_plain(CompiledCore m, Connection c, char* target, Py_ssize_t size) except -1:
    """As read_turn() what it has read."""
    c.wired.plain += size
    if (c.policy.framing.kind == CHUNKS and not c.policy.pull and c.inbox == NULL and c.reader is None
            and may_deliver(c) and not m.close_requested):
        return deliver_chunk(m, c, &m.scratch, size)
    return keep_input(m, c, target, size)

cdef int decrypted_last(CompiledCore m, Connection c, Wired wired, char* target, Py_ssize_t size) except -1:
    """close_notify, or an error: go_on() ends the stream, behind what came before."""
    wire = wired.wire
    wired.due = True  # an interrupt leaves the rest to run_pending()
    schedule(m, c)
    try:
        if size:
            wire.plain.append(PyBytes_FromStringAndSize(target, size))
        # Tickets wait for output, which is more than a peer that has ended may want. An alert is behind them.
        if wired.ssl_error != SSL_ERROR_ZERO_RETURN or bio_pending(&openssl, wired.wbio) > wired.tickets:
            collect_records(c, wired)
    except MemoryError as error:
        keep_failure(m, c, wired, error)
    if wired.ssl_error == SSL_ERROR_ZERO_RETURN:
        wire.ended = True
    elif wired.failure is None:
        set_failure(m, c, wired)
    if c.flags & F_ENDED or c.wired is not wired:
        return 0
    return go_on(m, c, wired)

cdef int set_failure(CompiledCore m, Connection c, Wired wired) except -1:
    """CPython makes an exception of what OpenSSL has noted for this thread. A signal handler may run then."""
    wired.failure = SSLError(1, "OpenSSL failed")
    wired.busy = True
    try:
        wired.wire.fail()
    except Exception as error:
        check_is_its_own(wired.wire, error)
        keep_failure(m, c, wired, error)
    finally:
        wired.busy = False
    return check_fork(m)

cdef int send_own(CompiledCore m, Connection c, Wired wired) except -1:
    """What OpenSSL has replied to what it has read: to a change of keys, say."""
    if bio_pending(&openssl, wired.wbio) <= wired.tickets:
        return 0
    try:
        collect_records(c, wired)
    except MemoryError as error:
        keep_failure(m, c, wired, error)
    return go_on(m, c, wired)

cdef int collect_records(Connection c, Wired wired) except -1:
    """Put what OpenSSL has for the peer behind what is ready. After close_notify it is dropped: a peer that changes its
    keys again and again must not fill memory with the replies."""
    cdef size_t size = bio_pending(&openssl, wired.wbio)
    if c.flags & F_WIRE_SHUT:
        openssl.bio_control(wired.wbio, BIO_CTRL_RESET, 0, NULL)
    elif size:
        data = PyBytes_FromStringAndSize(NULL, size)
        insert_ready(c, wired, data)
        openssl.bio_read(wired.wbio, PyBytes_AS_STRING(data), size)
    wired.tickets = 0
    return 0


# --- output ----------------------------------------------------------------------------------------

cdef bint encrypt_and_send(CompiledCore m, Connection c, Wired wired) except -1:
    """Encrypt from the front of the outbox and send that; whether all of it went, else this flush is over."""
    cdef size_t size = 0
    cdef const char* data
    if wired.busy or c.flags & F_WIRE_SHUT or (wired.due and wired.failure is not None):
        return False
    if bio_pending(&openssl, wired.wbio) > wired.tickets:
        return send_encrypted(m, c, wired)  # memory was out before
    if c.out_head == NULL:
        return False
    records(m)  # memory for it, while nothing is encrypted
    part = None
    if c.out_head.data == NULL:
        part = read_file(m, c, <FileChunk*>c.out_head, &size)
        if part is None:
            return False
        data = PyBytes_AS_STRING(part)
    else:
        data = plaintext(m, c.out_head, &size)
    if openssl.write(wired.ssl, <char*>data, size) != <int>size:
        return encrypt_failed(m, c, wired)
    consume_plaintext(m, c, size)
    return send_encrypted(m, c, wired)

cdef const char* plaintext(CompiledCore m, Chunk* chunk, size_t* size) except NULL:
    """A large piece, or small pieces together."""
    cdef const Chunk* first = chunk
    cdef char* together
    size[0] = min(chunk.size, <size_t>GATHERED)
    if chunk.next == NULL or chunk.next.data == NULL or chunk.size >= LARGE_PIECE:
        return chunk.data
    together = records(m)
    chunk = chunk.next
    while chunk != NULL and chunk.data != NULL and size[0] < GATHERED:
        size[0] = min(size[0] + chunk.size, <size_t>GATHERED)
        chunk = chunk.next
    copy_chunks(first, together, size[0])
    return together

cdef bint send_encrypted(CompiledCore m, Connection c, Wired wired) except -1:
    cdef size_t size = bio_pending(&openssl, wired.wbio)
    cdef char* data
    cdef ssize_t r
    wired.tickets = 0
    if size > RECORDS:
        try:
            collect_records(c, wired)
        except MemoryError as error:
            abort_for(m, c, error)
            return False
        return send_ready(m, c)
    data = records(m)
    openssl.bio_read(wired.wbio, data, size)
    m.n.send_calls += 1
    r = sys_send(c.fd, data, size)
    if r == <ssize_t>size:
        m.n.bytes_out += r
        c.wrote_ns = m.now_ns
        return True
    try:
        insert_ready(c, wired, PyBytes_FromStringAndSize(data + max(r, 0), size - max(r, 0)))
    except MemoryError as error:
        abort_for(m, c, error)  # the stream has a hole now
        return False
    if r < 0:
        send_failed(m, c, r)
        return False
    m.n.bytes_out += r
    c.wrote_ns = m.now_ns
    wait_writable(m, c)
    return False

cdef int finish_directly(Connection c, Wired wired) except -1:
    """close_notify. That of the peer is not waited for."""
    openssl.shutdown(wired.ssl)
    openssl.clear_errors()
    return collect_records(c, wired)

cdef bint encrypt_failed(CompiledCore m, Connection c, Wired wired) except -1:
    collect_records(c, wired)
    set_failure(m, c, wired)
    if not c.flags & F_ENDED and c.wired is wired:
        stream_failed(m, c, wired)
    return False
