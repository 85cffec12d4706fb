# What may live here: the handler of muxcore_native.py.

from muxcore cimport Connection, NativeHandler, send


cdef class Echo(NativeHandler):
    cdef int on_message(self, Connection conn, object message) except -1:
        send(conn, message)
        return 0
