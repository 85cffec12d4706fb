# What may live here: the extension. This file holds what its chapters share: the epoll set and policies.
#   _connection.pxi   Connection: sending, receiving, and the steps of its life
#   _mux.pxi          Listener and Core: accepting, the turn of the loop, threads, ending
#
# How a turn goes. wait() fills the batch; dispatch() reads, delivers and flushes connection by connection. Whatever
# is not that hot path (an interest to change, a drain or EOF to tell, a close to advance, output for another
# connection) only puts the connection on `pending`, once; settle() does it all in one place, at the end of the batch.
# So no method ever runs a callback, and a callback can do anything to any connection.
#
# EAGAIN and EOF are values here. An exception that leaves a C function is either the caller's mistake, out of memory,
# or a BaseException of a handler on its way out of poll() or run().

import dataclasses
import logging
import os
import socket
import warnings
from collections import deque

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.sequence cimport PySequence_Size
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset

from ._buffer cimport *
from ._sys cimport *

from . import _address
from ._config import Limits, Timeouts, as_limits, as_timeouts, check_seconds, to_ns
from ._stats import Stats
from ._timers import Timers
from .errors import ConnectionClosed, IdleTimeout, OutboxFull, WriteTimeout

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
    void no_memory "PyErr_NoMemory"()
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


# What we pass to make an object that nobody else may: one made by hand has no Mux, and its methods would read through
# None.
cdef object TOKEN = object()

cdef int check_token(object token, str advice) except -1:
    if token is not TOKEN:
        raise TypeError(advice)
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

    def __init__(self, handler, callbacks, limits, timeouts, half_open):
        self.pull = handler is None
        self.handler = handler
        self.callbacks = callbacks
        self.limits = limits
        self.timeouts = timeouts
        self.half_open = half_open
        self.on_open, self.on_message, self.on_messages, self.on_drain, self.on_eof, self.on_close = callbacks
        self.low, self.high = self.limits.low, self.limits.high
        self.max_outbox, self.max_inbox = self.limits.max_outbox, self.limits.max_inbox
        self.autopause = self.limits.autopause is not False
        self.overflow = OVERFLOWS[self.limits.overflow]
        self.linger_ns = to_ns(self.timeouts.linger)
        self.idle_ns = to_ns(self.timeouts.idle or 0)
        self.write_ns = to_ns(self.timeouts.write or 0)

cdef Policy changed_policy(Policy policy, object limits, object timeouts):
    """The same policy with other settings, for one connection alone."""
    cdef Policy other = Policy(policy.handler, policy.callbacks, limits, timeouts, policy.half_open)
    other.listener = policy.listener
    return other

include "_connection.pxi"
include "_mux.pxi"
