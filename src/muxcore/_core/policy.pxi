# What may live here: a handler and its settings, checked and compiled.

cdef enum Overflow:
    OVERFLOW_CLOSE
    OVERFLOW_DROP
    OVERFLOW_RAISE

cdef dict OVERFLOWS = {"close": OVERFLOW_CLOSE, "drop": OVERFLOW_DROP, "raise": OVERFLOW_RAISE}
cdef dict FRAMERS = {
    type(None): CHUNKS, Lines: LINES, Delimiter: DELIMITED, LengthPrefix: PREFIXED, Fixed: FIXED, Resp: RESP,
}

@cython.final
cdef class Policy:
    """A handler and its settings, checked and compiled."""

    def __init__(self, handler, callbacks, limits, timeouts, half_open, framer, outbound, wiring):
        self.pull = handler is None
        self.handler = handler
        self.callbacks = callbacks
        self.limits = limits
        self.timeouts = timeouts
        self.half_open = half_open
        self.on_open, self.on_message, self.on_messages = callbacks[:3]
        self.on_drain, self.on_eof, self.on_error, self.on_close = callbacks[3:]
        self.low, self.high = self.limits.low, self.limits.high
        self.max_outbox, self.max_inbox = self.limits.max_outbox, self.limits.max_inbox
        self.outbound = outbound
        self.wiring = wiring
        self.autopause = not outbound if self.limits.autopause is None else self.limits.autopause
        self.overflow = OVERFLOWS[self.limits.overflow]
        self.linger_ns = to_ns(self.timeouts.linger)
        self.idle_ns = to_ns(self.timeouts.idle or 0)
        self.write_ns = to_ns(self.timeouts.write or 0)
        self.silence_ns = to_ns(self.timeouts.silence or 0)
        self.handshake_ns = to_ns(self.timeouts.handshake or 0)

        self.framer = framer
        compile_framer(self, &self.framing, framer)

cdef int compile_framer(Policy policy, Framing* g, object framer) except -1:
    """Check the framer again: it was checked when it was made, but object.__setattr__ can change it, and memory safety
    depends on it here."""
    g.kind = FRAMERS.get(type(framer), CUSTOM)
    if g.kind == DELIMITED:
        delimiter = framer.delimiter
        if type(delimiter) is not bytes or not 1 <= len(delimiter) <= 255:
            raise ValueError(f"framer was changed: {framer!r}")
        policy.delimiter = delimiter
        g.delimiter = PyBytes_AS_STRING(delimiter)
        g.size = PyBytes_GET_SIZE(delimiter)
    elif g.kind == PREFIXED:
        g.size = 0 if type(framer.size) is str else framer.size
        g.little = framer.byteorder == "little"
        g.header_included = framer.header_included
        if g.size > 8:
            raise ValueError(f"framer was changed: {framer!r}")
    elif g.kind == FIXED:
        g.size = framer.size
    if g.kind != FIXED and g.kind != CHUNKS and g.kind != CUSTOM:
        g.max_size = framer.max_size
        g.max_sent = largest(framer)
    return 0

cdef Policy changed_policy(Policy policy, object limits, object timeouts, object framer):
    """The same policy with other settings, for one connection alone."""
    cdef Policy other = Policy(
        policy.handler, policy.callbacks, limits, timeouts, policy.half_open, framer, policy.outbound, policy.wiring
    )
    other.listener = policy.listener
    return other
