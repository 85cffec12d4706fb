# What may live here: the fuzz target of _core/frame.pxd. An input encodes a framer, the sizes of some reads, and
# a stream; what the framer makes of them must hold together. README.md has the format, and how to run it.

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc, strtoll
from libc.string cimport memchr, memcmp, memcpy, memset

from muxcore._core.frame cimport *

cdef extern from "<assert.h>" nogil:
    void demand "assert"(bint condition)

cdef enum:
    HEAD = 4    # kind, max_size, option, how many reads have a size

cdef public int LLVMFuzzerTestOneInput(const unsigned char* input_, size_t size) noexcept nogil:
    cdef Framing g
    cdef size_t reads, start
    cdef uint64_t number = 0
    cdef char* delimiter = NULL
    if size < HEAD or not compile_framing(&g, input_):
        return 0
    reads = input_[3] & 15
    start = HEAD + reads + (g.size if g.kind == DELIMITED else 0)
    if size < start:
        return 0
    if g.kind == DELIMITED:
        delimiter = exactly(<const char*>input_ + start - g.size, g.size)
        g.delimiter = delimiter
        check_delimiter_within(&g, <const char*>input_ + start, size - start)
    memcpy(&number, input_ + start, min(size - start, sizeof(number)))
    check_headers(&g, number)
    check_stream(&g, <const char*>input_ + start, size - start, input_ + HEAD, reads)
    free(delimiter)
    return 0

cdef bint compile_framing(Framing* g, const unsigned char* head) noexcept nogil:
    """As compile_framer() does; False for a kind that is not scanned."""
    cdef unsigned char option = head[2]
    memset(g, 0, sizeof(Framing))
    g.kind = <FramerKind>(head[0] & 7)
    g.max_size = head[1] if head[1] else <size_t>1 << 40
    if g.kind == DELIMITED:
        g.size = 1 + (option & 7)
    elif g.kind == PREFIXED:
        g.size = 0 if option & 4 else 1 << (option & 3)
        g.little = option & 8 != 0
        g.header_included = option & 16 != 0 and g.size != 0
    elif g.kind == FIXED:
        g.size = 1 + (option & 15)
    return LINES <= g.kind <= RESP

cdef char* exactly(const char* data, size_t size) noexcept nogil:
    """A copy that ends where its memory ends, so that ASan reports a read beyond it."""
    cdef char* copy = <char*>malloc(size)
    memcpy(copy, data, size)
    return copy


# --- reading ---------------------------------------------------------------------------------------

cdef void check_stream(
    const Framing* g, const char* data, size_t size, const unsigned char* reads, size_t count
) noexcept nogil:
    """However the stream arrives, its messages and its error are those of the stream that is all there."""
    cdef size_t start = 0, end = 0, i
    cdef Frame f, whole
    frame_clear(&f)
    for i in range(count + 1):  # the last read brings all the rest; one that brings nothing is a second look
        end = min(size, end + (reads[i] & 15)) if i < count else size
        while start < end:
            f.whole = 0
            look(g, data + start, end - start, &f)
            if f.whole == 0:
                break
            frame_clear(&whole)
            look(g, data + start, size - start, &whole)
            check_same(&f, &whole)
            if f.whole < 0:
                return
            start += f.whole
            frame_clear(&f)

cdef void look(const Framing* g, const char* data, size_t size, Frame* f) noexcept nogil:
    """Scan on; a scan that starts anew says the same."""
    cdef char* copy = exactly(data, size)
    cdef Frame anew
    frame_clear(&anew)
    demand(frame_scan(g, copy, size, f) == f.whole)
    frame_scan(g, copy, size, &anew)
    check_same(f, &anew)
    if f.whole > 0:
        demand(<size_t>f.whole <= size)
        check_message(g, copy, f)
    elif f.whole == 0:  # such a message is not buffered without end
        demand(f.at <= size <= g.max_size + g.size + MAX_HEADER)
        check_needed(g, copy, size)
    else:
        demand(f.at < size)
    free(copy)

cdef void check_same(const Frame* f, const Frame* other) noexcept nogil:
    demand(f.whole == other.whole)
    if f.whole > 0:
        demand(f.start == other.start and f.size == other.size and f.empty == other.empty)
    elif f.whole < 0:
        demand(f.at == other.at)

cdef void check_needed(const Framing* g, const char* data, size_t size) noexcept nogil:
    cdef size_t needed = frame_needed(g, data, size)
    demand(needed == 0 or needed > size)
    demand(needed == 0 or g.kind == FIXED or g.kind == PREFIXED)

cdef void check_message(const Framing* g, const char* data, const Frame* f) noexcept nogil:
    """What is complete looks as its framer has it."""
    cdef size_t whole = f.whole
    demand(f.start + f.size <= whole)
    demand(f.size <= g.max_size or g.kind == FIXED)
    if g.kind == LINES:
        demand(memchr(data, c'\n', whole) == data + whole - 1)
        demand(f.size + (whole > 1 and data[whole - 2] == c'\r') + 1 == whole)
    elif g.kind == DELIMITED:
        demand(f.size + g.size == whole and memcmp(data + f.size, g.delimiter, g.size) == 0)
        demand(not frame_delimiter_within(g, data, f.size))
    elif g.kind == PREFIXED:
        demand(f.start + f.size == whole)
    elif g.kind == FIXED:
        demand(f.size == whole == g.size)
    elif data[0] != c'*':
        demand(memchr(data, c'\n', whole) == data + whole - 1)
    elif not f.empty:
        check_request(data, whole)

cdef void check_request(const char* data, size_t size) noexcept nogil:
    """As request() reads it, without looking twice."""
    cdef size_t count = 0, length = 0, at = skip_number(data, 1, &count)
    demand(count > 0)
    while count:
        demand(data[at] == c'$')
        at = skip_number(data, at + 1, &length) + length + 2
        demand(at <= size and memcmp(data + at - 2, b"\r\n", 2) == 0)
        count -= 1
    demand(at == size)


# --- sending ---------------------------------------------------------------------------------------

cdef void check_delimiter_within(const Framing* g, const char* data, size_t size) noexcept nogil:
    """It says what a search in data + delimiter finds."""
    cdef char* sent = <char*>malloc(size + g.size)
    cdef char* copy = exactly(data, size)
    cdef size_t first = 0
    memcpy(sent, data, size)
    memcpy(sent + size, g.delimiter, g.size)
    while memcmp(sent + first, g.delimiter, g.size) != 0:
        first += 1
    demand(frame_delimiter_within(g, copy, size) == (first < size))
    free(copy)
    free(sent)

cdef void check_headers(const Framing* g, uint64_t number) noexcept nogil:
    """The number in a header is read as it was written, whether large or small."""
    cdef size_t i
    for i in range(sizeof(number)):
        if g.kind == PREFIXED:
            check_length(g, number >> 8 * i)
        elif g.kind == RESP:
            check_number(g, <int64_t>number >> 8 * i)

cdef void check_length(const Framing* g, uint64_t length) noexcept nogil:
    cdef char header[MAX_HEADER]
    cdef uint64_t most = <uint64_t>-1 >> (64 - 8 * g.size if g.size else 0)
    cdef uint64_t found = 0
    cdef size_t size
    cdef Frame f
    length &= most
    if g.header_included and length > most - g.size:
        length -= g.size
    size = put_length(g, length, header)
    frame_clear(&f)
    demand(size <= MAX_HEADER and read_length(g, header, size, &found, &f) == size)
    demand(found == length and f.whole == 0)
    demand(read_length(g, header, size - 1, &found, &f) == 0 and f.whole == 0)

cdef void check_number(const Framing* g, int64_t number) noexcept nogil:
    cdef char header[MAX_HEADER]
    cdef size_t size = put_number(c'*', number, header)
    cdef long long found = 0
    cdef Frame f
    demand(size <= MAX_HEADER and memcmp(header + size - 2, b"\r\n", 2) == 0)
    demand(header[0] == c'*' and strtoll(header + 1, NULL, 10) == number)
    if -<int64_t>g.max_size <= number <= <int64_t>g.max_size:
        frame_clear(&f)
        demand(read_number(g, header, size, 1, &found, &f) == size and found == number)
