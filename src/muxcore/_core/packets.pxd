# What may live here: the arrays that recvmmsg fills and sendmmsg reads, and leaf functions over them. No Python object.

from libc.stdlib cimport free, malloc
from libc.string cimport memset
from .syscalls cimport iovec, mmsghdr, sockaddr_storage, socklen_t

cdef enum:
    # Datagrams of one recvmmsg or sendmmsg: with so many, the system call itself is lost in the noise.
    PACKETS = 64
    # Buffers that are a power of two apart would all begin in the same few sets of the processor's caches.
    STAGGER = 320

# Room for one recvmmsg. Of the buffers the kernel gives us only the pages that datagrams have reached.
cdef struct Packets:
    size_t size             # of the largest datagram
    mmsghdr headers[PACKETS]
    iovec parts[PACKETS]
    sockaddr_storage names[PACKETS]

cdef inline Packets* packets_new(size_t size) noexcept nogil:
    """NULL when memory is out."""
    cdef size_t stride = size + STAGGER
    cdef int i
    cdef Packets* p = <Packets*>malloc(sizeof(Packets) + PACKETS * stride)
    if p == NULL:
        return NULL
    memset(p, 0, sizeof(Packets))
    p.size = size
    for i in range(PACKETS):
        p.parts[i].iov_base = <char*>(p + 1) + i * stride
        p.headers[i].msg_hdr.msg_iov = &p.parts[i]
        p.headers[i].msg_hdr.msg_iovlen = 1
        p.headers[i].msg_hdr.msg_name = &p.names[i]
    return p

cdef inline void packets_offer(Packets* p, size_t size) noexcept nogil:
    """Make all of it ready for datagrams of up to `size` bytes; the last call has changed it."""
    cdef int i
    for i in range(PACKETS):
        p.parts[i].iov_len = size
        p.headers[i].msg_hdr.msg_namelen = sizeof(sockaddr_storage)

cdef inline void packet_set(mmsghdr* header, iovec* part, const char* data, size_t size, const char* name,
                            socklen_t name_size) noexcept nogil:
    """One datagram for sendmmsg; `name` is NULL on a connected socket."""
    part.iov_base = <void*>data
    part.iov_len = size
    memset(header, 0, sizeof(mmsghdr))
    header.msg_hdr.msg_name = <void*>name
    header.msg_hdr.msg_namelen = name_size
    header.msg_hdr.msg_iov = part
    header.msg_hdr.msg_iovlen = 1
