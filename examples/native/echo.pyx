# cython: language_level=3
"""A handler in C: an echo of lines, with a limit on what one client may send.

    cythonize -i examples/native/echo.pyx
    PYTHONPATH=examples/native python -c "import echo; echo.serve(8888)"
"""

from muxcore cimport Connection, NativeHandler, close, send

import muxcore


cdef class Echo(NativeHandler):
    cdef readonly size_t messages
    cdef Py_ssize_t most

    def __init__(self, Py_ssize_t most=1000):
        self.most = most

    cdef int on_message(self, Connection conn, object message) except -1:
        self.messages += 1
        if len(<bytes>message) > self.most:
            close(conn, muxcore.FrameError("more than one may send"))
        else:
            send(conn, message)
        return 0


def serve(int port, ready=None):
    muxcore.serve(Echo(), ("127.0.0.1", port), framer=muxcore.Lines(), ready=ready)
