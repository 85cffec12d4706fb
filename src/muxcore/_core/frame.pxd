# What may live here: framers over (pointer, length): where the first message ends, and how one is headed. No Python
# object, no memory of its own. _frame.py does the same in Python, and names what is wrong.

from libc.stdint cimport uint64_t
from libc.string cimport memchr, memcmp

cdef extern from "string.h" nogil:
    void* memmem(const void* data, size_t size, const void* part, size_t part_size)

cdef enum FramerKind:
    CHUNKS          # no framer: what has arrived is a message
    LINES
    DELIMITED
    PREFIXED
    FIXED
    RESP
    CUSTOM          # a Python object; nothing here knows it

# _frame.py has the same numbers.
cdef enum Wrong:
    TOO_LARGE = 1
    UNFINISHED
    BAD_VARINT
    SHORT_LENGTH
    NOT_A_NUMBER
    NEGATIVE_LENGTH
    NO_DOLLAR
    NO_CRLF
    BAD_QUOTES

cdef enum:
    MAX_DIGITS = 18         # so many nines fit into 64 bits
    MAX_HEADER = 24         # of what put_length() and put_number() write
    LEAST_BULK = 6          # $0\r\n\r\n
    VARINT_BYTES = 10

# The settings of a framer, in C. Shared by connections, never changed.
cdef struct Framing:
    FramerKind kind
    size_t max_size         # of a message that is received ...
    size_t max_sent         # ... or sent: a length of fixed size has a maximum
    size_t size             # of a message (FIXED), of the header (PREFIXED; 0 is a varint), of the delimiter
    const char* delimiter
    bint little, header_included

# The first message of an inbox, as far as it was scanned. All zero: not at all.
cdef struct Frame:
    Py_ssize_t whole        # > 0: complete, so many bytes with all that is around it; 0: more is needed; < 0: -Wrong
    size_t start, size      # where in it the message is
    size_t at               # unfinished: where to go on scanning; wrong: the byte that is
    size_t left             # RESP: bulk strings still to come, once at > 0
    bint empty              # complete, and to be skipped

cdef inline void frame_clear(Frame* f) noexcept nogil:
    """Nothing is known; start and size mean something only in a complete one."""
    f.whole = 0
    f.at = f.left = 0
    f.empty = False

cdef inline Py_ssize_t frame_found(Frame* f, size_t whole, size_t start, size_t size) noexcept nogil:
    f.start, f.size = start, size
    f.whole = <Py_ssize_t>whole
    return f.whole

cdef inline Py_ssize_t frame_wrong(Frame* f, Wrong wrong, size_t at) noexcept nogil:
    f.at = at
    f.whole = -<Py_ssize_t>wrong
    return f.whole

cdef inline Py_ssize_t frame_scan(const Framing* g, const char* data, size_t size, Frame* f) noexcept nogil:
    """Look at the first message of `size` > 0 bytes; f.whole. Bytes that were scanned before, and are not enough, are
    not scanned again."""
    if g.kind == LINES:
        return scan_line(g, data, size, f)
    if g.kind == RESP:
        return scan_request(g, data, size, f)
    if g.kind == PREFIXED:
        return scan_prefixed(g, data, size, f)
    if g.kind == DELIMITED:
        return scan_delimited(g, data, size, f)
    if g.kind == FIXED:
        return frame_found(f, g.size, 0, g.size) if size >= g.size else 0
    return frame_found(f, size, 0, size)

cdef inline Py_ssize_t scan_line(const Framing* g, const char* data, size_t size, Frame* f) noexcept nogil:
    cdef const char* end = <const char*>memchr(data + f.at, c'\n', size - f.at)
    cdef size_t length = size if end == NULL else end - data
    cdef size_t whole = length + 1
    if length and data[length - 1] == c'\r':
        length -= 1
    if length > g.max_size:
        return frame_wrong(f, TOO_LARGE, 0)
    if end != NULL:
        return frame_found(f, whole, 0, length)
    f.at = size
    return 0

cdef inline Py_ssize_t scan_delimited(const Framing* g, const char* data, size_t size, Frame* f) noexcept nogil:
    cdef const char* end = <const char*>memmem(data + f.at, size - f.at, g.delimiter, g.size)
    cdef size_t length
    if end != NULL:
        length = end - data
    else:  # all but the last bytes, which may begin the delimiter, surely belong to the message
        length = size - g.size + 1 if size >= g.size else 0
    if length > g.max_size:
        return frame_wrong(f, TOO_LARGE, 0)
    if end != NULL:
        return frame_found(f, length + g.size, 0, length)
    f.at = length
    return 0

cdef inline Py_ssize_t scan_prefixed(const Framing* g, const char* data, size_t size, Frame* f) noexcept nogil:
    cdef uint64_t length = 0
    cdef size_t header = read_length(g, data, size, &length, f)
    if header == 0:
        return f.whole
    if length > g.max_size:
        return frame_wrong(f, TOO_LARGE, 0)
    if size - header < length:
        return 0
    return frame_found(f, header + length, header, length)

cdef inline size_t read_length(
    const Framing* g, const char* data, size_t size, uint64_t* length, Frame* f
) noexcept nogil:
    """The size of the header, and the length in it; 0 if it is not complete or malformed (see f.whole)."""
    cdef const unsigned char* bytes_ = <const unsigned char*>data
    cdef uint64_t value = 0
    cdef size_t i
    if g.size == 0:
        return read_varint(bytes_, size, length, f)
    if size < g.size:
        return 0
    for i in range(g.size):
        value = value << 8 | bytes_[g.size - 1 - i if g.little else i]
    if g.header_included:
        if value < g.size:
            frame_wrong(f, SHORT_LENGTH, 0)
            return 0
        value -= g.size
    length[0] = value
    return g.size

cdef inline size_t read_varint(const unsigned char* data, size_t size, uint64_t* length, Frame* f) noexcept nogil:
    cdef uint64_t value = 0
    cdef size_t i
    for i in range(min(size, <size_t>VARINT_BYTES)):
        if i == VARINT_BYTES - 1 and data[i] > 1:
            frame_wrong(f, BAD_VARINT, i)
            return 0
        value |= <uint64_t>(data[i] & 127) << 7 * i
        if data[i] < 128:
            length[0] = value
            return i + 1
    return 0

cdef inline Py_ssize_t scan_request(const Framing* g, const char* data, size_t size, Frame* f) noexcept nogil:
    cdef long long number = 0
    cdef size_t end
    if data[0] != c'*':
        return scan_inline(g, data, size, f)
    if f.at == 0:
        end = read_number(g, data, size, 1, &number, f)
        if end == 0:
            return f.whole
        if number <= 0:
            f.empty = True
            return frame_found(f, end, 0, 0)
        if end + <size_t>number * LEAST_BULK > g.max_size:
            return frame_wrong(f, TOO_LARGE, 0)
        f.at, f.left = end, <size_t>number
    while f.left:
        end = scan_bulk(g, data, size, f)
        if end == 0:
            return f.whole
        f.at = end
        f.left -= 1
    return frame_found(f, f.at, 0, f.at)

cdef inline size_t scan_bulk(const Framing* g, const char* data, size_t size, Frame* f) noexcept nogil:
    """The end of the bulk string at f.at; 0 if it is not complete or malformed (see f.whole)."""
    cdef long long length = 0
    cdef size_t start, end
    if f.at == size:
        return 0
    if data[f.at] != c'$':
        frame_wrong(f, NO_DOLLAR, f.at)
        return 0
    start = read_number(g, data, size, f.at + 1, &length, f)
    if start == 0:
        return 0
    if data[f.at + 1] == c'-':  # -0, too: skip_number() knows no sign
        frame_wrong(f, NEGATIVE_LENGTH, f.at + 1)
        return 0
    end = start + <size_t>length + 2
    if size >= end and end <= g.max_size and data[end - 2] == c'\r' and data[end - 1] == c'\n':
        return end
    if end > g.max_size:
        frame_wrong(f, TOO_LARGE, 0)
    elif size > end - 2 and data[end - 2] != c'\r':
        frame_wrong(f, NO_CRLF, end - 2)
    elif size > end - 1:
        frame_wrong(f, NO_CRLF, end - 1)
    return 0

cdef inline size_t read_number(
    const Framing* g, const char* data, size_t size, size_t at, long long* number, Frame* f
) noexcept nogil:
    """The end of a decimal number and CRLF, and the number; 0 if not complete or malformed (see f.whole)."""
    cdef bint negative = at < size and data[at] == c'-'
    cdef size_t i = at + negative
    cdef size_t most = min(size, i + MAX_DIGITS)
    cdef uint64_t value = 0
    cdef unsigned char digit
    at = i
    if i + 2 < size and data[i + 1] == c'\r' and data[i + 2] == c'\n':  # most lengths have one digit
        digit = <unsigned char>data[i] - c'0'
        if digit <= 9 and digit <= g.max_size:
            number[0] = -<long long>digit if negative else <long long>digit
            return i + 3
    while i < most:
        digit = <unsigned char>data[i] - c'0'
        if digit > 9:
            break
        value = 10 * value + digit
        i += 1
    if value > g.max_size:
        frame_wrong(f, TOO_LARGE, 0)
        return 0
    if i < size and data[i] == c'\r' and i > at:
        i += 1
        if i < size and data[i] == c'\n':
            number[0] = -<long long>value if negative else <long long>value
            return i + 1
    if i < size:
        frame_wrong(f, NOT_A_NUMBER, i)
    return 0

cdef inline Py_ssize_t scan_inline(const Framing* g, const char* data, size_t size, Frame* f) noexcept nogil:
    cdef const char* end = <const char*>memchr(data + f.at, c'\n', size - f.at)
    cdef size_t whole = size if end == NULL else end - data + 1
    if whole > g.max_size:
        return frame_wrong(f, TOO_LARGE, 0)
    if end == NULL:
        f.at = size
        return 0
    if not quotes_match(data, whole):
        return frame_wrong(f, BAD_QUOTES, 0)
    f.empty = is_blank(data, whole)
    return frame_found(f, whole, 0, whole - 1)

cdef inline bint is_space(char byte) noexcept nogil:
    return byte == c' ' or c'\t' <= byte <= c'\r'

cdef inline bint is_blank(const char* line, size_t size) noexcept nogil:
    cdef size_t i = 0
    while i < size and is_space(line[i]):
        i += 1
    return i == size

cdef inline bint quotes_match(const char* line, size_t size) noexcept nogil:
    """Whether every quote of a line, which ends with white space, is closed, and followed by white space."""
    cdef size_t i = 0
    cdef char quote = 0
    while i < size:
        if quote == 0:
            if line[i] == c'"' or line[i] == c"'":
                quote = line[i]
        elif line[i] == c'\\' and (quote == c'"' or line[i + 1] == quote):
            i += 1  # what follows is escaped
        elif line[i] == quote:
            if not is_space(line[i + 1]):
                return False
            quote = 0
        i += 1
    return quote == 0

cdef inline size_t skip_number(const char* data, size_t at, size_t* number) noexcept nogil:
    """A number that read_number() has found good: where its CRLF ends."""
    cdef size_t value = <size_t>(data[at] - c'0')
    at += 1
    while data[at] != c'\r':
        value = 10 * value + <size_t>(data[at] - c'0')
        at += 1
    number[0] = value
    return at + 2

cdef inline size_t frame_needed(const Framing* g, const char* data, size_t size) noexcept nogil:
    """The bytes that an unfinished message must have, as far as that is known; else 0."""
    cdef Frame f
    cdef uint64_t length = 0
    cdef size_t header
    if g.kind == PREFIXED:
        header = read_length(g, data, size, &length, &f)
        return header + length if header else g.size
    return g.size if g.kind == FIXED else 0


cdef inline bint frame_delimiter_within(const Framing* g, const char* data, size_t size) noexcept nogil:
    """Whether the peer would find the delimiter before the end of data + delimiter."""
    cdef size_t i
    if memmem(data, size, g.delimiter, g.size) != NULL:
        return True
    for i in range(1, min(g.size, size + 1)):  # its first i bytes at the end of data, and the rest behind those?
        if (memcmp(data + size - i, g.delimiter, i) == 0
                and memcmp(g.delimiter, g.delimiter + i, g.size - i) == 0):
            return True
    return False


# --- headers ---------------------------------------------------------------------------------------

cdef inline size_t put_length(const Framing* g, size_t length, char* to) noexcept nogil:
    """Write the header of a message of that length, at most MAX_HEADER bytes; how many."""
    cdef size_t i = 0
    if g.size == 0:
        while length > 127:
            to[i] = <char>(length & 127 | 128)
            length >>= 7
            i += 1
        to[i] = <char>length
        return i + 1
    if g.header_included:
        length += g.size
    for i in range(g.size):
        to[i if g.little else g.size - 1 - i] = <char>(length & 255)
        length >>= 8
    return g.size

cdef inline size_t put_number(char sign, long long number, char* to) noexcept nogil:
    """Write a RESP header, such as $12\\r\\n, at most MAX_HEADER bytes; how many."""
    cdef char digits[MAX_HEADER]
    cdef uint64_t value = <uint64_t>number if number >= 0 else -<uint64_t>number
    cdef size_t count = 1, i = 1
    to[0] = sign
    if number < 0:
        to[1] = c'-'
        i = 2
    digits[0] = <char>(c'0' + value % 10)
    value //= 10
    while value:
        digits[count] = <char>(c'0' + value % 10)
        value //= 10
        count += 1
    while count:
        count -= 1
        to[i] = digits[count]
        i += 1
    to[i], to[i + 1] = c'\r', c'\n'
    return i + 2
