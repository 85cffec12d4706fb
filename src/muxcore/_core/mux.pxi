# What may live here: CompiledCore, and how connections come to it. What the user calls and is not hot is in _mux.py,
# which is a base class of the same object.

cdef Connection add_connection(CompiledCore m, object sock, object peer, Policy policy, object reader):
    cdef Connection c = new_connection(m, policy)
    c.peer_tuple, c.reader = peer, reader
    take_over(m, c, sock)
    count_connection(m, c)
    schedule(m, c)
    return c

cdef int take_over(CompiledCore m, Connection c, object sock) except -1:
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

cdef Connection new_outbound(CompiledCore m, object address, Policy policy, object reader):
    cdef Connection c = new_connection(m, policy)
    c.peer_tuple, c.reader = address, reader
    c.flags |= F_CONNECTING
    return c


# --- the class -------------------------------------------------------------------------------------

@cython.no_gc_clear  # as Connection; its tables are lists, which are cleared
cdef class CompiledCore:
    """The compiled half of a Mux; _mux.py lists what it calls of its core."""

    def __cinit__(self):
        self.wake_fd = self.timer_fd = -1
        self.armed_ns = -1
        self.is_closed = True

    def _set_up(self, backend, int max_events, Py_ssize_t read_size, Py_ssize_t read_budget, int64_t busy_poll_ns):
        global socket_type, plain_type, address_module, adopted, reports
        from . import _address, _own, _report

        if reports is None:  # once: other threads may be reading them
            socket_type, plain_type, address_module, adopted = _own.SocketType, _own.PlainType, _address, _own.adopted
            reports = _report.REPORTS
        self.read_size, self.read_budget, self.busy_poll_ns = read_size, read_budget, busy_poll_ns
        # glibc maps blocks of 128 KiB and more anew each time, until it has seen one of that size freed.
        allocate_and_free(LARGE_READS * read_size)
        self.objects, self.pending, self.pending_now = [], [], []
        self.ready, self.finished, self.accept_paused = [], [], []
        self.connecting = set()
        self.handshakes = deque()
        self.soon, self.foreign, self.offloaded = deque(), deque(), {}
        self.timers = Timers(self._check_thread, self._wake_driver)
        self.timer_heap = self.timers.heap
        self.forks = forks
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
        free(self.records)
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
                    self._signals.close()  # Python would write into a descriptor that another object has by then
                finally:
                    close_descriptors(self)

    # -- what it is

    @property
    def backend(self) -> str:
        """The readiness call that it waits with: "epoll", "poll", "select" or "kqueue"."""
        return "epoll"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.is_closed

    def stats(self):
        """The current counters. Any thread may call it."""
        return Stats(**self.n)

    def fileno(self) -> int:
        """The epoll descriptor, for another loop to watch: it is readable whenever `poll(0)` has work to do.

        After the first call, `send` outside of callbacks sends at once, and does not wait for the next `poll`.
        """
        check_usable(self)
        if not self.driven:
            if self.timer_fd < 0:
                self.timer_fd = sys_timerfd()
                if self.timer_fd < 0:
                    raise os_error(self.timer_fd)
            watch_wakeup(self, self.timer_fd)
            self.driven = True
        store_flag(&self.flush_at_once, True)
        if not self.in_turn:
            notify_driver(self)
        return self.epoll.fd

    def _batch_output(self):
        """For coroutines: what they send between two turns leaves with the next turn, which is soon."""
        self.batches = True

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

    def _take_back(self, Connection c not None):
        self.offloaded.pop(c, None)
        c.received_ns = self.now_ns  # until now the peer had to wait for us
        schedule(self, c)

    def _hold(self, Connection c not None, bint on):
        if on == (c.flags & F_HELD != 0):
            return
        c.flags ^= F_HELD
        if not on:
            c.received_ns = sys_clock_ns(CLOCK_MONOTONIC)
        schedule(self, c)

    def _fail(self, Connection c not None, error):
        handler_failed(self, c, error)

    def _check(self):
        check_usable(self)

    def _check_thread(self):
        check_thread(self)

    def _begin(self, str method):
        begin_turns(self, method)

    def _has_judged(self, int64_t due):
        return has_judged(self, due)

    def _running(self):
        return self.running

    def _without_handler(self):
        return self.pull_count

    def _listeners(self):
        return [owner for owner in self.objects if isinstance(owner, Listener)] + self.accept_paused

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
        if self.flush_at_once and not self.in_turn:
            sys_eventfd_signal(self.wake_fd)

    def _call_foreign(self, fn, args):
        if not load_flag(&self.is_closed):
            check_fork(self)
        if load_flag(&self.is_closed):
            raise RuntimeError("the Mux is closed")
        call_foreign(self, OP_CALL, fn, args)

    # In critical sections, since other threads may do the same before the first turn: see bind().

    def _policy(self, *settings):
        policy = Policy(*settings)
        with cython.critical_section(self):
            need_sweep(self, policy)
        return policy

    def _add_listener(self, sock, file, Policy policy, max_connections, exclusive):
        with cython.critical_section(self):
            return add_listener(self, sock, file, policy, max_connections, exclusive)

    def _add_connection(self, sock, peer, Policy policy):
        reader = CustomReader(policy.framer) if policy.framing.kind == CUSTOM else None
        with cython.critical_section(self):
            check_usable(self)  # here and below: the arguments may have run code of the user's
            return add_connection(self, sock, peer, policy, reader)

    def _new_connection(self, address, Policy policy):
        reader = CustomReader(policy.framer) if policy.framing.kind == CUSTOM else None
        with cython.critical_section(self):
            return new_outbound(self, address, policy, reader)

    def _watch(self, watch, int wanted, dict calls):
        with cython.critical_section(self):
            check_usable(self)
            watch_descriptor(self, watch, wanted, calls)

    def _attempting(self, Connection c not None, attempt):
        with cython.critical_section(self):
            check_usable(self)  # and the first turn, in another thread, may have been faster
            self.connecting.add(c)
            c.deadline = attempt
            count_connection(self, c)

    def _connected(self, Connection c not None, sock, peer):
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
        schedule(self, c)
        if c.policy.wiring is not None:
            make_wire(self, c)

    def _connect_failed(self, Connection c not None, error):
        self.n.timeouts += isinstance(error, ConnectTimeout)
        end(self, c, error)

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
        """Run one turn of the loop: wait up to `timeout` seconds (None: without limit) for events, and handle them.

        Returns [(connection, flags), ...] for connections without a handler; the flags (OPENED, READABLE, DRAINED, EOF,
        CLOSED) may be combined. The list is empty at the timeout, and when only callbacks ran.
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
            store_flag(&self.flush_at_once, not self.is_closed)

    def _serve_until_empty(self, int64_t deadline_ns):
        self.running = self.draining = True
        try:
            self._serve_until(deadline_ns)
        finally:
            self.running = self.draining = False
            store_flag(&self.stopping, False)
        return self.n.connections == 0

    def _serve_until(self, int64_t deadline_ns):
        while ((self.n.connections or self.pending or self.pending_now) and not load_flag(&self.stopping)
               and not self.is_closed):
            turn(self, max(deadline_ns - sys_clock_ns(CLOCK_MONOTONIC), 0))
            if sys_clock_ns(CLOCK_MONOTONIC) >= deadline_ns:
                break

    def stop(self) -> None:
        """Make `run` return after the current batch; if it is not running, the next `run`. Any thread may call it."""
        check_fork(self)
        store_flag(&self.stopping, True)
        wake(self)

    def close(self) -> None:
        """Flush every connection once without blocking, abort those with output left, and release all resources.

        Inside a callback it is done when the callback returns. In a forked child it only closes the descriptors. If the
        Mux's thread has ended, any thread may call it, and `on_close` is called in that thread.
        """
        if self.is_closed:
            return
        if self.forks != forks:
            close_descriptors(self)
            return
        adopt(self)
        check_thread(self)
        if self.in_turn:
            self.close_requested = self.turn_over = True
        else:
            shut_down(self)

cdef list take_ready(CompiledCore m):
    """What poll() reports."""
    cdef Connection c
    cdef uint32_t what
    cdef uint64_t before = m.reports
    cdef list taken = [], reported = []
    taken, m.ready = m.ready, taken  # making the list may run a finalizer, which may poll or close, too
    try:
        for conn in taken:
            c = <Connection>conn
            what = (c.flags & F_REPORT_MASK) // F_REPORT
            if what & R_EOF and not c.policy.half_open:
                m.finished.append(c)
            reported.append((c, reports[what]))
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

cdef int watch_wakeup(CompiledCore m, int fd) except -1:
    """Watch a descriptor of ours whose readability only ends a wait."""
    cdef int r = register(m, m.epoll, fd, WAKEUP, EPOLLIN)
    if r < 0:
        raise os_error(r)
    return 0
