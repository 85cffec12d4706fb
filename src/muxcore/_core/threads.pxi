# What may live here: the check of the calling thread, and calls from other threads.

cdef inline bint on_owner_thread(CompiledCore m) noexcept:
    """Whether the Mux is bound to this thread; not before its first turn."""
    return load_thread(&m.thread) == this_thread()

cdef inline bint on_other_thread(CompiledCore m) noexcept:
    cdef unsigned long thread = load_thread(&m.thread)
    return thread != 0 and thread != this_thread()

cdef inline int check_fork(CompiledCore m) except -1:
    if m.forks != forks:
        raise RuntimeError("this Mux was made before fork(): a child has to make its own")
    return 0

cdef inline void count_drops(CompiledCore m, uint64_t count) noexcept:
    add_count(&m.n.drops, count)  # any thread calls this

cdef inline void count_drop(CompiledCore m) noexcept:
    count_drops(m, 1)

cdef inline int check_thread(CompiledCore m) except -1:
    check_fork(m)
    if on_other_thread(m):
        raise RuntimeError("this Mux belongs to the thread that first ran it: from another, use call_soon_threadsafe")
    return 0

cdef int check_usable(CompiledCore m) except -1:
    check_thread(m)
    if m.is_closed or m.close_requested:
        raise RuntimeError("the Mux is closed")
    return 0

cdef int bind(CompiledCore m) except -1:
    """From now on it is this thread's Mux. Until then it has no thread, and a method does its work in its caller's;
    those that any thread may call do it in a critical section, so that it is over before the first turn."""
    thread = what_lives_as_long_as_this_thread()
    with cython.critical_section(m):
        check_thread(m)  # another thread may have been faster
        m.owner_thread = thread
        store_thread(&m.thread, this_thread())
    return 0

cdef int adopt(CompiledCore m) except -1:
    """Bind the Mux of a thread that has ended to this one."""
    thread = what_lives_as_long_as_this_thread()
    with cython.critical_section(m):  # of two threads, one binds it
        if on_other_thread(m) and m.owner_thread() is None:
            m.owner_thread = thread
            store_thread(&m.thread, this_thread())
    return 0


# --- calls from other threads ----------------------------------------------------------------------

cdef int call_foreign(CompiledCore m, Operation operation, object target, object argument) except -1:
    """Queue something for the Mux's thread, and end its wait if it is in one."""
    m.foreign.append((operation, target, argument))
    return wake(m)

cdef int end_from_any_thread(CompiledCore m, Connection c, Operation operation, object reason) except -1:
    """close() or abort() outside of the Mux's thread, or before it has one."""
    if not on_other_thread(m):
        with cython.critical_section(m):  # see bind()
            if not on_other_thread(m):
                return close_for(m, c, reason) if operation == OP_CLOSE else abort(m, c)
    with cython.critical_section(c):
        c.close_asked = True
    return 0 if seen_flags(c) & F_CLOSED else call_foreign(m, operation, c, reason)

cdef int wake(CompiledCore m) except -1:
    # The loop sets `sleeping` before its last check for work: either it sees the queued entry, or this thread sees the
    # flag. Of many threads, one writes.
    if muxcore_exchange(&m.sleeping, 0) or load_flag(&m.flush_at_once):
        with cython.critical_section(m):  # release() must not close the descriptor between our look and our write
            if m.wake_fd >= 0:
                sys_eventfd_signal(m.wake_fd)
    return 0

cdef int run_foreign(CompiledCore m) except -1:
    cdef Connection c
    cdef Operation operation
    for _ in range(len(m.foreign)):
        if m.close_requested or tick(m):
            break  # shut_down(), or the next turn, continues
        operation, target, argument = m.foreign.popleft()
        if operation == OP_CALL:
            if not m.is_closed:
                call_plain(m, target, argument)
            continue
        c = <Connection>target
        if operation == OP_SEND or operation == OP_SEND_ABOVE:
            apply_foreign_send(m, c, argument, operation == OP_SEND_ABOVE)
        elif operation == OP_CLOSE:
            close_for(m, c, argument)
        else:
            if operation == OP_OVERFLOW:
                keep_error(c, argument)
            abort(m, c)
    return 0

cdef int apply_foreign_send(CompiledCore m, Connection c, object data, bint promised_drain) except -1:
    add_count(&c.foreign, -foreign_word(PyBytes_GET_SIZE(data)))
    # It was accepted before a close() that came since, and close() waits for it.
    if c.flags & (F_ENDED | F_PEER_GONE):
        count_drop(m)
        return 0
    try:
        if PyBytes_GET_SIZE(data):
            push(m, c, data)
    except MemoryError as error:  # it was accepted: without it the stream would have a hole
        return abort_for(m, c, error)
    queued(m, c)
    if promised_drain and not c.flags & F_ABOVE_HIGH:
        c.flags |= F_DRAIN_OWED
    return schedule(m, c)
