# What may live here: the core of a Mux: which descriptor is whose, accepting, the turn of the loop, threads, the end.
# What the user calls and is not hot is in _mux.py, which is a base class of the same object.

cdef enum:
    ACCEPT_BUDGET = 64          # connections accepted per event of a listener; the kernel reports what is left
    READ = 1                    # directions of a Watch, as in _watch.py
    WRITE = 2

cdef int64_t FIRST_REST_NS = 10_000_000
cdef int64_t LONGEST_REST_NS = 1_000_000_000
# Under load, other threads get the interpreter this often. Longer than the 5 ms after which a thread that waits for it
# asks for it (sys.getswitchinterval): to let go before it has asked wakes it, but mostly too late to take it, and its
# 5 ms begin anew; so it could starve for ever.
cdef int64_t RELEASE_NS = 6_000_000
cdef int64_t SWEEP_NS = 1_000_000_000
# How long each part of a turn (what is pending, the events, calls, timers) may take before it leaves the rest to the
# next turn, so that no part waits long for the others.
cdef int64_t PART_NS = 3_000_000


# --- who may call ----------------------------------------------------------------------------------

cdef inline bint is_here(Core m) noexcept:
    """Whether the Mux is bound to this thread; not before its first turn."""
    return load_thread(&m.thread) == this_thread()

cdef inline bint is_foreign(Core m) noexcept:
    cdef unsigned long thread = load_thread(&m.thread)
    return thread != 0 and thread != this_thread()

cdef inline int check_fork(Core m) except -1:
    if m.forks != forks:
        raise RuntimeError("this Mux was made before fork(): a child has to make its own")
    return 0

cdef inline void count_drops(Core m, uint64_t count) noexcept:
    add_count(&m.n.drops, count)  # any thread does

cdef inline void count_drop(Core m) noexcept:
    count_drops(m, 1)

cdef inline int check_thread(Core m) except -1:
    check_fork(m)
    if is_foreign(m):
        raise RuntimeError("this Mux belongs to the thread that first ran it: use call_soon_threadsafe from another")
    return 0

cdef int check_usable(Core m) except -1:
    check_thread(m)
    if m.is_closed or m.unwinding:
        raise RuntimeError("the Mux is closed")
    return 0

cdef int bind(Core m) except -1:
    """From now on it is this thread's Mux. Until then it is nobody's, and a method does its work in whatever thread it
    is called; those that any thread may call do it in a critical section, so that it is over before the first turn."""
    thread = what_lives_as_long_as_this_thread()
    with cython.critical_section(m):
        check_thread(m)  # another thread may have been faster
        m.owner_thread = thread
        store_thread(&m.thread, this_thread())
    return 0

cdef int adopt(Core m) except -1:
    """Bind the Mux of a thread that has ended to this one."""
    thread = what_lives_as_long_as_this_thread()
    with cython.critical_section(m):  # of two threads, one
        if is_foreign(m) and m.owner_thread() is None:
            m.owner_thread = thread
            store_thread(&m.thread, this_thread())
    return 0

cdef int check_can_turn(Core m, str method) except -1:
    check_usable(m)
    if m.in_turn or m.polling:  # the latter: by a finalizer, while poll() makes its list
        raise RuntimeError(f"{method}() was called inside a callback of the same Mux")
    return 0


# --- which descriptor is whose ---------------------------------------------------------------------

cdef inline uint64_t token(Core m, int fd) noexcept:
    """What the kernel is given with a registration: an event that carries an old generation is stale."""
    return <uint64_t>m.slots[fd].generation << 32 | <uint32_t>fd

cdef int grow_slots(Core m, size_t needed) except -1:
    cdef size_t before, count
    cdef Slot* slots
    cdef list more = None
    while more is None or m.slot_count != before:  # to make a list may start the collector, and with it anything
        before = m.slot_count
        count = 2 * before if 2 * before > needed else needed + 64
        more = [None] * <Py_ssize_t>(count - before)
    slots = <Slot*>realloc(m.slots, count * sizeof(Slot))
    if slots == NULL:
        raise MemoryError()
    m.slots = slots
    memset(slots + before, 0, (count - before) * sizeof(Slot))
    m.objects.extend(more)
    m.slot_count = count
    return 0

cdef object owner_of(Core m, int fd):
    return m.objects[fd] if 0 <= fd and <size_t>fd < m.slot_count else None

cdef int register(Core m, object owner, int fd, Kind kind, uint32_t events) except? -2:
    """Put a descriptor into the set; 0 or -errno."""
    cdef int r
    if fd < 0:
        return sys_epoll_ctl(m.epoll.fd, EPOLL_CTL_ADD, fd, events, 0)  # which knows the error for that
    while <size_t>fd >= m.slot_count:
        grow_slots(m, fd + 1)
    while m.slots[fd].kind != NOTHING:
        evict(m, fd)
    m.slots[fd].generation += 1
    r = sys_epoll_ctl(m.epoll.fd, EPOLL_CTL_ADD, fd, events, token(m, fd))
    if r == 0:
        m.slots[fd].kind = kind
        m.objects[fd] = owner
    return r

cdef int unregister(Core m, int fd) except -1:
    """Take a descriptor out, always before close(2): a dup of it somewhere would keep a closed one registered."""
    if fd < 0 or <size_t>fd >= m.slot_count:
        return 0  # of a Mux that has released everything
    m.slots[fd].generation += 1
    m.slots[fd].kind = NOTHING
    m.objects[fd] = None
    sys_epoll_ctl(m.epoll.fd, EPOLL_CTL_DEL, fd, 0, 0)  # fails only if somebody closed it behind our back
    return 0

cdef int evict(Core m, int fd) except -1:
    """Somebody closed this descriptor behind our back, and the kernel has handed its number to a new socket, which
    the old owner must not touch."""
    owner = m.objects[fd]
    error = OSError(f"descriptor {fd} was closed by somebody else")
    call = (_log_eviction, (owner, error))
    if m.objects[fd] is not owner:
        return 0  # what ran since has closed it
    if isinstance(owner, Connection):
        mark_or_raise(m, <Connection>owner)
        (<Connection>owner).fd = -1
        set_ended(<Connection>owner, error)
    else:
        m.soon.append(call)  # a log handler may do anything, which is too early now
    m.slots[fd].kind = NOTHING
    m.objects[fd] = None
    if isinstance(owner, Listener):
        (<Listener>owner).fd = -1
        (<Listener>owner).listening = False
        m.pull_count -= (<Listener>owner).policy.pull
    elif isinstance(owner, Datagram):
        (<Datagram>owner).fd = -1
        discard_datagrams(m, <Datagram>owner)
    return 0

def _log_eviction(owner, error):
    log.error("%r lost its descriptor: %s", owner, error)


# --- listeners -------------------------------------------------------------------------------------

@cython.final
cdef class Listener:
    """A listening socket; made by `Mux.listen`.

    address: where it listens, as `socket.getsockname` gives it. connections: how many of those it accepted are open.
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
        """Whether it listens no more."""
        return self.fd < 0

    def fileno(self) -> int:
        """The descriptor; -1 once closed."""
        return self.fd

    def dup(self):
        """A new `socket.socket` for the same listening socket: to pass to another process, say.

        It is nonblocking, as both share one mode (`socket.dup` would make both blocking), and not inheritable (see
        `pass_fds` of `subprocess.Popen`). It listens until you close it, also after `close` of this Listener; but that
        removes the file of a path that `listen` was given, and no client finds the socket then.

        Raises ConnectionClosed once closed, OSError without a descriptor left.
        """
        check_thread(self.mux)
        if self.fd < 0:
            raise ConnectionClosed(f"dup: {self!r} is closed")
        return duplicate(self.fd)

    def close(self) -> None:
        """Stop listening. Connections that were accepted live on; those in the backlog are reset by the kernel."""
        check_thread(self.mux)
        close_listener(self.mux, self)

cdef Listener new_listener(Core m, Policy policy):
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

cdef int close_listener(Core m, Listener listener) except -1:
    cdef int fd = listener.fd
    if fd < 0:
        return 0
    stop_listening(m, listener)
    if listener.resting:
        m.resting.remove(listener)
        listener.resting = False
    if listener.policy.pull:
        m.pull_count -= 1
    listener.fd = -1
    try:
        if listener.file is not None:
            listener.file.remove()
    finally:
        sys_close(fd)
    return 0

cdef Listener add_listener(Core m, object sock, object file, Policy policy, object max_connections, bint exclusive):
    cdef Listener listener = new_listener(m, policy)
    cdef int r
    listener.address, listener.file = address_module.shown(socket_type.getsockname(sock)), file
    listener.max_accepted = max_connections
    listener.exclusive = exclusive
    check_usable(m)  # which a signal handler may have closed in the line of the address
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

cdef int start_listening(Core m, Listener listener) except? -2:
    cdef int r = register(m, listener, listener.fd, LISTENER, EPOLLIN | (EPOLLEXCLUSIVE if listener.exclusive else 0))
    listener.listening = r == 0
    return r

cdef int stop_listening(Core m, Listener listener) except -1:
    # DEL and not MOD: an EPOLLEXCLUSIVE registration cannot be modified.
    if listener.listening:
        unregister(m, listener.fd)
        listener.listening = False
    return 0

cdef int accept_ready(Core m, Listener listener) except -1:
    cdef sockaddr_storage address
    cdef socklen_t size
    cdef int i, fd
    sys_ensure_nonblocking(listener.fd)  # the next line knows if it is closed
    for i in range(ACCEPT_BUDGET):
        if not listener.listening or m.unwinding:
            return 0
        if listener.max_accepted is not None and listener.connections >= listener.max_accepted:
            return rest(m, listener, 0)
        fd = sys_accept(listener.fd, &address, &size)
        if fd >= 0:
            accepted(m, listener, fd, &address, size)
            if look_at_clock(m):  # each on_open may have taken long
                return 0
        elif err_would_block(fd):  # the backlog is empty; or another process was faster, which is no error
            listener.rest_ns = 0
            return 0
        elif not err_client_gone(fd):
            return accept_failed(m, listener, fd)
    return 0

cdef int accept_failed(Core m, Listener listener, int r) except -1:
    """No descriptors or memory. The client stays in the backlog, so the listener stays readable: to keep watching it
    would spin. It rests until a connection ends, or for a while that doubles."""
    cdef bint is_first = listener.rest_ns == 0
    listener.rest_ns = FIRST_REST_NS if is_first else min(2 * listener.rest_ns, LONGEST_REST_NS)
    rest(m, listener, listener.rest_ns)
    if is_first:
        log.error("%r: accept failed, resting: %s", listener, os.strerror(-r))
        if not err_no_resources(r):
            log.error("%r: this error is not expected of accept; it will be tried again", listener)
    return 0

cdef int rest(Core m, Listener listener, int64_t ns) except -1:
    m.n.accept_pauses += 1
    m.resting.append(listener)
    listener.resting = True
    listener.rests_until_ns = m.now_ns + ns if ns else 0
    stop_listening(m, listener)
    if ns:
        add_timer(m, listener.rests_until_ns, _rest_over, (listener, listener.rests_until_ns))
    return 0

def _rest_over(Listener listener, int64_t until_ns):
    """Only the timer of the last rest wakes it. One of an earlier rest, which a connection's end has cut short, would
    make one more each time, and so there would be ever more of them."""
    if listener.rests_until_ns == until_ns:
        rested(listener)

cdef int rested(Listener listener) except -1:
    cdef Core m = listener.mux
    cdef int r
    if not listener.resting:
        return 0
    r = start_listening(m, listener)
    if not listener.resting:
        return 0  # it was closed meanwhile
    m.resting.remove(listener)
    listener.resting = False
    return accept_failed(m, listener, r) if r < 0 else 0

cdef int wake_resting(Core m) except -1:
    cdef Listener listener
    cdef Py_ssize_t i
    for i in range(PyList_GET_SIZE(m.resting) - 1, -1, -1):  # one that cannot be woken is put at the end again
        if i >= PyList_GET_SIZE(m.resting):
            continue  # a log handler has closed some
        listener = <Listener>m.resting[i]
        if listener.max_accepted is None or listener.connections < listener.max_accepted:
            rested(listener)
    return 0

cdef int accepted(Core m, Listener listener, int fd, sockaddr_storage* address, socklen_t size) except -1:
    cdef Connection c = None
    cdef int r
    try:
        c = new_connection(m, listener.policy)
        c.fd = fd
        fill_address(c, address, size)
        check_fork(m)
        r = watch_connection(m, c)
    except BaseException:  # memory is out; a RST, since a FIN might look like an answer
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
    if c.policy.framing.kind == CUSTOM:
        mark(m, c)  # should it be interrupted
        make_reader(m, c)
    return tell(m, c, c.policy.on_open, R_OPENED, F_OPENED)

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
        c.flowinfo = six.sin6_flowinfo
        c.scope = six.sin6_scope_id
    else:  # AF_VSOCK, say, of which Python knows more
        try:
            c.peer_tuple = with_socket(c, "getpeername", ())
        except OSError:
            c.peer_tuple = ""  # it is gone again
    return 0


# --- connections -----------------------------------------------------------------------------------

cdef Connection new_connection(Core m, Policy policy):
    cdef Connection c = <Connection>(<PyTypeObject*>Connection).tp_new(Connection, <PyObject*>BY_US, NULL)
    c.mux = m
    c.policy = policy
    m.last_id += 1
    c.id = m.last_id
    c.received_ns = c.heard_ns = m.now_ns if m.in_turn else sys_clock_ns(CLOCK_MONOTONIC)
    return c

cdef int watch_connection(Core m, Connection c) except? -2:
    c.interest = EPOLLIN | EPOLLRDHUP
    return register(m, c, c.fd, CONNECTION, c.interest)

cdef int count_connection(Core m, Connection c) except -1:
    """It is open: from here on it gets on_open and on_close."""
    m.n.connections += 1
    if m.n.connections > m.n.peak_connections:
        m.n.peak_connections = m.n.connections
    if c.policy.pull:
        m.pull_count += 1
    if m.draining:
        close_connection(m, c)
    return 0

cdef Connection add_connection(Core m, object sock, object peer, Policy policy, object reader):
    cdef Connection c = new_connection(m, policy)
    c.peer_tuple, c.reader = peer, reader
    take_over(m, c, sock)
    count_connection(m, c)
    mark(m, c)
    return c

cdef int take_over(Core m, Connection c, object sock) except -1:
    """The socket is the connection's from now on, unless this raises."""
    cdef int r
    c.fd = socket_type.fileno(sock)
    try:
        r = watch_connection(m, c)
        if r < 0:
            raise os_error(r)
        socket_type.detach(sock)
    except BaseException:
        if owner_of(m, c.fd) is c:
            unregister(m, c.fd)
        c.fd = -1  # it stays the caller's
        raise
    return 0

cdef Connection new_outbound(Core m, object address, Policy policy, object reader):
    cdef Connection c = new_connection(m, policy)
    c.peer_tuple, c.reader = address, reader
    c.flags |= F_CONNECTING
    return c

cdef int need_sweep(Core m, Policy policy) except -1:
    """See that the timeouts of open connections are looked at often enough: at least four times in the shortest."""
    cdef int64_t shortest = 0
    for ns in (policy.idle_ns, policy.write_ns, policy.silence_ns):
        if ns and (shortest == 0 or ns < shortest):
            shortest = ns
    if shortest and (m.sweep_ns == 0 or shortest // 4 < m.sweep_ns):
        m.sweep_ns = max(min(shortest // 4, SWEEP_NS), 1_000_000)
    return plan_sweep(m)

cdef int plan_sweep(Core m) except -1:
    if m.sweep_ns and not m.sweeping:
        add_timer(m, sys_clock_ns(CLOCK_MONOTONIC) + m.sweep_ns, _sweep, (m,))
        m.sweeping = True
    return 0

def _sweep(Core m):
    """End the connections whose peer is too slow. A message costs no more than the store of a cached clock; this one
    pass over the slots looks at what was stored."""
    cdef size_t fd
    m.sweeping = False
    plan_sweep(m)
    for fd in range(m.slot_count):
        if fd < m.slot_count and m.slots[fd].kind == CONNECTION:
            end_if_slow(m, <Connection>m.objects[fd])

cdef int end_if_slow(Core m, Connection c) except -1:
    cdef Policy policy = c.policy
    if c.flags & (F_CLOSING | F_ENDED):
        return 0  # has a timer of its own
    if policy.write_ns and c.flags & F_BLOCKED and m.now_ns - c.wrote_ns >= policy.write_ns:
        return write_timeout(m, c, policy.write_ns)
    if (policy.silence_ns and m.now_ns - max(c.heard_ns, c.wrote_ns) >= policy.silence_ns
            and (receives(c) or c.out_head != NULL) and is_waiting(m, c)):
        return silence_timeout(m, c)
    if policy.idle_ns and receives(c) and m.now_ns - c.received_ns >= policy.idle_ns and is_waiting(m, c):
        return idle_timeout(m, c)
    return 0

cdef bint is_waiting(Core m, Connection c) except -1:
    """Whether the peer is slow, and not we; a framer that is asked may also have closed the connection."""
    return not has_message(m, c) and c not in m.offloaded and not c.flags & (F_CLOSING | F_ENDED)


# --- other threads ---------------------------------------------------------------------------------

cdef int call_foreign(Core m, Operation operation, object target, object argument) except -1:
    """Queue something for the Mux's thread, and end its wait if it is in one."""
    m.foreign.append((operation, target, argument))
    return wake(m)

cdef int end_elsewhere(Core m, Connection c, Operation operation) except -1:
    """close() or abort() outside of the Mux's thread, or before it has one."""
    if not is_foreign(m):
        with cython.critical_section(m):  # see bind()
            if not is_foreign(m):
                return close_connection(m, c) if operation == OP_CLOSE else abort(m, c)
    c.close_asked = True
    return 0 if seen_flags(c) & F_CLOSED else call_foreign(m, operation, c, None)

cdef int wake(Core m) except -1:
    # The loop sets `sleeping` before it looks for work for the last time; so either it sees what was queued, or we see
    # the flag. Of many threads, one writes.
    if muxcore_exchange(&m.sleeping, 0) or load_flag(&m.direct):
        with cython.critical_section(m):  # release() must not close the descriptor between our look and our write
            if m.wake_fd >= 0:
                sys_eventfd_signal(m.wake_fd)
    return 0

cdef int run_foreign(Core m) except -1:
    cdef Connection c
    cdef Operation operation
    for _ in range(len(m.foreign)):
        if m.unwinding or tick(m):
            break  # shut_down(), or the next turn, does the rest
        operation, target, argument = m.foreign.popleft()
        if operation == OP_CALL:
            if not m.is_closed:
                call_plain(m, target, argument)
            continue
        c = <Connection>target
        if operation == OP_SEND or operation == OP_SEND_ABOVE:
            apply_foreign_send(m, c, argument, operation == OP_SEND_ABOVE)
        elif operation == OP_CLOSE:
            close_connection(m, c)
        else:
            if operation == OP_OVERFLOW:
                keep_error(c, argument)
            abort(m, c)
    return 0

cdef int apply_foreign_send(Core m, Connection c, object data, bint promised_drain) except -1:
    add_count(&c.foreign, -foreign_word(PyBytes_GET_SIZE(data)))
    # It was accepted before a close() that came since, and close() waits for it.
    if c.flags & (F_ENDED | F_BROKEN | F_SHUT):
        count_drop(m)
        return 0
    try:
        if PyBytes_GET_SIZE(data):
            push(m, c, data)
    except MemoryError as error:  # it was accepted: there is no going on without it
        return abort_for(m, c, error)
    queued(m, c)
    if promised_drain and not c.flags & F_ABOVE:
        c.flags |= F_DRAIN_OWED
    return mark(m, c)


# --- the turn of the loop --------------------------------------------------------------------------

cdef inline bint has_work(Core m) except -1:
    """Whether there is something to do that no wait would bring."""
    return (PyList_GET_SIZE(m.pending) != 0 or PySequence_Size(m.soon) != 0 or PySequence_Size(m.foreign) != 0
            or PyList_GET_SIZE(m.settling) != 0 or m.lost_mark or (m.running and load_flag(&m.stopping))
            or (m.polling and PyList_GET_SIZE(m.ready) != 0) or (m.draining and m.n.connections == 0))

# A turn is bounded in time. Its steps (a message, a call, a settled connection) are counted. Every eighth of them, and
# every eighth event, looks at the clock, which costs some 25 ns.

cdef inline bint tick(Core m) except -1:
    """Count a step; whether the rest of this part of the turn is for the next turn."""
    m.ticks += 1
    return m.turn_over if m.ticks % 8 else look_at_clock(m)

cdef bint look_at_clock(Core m) except -1:
    cdef int64_t now = sys_clock_ns(CLOCK_MONOTONIC)
    check_fork(m)
    if now > m.turn_ends_ns:
        m.turn_over = True
    let_others_run(m, now)
    return m.turn_over

cdef inline int let_others_run(Core m, int64_t now) except -1:
    """Let other threads have the interpreter, if it has been ours for long."""
    if now - m.released_ns > RELEASE_NS:
        m.released_ns = now
        with nogil:
            pass
    return 0

cdef inline void begin_part(Core m) noexcept:
    """Behind a look at the clock."""
    m.turn_over = False
    m.turn_ends_ns = m.now_ns + PART_NS

cdef inline void begin_part_now(Core m) noexcept:
    m.now_ns = sys_clock_ns(CLOCK_MONOTONIC)
    begin_part(m)

cdef object add_timer(Core m, int64_t when_ns, object fn, tuple args):
    """A timer of our own. Without it a connection or listener would wait for ever: so if an interrupt, or a lack of
    memory, comes in its way, everything is looked at again."""
    try:
        return m.timers.add(when_ns, fn, args)
    except BaseException:
        m.lost_mark = True
        raise

cdef int run_timers(Core m) except -1:
    cdef int64_t now = sys_clock_ns(CLOCK_MONOTONIC)
    newest = m.timers.order
    while not m.unwinding:
        handle = m.timers.due(now, newest)
        if handle is None:
            break
        call = m.timers.take(handle)
        if call is not None:
            fn, args = call
            call_plain(m, fn, args)
        if tick(m):
            break
    return 0

cdef int call_plain(Core m, object fn, object args) except -1:
    """Call what was passed to call_soon and the like; an Exception is logged."""
    try:
        fn(*args)
    except Exception as error:
        if m.forks != forks:
            raise
        m.lost_mark = m.lost_mark or isinstance(error, MemoryError)  # it may have been a step of ours
        m.n.handler_errors += 1
        log.error("%r raised", fn, exc_info=error)
    return check_fork(m)

cdef int wait(Core m, int64_t timeout_ns) except -1:
    """Fill the batch: at once if something is ready, else after a wait without the interpreter lock.

    Letting go of the lock costs more than asking the kernel a second time, unless there is nothing yet: then the first
    question was for nothing. So whoever had at most one event the last time waits at once."""
    cdef Epoll ep = m.epoll
    cdef int64_t deadline = m.now_ns + timeout_ns if timeout_ns >= 0 else -1
    cdef bint was_busy = ep.count > 1
    cdef bint slept = False
    m.n.waits += 1
    ep.next = ep.count = 0
    if was_busy or timeout_ns == 0:
        ep.count = checked_wait(ep, 0)
    if ep.count == 0 and timeout_ns:
        sleep_until(m, deadline)
        slept = True
    m.now_ns = sys_clock_ns(CLOCK_MONOTONIC)
    m.n.events += ep.count
    if slept:
        m.released_ns = m.now_ns
    else:
        let_others_run(m, m.now_ns)
    return 0

cdef int checked_wait(Epoll ep, int64_t timeout_ns) except -1:
    cdef int r
    if timeout_ns == 0:
        r = sys_epoll_wait(ep.fd, ep.events, ep.capacity, 0, NULL)
    else:
        with nogil:
            r = sys_epoll_wait(ep.fd, ep.events, ep.capacity, timeout_ns, ep.pwait2)
    if r < 0:
        raise os_error(r)
    return r

cdef int sleep_until(Core m, int64_t deadline) except -1:
    """Block until there are events, work, or `deadline` (-1: for ever). A signal ends the system call: Python's
    handlers run, and what is left of the time is waited for again."""
    cdef int64_t left = -1
    cdef int64_t now = 0
    cdef int64_t due
    cdef int64_t spin_end = sys_clock_ns(CLOCK_MONOTONIC) + m.busy_poll_ns if m.busy_poll_ns else 0
    if 0 <= deadline < spin_end:
        spin_end = deadline
    while m.epoll.count == 0:
        PyErr_CheckSignals()
        muxcore_exchange(&m.sleeping, 1)
        due = deadline
        if PyList_GET_SIZE(m.timer_heap):  # looked at each time: a signal handler may have set a timer
            due = m.timers.next_ns()
            if due < 0 or 0 <= deadline < due:
                due = deadline
        if due >= 0 or spin_end:
            now = sys_clock_ns(CLOCK_MONOTONIC)
        left = max(due - now, 0) if due >= 0 else -1
        if left == 0 or has_work(m) or m.unwinding:
            break
        if now < spin_end:
            m.epoll.count = spin(m.epoll, min(spin_end, now + RELEASE_NS))  # not longer, for signals
        else:
            m.epoll.count = checked_wait(m.epoll, left)
    muxcore_exchange(&m.sleeping, 0)
    return 0

cdef int spin(Epoll ep, int64_t end) except -1:
    """Ask again and again: a thread that sleeps is woken some microseconds after its event. Other threads have the
    interpreter meanwhile, and a wakeup of theirs is an event like any other."""
    cdef int r = 0
    with nogil:
        while r == 0 and sys_clock_ns(CLOCK_MONOTONIC) < end:
            r = sys_epoll_wait(ep.fd, ep.events, ep.capacity, 0, NULL)
    if r < 0:
        raise os_error(r)
    return r

cdef int dispatch(Core m) except -1:
    """Hand the events of the batch to their owners, a group at a time, and send what a group has answered when all its
    handlers are done: to wake a process is the dearest part of a small send, and one that waits for several answers
    is woken once and not for each. The group is small, so that no answer waits for many events.

    `next` lives in the set, so an exception loses no event: the next turn goes on behind it. So does the next poll()
    once this one has read `read_budget` bytes: what the user gets is still in the processor's cache, and answers do
    not wait for megabytes from everybody else."""
    cdef uint64_t enough = m.n.bytes_in + m.read_budget if m.polling else <uint64_t>-1
    cdef Epoll ep = m.epoll
    while ep.next < ep.count and m.n.bytes_in < enough and not m.unwinding:
        try:
            dispatch_group(m, enough)
        finally:
            send_group(m)
        if m.turn_over:
            break
    return 0

cdef int dispatch_group(Core m, uint64_t enough) except -1:
    cdef Epoll ep = m.epoll
    cdef int end = min(ep.count, ep.next + GROUP)
    cdef epoll_event* event
    cdef uint32_t fd
    cdef object owner
    while ep.next < end and m.n.bytes_in < enough:
        event = &ep.events[ep.next]
        ep.next += 1
        fd = <uint32_t>event.data.u64
        if m.slots[fd].generation != <uint32_t>(event.data.u64 >> 32):
            m.n.stale_events += 1  # its descriptor was closed, and maybe reused, earlier in this batch
            continue
        owner = <object>PyList_GET_ITEM(m.objects, fd)
        if m.slots[fd].kind == CONNECTION:
            Py_INCREF(owner)
            m.group[m.group_count] = m.answering = <PyObject*>owner
            m.group_count += 1
            on_ready(m, <Connection>owner, event.events)
        elif m.slots[fd].kind == LISTENER:
            accept_ready(m, <Listener>owner)
        elif m.slots[fd].kind == DATAGRAM:
            datagram_ready(m, <Datagram>owner, event.events)
        elif m.slots[fd].kind == WATCHED:
            watched_ready(m, owner, event.events)
        else:
            m.n.wakeups += 1
            sys_discard(fd)
        if m.turn_over or (ep.next % 8 == 0 and look_at_clock(m)):
            break  # close() sets it, too
    return 0

cdef int send_group(Core m) except -1:
    """Send what the group has answered; a child that one of its handlers has forked only forgets the group."""
    cdef int count = m.group_count
    cdef int done = 0
    m.group_count = 0
    m.answering = NULL
    try:
        if m.forks == forks:
            while done < count:
                done += 1
                send_out(m, <Connection>taken(m.group[done - 1]))
    finally:
        while done < count:
            done += 1
            DECREF(m.group[done - 1])
    return 0

cdef int watch_descriptor(Core m, object watch, int wanted, dict calls) except -1:
    cdef int r = set_wanted(m, watch, watch.fd, wanted)
    if r < 0:
        raise os_error(r)
    watch.calls = calls
    return 0

cdef int set_wanted(Core m, object watch, int fd, int wanted) except? -2:
    """0 or -errno."""
    cdef uint32_t events = (EPOLLIN if wanted & READ else 0) | (EPOLLOUT if wanted & WRITE else 0)
    cdef int r
    if wanted == 0:
        return unregister(m, fd)
    if owner_of(m, fd) is watch:
        r = sys_epoll_ctl(m.epoll.fd, EPOLL_CTL_MOD, fd, events, token(m, fd))
        if r == 0 or not err_not_there(r):
            return r
    return register(m, watch, fd, WATCHED, events)

cdef int watched_ready(Core m, object watch, uint32_t events) except -1:
    """An error or a hang-up is told to both directions: to read or to write tells what it is."""
    cdef int fd = watch.fd
    if events & ~<uint32_t>EPOLLOUT:
        call_watched(m, watch.calls.get(READ))
    if events & ~<uint32_t>EPOLLIN and not m.unwinding and owner_of(m, fd) is watch:
        call_watched(m, watch.calls.get(WRITE))
    return 0

cdef int call_watched(Core m, object call) except -1:
    if call is not None:
        fn, args = call
        call_plain(m, fn, args)
    return 0

cdef int settle_all(Core m) except -1:
    """See to everything that was marked. Those marked meanwhile wait for the next time, so that two connections
    that keep marking each other cannot keep the loop here."""
    if PyList_GET_SIZE(m.settling) == 0:  # else it was interrupted, perhaps amid the steps of one: it goes on there
        m.settling, m.pending = m.pending, m.settling
    while m.settled < PyList_GET_SIZE(m.settling) and not m.unwinding:
        settle_owner(m, <object>PyList_GET_ITEM(m.settling, m.settled))
        m.settled += 1
        check_fork(m)
        if tick(m):
            break
    if m.settled == PyList_GET_SIZE(m.settling):
        PyList_SetSlice(m.settling, 0, m.settled, NULL)
        m.settled = 0
    return 0

cdef inline int settle_owner(Core m, object owner) except -1:
    return settle_datagram(m, <Datagram>owner) if type(owner) is Datagram else settle(m, <Connection>owner)

cdef int settle_everybody(Core m) except -1:
    """Memory was out, so nobody could write down what is left to do: look at everything. All are written down before
    the first is seen to, since one that has lost its descriptor is found nowhere else."""
    cdef Connection c
    cdef Py_ssize_t count
    everybody = m._connections() + m._datagrams()
    for owner in everybody:
        if isinstance(owner, Connection):
            c = <Connection>owner
            c.flags &= ~F_STARVED  # its timer may be what was lost
            report_message(m, c)
            if c.flags & F_CONNECTING and c.deadline is not None:
                c.deadline.tell_again()
    count = PyList_GET_SIZE(m.pending)
    m.settling, m.settled = list(dict.fromkeys(m.settling[m.settled:] + m.pending + everybody)), 0
    PyList_SetSlice(m.pending, 0, count, NULL)  # what a finaliser has marked since may not be among them
    m.lost_mark = False
    plan_sweep(m)
    return wake_resting(m)

cdef int run_soon(Core m) except -1:
    for _ in range(len(m.soon)):
        if m.unwinding:
            break
        fn, args = m.soon.popleft()
        call_plain(m, fn, args)
        if tick(m):
            break
    return 0

cdef int turn(Core m, int64_t timeout_ns) except -1:
    """One turn: what was left to do, a wait, what the kernel reports, what is queued or due."""
    cdef bint complete = False
    m.in_turn = True
    try:
        PyErr_CheckSignals()
        m.told = False
        if m.lost_mark:
            settle_everybody(m)
        if PyList_GET_SIZE(m.pending) or PyList_GET_SIZE(m.settling):
            begin_part_now(m)
            settle_all(m)
        if m.epoll.next == m.epoll.count and not m.unwinding:
            wait(m, 0 if m.told or has_work(m) else timeout_ns)
            begin_part(m)
        else:
            begin_part_now(m)
        dispatch(m)
        if PySequence_Size(m.foreign):
            begin_part_now(m)
            run_foreign(m)
        if PySequence_Size(m.soon):
            begin_part_now(m)
            run_soon(m)
        if PyList_GET_SIZE(m.timer_heap):
            begin_part_now(m)
            run_timers(m)
        if PyList_GET_SIZE(m.pending):
            begin_part_now(m)
            settle_all(m)
        if MUXCORE_CHECKS:
            check_turn(m)
        complete = True
    finally:
        m.lost_mark = m.lost_mark or not complete
        m.in_turn = False
        m.corked = NULL
        if m.forks == forks:
            if m.unwinding:
                shut_down(m)
            elif m.driven:
                tell_driver(m)
    return 0

cdef int tell_driver(Core m) except -1:
    """Whoever drives this Mux waits for its descriptor: let it be readable if there is something left to do, and when
    the next timer is due."""
    cdef int64_t due = m.timers.next_ns()
    if has_work(m) or PyList_GET_SIZE(m.finished) or m.epoll.next < m.epoll.count:
        sys_eventfd_signal(m.wake_fd)
    if due != m.armed_ns or 0 <= due <= m.now_ns:  # the latter has gone off, and is still due
        sys_timerfd_set(m.timer_fd, due)
        m.armed_ns = due
    return 0

cdef int begin_turns(Core m, str method) except -1:
    check_can_turn(m, method)
    if not is_here(m):
        bind(m)
        check_usable(m)  # what has run meanwhile may have closed it
    store_flag(&m.direct, m.driven)
    m.now_ns = sys_clock_ns(CLOCK_MONOTONIC)
    return 0


# --- the end ---------------------------------------------------------------------------------------

cdef int shut_down(Core m) except -1:
    """What close() promises: flush once, abort the rest, tell everybody; then give back what the Mux holds. An
    exception on the way (Ctrl-C, say) is raised at the end, when everything is done all the same."""
    owners = m._listeners() + [None] + m._connections()
    unsettled = 2 * (m.settling[m.settled:] + m.pending + m._connections())
    interrupt = None
    m.unwinding = False
    store_flag(&m.is_closed, True)
    m.in_turn = True
    for owner in owners:
        try:
            if owner is None:
                refuse_output(m)
                while PySequence_Size(m.foreign):  # what other threads have sent counts as sent
                    begin_part_now(m)
                    run_foreign(m)
            elif isinstance(owner, Listener):
                close_listener(m, <Listener>owner)
            else:
                close_now(m, <Connection>owner)
        except BaseException as error:
            interrupt = error
            if isinstance(owner, Connection):
                abort(m, <Connection>owner)
    for owner in unsettled:  # twice, since on_close is owed even after an on_open that raised
        try:
            settle_owner(m, owner)
        except BaseException as error:
            interrupt = error
    for owner in m._datagrams():  # the last, since on_close may send something
        try:
            close_datagram(m, <Datagram>owner)
        except BaseException as error:
            interrupt = error
    m.in_turn = False
    try:
        m._at_close.close()
    except BaseException as error:
        interrupt = error
    release(m)
    if interrupt is not None:
        raise interrupt
    return 0

cdef int refuse_output(Core m) except -1:
    cdef Connection c
    for conn in m._connections():
        c = <Connection>conn
        with cython.critical_section(c):  # as in advance_close()
            c.flags |= F_CLOSING
    return 0

cdef int close_now(Core m, Connection c) except -1:
    cdef size_t unsent
    send_out(m, c)
    unsent = c.outbox_bytes + foreign_bytes(c)
    if unsent:
        return abort_for(m, c, ConnectionClosed(f"the Mux was closed with {unsent} bytes unsent", conn=c))
    discard_inbox(m, c)
    return end(m, c, None)

cdef int release(Core m) except -1:
    """Close the Mux's own descriptors and drop what it refers to. Connections close theirs when they go."""
    store_flag(&m.is_closed, True)
    epoll_close(m.epoll)
    with cython.critical_section(m):  # see wake()
        if m.wake_fd >= 0:
            sys_close(m.wake_fd)
            m.wake_fd = -1
    if m.timer_fd >= 0:
        sys_close(m.timer_fd)
        m.timer_fd = -1
    m.settled = 0
    m.slot_count = 0  # before the objects are gone, whose finalizers may call anything
    for queue in (m.objects, m.connecting, m.pending, m.settling, m.ready, m.finished, m.resting, m.soon, m.foreign,
                  m.offloaded, m.timers):
        queue.clear()
    return 0

cdef int close_descriptors(Core m) except -1:
    """In a forked child, or for a Mux that was never closed: close(2) and nothing else."""
    for owner in m.objects + m.resting + list(m.connecting):
        if isinstance(owner, Connection) and not (<Connection>owner).flags & F_CLOSED:
            (<Connection>owner).flags |= F_CLOSING | F_ENDED | F_CLOSED | F_CLOSE_TOLD
            discard_outbox(m, <Connection>owner)
            if owner in m.connecting and (<Connection>owner).deadline is not None:
                (<Connection>owner).deadline.abandon()
            sys_close((<Connection>owner).fd)
            (<Connection>owner).fd = -1
        elif isinstance(owner, Listener) and (<Listener>owner).fd >= 0:
            sys_close((<Listener>owner).fd)
            (<Listener>owner).fd = -1
            (<Listener>owner).listening = (<Listener>owner).resting = False
        elif isinstance(owner, Datagram) and (<Datagram>owner).fd >= 0:
            sys_close((<Datagram>owner).fd)
            (<Datagram>owner).fd = -1
    return release(m)


# --- the class -------------------------------------------------------------------------------------

cdef class Core:
    """The compiled half of a Mux; _mux.py tells what it needs of its core."""

    def __cinit__(self):
        self.wake_fd = self.timer_fd = -1
        self.armed_ns = -1
        self.is_closed = True

    def _set_up(self, backend, int max_events, Py_ssize_t read_size, Py_ssize_t read_budget, int64_t busy_poll_ns):
        global socket_type, address_module, adopted
        if self.epoll is not None:
            raise RuntimeError("a Mux is initialised once")
        from . import _address, _own

        socket_type, address_module, adopted = _own.SocketType, _address, _own.adopted
        self.read_size, self.read_budget, self.busy_poll_ns = read_size, read_budget, busy_poll_ns
        # glibc maps blocks of 128 KiB and more anew each time, until it has seen one of that size freed.
        allocate_and_free(LARGE_READS * read_size)
        self.objects, self.pending, self.settling, self.ready, self.finished, self.resting = [], [], [], [], [], []
        self.connecting = set()
        self.soon, self.foreign, self.offloaded = deque(), deque(), {}
        self.timers = Timers(self._check_thread, self._wake_driver)
        self.timer_heap = self.timers.heap
        self.forks = forks
        self.now_ns = sys_clock_ns(CLOCK_MONOTONIC)
        self.epoll = epoll_with_batch(max_events)
        self.wake_fd = sys_eventfd()
        if self.wake_fd < 0:
            raise os_error(self.wake_fd)
        self.is_closed = False
        watch_wakeup(self, self.wake_fd)

    def __dealloc__(self):
        if self.wake_fd >= 0:
            sys_close(self.wake_fd)
        if self.timer_fd >= 0:
            sys_close(self.timer_fd)
        free(self.slots)
        free(self.window)
        free(self.packets)
        free(self.text.data)
        Py_XDECREF(self.scratch)
        Py_XDECREF(self.large_scratch)
        for name in self.names:
            Py_XDECREF(name)
        for spares in self.spares:
            for spare in spares.messages[:spares.count]:
                DECREF(spare)
        while self.blocks != NULL:
            block = self.blocks
            self.blocks = block.next
            free(block)

    def __del__(self):
        if not self.is_closed:
            try:
                if self.forks == forks:
                    warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self)
            finally:
                try:
                    self._signals.close()  # Python would write into a descriptor that is somebody else's
                finally:
                    close_descriptors(self)

    # -- what it is

    @property
    def backend(self) -> str:
        return "epoll"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.is_closed

    def stats(self):
        """The counters as they are now; from any thread."""
        return Stats(**self.n)

    def fileno(self) -> int:
        """The epoll descriptor: readable when `poll(0)` has something to do, so that another loop can drive this one.

        From then on nothing is kept back for the next poll: `send` outside of callbacks sends at once.
        """
        check_usable(self)
        if not self.driven:
            if self.timer_fd < 0:
                self.timer_fd = sys_timerfd()
                if self.timer_fd < 0:
                    raise os_error(self.timer_fd)
            watch_wakeup(self, self.timer_fd)
            self.driven = True
        store_flag(&self.direct, True)
        if not self.in_turn:
            tell_driver(self)
        return self.epoll.fd

    # -- what _mux.py needs

    @property
    def _timers(self):
        return self.timers

    @property
    def _soon(self):
        return self.soon

    @property
    def _offloaded(self):
        return self.offloaded

    def _take_back(self, Connection c):
        self.offloaded.pop(c, None)
        c.received_ns = self.now_ns  # until now the peer had to wait for us
        mark(self, c)

    def _hold(self, Connection c, bint on):
        if on == (c.flags & F_HELD != 0):
            return
        c.flags ^= F_HELD
        if not on:
            c.received_ns = sys_clock_ns(CLOCK_MONOTONIC)
        mark(self, c)

    def _fail(self, Connection c, error):
        handler_failed(self, c, error)

    def _check(self):
        check_usable(self)

    def _check_thread(self):
        check_thread(self)

    def _begin(self, str method):
        begin_turns(self, method)

    def _running(self):
        return self.running

    def _without_handler(self):
        return self.pull_count

    def _listeners(self):
        return [owner for owner in self.objects if isinstance(owner, Listener)] + self.resting

    def _connections(self):
        return [owner for owner in self.objects if isinstance(owner, Connection)] + list(self.connecting)

    def _datagrams(self):
        return [owner for owner in self.objects if isinstance(owner, Datagram)]

    def _broadcast(self, list connections, message):
        return broadcast(self, connections, message)

    def _bind(self):
        bind(self)

    def _owner(self, int fd):
        with cython.critical_section(self):
            return owner_of(self, fd)

    def _wake_driver(self):
        if self.direct and not self.in_turn:
            sys_eventfd_signal(self.wake_fd)

    def _call_foreign(self, fn, args):
        if not load_flag(&self.is_closed):
            check_fork(self)
        if load_flag(&self.is_closed):
            raise RuntimeError("the Mux is closed")
        call_foreign(self, OP_CALL, fn, args)

    # In critical sections, since other threads may do the like before the first turn: see bind().

    def _policy(self, *settings):
        policy = Policy(*settings)
        with cython.critical_section(self):
            need_sweep(self, policy)
        return policy

    def _add_listener(self, sock, file, Policy policy, max_connections, exclusive):
        with cython.critical_section(self):
            check_usable(self)  # here and below: the arguments may have run code of the user's
            return add_listener(self, sock, file, policy, max_connections, exclusive)

    def _add_connection(self, sock, peer, Policy policy):
        reader = CustomReader(policy.framer) if policy.framing.kind == CUSTOM else None
        with cython.critical_section(self):
            check_usable(self)
            return add_connection(self, sock, peer, policy, reader)

    def _new_connection(self, address, Policy policy):
        reader = CustomReader(policy.framer) if policy.framing.kind == CUSTOM else None
        with cython.critical_section(self):
            return new_outbound(self, address, policy, reader)

    def _watch(self, watch, int wanted, dict calls):
        with cython.critical_section(self):
            check_usable(self)
            watch_descriptor(self, watch, wanted, calls)

    def _attempting(self, Connection c, attempt):
        with cython.critical_section(self):
            check_usable(self)  # and the first turn, in another thread, may have been faster
            self.connecting.add(c)
            c.deadline = attempt
            count_connection(self, c)

    def _connected(self, Connection c, sock, peer):
        if c.flags & F_ENDED:  # by what has run since its attempt came to an end
            sock.close()
            return
        take_over(self, c, sock)
        c.deadline = None
        with cython.critical_section(c):  # other threads may be reading it
            c.peer_tuple = peer
        c.flags &= ~F_CONNECTING
        c.received_ns = c.heard_ns = self.now_ns
        self.connecting.discard(c)
        mark(self, c)

    def _connect_failed(self, Connection c, error):
        self.n.timeouts += isinstance(error, ConnectTimeout)
        end(self, c, without_frames(error))

    def _add_datagram(self, sock, file, tuple remotes, callbacks, limits, size_t max_size):
        cdef Datagram d = Datagram.__new__(Datagram, TOKEN)
        cdef int r, fd = socket_type.fileno(sock)
        d.mux = self
        d.address, d.file, d.limits = address_module.shown(socket_type.getsockname(sock)), file, limits
        d.remotes, d.remote = remotes, remotes[0] if remotes else None
        d.on_datagrams, d.on_error, d.on_drain = callbacks
        d.out, d.errors, d.names, d.sockaddrs, d.last_name = [], [], {}, {}, b""
        d.low, d.high, d.max_outbox, d.overflow = limits.low, limits.high, limits.max_outbox, OVERFLOWS[limits.overflow]
        d.family, d.max_size = address_module.family_of(sock), max_size
        d.largest_sent = address_module.LARGEST_DATAGRAM.get(d.family, SIZE_MAX)
        d.interest = EPOLLIN
        with cython.critical_section(self):
            check_usable(self)
            give_back_packets(self, taken_packets(self, max_size))  # so that there is memory when something comes
            r = register(self, d, fd, DATAGRAM, d.interest)
        if r < 0:
            raise os_error(r)
        d.fd = fd
        socket_type.detach(sock)
        return d

    # -- the loop

    def poll(self, timeout=None):
        """Wait up to `timeout` seconds (None: for ever) for one batch of events and see to it.

        Returns [(connection, flags), ...] for connections without a handler: OPENED, READABLE, DRAINED, EOF and
        CLOSED, or'ed. The list is empty when the time was up, or when only callbacks ran.
        """
        cdef Connection c
        cdef int64_t timeout_ns = -1 if timeout is None else to_ns(check_seconds("timeout", timeout))
        begin_turns(self, "poll")
        while self.finished:
            c = <Connection>self.finished.pop()
            if c.inbox == NULL and (c.reader is None or not c.reader.found):
                close_connection(self, c)
        self.polling = True
        try:
            turn(self, timeout_ns)
            return take_ready(self)
        finally:
            self.polling = False

    def _serve(self):
        self.running = True
        try:
            while not load_flag(&self.stopping) and not self.is_closed:
                turn(self, -1)
        finally:
            self.running = False
            store_flag(&self.stopping, False)
            store_flag(&self.direct, not self.is_closed)

    def _serve_until_empty(self, int64_t deadline_ns):
        self.running = self.draining = True
        try:
            self._serve_until(deadline_ns)
        finally:
            self.running = self.draining = False
            store_flag(&self.stopping, False)
        return self.n.connections == 0

    def _serve_until(self, int64_t deadline_ns):
        while ((self.n.connections or self.pending or self.settling) and not load_flag(&self.stopping)
               and not self.is_closed):
            turn(self, max(deadline_ns - sys_clock_ns(CLOCK_MONOTONIC), 0) if self.n.connections else 0)
            if sys_clock_ns(CLOCK_MONOTONIC) >= deadline_ns:
                break

    def stop(self) -> None:
        """Make `run` (this one, or else the next) return after the current batch; from any thread."""
        check_fork(self)
        store_flag(&self.stopping, True)
        wake(self)

    def close(self) -> None:
        """Flush every connection once, without blocking, abort those with output left, and release everything.

        Inside a callback it takes effect when that returns. In a forked child it only closes the descriptors. Once the
        thread that the Mux was bound to has ended, any thread may call it, and `on_close` is called in that thread.
        """
        if self.is_closed:
            return
        if self.forks != forks:
            close_descriptors(self)
            return
        adopt(self)
        check_thread(self)
        if self.in_turn:
            self.unwinding = self.turn_over = True
        else:
            shut_down(self)

cdef list take_ready(Core m):
    """What poll() reports."""
    cdef Connection c
    cdef uint32_t what
    cdef uint64_t before = m.reports
    cdef list taken = [], reported = []
    taken, m.ready = m.ready, taken  # to make what is returned may run a finalizer, which may poll or close, too
    try:
        for conn in taken:
            c = <Connection>conn
            what = (c.flags & F_REPORT_MASK) // F_REPORT
            if what & R_EOF and not c.policy.half_open:
                m.finished.append(c)
            reported.append((c, what))
    except BaseException:
        taken, m.ready = m.ready, taken  # which needs no memory
        if taken:
            m.ready.extend(taken)
        raise
    if m.reports == before:
        for conn in taken:  # not before all are there to be returned
            (<Connection>conn).flags &= ~<uint32_t>F_REPORT_MASK
        return reported
    for conn, what in reported:
        c = <Connection>conn
        c.flags &= ~(what * F_REPORT)
        if c.flags & F_REPORT_MASK:  # the finalizer did more to it
            m.ready.append(c)
    return reported

cdef int watch_wakeup(Core m, int fd) except -1:
    """Watch a descriptor of ours whose readability only ends a wait."""
    cdef int r = register(m, m.epoll, fd, WAKEUP, EPOLLIN)
    if r < 0:
        raise os_error(r)
    return 0
