# What may live here: the chain of chunks that is an outbox, the memory of an inbox, and leaf functions over them. No
# Python object: the bytes objects that they refer to are `void*` here, and the code that frees a chunk releases its
# owner.

from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove
from .frame cimport Frame, frame_clear
from .syscalls cimport iovec

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
    # Room of a block between large pieces: a header or a trailer, and mostly both.
    SMALL_ROOM = 80

# A run of bytes. A reference (owner != NULL) points into a bytes object; a block owns the memory that follows it; with
# data == NULL it is the head of a FileChunk.
cdef struct Chunk:
    Chunk* next
    Chunk* last         # of the first in a chain: the last of it
    void* owner
    const char* data    # first byte that is still wanted
    size_t size         # how many are
    size_t room         # free bytes of a block behind data + size; 0 for a reference
    size_t total        # the memory of a block, this header included; 0 for a reference

# A part of a file, for sendfile(2).
cdef struct FileChunk:
    Chunk chunk
    int64_t offset      # of the first byte that is still wanted
    int fd              # a dup of ours

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

cdef inline Chunk* chunk_file(int fd, int64_t offset, size_t size) noexcept nogil:
    """A part of a file, whose descriptor goes with the chunk; NULL when memory is out."""
    cdef FileChunk* chunk = <FileChunk*>malloc(sizeof(FileChunk))
    if chunk == NULL:
        return NULL
    chunk.chunk.next = NULL
    chunk.chunk.owner = NULL
    chunk.chunk.data = NULL
    chunk.chunk.size = size
    chunk.chunk.room = chunk.chunk.total = 0
    chunk.offset = offset
    chunk.fd = fd
    return &chunk.chunk

cdef inline size_t chunk_files(const Chunk* chunk) noexcept nogil:
    """How many of a chain are parts of files."""
    cdef size_t count = 0
    while chunk != NULL:
        count += chunk.data == NULL
        chunk = chunk.next
    return count

cdef inline void chunk_append(Chunk* chunk, const char* data, size_t size) noexcept nogil:
    memcpy(<char*>chunk.data + chunk.size, data, size)
    chunk.size += size
    chunk.room -= size

cdef inline void chunk_append_byte(Chunk* chunk, char byte) noexcept nogil:
    (<char*>chunk.data)[chunk.size] = byte
    chunk.size += 1
    chunk.room -= 1

cdef inline size_t chunk_parts(Chunk* chunk, iovec* parts, size_t* bytes_) noexcept nogil:
    """Describe the first MAX_PARTS chunks of a chain, up to a file, for sendmsg: how many, and their bytes."""
    cdef size_t count = 0
    bytes_[0] = 0
    while chunk != NULL and chunk.data != NULL and count < MAX_PARTS:
        parts[count].iov_base = <void*>chunk.data
        parts[count].iov_len = chunk.size
        bytes_[0] += chunk.size
        count += 1
        chunk = chunk.next
    return count


# --- inboxes ---------------------------------------------------------------------------------------

# What was received and not delivered: bytes of an object (owner != NULL), of the memory that follows (total > 0), or of
# the Mux's window.
cdef struct Inbox:
    void* owner
    const char* data
    size_t size
    size_t room         # bytes free behind data + size
    size_t total        # bytes of memory that follow
    Frame frame         # the first message

cdef inline void inbox_set(Inbox* inbox, void* owner, const char* data, size_t size) noexcept nogil:
    inbox.owner = owner
    inbox.data = data
    inbox.size = size
    inbox.room = inbox.total = 0
    frame_clear(&inbox.frame)

cdef inline Inbox* inbox_reference(void* owner, const char* data, size_t size) noexcept nogil:
    """An inbox of bytes that `owner` holds; NULL when memory is out."""
    cdef Inbox* inbox = <Inbox*>malloc(sizeof(Inbox))
    if inbox != NULL:
        inbox_set(inbox, owner, data, size)
    return inbox

cdef inline Inbox* inbox_copy(const Inbox* source, size_t room) noexcept nogil:
    """The same bytes in memory of their own, with room for more; NULL when memory is out."""
    cdef size_t total = source.size + room
    cdef Inbox* inbox = <Inbox*>malloc(sizeof(Inbox) + total)
    if inbox != NULL:
        inbox.owner = NULL
        inbox.data = <const char*>(inbox + 1)
        inbox.size = source.size
        inbox.room = room
        inbox.total = total
        inbox.frame = source.frame
        memcpy(<char*>inbox.data, source.data, source.size)
    return inbox

cdef inline void inbox_shift(Inbox* inbox) noexcept nogil:
    """Give the memory of what was delivered back to `room`. Only for one with memory of its own."""
    memmove(<char*>(inbox + 1), inbox.data, inbox.size)
    inbox.data = <const char*>(inbox + 1)
    inbox.room = inbox.total - inbox.size
