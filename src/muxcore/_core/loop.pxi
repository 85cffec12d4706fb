# What may live here: the turn of the loop: what is pending, the wait, the events, calls and timers; slow connections.

# Under load, the loop releases the interpreter lock this often. It is longer than the 5 ms after which a waiting thread
# requests the lock (sys.getswitchinterval): a release before that request wakes the thread, but mostly too late to get
# the lock, and its 5 ms begin again; so it could starve.
cdef int64_t RELEASE_NS = 6_000_000
cdef int64_t SWEEP_NS = 1_000_000_000
# The time of each part of a turn (pending work, events, calls, timers). Then the next turn continues with the remaining
# work, so that no part waits long for the others.
cdef int64_t PART_NS = 3_000_000


cdef inline bint has_work(CompiledCore m) except -1:
    """Whether there is something to do that no wait would bring."""
    return (PyList_GET_SIZE(m.pending) != 0 or PySequence_Size(m.soon) != 0 or PySequence_Size(m.foreign) != 0
            or PyList_GET_SIZE(m.pending_now) != 0 or PySequence_Size(m.handshakes) != 0 or m.schedule_failed
            or (m.running and load_flag(&m.stopping))
            or (m.polling and PyList_GET_SIZE(m.ready) != 0) or (m.draining and m.n.connections == 0))

# A turn is bounded in time. Its steps (a message, a call, a pending connection) are counted. Every eighth of them, and
# every eighth event, looks at the clock, which costs some 25 ns.

cdef inline bint tick(CompiledCore m) except -1:
    """Count a step. Returns whether the remaining work of this part is left to the next turn."""
    m.ticks += 1
    return m.turn_over if m.ticks % 8 else look_at_clock(m)

cdef bint look_at_clock(CompiledCore m) except -1:
    cdef int64_t now = sys_clock_ns(CLOCK_MONOTONIC)
    check_fork(m)
    if now > m.turn_ends_ns:
        m.turn_over = True
    let_others_run(m, now)
    return m.turn_over

cdef inline int let_others_run(CompiledCore m, int64_t now) except -1:
    """Let other threads have the interpreter, if it has been ours for long."""
    if now - m.released_ns > RELEASE_NS:
        m.released_ns = now
        with nogil:
            pass
    return 0

cdef inline void begin_part(CompiledCore m) noexcept:
    """For callers that have just read the clock."""
    m.turn_over = False
    m.turn_ends_ns = m.now_ns + PART_NS

cdef inline void begin_part_now(CompiledCore m) noexcept:
    m.now_ns = sys_clock_ns(CLOCK_MONOTONIC)
    begin_part(m)

cdef object add_timer(CompiledCore m, int64_t when_ns, object fn, tuple args):
    """A timer of our own. Without it a connection or listener would wait for ever: so if an interrupt or a lack of
    memory prevents it, the next turn looks at everything."""
    try:
        return m.timers.add(when_ns, fn, args)
    except BaseException:
        m.schedule_failed = True
        raise

cdef int run_timers(CompiledCore m) except -1:
    cdef int64_t now = sys_clock_ns(CLOCK_MONOTONIC)
    newest = m.timers.order
    while not m.close_requested:
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

cdef int call_plain(CompiledCore m, object fn, object args) except -1:
    """Call what was passed to call_soon and the like; an Exception is logged."""
    try:
        fn(*args)
    except Exception as error:
        if m.forks != forks:
            raise
        m.schedule_failed = m.schedule_failed or isinstance(error, MemoryError)  # it may have been a step of ours
        m.n.handler_errors += 1
        log.error("%r raised", fn, exc_info=error)
    return check_fork(m)

cdef int wait(CompiledCore m, int64_t timeout_ns) except -1:
    """Fill the batch: at once if something is ready, else after a wait without the interpreter lock.

    To release the lock costs more than a second system call; but if nothing is ready, the first call was in vain. So a
    loop that had at most one event the last time waits at once."""
    cdef Epoll ep = m.epoll
    cdef int64_t deadline = m.now_ns + timeout_ns if timeout_ns >= 0 else -1
    cdef bint was_busy = ep.count > 1
    cdef bint slept = False
    m.n.waits += 1
    ep.next = ep.count = 0
    m.asked_ns = m.now_ns
    if was_busy or timeout_ns == 0:
        ep.count = checked_wait(m, 0)
    if ep.count == 0 and timeout_ns:
        sleep_until(m, deadline, was_busy)
        slept = True
    m.now_ns = sys_clock_ns(CLOCK_MONOTONIC)
    m.n.events += ep.count
    if slept:
        m.released_ns = m.now_ns
    else:
        let_others_run(m, m.now_ns)
    return 0

cdef int checked_wait(CompiledCore m, int64_t timeout_ns) except -1:
    cdef Epoll ep = m.epoll
    cdef int r
    if timeout_ns == 0:
        r = sys_epoll_wait(ep.fd, ep.events, ep.capacity, 0, NULL)
    else:
        with nogil:
            r = sys_epoll_wait(ep.fd, ep.events, ep.capacity, timeout_ns, ep.pwait2)
            if r == 0:
                m.asked_ns = sys_clock_ns(CLOCK_MONOTONIC)  # before others hold the interpreter, perhaps for long
    if r < 0:
        raise os_error(r)
    return r

cdef int sleep_until(CompiledCore m, int64_t deadline, bint has_asked) except -1:
    """Block until there are events, work, or `deadline` (-1: for ever). A signal ends the system call: Python's
    handlers run, and the wait goes on for the rest of the time. It polls the kernel at least once, unless wait()
    `has_asked` already: otherwise a timer that is due in each turn would starve all connections."""
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
        if left == 0 or has_work(m) or m.close_requested:
            if not has_asked:
                m.epoll.count = checked_wait(m, 0)
            break
        has_asked = True
        if now < spin_end:
            m.epoll.count = spin(m, min(spin_end, now + RELEASE_NS))  # not longer, for signals
        else:
            m.epoll.count = checked_wait(m, left)
    muxcore_exchange(&m.sleeping, 0)
    return 0

cdef int spin(CompiledCore m, int64_t end) except -1:
    """Poll without sleeping (busy_poll): a thread that sleeps is woken some microseconds after its event. Other threads
    have the interpreter meanwhile, and their wakeup is an event like any other."""
    cdef Epoll ep = m.epoll
    cdef int r = 0
    with nogil:
        while r == 0 and m.asked_ns < end:
            m.asked_ns = sys_clock_ns(CLOCK_MONOTONIC)
            r = sys_epoll_wait(ep.fd, ep.events, ep.capacity, 0, NULL)
    if r < 0:
        raise os_error(r)
    return r

cdef int dispatch(CompiledCore m) except -1:
    """Pass the events of the batch to their owners, in groups of sixteen (GROUP), and send the output of a group when
    all its handlers have returned: to wake the receiver is the most expensive part of a small send, and a process that
    waits for several replies is woken once. The group is small, so that no reply waits for many events.

    `next` lives in the set, so an exception loses no event: the next turn goes on behind it. So does the next poll()
    once this one has read `read_budget` bytes: the messages are still in the processor's cache, and replies do not wait
    for megabytes from all other connections."""
    cdef uint64_t enough = m.n.bytes_in + m.read_budget if m.polling else <uint64_t>-1
    cdef Epoll ep = m.epoll
    while ep.next < ep.count and m.n.bytes_in < enough and not m.close_requested:
        try:
            dispatch_group(m, enough)
        finally:
            send_group(m)
        if m.turn_over:
            break
    return 0

cdef int dispatch_group(CompiledCore m, uint64_t enough) except -1:
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
            m.group[m.group_count] = m.group_tail = <PyObject*>owner
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

cdef int send_group(CompiledCore m) except -1:
    """Send the output of the group. A child that one of its handlers has forked only forgets the group."""
    cdef int count = m.group_count
    cdef int done = 0
    m.group_count = 0
    m.group_tail = NULL
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

cdef int run_all_pending(CompiledCore m) except -1:
    """Run what was scheduled. What is scheduled meanwhile waits for the next time, so that two connections that keep
    scheduling each other cannot keep the loop here."""
    if PyList_GET_SIZE(m.pending_now) == 0:  # else it was interrupted, perhaps amid the steps of one: it goes on there
        m.pending_now, m.pending = m.pending, m.pending_now
    while m.pending_done < PyList_GET_SIZE(m.pending_now) and not m.close_requested:
        run_pending_of(m, <object>PyList_GET_ITEM(m.pending_now, m.pending_done))
        m.pending_done += 1
        check_fork(m)
        if tick(m):
            break
    if m.pending_done == PyList_GET_SIZE(m.pending_now):
        PyList_SetSlice(m.pending_now, 0, m.pending_done, NULL)
        m.pending_done = 0
    return 0

cdef inline int run_pending_of(CompiledCore m, object owner) except -1:
    return run_pending_datagram(m, <Datagram>owner) if type(owner) is Datagram else run_pending(m, <Connection>owner)

cdef int run_everything(CompiledCore m) except -1:
    """Memory was out, so `pending` may be incomplete: check every connection and datagram socket. All are listed before
    the first is handled, since one that has lost its descriptor is in no other table."""
    cdef Connection c
    cdef Py_ssize_t count
    owners = m._connections() + m._datagrams()
    for owner in owners:
        if isinstance(owner, Connection):
            c = <Connection>owner
            c.flags &= ~F_STARVED  # its timer may be what was lost
            report_message(m, c)
            if c.flags & F_CONNECTING and c.deadline is not None:
                c.deadline.notify_again()
    count = PyList_GET_SIZE(m.pending)
    m.pending_now, m.pending_done = list(dict.fromkeys(m.pending_now[m.pending_done:] + m.pending + owners)), 0
    PyList_SetSlice(m.pending, 0, count, NULL)  # what a finaliser has scheduled since may not be among them
    m.schedule_failed = False
    plan_sweep(m)
    return resume_accepts(m)

cdef int run_soon(CompiledCore m) except -1:
    for _ in range(len(m.soon)):
        if m.close_requested:
            break
        fn, args = m.soon.popleft()
        call_plain(m, fn, args)
        if tick(m):
            break
    return 0

cdef int turn(CompiledCore m, int64_t timeout_ns) except -1:
    """One turn: what was left to do, a wait, what the kernel reports, what is queued or due."""
    cdef bint complete = False
    m.in_turn = True
    try:
        PyErr_CheckSignals()
        m.notified = False
        if m.schedule_failed:
            run_everything(m)
        if PyList_GET_SIZE(m.pending) or PyList_GET_SIZE(m.pending_now):
            begin_part_now(m)
            run_all_pending(m)
        if m.epoll.next == m.epoll.count and not m.close_requested:
            wait(m, 0 if m.notified or has_work(m) else timeout_ns)
            begin_part(m)
        else:
            begin_part_now(m)
        dispatch(m)
        if m.epoll.next == m.epoll.count:
            m.seen_ns = m.asked_ns
        if PySequence_Size(m.handshakes):
            run_handshakes(m)
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
            run_all_pending(m)
        if MUXCORE_CHECKS:
            check_turn(m)
        complete = True
    finally:
        m.schedule_failed = m.schedule_failed or not complete
        m.in_turn = False
        m.in_handler = NULL
        if m.forks == forks:
            if m.close_requested:
                shut_down(m)
            elif m.driven:
                notify_driver(m)
    return 0

cdef int notify_driver(CompiledCore m) except -1:
    """The loop that drives this Mux waits for its descriptor: let it be readable if there is something left to do, and
    when the next timer is due."""
    cdef int64_t due = m.timers.next_ns()
    if has_work(m) or PyList_GET_SIZE(m.finished) or m.epoll.next < m.epoll.count:
        sys_eventfd_signal(m.wake_fd)
    if due != m.armed_ns or 0 <= due <= m.now_ns:  # the latter has gone off, and is still due
        sys_timerfd_set(m.timer_fd, due)
        m.armed_ns = due
    return 0

cdef int begin_turns(CompiledCore m, str method) except -1:
    check_usable(m)
    if not on_owner_thread(m):
        bind(m)
        check_usable(m)  # what has run meanwhile may have closed it
    if m.in_turn or m.polling:  # the latter: by a finalizer, while poll() makes its list
        raise RuntimeError(f"{method}() was called inside a callback of the same Mux")
    store_flag(&m.flush_at_once, m.driven)
    m.now_ns = sys_clock_ns(CLOCK_MONOTONIC)
    return 0


# --- idle and slow connections ---------------------------------------------------------------------

# A handler, or the program between two polls, may take longer than a timeout. What a peer has done meanwhile is not
# known then: so peers are judged by `seen_ns`, up to which everything that the kernel reported was handled.

cdef inline bint has_judged(CompiledCore m, int64_t due) noexcept:
    """Whether a peer had its chance until `due`. If not, the timer is set anew: it is called again after the next wait
    has returned the kernel's events."""
    return due <= m.seen_ns

cdef int need_sweep(CompiledCore m, Policy policy) except -1:
    """Have the timeouts of open connections checked often enough: at least four times within the shortest."""
    cdef int64_t shortest = 0, every_ns
    for ns in (policy.idle_ns, policy.write_ns, policy.silence_ns):
        if ns and (shortest == 0 or ns < shortest):
            shortest = ns
    every_ns = max(min(shortest // 4, SWEEP_NS), 1_000_000)
    if shortest and (m.sweep_ns == 0 or every_ns < m.sweep_ns):
        m.sweep_ns = every_ns
        m.sweeping = False  # what is planned comes too late
    return plan_sweep(m)

cdef int plan_sweep(CompiledCore m) except -1:
    if m.sweep_ns and not m.sweeping:
        add_timer(m, sys_clock_ns(CLOCK_MONOTONIC) + m.sweep_ns, _sweep, (m, m.sweep_ns))
        m.sweeping = True
    return 0

def _sweep(CompiledCore m, int64_t every_ns):
    """End the connections whose peer is too slow. A message costs no more than the store of a cached clock; this one
    pass over the slots looks at what was stored. One that was planned before a shorter timeout came is not repeated."""
    cdef size_t fd
    if every_ns == m.sweep_ns:
        m.sweeping = False
    plan_sweep(m)
    for fd in range(m.slot_count):
        if fd < m.slot_count and m.slots[fd].kind == CONNECTION:
            check_timeouts(m, <Connection>m.objects[fd])

cdef int check_timeouts(CompiledCore m, Connection c) except -1:
    cdef Policy policy = c.policy
    if c.flags & (F_CLOSING | F_ENDED | F_HANDSHAKE):
        return 0  # has a timer of its own
    if policy.write_ns and c.flags & F_BLOCKED and m.seen_ns - c.wrote_ns >= policy.write_ns:
        return write_timeout(m, c, policy.write_ns)
    if (policy.silence_ns and m.seen_ns - max(c.heard_ns, c.wrote_ns) >= policy.silence_ns
            and (may_read(c) or c.out_head != NULL) and is_waiting(m, c)):
        return silence_timeout(m, c)
    if policy.idle_ns and may_read(c) and m.seen_ns - c.received_ns >= policy.idle_ns and is_waiting(m, c):
        return idle_timeout(m, c)
    return 0

cdef bint is_waiting(CompiledCore m, Connection c) except -1:
    """Whether the connection waits for its peer. (A framer that has_message() calls may also have closed it.)"""
    return not has_message(m, c) and c not in m.offloaded and not c.flags & (F_CLOSING | F_ENDED)
