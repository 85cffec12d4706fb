# What may live here: which descriptor is whose, and the descriptors of the user's that are watched.

cdef enum:
    READ = 1                    # directions of a Watch, as in _watch.py
    WRITE = 2

cdef inline uint64_t token(CompiledCore m, int fd) noexcept:
    """What the kernel is given with a registration: an event that carries an old generation is stale."""
    return <uint64_t>m.slots[fd].generation << 32 | <uint32_t>fd

cdef int grow_slots(CompiledCore m, size_t needed) except -1:
    cdef size_t before = 0, count = 0
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

cdef object owner_of(CompiledCore m, int fd):
    return m.objects[fd] if <size_t>fd < m.slot_count else None  # -1 is the largest size_t

cdef int register(CompiledCore m, object owner, int fd, Kind kind, uint32_t events) except? -2:
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

cdef int unregister(CompiledCore m, int fd) except -1:
    """Remove a descriptor from the set, always before close(2): a dup of it would keep the closed one registered."""
    if <size_t>fd >= m.slot_count:
        return 0  # of a Mux that has released everything
    m.slots[fd].generation += 1
    m.slots[fd].kind = NOTHING
    m.objects[fd] = None
    sys_epoll_ctl(m.epoll.fd, EPOLL_CTL_DEL, fd, 0, 0)  # fails only if other code closed it
    return 0

cdef int evict(CompiledCore m, int fd) except -1:
    """Other code closed this descriptor, and the kernel has handed its number to a new socket, which
    the old owner must not touch."""
    owner = m.objects[fd]
    error = OSError(f"descriptor {fd} was closed by other code")
    call = (_log_eviction, (owner, error))
    if m.objects[fd] is not owner:
        return 0  # what ran since has closed it
    if isinstance(owner, Connection):
        schedule_or_raise(m, <Connection>owner)
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


# --- watched descriptors ---------------------------------------------------------------------------

cdef int watch_descriptor(CompiledCore m, object watch, int wanted, dict calls) except -1:
    cdef int r = set_wanted(m, watch, watch.fd, wanted)
    if r < 0:
        raise os_error(r)
    watch.calls = calls
    return 0

cdef int set_wanted(CompiledCore m, object watch, int fd, int wanted) except? -2:
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

cdef int watched_ready(CompiledCore m, object watch, uint32_t events) except -1:
    """An error or a hang-up is reported to both directions: a read or a write returns what it is."""
    cdef int fd = watch.fd
    if events & ~<uint32_t>EPOLLOUT:
        call_watched(m, watch.calls.get(READ))
    if events & ~<uint32_t>EPOLLIN and not m.close_requested and owner_of(m, fd) is watch:
        call_watched(m, watch.calls.get(WRITE))
    return 0

cdef int call_watched(CompiledCore m, object call) except -1:
    if call is not None:
        fn, args = call
        call_plain(m, fn, args)
    return 0
