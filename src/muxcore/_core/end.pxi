# What may live here: the end of a Mux.

cdef int shut_down(CompiledCore m) except -1:
    """What close() promises: flush once, abort the rest, report each end; then give back what the Mux holds. An
    exception on the way (Ctrl-C, say) is raised at the end, when everything is done all the same."""
    owners = m._listeners() + [None] + m._connections()
    owed = 2 * (m.pending_now[m.pending_done:] + m.pending + m._connections())
    interrupt = None
    m.close_requested = False
    store_flag(&m.is_closed, True)
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
    for owner in owed:  # twice, since on_close is owed even after an on_open that raised
        try:
            run_pending_of(m, owner)
        except BaseException as error:
            interrupt = error
    for owner in m._datagrams():  # the last, since on_close may send something
        try:
            close_datagram(m, <Datagram>owner)
        except BaseException as error:
            interrupt = error
    for step in 2 * m._at_close[::-1]:  # twice, since an interrupt may come amid one; the second finds nothing to do
        try:
            step()
        except BaseException as error:
            interrupt = error
    release(m)
    if interrupt is not None:
        raise interrupt
    return 0

cdef int refuse_output(CompiledCore m) except -1:
    cdef Connection c
    for conn in m._connections():
        c = <Connection>conn
        with cython.critical_section(c):  # as in advance_close()
            c.flags |= F_CLOSING
    return 0

cdef int close_now(CompiledCore m, Connection c) except -1:
    cdef size_t unsent
    begin_stall(m)
    send_out(m, c)
    if c.flags & (F_WIRE | F_HANDSHAKE | F_WIRE_SHUT) == F_WIRE and c.out_head == NULL:
        shut_wire(m, c)
        send_out(m, c)
    unsent = c.outbox_bytes + foreign_bytes(c)
    if unsent:
        return abort_for(m, c, ConnectionClosed(f"the Mux was closed with {unsent} bytes unsent", conn=c))
    discard_inbox(m, c)
    return end(m, c, None)

cdef int release(CompiledCore m) except -1:
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
    m.slot_count = 0  # before the objects are gone, whose finalizers may call anything
    for queue in (m.objects, m.connecting, m.pending, m.pending_now, m.ready, m.finished, m.accept_paused, m.soon,
                  m.foreign, m.offloaded, m.handshakes, m.timers):
        queue.clear()
    return 0

cdef int close_descriptors(CompiledCore m) except -1:
    """In a forked child, or for a Mux that was never closed: close(2) and nothing else."""
    for owner in m.objects + m.accept_paused + list(m.connecting):
        if isinstance(owner, Connection):
            (<Connection>owner).flags |= F_CLOSING | F_ENDED | F_CLOSED
            discard_outbox(m, <Connection>owner)
            if owner in m.connecting and (<Connection>owner).deadline is not None:
                (<Connection>owner).deadline.abandon()
            sys_close((<Connection>owner).fd)
            (<Connection>owner).fd = -1
        elif isinstance(owner, Listener):
            sys_close((<Listener>owner).fd)
            (<Listener>owner).fd = -1
            (<Listener>owner).listening = (<Listener>owner).accept_paused = False
        elif isinstance(owner, Datagram):
            sys_close((<Datagram>owner).fd)
            (<Datagram>owner).fd = -1
    return release(m)
