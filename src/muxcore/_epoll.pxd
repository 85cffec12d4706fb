# What may live here: the layout of the extension's classes. Bodies are in _epoll.pyx and its chapters.

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from ._core.buffer cimport Chunk, Inbox
from ._core.frame cimport Framing
from ._core.packets cimport Packets
from ._core.syscalls cimport epoll_event, muxcore_pwait2

cdef class Epoll:
    cdef int fd
    cdef dict data              # by descriptor: what poll() returns for it
    # A Mux keeps its batch here:
    cdef int capacity
    cdef int count              # events of the last wait ...
    cdef int next               # ... and the first of them that is not dispatched yet
    cdef epoll_event* events
    cdef muxcore_pwait2 pwait2  # NULL before glibc 2.35

# What a descriptor of the Mux is. Slots are numbered by fd, so a slot belongs to the holder of the fd now.
cdef enum Kind:
    NOTHING
    CONNECTION
    LISTENER
    DATAGRAM
    WATCHED                     # the user's: the owner is a Watch
    WAKEUP

cdef enum:
    GROUP = 16              # events of a group, whose output leaves together: see dispatch()

cdef struct Slot:
    uint32_t generation
    uint8_t kind

cdef struct Counters:
    uint64_t waits, events, stale_events
    uint64_t accepts, accept_pauses
    uint64_t recv_calls, send_calls, sendmsg_calls
    uint64_t bytes_in, bytes_out, messages_in, messages_out
    uint64_t would_blocks, high_water_hits, drops, timeouts, wakeups, handler_errors
    uint64_t connections, peak_connections
    uint64_t unsent             # connections and datagram sockets that ended with output unsent
    uint64_t datagram_errors
    uint64_t handshake_failures

cdef struct Text:
    char* data
    size_t size, room

cdef enum:
    SPARES_KEPT = 16

cdef struct Spares:             # message objects, and a reference to each
    PyObject* messages[SPARES_KEPT]
    size_t count

# One handler with its settings, compiled for reading in C. Shared by all connections of a listener.
cdef class Policy:
    cdef object handler, callbacks, limits, timeouts, framer
    cdef object on_open, on_message, on_messages, on_drain, on_eof, on_error, on_close
    cdef Listener listener
    cdef Framing framing
    cdef bytes delimiter         # that `framing` points to
    cdef size_t high, low, max_outbox, max_inbox
    cdef int64_t linger_ns, idle_ns, write_ns, silence_ns, handshake_ns   # 0 is for ever, but for linger
    cdef int overflow
    cdef bint autopause, half_open, outbound, pull
    cdef object wiring          # makes the wires of new connections, or None

# What stands between a connection's socket and its framer.
cdef class Wired:
    cdef object wire            # a Wire
    cdef object proxy           # the content of a PROXY header
    cdef size_t ready           # bytes at the front of the outbox that are for the socket as they are
    cdef size_t given           # and of the plaintext behind them, that the wire has in `given`
    cdef object failure         # why it cannot go on, until that is dealt with
    cdef size_t plain           # bytes of plaintext that have come of it
    cdef bint fruitful          # the last read was plaintext for the most part
    cdef bint due               # it has something to work on
    cdef bint busy              # the wire is at work: what it calls may come here again
    cdef bint asked             # whether OpenSSL can be called directly. If so, tls.pxi does what follows ...
    cdef object owner           # ... with CPython's object, ...
    cdef void* ssl              # ... its SSL*, ...
    cdef void* rbio             # ... its BIOs ...
    cdef void* wbio
    cdef size_t tickets         # ... and as much in front of its output as TLSWire._tickets
    cdef int ssl_error          # the last result of SSL_get_error

cdef class Connection:
    cdef object __weakref__
    cdef CompiledCore mux
    cdef Policy policy
    cdef object data_
    cdef readonly object error
    cdef object peer_tuple
    cdef object deadline        # has cancel(): the Attempt to connect or, while closing, a timer
    cdef object reader          # CustomReader of a user's framer, else None
    cdef Wired wired            # None for a plain connection
    cdef Inbox* inbox           # received and not delivered; NULL when there is nothing
    cdef Chunk* out_head        # the outbox; the first chunk knows the last
    cdef size_t outbox_bytes    # in the chain
    cdef size_t file_bytes      # of these, in files, where they cost no memory
    cdef uint64_t foreign       # sent by other threads and not in the chain yet: see foreign_word(); atomic
    cdef readonly uint64_t id
    cdef int64_t received_ns    # when its last message came, or since when we listen to it
    cdef int64_t heard_ns       # when its last byte came
    cdef int64_t wrote_ns       # when the peer last accepted output, or when output first had to wait
    cdef uint16_t port          # the peer's address, with family and host; its tuple is made when it is read
    cdef uint8_t family
    cdef uint8_t close_asked    # by another thread, whose close() is not carried out yet
    cdef uint8_t host[16]       # 4 bytes of IPv4, 16 of IPv6; the port is in network order, too
    cdef int fd
    cdef uint32_t flags
    cdef uint32_t interest      # what the kernel has

cdef class Listener:
    cdef object __weakref__
    cdef CompiledCore mux
    cdef Policy policy
    cdef readonly object address
    cdef object file            # SocketFile, or None
    cdef object max_accepted    # max_connections, or None
    cdef readonly Py_ssize_t connections
    cdef int64_t pause_ns        # the length of the last pause after EMFILE and the like; 0 outside such an episode
    cdef int64_t paused_until_ns  # when the pause is over; 0: when a connection ends
    cdef int fd
    cdef uint8_t exclusive, listening, accept_paused

cdef class Datagram:
    cdef object __weakref__
    cdef CompiledCore mux
    cdef public object data
    cdef readonly object address, remote, limits
    cdef tuple remotes          # the remote and, if it was given, as it was given; or ()
    cdef object file            # SocketFile, or None
    cdef object on_datagrams, on_error, on_drain
    cdef list out               # what is to be sent: data, sockaddr (None: the remote), data, sockaddr, ...
    cdef Py_ssize_t out_at      # the first of it that has not been sent
    cdef list errors            # for the handler's on_error
    cdef dict names             # the address as its user sees it, by sockaddr ...
    cdef dict sockaddrs         # ... and the other way round: of those seen lately. The keys run no code of the user's
    cdef bytes last_name        # the sockaddr of the last datagram ...
    cdef object last_address    # ... and its address
    cdef size_t outbox_bytes    # of what is to be sent, with PACKET_COST for each
    cdef size_t high, low, max_outbox, max_size, largest_sent
    cdef int fd, family, overflow
    cdef int refused            # -errno of the last send, if that is to be tried once more; else 0
    cdef int64_t retry_ns       # when it is to be tried again, while `starved`
    cdef uint32_t interest      # what the kernel has
    cdef bint pending, above, drain_owed, blocked, starved, warned

cdef class CompiledCore:
    cdef object __weakref__
    cdef Epoll epoll
    cdef Slot* slots
    cdef size_t slot_count
    cdef list objects           # by fd, like slots; a list, so that the cyclic collector sees through it
    cdef list pending           # connections and datagram sockets with work to do before the next wait
    cdef list pending_now       # those that are run now ...
    cdef Py_ssize_t pending_done  # ... and how many of them were
    cdef list ready             # connections with something to report from poll()
    cdef uint64_t reports       # how many were noted
    cdef list finished          # connections whose EOF the last poll() reported
    cdef set connecting         # connections that have no descriptor yet
    cdef object handshakes      # deque of connections whose wire has to work before they are open
    cdef list accept_paused     # listeners that wait for a connection to end
    cdef dict offloaded         # connections whose messages are worked on in other threads: the work
    cdef object timers          # Timers ...
    cdef list timer_heap        # ... and its heap, empty most of the time
    cdef object soon            # deque of (fn, args)
    cdef object foreign         # deque of (operation, connection, argument), from any thread
    cdef PyObject* scratch      # bytes object of read_size that recv fills where there is no framer
    cdef PyObject* large_scratch  # a larger one, for bulk input
    cdef char* records          # ciphertext, in and out; see records()
    cdef char* window           # WINDOW_HEAD + read_size bytes that it fills where there is one
    cdef Inbox in_window        # the inbox of the connection whose messages are there
    cdef Packets* packets       # what recvmmsg fills; NULL at first, and while a batch is received
    cdef Text text              # memory for replies of RESP, while none is written
    cdef Spares spares[32]      # message objects to be used again, by size: see new_message()
    cdef PyObject* names[64]    # commands of RESP that came lately: see request()
    cdef PyObject* in_handler     # the connection whose messages are being handled; borrowed
    cdef PyObject* group[GROUP]  # connections whose output leaves together: see dispatch()
    cdef int group_count
    cdef PyObject* group_tail   # the last of them: its event is being handled; borrowed
    cdef Py_ssize_t read_size, read_budget
    cdef int64_t busy_poll_ns
    cdef int64_t now_ns, released_ns
    cdef int64_t asked_ns       # what came until then is in the batch ...
    cdef int64_t seen_ns        # ... and until then was handled: the time by which a peer is judged, see has_judged()
    cdef uint64_t last_id, forks
    cdef unsigned long thread   # the thread it is bound to; 0 before its first turn; atomic
    cdef int wake_fd
    cdef int timer_fd           # -1 until another loop drives this Mux
    cdef int64_t armed_ns       # when it goes off; -1: never
    cdef int sleeping           # 1 while the loop is, or is about to be, in a wait that only a wakeup ends
    cdef bint schedule_failed         # there was no memory to put a connection on `pending`: see run_everything()
    cdef bint notified          # a callback was called since the turn began
    cdef int64_t turn_ends_ns   # when the turn, or the part of it behind the wait, has lasted long enough ...
    cdef bint turn_over         # ... and whether it has: see tick()
    cdef unsigned int ticks
    cdef bint sweeping          # a timer will call _sweep()
    cdef object owner_thread    # a weak reference to what lives as long as the thread it is bound to
    cdef bint draining          # newcomers are closed at once
    cdef bint in_turn, running, polling, stopping, driven, flush_at_once, batches, is_closed, close_requested
    cdef Py_ssize_t pull_count  # listeners and connections without a handler
    cdef int64_t sweep_ns       # how often idle and write timeouts are checked; 0 while there are none
    cdef Chunk* blocks          # empty blocks of BLOCK_SIZE, at most BLOCKS_KEPT
    cdef size_t block_count
    cdef Counters n

# For a user's module, by `from muxcore cimport ...`: see native.pxi.
cdef class NativeHandler:
    cdef int on_open(self, Connection conn) except -1
    cdef int on_message(self, Connection conn, object message) except -1
    cdef int on_messages(self, Connection conn, list messages) except -1
    cdef int on_drain(self, Connection conn) except -1
    cdef int on_eof(self, Connection conn) except -1
    cdef int on_error(self, Connection conn, object exc) except -1
    cdef int on_close(self, Connection conn, object exc) except -1

cdef bint native_send(Connection conn, object message) except -1
cdef bint native_write(Connection conn, object data) except -1
cdef int native_close(Connection conn, object reason) except -1
