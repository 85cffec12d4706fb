# What may live here: Listener: accepting, and the pause when there are no descriptors.

cdef enum:
    ACCEPT_BUDGET = 64          # connections accepted per event of a listener; the kernel reports what is left

cdef int64_t FIRST_PAUSE_NS = 10_000_000
cdef int64_t LONGEST_PAUSE_NS = 1_000_000_000

@cython.final
@cython.no_gc_clear  # as Connection; Policy lets go of it
cdef class Listener:
    """A listening socket; made by `Mux.listen`.

    address: its address, as `socket.getsockname` returns it; with port 0 as argument, it has the actual port.
    connections: the number of open connections that it accepted.
    """

    def __cinit__(self, token=None):
        self.fd = -1
        check_token(token, "listeners are made by Mux.listen")

    def __dealloc__(self):
        if self.fd >= 0:
            sys_close(self.fd)

    def __repr__(self):
        return f"<muxcore.Listener {'closed' if self.closed else 'open'}, address={self.address!r}>"

    @property
    def mux(self):
        """The Mux that accepts for it."""
        return self.mux

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self.fd < 0

    def fileno(self) -> int:
        """The descriptor; -1 after it is closed."""
        return self.fd

    def dup(self):
        """A new `socket.socket` for the same listening socket, for example to pass it to another process.

        It is nonblocking, because both share one mode (`socket.dup` would make both blocking), and not inheritable (see
        `pass_fds` of `subprocess.Popen`). It listens until you close it, also after `close` of this Listener. But if
        `listen` created a Unix socket from a path, that `close` removes the file, and clients cannot find the socket.

        Raises ConnectionClosed if the Listener is closed, OSError if no descriptor is left.
        """
        check_thread(self.mux)
        if self.fd < 0:
            raise ConnectionClosed(f"dup: {self!r} is closed")
        return duplicate(self.fd)

    @property
    def tls(self):
        """The `ssl.SSLContext` of new connections; None without TLS. Set another one to rotate certificates: open
        connections keep theirs. A listener that began without TLS has none; setting it raises ValueError."""
        wiring = self.policy.wiring
        return None if wiring is None else wiring.tls

    @tls.setter
    def tls(self, context):
        check_thread(self.mux)
        change_context(self.policy.wiring, context)

    def close(self) -> None:
        """Stop listening. Accepted connections stay open; the kernel resets those in the backlog."""
        check_thread(self.mux)
        close_listener(self.mux, self)

cdef Listener new_listener(CompiledCore m, Policy policy):
    cdef Listener listener = Listener.__new__(Listener, TOKEN)
    listener.mux = m
    listener.policy = policy
    return listener

cdef object duplicate(int fd):
    fd = os.dup(fd)
    try:
        sock = adopted(fd)
    except BaseException:
        sys_close(fd)
        raise
    sock.setblocking(False)
    return sock

cdef int close_listener(CompiledCore m, Listener listener) except -1:
    cdef int fd = listener.fd
    if fd < 0:
        return 0
    stop_listening(m, listener)
    if listener.accept_paused:
        m.accept_paused.remove(listener)
        listener.accept_paused = False
    if listener.policy.pull:
        m.pull_count -= 1
    listener.fd = -1
    try:
        if listener.file is not None:
            listener.file.remove()
    finally:
        sys_close(fd)
    return 0

cdef Listener add_listener(
    CompiledCore m, object sock, object file, Policy policy, object max_connections, bint exclusive
):
    cdef Listener listener = new_listener(m, policy)
    cdef int r
    listener.address, listener.file = address_module.shown(socket_type.getsockname(sock)), file
    listener.max_accepted = max_connections
    listener.exclusive = exclusive
    check_usable(m)  # the arguments, or a signal handler in the line of the address, may have closed it
    listener.fd = socket_type.fileno(sock)
    try:
        r = start_listening(m, listener)
        if r < 0:
            raise os_error(r)
        socket_type.detach(sock)
    except BaseException:
        stop_listening(m, listener)
        listener.fd = -1  # it stays the caller's
        raise
    policy.listener = listener
    m.pull_count += policy.pull
    return listener

cdef int start_listening(CompiledCore m, Listener listener) except? -2:
    cdef int r = register(m, listener, listener.fd, LISTENER, EPOLLIN | (EPOLLEXCLUSIVE if listener.exclusive else 0))
    listener.listening = r == 0
    return r

cdef int stop_listening(CompiledCore m, Listener listener) except -1:
    # DEL and not MOD: an EPOLLEXCLUSIVE registration cannot be modified.
    if listener.listening:
        unregister(m, listener.fd)
        listener.listening = False
    return 0

cdef int accept_ready(CompiledCore m, Listener listener) except -1:
    cdef sockaddr_storage address
    cdef socklen_t size
    cdef int i, fd
    sys_ensure_nonblocking(listener.fd)  # the next line knows if it is closed
    for i in range(ACCEPT_BUDGET):
        if not listener.listening:
            return 0
        if listener.max_accepted is not None and listener.connections >= listener.max_accepted:
            return pause_accept(m, listener, 0)
        fd = sys_accept(listener.fd, &address, &size)
        if fd >= 0:
            accepted(m, listener, fd, &address, size)
            if look_at_clock(m):  # each on_open may have taken long
                return 0
        elif err_would_block(fd):  # the backlog is empty; or another process was faster, which is no error
            listener.pause_ns = 0
            return 0
        elif not err_client_gone(fd):
            return accept_failed(m, listener, fd)
    return 0

cdef int accept_failed(CompiledCore m, Listener listener, int r) except -1:
    """No descriptor (EMFILE) or no memory. The client stays in the backlog, so the listener stays readable: to keep
    watching it would spin. It pauses until a connection ends, or for a time that doubles with each failure."""
    cdef bint is_first = listener.pause_ns == 0
    listener.pause_ns = FIRST_PAUSE_NS if is_first else min(2 * listener.pause_ns, LONGEST_PAUSE_NS)
    pause_accept(m, listener, listener.pause_ns)
    if is_first:
        log.error("%r: accept failed, pausing: %s", listener, os.strerror(-r))
        if not err_no_resources(r):
            log.error("%r: accept(2) does not document this error; muxcore will retry", listener)
    return 0

cdef int pause_accept(CompiledCore m, Listener listener, int64_t ns) except -1:
    m.n.accept_pauses += 1
    m.accept_paused.append(listener)
    listener.accept_paused = True
    listener.paused_until_ns = m.now_ns + ns if ns else 0
    stop_listening(m, listener)
    if ns:
        add_timer(m, listener.paused_until_ns, _pause_over, (listener, listener.paused_until_ns))
    return 0

def _pause_over(Listener listener, int64_t until_ns):
    """Only the timer of the last pause resumes it. The timer of an earlier pause, which the end of a connection has cut
    short, is ignored: otherwise timers would accumulate."""
    if listener.paused_until_ns == until_ns:
        resume_accept(listener)

cdef int resume_accept(Listener listener) except -1:
    cdef CompiledCore m = listener.mux
    cdef int r
    if not listener.accept_paused:
        return 0
    r = start_listening(m, listener)
    if not listener.accept_paused:
        return 0  # it was closed meanwhile
    m.accept_paused.remove(listener)
    listener.accept_paused = False
    return accept_failed(m, listener, r) if r < 0 else 0

cdef int resume_accepts(CompiledCore m) except -1:
    cdef Listener listener
    cdef Py_ssize_t i
    for i in range(PyList_GET_SIZE(m.accept_paused) - 1, -1, -1):  # one that cannot be woken is put at the end again
        if i >= PyList_GET_SIZE(m.accept_paused):
            continue  # a log handler has closed some
        listener = <Listener>m.accept_paused[i]
        if listener.max_accepted is None or listener.connections < listener.max_accepted:
            resume_accept(listener)
    return 0

cdef int accepted(CompiledCore m, Listener listener, int fd, sockaddr_storage* address, socklen_t size) except -1:
    cdef Connection c = None
    cdef int r
    try:
        c = new_connection(m, listener.policy)
        c.fd = fd
        fill_address(c, address, size)
        check_fork(m)
        r = watch_connection(m, c)
    except BaseException:  # memory is out; a RST, since a FIN might look like an empty reply
        if c is not None:
            c.fd = -1
        if m.forks == forks:
            sys_reset_on_close(fd)
        sys_close(fd)
        raise
    m.n.accepts += 1
    listener.connections += 1
    count_connection(m, c)
    if r < 0:
        return end(m, c, os_error(r))
    if c.policy.wiring is not None:
        return make_wire(m, c)
    if c.policy.framing.kind == CUSTOM:
        schedule(m, c)  # should it be interrupted
        make_reader(m, c)
    return notify(m, c, c.policy.on_open, R_OPENED, F_OPENED)

cdef int fill_address(Connection c, sockaddr_storage* address, socklen_t size) except -1:
    cdef sockaddr_in6* six = <sockaddr_in6*>address
    c.family = <uint8_t>address.ss_family
    if address.ss_family == AF_UNIX:
        if size > 2:
            c.peer_tuple = PyBytes_FromStringAndSize(<char*>address + 2, size - 2)
        return 0
    c.port = six.sin6_port
    if address.ss_family == AF_INET:
        memcpy(c.host, <char*>address + 4, 4)  # sin_addr follows sin_port
    elif address.ss_family == AF_INET6:
        memcpy(c.host, <char*>address + 8, 16)
        if six.sin6_flowinfo or six.sin6_scope_id:  # of a link's neighbour, seldom
            c.peer_tuple = internet_address(AF_INET6, c.host, c.port, six.sin6_flowinfo, six.sin6_scope_id)
    else:  # AF_VSOCK, say, of which Python knows more
        try:
            c.peer_tuple = with_socket(c, "getpeername", ())
        except OSError:
            c.peer_tuple = ""  # it is gone again
    return 0
