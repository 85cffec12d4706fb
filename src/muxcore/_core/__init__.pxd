# What may live here: nothing. The folder has the chapters of _epoll.pyx (.pxi) and the leaves that they call (.pxd).
