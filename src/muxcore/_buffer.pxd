# What may live here: the chain of chunks that is an outbox, and leaf functions over it. No Python object: the bytes
# objects that chunks refer to are `void*` here, and whoever takes a chunk off the chain releases its owner.

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from ._sys cimport iovec

cdef enum:
    # Pieces below this are copied next to each other; a larger one is kept by reference. Copying 1 KiB costs about as
    # much as another iovec costs the kernel.
    SMALL_PIECE = 1024
    # One block of gathered pieces, header included: what malloc serves from its cache without a page fault.
    BLOCK_SIZE = 4096
    # A lone leftover below this is moved out of its block, so that 10,000 slow readers do not hold 10,000 blocks.
    COMPACT_BELOW = 2048
    # Chunks of one sendmsg. IOV_MAX is 1024; beyond some dozens nothing is gained.
    MAX_PARTS = 64

# A run of bytes. A reference (owner != NULL) points into a bytes object; a block owns the memory that follows it.
cdef struct Chunk:
    Chunk* next
    void* owner
    const char* data    # first byte that is still wanted
    size_t size         # how many are
    size_t room         # bytes that a block still takes behind data + size; 0 for a reference
    size_t total        # what a block takes of memory, this header included; 0 for a reference

cdef inline void chunk_clear(Chunk* chunk) noexcept nogil:
    chunk.next = NULL
    chunk.owner = NULL
    chunk.data = <const char*>(chunk + 1)
    chunk.size = 0
    chunk.room = chunk.total - sizeof(Chunk)

cdef inline Chunk* chunk_block(size_t room) noexcept nogil:
    """A block for `room` bytes; NULL when memory is out."""
    cdef Chunk* chunk = <Chunk*>malloc(sizeof(Chunk) + room)
    if chunk != NULL:
        chunk.total = sizeof(Chunk) + room
        chunk_clear(chunk)
    return chunk

cdef inline Chunk* chunk_reference(void* owner, const char* data, size_t size) noexcept nogil:
    """A reference to bytes that `owner` holds; NULL when memory is out."""
    cdef Chunk* chunk = <Chunk*>malloc(sizeof(Chunk))
    if chunk != NULL:
        chunk.next = NULL
        chunk.owner = owner
        chunk.data = data
        chunk.size = size
        chunk.room = 0
        chunk.total = 0
    return chunk

cdef inline void chunk_append(Chunk* chunk, const char* data, size_t size) noexcept nogil:
    memcpy(<char*>chunk.data + chunk.size, data, size)
    chunk.size += size
    chunk.room -= size

cdef inline size_t chunk_parts(Chunk* chunk, iovec* parts, size_t* bytes_) noexcept nogil:
    """Describe the first MAX_PARTS chunks of a chain for sendmsg: how many, and their bytes."""
    cdef size_t count = 0
    bytes_[0] = 0
    while chunk != NULL and count < MAX_PARTS:
        parts[count].iov_base = <void*>chunk.data
        parts[count].iov_len = chunk.size
        bytes_[0] += chunk.size
        count += 1
        chunk = chunk.next
    return count
