# What may live here: the extension. This file holds what its chapters share: the epoll set, policies and timers.
#   _connection.pxi   Connection: sending, receiving, and the steps of its life
#   _mux.pxi          Listener and Mux: accepting, the turn of the loop, threads, ending
#
# How a turn goes. wait() fills the batch; dispatch() reads, delivers and flushes connection by connection. Whatever
# is not that hot path (an interest to change, a drain or EOF to tell, a close to advance, output for another
# connection) only puts the connection on `pending`, once; settle() does it all in one place, at the end of the batch.
# So no method ever runs a callback, and a callback can do anything to any connection.
#
# EAGAIN and EOF are values here. An exception that leaves a C function is either the caller's mistake, out of memory,
# or a BaseException of a handler on its way out of poll() or run().

import dataclasses
import heapq
import logging
import os
import signal
import socket
import threading
import warnings
from collections import deque

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from ._buffer cimport *
from ._sys cimport *

from . import _address, _config
from ._config import Limits, Timeouts
from ._stats import Stats
from .errors import ConnectionClosed, IdleTimeout, OutboxFull, WriteTimeout
from .handler import Callbacks, resolve

cdef extern from "Python.h":
    unsigned long PyThread_get_thread_ident() noexcept nogil
    PyObject* PyObject_Vectorcall(PyObject* fn, PyObject** args, size_t nargs, PyObject* names)
    size_t PY_VECTORCALL_ARGUMENTS_OFFSET
    int _PyBytes_Resize(PyObject** bytes_, Py_ssize_t size) except -1
    PyObject* make_bytes "PyBytes_FromStringAndSize"(const char* data, Py_ssize_t size)
    void Py_XDECREF(PyObject* obj)
    void DECREF "Py_DECREF"(PyObject* obj)

cdef extern from *:
    """
    static inline PyObject *muxcore_raised(void) { return NULL; }
    """
    object raised "muxcore_raised"()  # hands on the exception that a C call left behind

log = logging.getLogger("muxcore")

# How many times this process is a forked child. A Mux of another count belongs to a parent: it must not be used, and
# may only be close(2)d, since EPOLL_CTL_DEL and shutdown would reach the parent's set and the parent's peers.
cdef uint64_t forks = 0

def _count_fork():
    global forks
    forks += 1

os.register_at_fork(after_in_child=_count_fork)

cdef object os_error(ssize_t r):
    return OSError(-r, os.strerror(-r))


# Set just before we make an object that nobody else may: one made by hand has no Mux, and its methods would read
# through None.
cdef bint making = False

cdef int check_making(str advice) except -1:
    global making
    if not making:
        raise TypeError(advice)
    making = False
    return 0


# --- the epoll set ---------------------------------------------------------------------------------

@cython.final
cdef class Epoll:
    """An epoll descriptor and the events of its last wait."""

    def __cinit__(self, int capacity):
        self.fd = -1
        self.capacity = capacity
        self.events = <epoll_event*>malloc(capacity * sizeof(epoll_event))
        if self.events == NULL:
            raise MemoryError()
        self.pwait2 = muxcore_find_pwait2()
        self.fd = sys_epoll_create()
        if self.fd < 0:
            raise os_error(self.fd)

    def __dealloc__(self):
        epoll_close(self)
        free(self.events)

cdef void epoll_close(Epoll ep) noexcept:
    if ep.fd >= 0:
        sys_close(ep.fd)
    ep.fd = -1
    ep.count = ep.next = 0


# --- policies --------------------------------------------------------------------------------------

cdef enum Overflow:
    OVERFLOW_CLOSE
    OVERFLOW_DROP
    OVERFLOW_RAISE

cdef dict OVERFLOWS = {"close": OVERFLOW_CLOSE, "drop": OVERFLOW_DROP, "raise": OVERFLOW_RAISE}

@cython.final
cdef class Policy:
    """A handler and its settings, checked and compiled."""

    def __init__(self, handler, framer, limits, timeouts, half_open):
        if framer is not None:
            raise TypeError(f"framer must be None: this version delivers chunks as they arrive, not {framer!r}")
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits must be a muxcore.Limits or None, not {type(limits).__name__}")
        if timeouts is not None and not isinstance(timeouts, Timeouts):
            raise TypeError(f"timeouts must be a muxcore.Timeouts or None, not {type(timeouts).__name__}")
        self.pull = handler is None
        self.callbacks = Callbacks(None, None, None, None, None, None) if handler is None else resolve(handler)
        self.handler = handler
        self.framer = framer
        self.half_open = half_open
        self.limits = limits or Limits()
        self.timeouts = timeouts or Timeouts()
        self.on_open, self.on_message, self.on_messages, self.on_drain, self.on_eof, self.on_close = self.callbacks
        self.low, self.high = self.limits.low, self.limits.high
        self.max_outbox, self.max_inbox = self.limits.max_outbox, self.limits.max_inbox
        self.autopause = self.limits.autopause is not False
        self.overflow = OVERFLOWS[self.limits.overflow]
        self.linger_ns = to_ns(self.timeouts.linger)
        self.idle_ns = to_ns(self.timeouts.idle or 0)
        self.write_ns = to_ns(self.timeouts.write or 0)

cdef Policy changed_policy(Policy policy, object limits, object timeouts):
    """The same policy with other settings, for one connection alone."""
    cdef Policy other = Policy(policy.handler, policy.framer, limits, timeouts, policy.half_open)
    other.listener = policy.listener
    return other

cdef int64_t to_ns(object seconds) except? -1:
    # Half a year is for ever, and 2**63 ns is only 292 years: no sum of two of these overflows.
    return <int64_t>(min(seconds, 1.6e7) * 1e9)


# --- timers ----------------------------------------------------------------------------------------

@cython.final
cdef class TimerHandle:
    """A call that is due at a time; made by `call_later` and `call_at`."""

    def __cinit__(self):
        check_making("timers are made by Mux.call_later and Mux.call_at")

    @property
    def when(self) -> float:
        """The time it is due, in seconds of `Mux.time()`."""
        return self.when_ns / 1e9

    def cancel(self) -> None:
        """Do not call it; no effect if it was called or cancelled. What it would have called is released at once."""
        check_thread(self.mux)
        cancel_timer(self)

    def __lt__(self, TimerHandle other):
        if self.when_ns != other.when_ns:
            return self.when_ns < other.when_ns
        return self.order < other.order

    def __repr__(self):
        state = "cancelled" if self.cancelled else "called" if self.fn is None else f"calls {self.fn!r}"
        return f"<muxcore.TimerHandle {state}, when={self.when:.6f}>"

cdef TimerHandle add_timer(Mux m, int64_t when_ns, object fn, tuple args):
    cdef TimerHandle timer
    global making
    making = True
    timer = TimerHandle.__new__(TimerHandle)
    timer.mux = m
    timer.when_ns = when_ns
    m.last_order += 1
    timer.order = m.last_order
    timer.fn = fn
    timer.args = args
    heapq.heappush(m.timers, timer)
    return timer

cdef int cancel_timer(TimerHandle timer) except -1:
    cdef Mux m = timer.mux
    if timer.fn is None:
        return 0
    timer.cancelled = True
    timer.fn = timer.args = None
    m.cancelled_timers += 1
    # A cancelled timer stays in the heap until it is due. Once they are the majority they are swept out, so their
    # memory is bounded by that of the living ones, at a constant cost each.
    if m.cancelled_timers > 64 and 2 * m.cancelled_timers > <uint64_t>len(m.timers):
        m.timers = [t for t in m.timers if not (<TimerHandle>t).cancelled]
        heapq.heapify(m.timers)
        m.cancelled_timers = 0
    return 0

cdef int64_t next_timer_ns(Mux m) except? -2:
    """When the next timer is due; -1 if there is none."""
    cdef TimerHandle timer
    while m.timers:
        timer = <TimerHandle>m.timers[0]
        if not timer.cancelled:
            return timer.when_ns
        heapq.heappop(m.timers)
        m.cancelled_timers -= 1
    return -1

cdef int run_timers(Mux m) except -1:
    cdef TimerHandle timer
    cdef int64_t when, now
    cdef uint64_t newest
    if not m.timers:
        return 0
    now = sys_clock_ns(CLOCK_MONOTONIC)
    newest = m.last_order  # one that a callback sets with delay 0 waits for the next turn
    while not m.unwinding:
        when = next_timer_ns(m)
        if when < 0 or when > now or (<TimerHandle>m.timers[0]).order > newest:
            return 0
        timer = heapq.heappop(m.timers)
        fn, args = timer.fn, timer.args
        timer.fn = timer.args = None
        call_plain(m, fn, args)
    return 0

cdef int call_plain(Mux m, object fn, object args) except -1:
    """Call what was passed to call_soon and the like; an Exception is logged."""
    try:
        fn(*args)
    except Exception:
        m.n.handler_errors += 1
        log.exception("%r raised", fn)
    return 0


include "_connection.pxi"
include "_mux.pxi"
