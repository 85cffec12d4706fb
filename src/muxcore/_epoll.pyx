# What may live here: the extension: the epoll set. Its chapters are in _core:
#   policy      a handler and its settings
#   connection  Connection: what it is, the steps of its life, and the class
#   outbox      what it sends: queueing, framing, flushing
#   inbox       what it receives: reading, framing, delivering
#   wire        what stands between its socket and its framer: TLS, the PROXY protocol
#   tls         TLS's hot path: OpenSSL called directly
#   datagram    Datagram: UDP and Unix datagram sockets
#   listener    Listener: accepting
#   slots       which descriptor is whose
#   threads     the check of the calling thread, and calls from other threads
#   loop        the turn
#   end         the end of a Mux
#   mux         CompiledCore: the class
#   native      NativeHandler: handlers in C
#   check       what is true between two turns, for a build that checks it
# and its leaves, which know no Python object: syscalls, frame, buffer, packets, openssl.
#
# A turn of the loop: wait() fills the batch; dispatch() reads and delivers event by event, and sends the replies after
# every sixteen events. All other work (an interest to change, a drain or EOF to report, a close to advance, output for
# another connection) only puts the connection on `pending`, once; run_pending() does it in one place, at the end of the
# batch. So no method calls a callback, and a callback may call any method of any connection.
#
# EAGAIN and EOF are values here. An exception that leaves a C function is either the caller's mistake, out of memory,
# or a BaseException of a handler on its way out of poll() or run().

import os
import sys
import warnings
from collections import deque
from functools import partial
from types import GenericAlias

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals, PyErr_GivenExceptionMatches
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE, PyList_New, PyList_SET_ITEM
from cpython.number cimport PyNumber_Index
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_INCREF
from cpython.sequence cimport PySequence_Size
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE
from cpython.unicode cimport PyUnicode_CheckExact
from libc.math cimport ceil
from libc.stdint cimport SIZE_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memset

from ._core.buffer cimport *
from ._core.frame cimport *
from ._core.openssl cimport *
from ._core.packets cimport *
from ._core.syscalls cimport *

from . import _file, _frame
from ._config import Limits, Timeouts, as_limits, as_timeouts, check_seconds, to_ns
from ._custom import CustomReader, Found, rest_for_next
from ._file import file_part
from ._frame import (
    as_bytes, check_framer, datagram_too_large, delimiter_inside, encode, frame_error, largest, message_too_large,
    split_inline,
)
from ._log import log
from ._owner import what_lives_as_long_as_this_thread
from ._stats import Stats
from ._timers import Timers
from ._unix import PeerCredentials, peer_credentials
from ._wire import Wire, check_is_its_own
from ._wiring import change_context, tls_wire
from .errors import (
    ConnectionClosed, ConnectTimeout, FrameError, HandshakeTimeout, IdleTimeout, OutboxFull, WriteTimeout, about,
    check_reason, without_frames,
)
from .framing import Delimiter, Fixed, LengthPrefix, Lines, Resp

# Set by the first Mux, since their modules take long to import.
cdef object socket_type = None, plain_type = None, adopted = None, address_module = None
cdef tuple reports = None

cdef extern from "Python.h":
    int PyObject_AsFileDescriptor(object obj) except -1
    int _PyBytes_Resize(PyObject** bytes_, Py_ssize_t size) noexcept  # as a C call: its exception stays
    PyObject* make_bytes "PyBytes_FromStringAndSize"(const char* data, Py_ssize_t size)
    void Py_XDECREF(PyObject* obj)
    long long PyLong_AsLongLongAndOverflow(object number, int* overflow) except? -1
    unsigned long PyLong_AsUnsignedLongMask(object number) except? <unsigned long>-1
    bint PyLong_CheckExact(object value)
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    void* PyUnicode_1BYTE_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    bint is_too_deep "Py_EnterRecursiveCall"(const char* where)  # raises and returns 1, which no `except` declares
    void Py_LeaveRecursiveCall()
    void INCREF "Py_INCREF"(PyObject* obj)
    void DECREF "Py_DECREF"(PyObject* obj)

cdef extern from *:
    """
    static inline PyObject *muxcore_raised(void) { return NULL; }
    static inline PyObject *muxcore_taken(PyObject *object) { return object; }

    /* Without `volatile`, the compiler would leave out both. */
    static inline void muxcore_allocate_and_free(size_t size) { void *volatile block = malloc(size); free(block); }

    /* A callback of a NativeHandler, and the function that calls it; its argument is behind the connection. */
    typedef PyObject *(*muxcore_native_call)(PyObject *, PyObject **);
    static PyTypeObject *muxcore_native_type;
    static muxcore_native_call muxcore_native;
    static inline void muxcore_set_native(PyObject *type, muxcore_native_call call)
    {
        muxcore_native_type = (PyTypeObject *)type;
        muxcore_native = call;
    }

    /* Call fn; what is in front of args is free, twice. CPython does the same, behind three more calls: a bound method
       costs 100 instructions less here. */
    static inline PyObject *muxcore_call(PyObject *fn, PyObject **args, size_t count)
    {
        if (PyMethod_Check(fn)) {
            *--args = PyMethod_GET_SELF(fn);
            count++;
            fn = PyMethod_GET_FUNCTION(fn);
        }
        count |= PY_VECTORCALL_ARGUMENTS_OFFSET;
        if (PyFunction_Check(fn))
            return ((PyFunctionObject *)fn)->vectorcall(fn, args, count, NULL);
        if (Py_TYPE(fn) == muxcore_native_type)
            return muxcore_native(fn, args);
        return PyObject_Vectorcall(fn, args, count, NULL);
    }

    #ifdef Py_GIL_DISABLED
    #define MUXCORE_FREE_THREADED 1
    #else
    #define MUXCORE_FREE_THREADED 0
    #endif

    /* Whether the caller has the only reference. Without a GIL that is not all: nothing is reused there. */
    static inline int muxcore_is_lone(PyObject *object)
    {
    #ifdef Py_GIL_DISABLED
        return 0;
    #else
        return Py_REFCNT(object) == 1;
    #endif
    }

    /* Give a bytes object of which the caller has the only reference, and that is long enough, new contents. */
    static inline void muxcore_refill(PyObject *bytes, const char *data, size_t size)
    {
        PyBytesObject *it = (PyBytesObject *)bytes;
        memcpy(it->ob_sval, data, size);
        it->ob_sval[size] = 0;
        Py_SET_SIZE(it, (Py_ssize_t)size);
    #pragma GCC diagnostic push
    #pragma GCC diagnostic ignored "-Wdeprecated-declarations"
        it->ob_shash = -1;
    #pragma GCC diagnostic pop
    }

    /* The code that Cython 3.3 generates for an `except` releases the exception's traceback, and expects that it has
       one. It has none if C code raised it and memory was out when the traceback was due: then this one is used. */
    static PyObject *muxcore_spare_traceback;
    static inline PyObject *muxcore_some_traceback(PyObject *own) {
        return own != NULL ? own : Py_XNewRef(muxcore_spare_traceback);
    }
    static inline void muxcore_spare(PyObject *traceback) { muxcore_spare_traceback = Py_NewRef(traceback); }
    #if PY_VERSION_HEX >= 0x030C0000
    #define PyException_GetTraceback(value) muxcore_some_traceback(PyException_GetTraceback(value))
    #else
    #define PyErr_NormalizeException(type, value, traceback) \
        (PyErr_NormalizeException(type, value, traceback), *(traceback) = muxcore_some_traceback(*(traceback)))
    #endif
    """
    bint muxcore_is_lone(PyObject* obj) noexcept
    int MUXCORE_FREE_THREADED
    void muxcore_refill(PyObject* bytes_, const char* data, size_t size) noexcept
    PyObject* muxcore_call(PyObject* fn, PyObject** args, size_t count)
    void set_native "muxcore_set_native"(PyObject* type_, PyObject* (*call)(PyObject*, PyObject**) except NULL)
    void allocate_and_free "muxcore_allocate_and_free"(size_t size) noexcept
    void keep_spare_traceback "muxcore_spare"(object traceback)
    void no_memory "PyErr_NoMemory"()
    char* bytes_data "PyBytes_AS_STRING"(PyObject* bytes_) noexcept
    Py_ssize_t bytes_size "PyBytes_GET_SIZE"(PyObject* bytes_) noexcept
    int PyList_SetSlice(object items, Py_ssize_t start, Py_ssize_t end, PyObject* others) except -1
    int append_or_fail "PyList_Append"(object items, object item)
    void PyErr_Clear()
    object taken "muxcore_taken"(PyObject* obj)  # takes over a reference that was counted by hand
    object raised "muxcore_raised"()  # hands on the exception that a C call left behind

try:
    raise MemoryError()
except MemoryError as error:
    keep_spare_traceback(error.__traceback__)

# How many times this process is a forked child. A Mux of another count belongs to a parent: it must not be used, and
# may only be close(2)d, since EPOLL_CTL_DEL and shutdown would reach the parent's set and the parent's peers.
cdef uint64_t forks = 0

def _count_fork():
    global forks
    forks += 1

os.register_at_fork(after_in_child=_count_fork)

cdef object os_error(ssize_t r):
    try:
        return OSError(-r, os.strerror(-r))
    except MemoryError as error:
        return error  # the kernel reports an error once: the caller gets one


# What we pass to make an object that users may not make: one made by hand has no Mux, and its methods would read
# through None.
cdef object TOKEN = object()
cdef tuple BY_US = (TOKEN,)

cdef int check_token(object token, str advice) except -1:
    if token is not TOKEN:
        raise TypeError(advice)
    return 0


# --- the epoll set ---------------------------------------------------------------------------------

cdef enum:
    DEFAULT_EVENTS = 1023   # as select.epoll: FD_SETSIZE - 1; so many fit onto the stack

@cython.final
@cython.no_gc_clear  # as Connection
cdef class Epoll:
    """A drop-in replacement for select.epoll: the same methods and errors, and the select module's constants.

    Two additions: timeouts have nanosecond precision (where the kernel has epoll_pwait2; else they are rounded up to
    milliseconds), and after `register(fd, events, data=obj)`, `poll` returns `obj` in place of the descriptor.

    sizehint: ignored, as in the kernel; -1 or positive.
    flags: 0 or EPOLL_CLOEXEC, which is set in any case (PEP 446).
    """

    def __cinit__(self):
        self.fd = -1
        self.data = {}
        self.pwait2 = muxcore_find_pwait2()

    def __init__(self, sizehint=-1, flags=0):
        cdef int hint = PyNumber_Index(sizehint), wanted = PyNumber_Index(flags)
        if hint != -1 and hint <= 0:
            raise ValueError("negative sizehint")
        if wanted & ~EPOLL_CLOEXEC:
            raise OSError("invalid flags")
        epoll_close(self)
        self.fd = sys_epoll_create()
        if self.fd < 0:
            raise os_error(self.fd)

    def __dealloc__(self):
        epoll_close(self)
        free(self.events)

    @staticmethod
    def fromfd(fd) -> Epoll:
        """An Epoll that owns an existing epoll descriptor, and closes it; -1 makes a new one."""
        cdef int number = PyNumber_Index(fd)
        cdef Epoll ep
        if number == -1:
            return Epoll()
        if number < 0:
            raise OSError("invalid descriptor")
        ep = Epoll.__new__(Epoll)
        ep.fd = number
        return ep

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.fd < 0

    def fileno(self) -> int:
        """The epoll descriptor. ValueError if closed."""
        return epoll_checked(self)

    def close(self) -> None:
        """Close the epoll descriptor. A second call has no effect. A thread that waits on it is not woken.

        Raises OSError (EBADF) if other code has closed it, as select.epoll does since CPython 3.15.
        """
        cdef int fd = muxcore_exchange(&self.fd, -1)  # of two threads, one closes it
        cdef int r = sys_close(fd) if fd >= 0 else 0
        self.data.clear()  # last: it runs the finalisers of what was registered as data
        if r < 0:
            raise os_error(r)

    def __enter__(self):
        epoll_checked(self)
        return self

    def __exit__(self, *exc_info):
        self.close()

    def register(self, fd, eventmask=EPOLLIN | EPOLLPRI | EPOLLOUT, data=None) -> None:
        """Watch a descriptor, or an object with `fileno()`. `data`: what `poll` returns for it; None: the descriptor.

        Raises FileExistsError if it is registered, PermissionError for what cannot be polled (a regular file),
        ValueError if closed.
        """
        cdef int number = PyObject_AsFileDescriptor(fd)
        epoll_change(self, EPOLL_CTL_ADD, number, as_events(eventmask))
        epoll_keep(self, number, data)

    def modify(self, fd, eventmask, data=None) -> None:
        """Change the events of a descriptor, and its data unless that is None. FileNotFoundError if not registered."""
        cdef int number = PyObject_AsFileDescriptor(fd)
        epoll_change(self, EPOLL_CTL_MOD, number, as_events(eventmask))
        if data is not None:
            self.data[number] = data

    def unregister(self, fd) -> None:
        """Stop watching a descriptor. FileNotFoundError if it is not registered, OSError (EBADF) if it is closed."""
        cdef int number = PyObject_AsFileDescriptor(fd)
        _held = self.data.pop(number, None)  # its finaliser may register the same number again
        epoll_change(self, EPOLL_CTL_DEL, number, 0)

    def poll(self, timeout=None, maxevents=-1) -> list:
        """Wait for events: [(descriptor or data, events), ...].

        timeout: seconds; None or negative waits without limit. A signal does not end the wait (PEP 475).
        maxevents: the most events that are returned; -1 is 1023.
        """
        cdef int64_t timeout_ns = seconds_to_ns(timeout)
        cdef int most = PyNumber_Index(maxevents)
        epoll_checked(self)  # behind the conversions, which may run a method of the user's
        if most == -1:
            most = DEFAULT_EVENTS
        elif most < 1:
            raise ValueError(f"maxevents must be greater than 0, got {most}")
        return epoll_poll(self, timeout_ns, most)

cdef int64_t seconds_to_ns(object timeout) except? -2:
    """Rounded up, since a wait is never too short; -1 (without limit) if None or negative."""
    cdef double seconds
    if timeout is None:
        return -1
    try:
        seconds = timeout
    except TypeError:
        raise TypeError(f"timeout must be seconds or None, not {type(timeout).__name__}") from None
    if seconds != seconds:
        raise ValueError("timeout must not be NaN")
    if not -9e9 < seconds < 9e9:
        raise OverflowError("timeout is too large")
    return -1 if seconds < 0 else <int64_t>ceil(seconds * 1e9)

cdef uint32_t as_events(object eventmask) except? <uint32_t>-1:
    """The low 32 bits of a mask, as select.epoll has it: ~EPOLLOUT and -1 are masks, too."""
    return <uint32_t>PyLong_AsUnsignedLongMask(eventmask)

cdef list epoll_poll(Epoll ep, int64_t timeout_ns, int maxevents):
    cdef epoll_event on_stack[DEFAULT_EVENTS]
    cdef epoll_event* events = on_stack
    cdef int count
    if maxevents > DEFAULT_EVENTS:
        events = <epoll_event*>malloc(maxevents * sizeof(epoll_event))
        if events == NULL:
            raise MemoryError()
    try:
        count = epoll_wait_through(ep, events, maxevents, timeout_ns)
        return epoll_found(ep, events, count)
    finally:
        if events != on_stack:
            free(events)

cdef int epoll_wait_through(Epoll ep, epoll_event* events, int maxevents, int64_t timeout_ns) except -1:
    """Wait for the whole timeout, also if signals arrive; their handlers run."""
    cdef int64_t deadline = 0
    cdef int count, fd = ep.fd
    if timeout_ns > 0:
        deadline = sys_clock_ns(CLOCK_MONOTONIC) + timeout_ns
    while True:
        with nogil:
            count = sys_epoll_wait(fd, events, maxevents, timeout_ns, ep.pwait2)
        if ep.fd != fd:
            return 0  # another thread has closed it: the number may be another file's now, and the data is gone
        if count < 0:
            raise os_error(count)
        if count > 0 or timeout_ns == 0:
            return count
        PyErr_CheckSignals()
        if ep.fd != fd:
            return 0  # a signal handler has
        if timeout_ns > 0:
            timeout_ns = deadline - sys_clock_ns(CLOCK_MONOTONIC)
            if timeout_ns <= 0:
                return 0

cdef list epoll_found(Epoll ep, epoll_event* events, int count):
    cdef list found = [None] * count
    cdef int i
    cdef bint has_data = len(ep.data) != 0
    for i in range(count):
        key = <int>events[i].data.u64
        found[i] = (ep.data.get(key, key) if has_data else key, events[i].events)
    return found

cdef int epoll_checked(Epoll ep) except -1:
    if ep.fd < 0:
        raise ValueError("I/O operation on closed epoll object")
    return ep.fd

cdef int epoll_change(Epoll ep, int operation, int fd, uint32_t events) except -1:
    cdef int r = sys_epoll_ctl(epoll_checked(ep), operation, fd, events, <uint32_t>fd)
    if r < 0:
        raise os_error(r)
    return 0

cdef int epoll_keep(Epoll ep, int fd, object data) except -1:
    if data is not None:
        ep.data[fd] = data
    elif ep.data:
        ep.data.pop(fd, None)  # of a descriptor that was closed, and whose number is back
    return 0

cdef Epoll epoll_with_batch(int capacity):
    """An epoll set with a batch of its own, for a Mux."""
    cdef Epoll ep = Epoll()
    ep.events = <epoll_event*>malloc(capacity * sizeof(epoll_event))
    if ep.events == NULL:
        raise MemoryError()
    ep.capacity = capacity
    return ep

cdef void epoll_close(Epoll ep) noexcept:
    if ep.fd >= 0:
        sys_close(ep.fd)
    ep.fd = -1
    ep.count = ep.next = 0

include "_core/policy.pxi"
include "_core/connection.pxi"
include "_core/outbox.pxi"
include "_core/inbox.pxi"
include "_core/wire.pxi"
include "_core/tls.pxi"
include "_core/datagram.pxi"
include "_core/check.pxi"
include "_core/listener.pxi"
include "_core/slots.pxi"
include "_core/threads.pxi"
include "_core/loop.pxi"
include "_core/end.pxi"
include "_core/mux.pxi"
include "_core/native.pxi"
