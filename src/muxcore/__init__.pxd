# What may live here: what a user's Cython module may cimport. docs/guides/native.md shows how.

from muxcore._epoll cimport Connection, NativeHandler
from muxcore._epoll cimport native_close as close
from muxcore._epoll cimport native_send as send
from muxcore._epoll cimport native_write as write
