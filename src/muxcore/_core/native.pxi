# What may live here: handlers in C: NativeHandler, its place among a connection's callbacks, and what a user's module
# calls of a connection.

cdef enum Callback:
    ON_OPEN
    ON_MESSAGE
    ON_MESSAGES
    ON_DRAIN
    ON_EOF
    ON_ERROR
    ON_CLOSE

cdef class NativeHandler:
    """A handler whose callbacks are C functions: subclass it in Cython, with `from muxcore cimport NativeHandler`.

    The callbacks are those of `Handler`, as `cdef` methods; override those that you need. The loop calls them without a
    call of Python. A method that a Python subclass defines under one of these names is called in its place.

    Raises TypeError without the compiled core; backends other than "epoll" refuse it.
    """

    cdef int on_open(self, Connection conn) except -1:
        return 0

    cdef int on_message(self, Connection conn, object message) except -1:
        return 0

    cdef int on_messages(self, Connection conn, list messages) except -1:
        return 0

    cdef int on_drain(self, Connection conn) except -1:
        return 0

    cdef int on_eof(self, Connection conn) except -1:
        return 0

    cdef int on_error(self, Connection conn, object exc) except -1:
        return 0

    cdef int on_close(self, Connection conn, object exc) except -1:
        return 0

    def _native_callbacks(self):
        """For handler.resolve(): the callbacks that a subclass has overridden."""
        cdef Callback which
        found = {}
        for which, name, own in (
            (ON_OPEN, "on_open", overrides_on_open(self, PLAIN)),
            (ON_MESSAGE, "on_message", overrides_on_message(self, PLAIN)),
            (ON_MESSAGES, "on_messages", overrides_on_messages(self, PLAIN)),
            (ON_DRAIN, "on_drain", overrides_on_drain(self, PLAIN)),
            (ON_EOF, "on_eof", overrides_on_eof(self, PLAIN)),
            (ON_ERROR, "on_error", overrides_on_error(self, PLAIN)),
            (ON_CLOSE, "on_close", overrides_on_close(self, PLAIN)),
        ):
            if own:
                found[name] = native_callback(self, which)
        return found

cdef extern from *:
    """
    #define MUXCORE_OVERRIDES(h, base, name) ((h)->__pyx_vtab->name != (base)->__pyx_vtab->name)
    #define muxcore_overrides_on_open(h, base) MUXCORE_OVERRIDES(h, base, on_open)
    #define muxcore_overrides_on_message(h, base) MUXCORE_OVERRIDES(h, base, on_message)
    #define muxcore_overrides_on_messages(h, base) MUXCORE_OVERRIDES(h, base, on_messages)
    #define muxcore_overrides_on_drain(h, base) MUXCORE_OVERRIDES(h, base, on_drain)
    #define muxcore_overrides_on_eof(h, base) MUXCORE_OVERRIDES(h, base, on_eof)
    #define muxcore_overrides_on_error(h, base) MUXCORE_OVERRIDES(h, base, on_error)
    #define muxcore_overrides_on_close(h, base) MUXCORE_OVERRIDES(h, base, on_close)
    """
    bint overrides_on_open "muxcore_overrides_on_open"(NativeHandler handler, NativeHandler base)
    bint overrides_on_message "muxcore_overrides_on_message"(NativeHandler handler, NativeHandler base)
    bint overrides_on_messages "muxcore_overrides_on_messages"(NativeHandler handler, NativeHandler base)
    bint overrides_on_drain "muxcore_overrides_on_drain"(NativeHandler handler, NativeHandler base)
    bint overrides_on_eof "muxcore_overrides_on_eof"(NativeHandler handler, NativeHandler base)
    bint overrides_on_error "muxcore_overrides_on_error"(NativeHandler handler, NativeHandler base)
    bint overrides_on_close "muxcore_overrides_on_close"(NativeHandler handler, NativeHandler base)

cdef NativeHandler PLAIN = NativeHandler()

@cython.final
@cython.no_gc_clear  # as Connection
cdef class NativeCallback:
    """One callback of a NativeHandler, among the callbacks of a Policy. muxcore_call() knows it."""
    cdef NativeHandler handler
    cdef Callback which

    def __call__(self, Connection conn not None, arg=None):  # by Threaded, or with `slow_handler`
        call_native(self, conn, arg)

cdef NativeCallback native_callback(NativeHandler handler, Callback which):
    cdef NativeCallback callback = NativeCallback.__new__(NativeCallback)
    callback.handler, callback.which = handler, which
    return callback

cdef inline int call_native(NativeCallback callback, Connection c, object arg) except -1:
    cdef NativeHandler handler = callback.handler
    if callback.which == ON_MESSAGE:
        return handler.on_message(c, arg)
    if callback.which == ON_MESSAGES:
        return handler.on_messages(c, arg)
    if callback.which == ON_OPEN:
        return handler.on_open(c)
    if callback.which == ON_DRAIN:
        return handler.on_drain(c)
    if callback.which == ON_EOF:
        return handler.on_eof(c)
    if callback.which == ON_ERROR:
        return handler.on_error(c, arg)
    return handler.on_close(c, arg)

cdef PyObject* native_called(PyObject* callback, PyObject** args) except NULL:
    call_native(<NativeCallback>callback, <Connection>args[0], <object>args[1])
    Py_INCREF(None)
    return <PyObject*>None

set_native(<PyObject*>NativeCallback, native_called)


# --- for a user's module ---------------------------------------------------------------------------

cdef inline int check_given(Connection conn) except -1:
    if conn is None:
        raise TypeError("conn must be a Connection, not None")
    return 0

cdef bint native_send(Connection conn, object message) except -1:
    """As Connection.send."""
    check_given(conn)
    return send(conn, message, False) != 0

cdef bint native_write(Connection conn, object data) except -1:
    """As Connection.write."""
    check_given(conn)
    return send(conn, data, True) != 0

cdef int native_close(Connection conn, object reason) except -1:
    """As Connection.close."""
    check_given(conn)
    conn.close(reason)
    return 0
