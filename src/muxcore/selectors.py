"""What may live here: Selector, a drop-in replacement for selectors.DefaultSelector."""

from __future__ import annotations

import select
import selectors
from collections.abc import Iterator, Mapping
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey

from ._impl import Epoll, resolve_backend
from ._typing import TYPE_CHECKING, Protocol
from ._watch import ERROR, HANGUP, INVALID, READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    Mode = Literal["level", "edge", "oneshot", "exclusive"]

MODES = ("level", "edge", "oneshot", "exclusive")


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Selector(selectors.BaseSelector):
    """A selectors.BaseSelector: pass it to asyncio.SelectorEventLoop or socketserver.

    backend: as for Mux. With epoll, `register` and `modify` accept a `mode`: "edge" reports a change of readiness once,
    "oneshot" reports one event until the next `modify`, "exclusive" wakes one of several processes that watch the same
    descriptor. The other backends support only "level", and raise ValueError. Each `modify` sets the mode ("level" by
    default), and arms a "oneshot" or "edge" again. Raises the exceptions of selectors.EpollSelector.

    epoll refuses regular files (PermissionError). If a descriptor may be one, such as the standard input of a child in
    `subprocess`, use `backend="poll"`; the standard library uses PollSelector there.
    """

    def __init__(self, *, backend: str = "auto") -> None:
        self.backend: str = resolve_backend(backend)[0]
        self._keys: dict[int, SelectorKey] = {}
        self._modes: dict[int, Mode] = {}  # of those that are not "level"
        self._map: _Keys | None = _Keys(self)
        self._watcher: _EpollWatcher | _PollWatcher
        if self.backend == "epoll":
            self._watcher = _EpollWatcher()
            # The others have no descriptor, so they have no such method.
            self.fileno: Callable[[], int] = self._watcher.epoll.fileno
        else:
            self._watcher = _PollWatcher(self.backend)

    def register(
        self, fileobj: int | HasFileno, events: int, data: Any = None, *, mode: Mode = "level"
    ) -> SelectorKey:
        """Watch a file object for EVENT_READ and EVENT_WRITE; see selectors.BaseSelector.register."""
        _check_events(events)
        _check_mode(mode, self._watcher.modes)
        fd = self._fd(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (FD {fd}) is already registered")
        # First the key: a descriptor in the kernel's set that has none would be reported in vain, for ever.
        self._keys[fd] = key = SelectorKey(fileobj, fd, events, data)
        try:
            self._watcher.register(fd, events, mode)
            self._set_mode(fd, mode)
        except BaseException:
            self._forget(fd)
            raise
        return key

    def unregister(self, fileobj: int | HasFileno) -> SelectorKey:
        """Stop watching. A descriptor that was closed meanwhile is no error. KeyError if it is not registered."""
        key = self._key(fileobj)
        self._forget(key.fd)
        return key

    def modify(
        self, fileobj: int | HasFileno, events: int, data: Any = None, *, mode: Mode = "level"
    ) -> SelectorKey:
        """Change the events and the data. KeyError if it is not registered."""
        _check_events(events)
        _check_mode(mode, self._watcher.modes)
        key = self._key(fileobj)
        before = self._modes.get(key.fd, "level")
        changed = events != key.events or (mode, before) != ("level", "level")
        if changed or data is not key.data:
            self._keys[key.fd] = key = key._replace(events=events, data=data)
        if changed:
            try:
                self._watcher.modify(key.fd, events, mode, before)
                self._set_mode(key.fd, mode)
            except BaseException:
                self._forget(key.fd)
                raise
        return key

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """[(key, events), ...] of the ready files. timeout: seconds; None waits without limit, <= 0 does not wait."""
        timeout = None if timeout is None else max(timeout, 0)
        keys = self._keys
        found = self._watcher.wait(timeout, max(len(keys), 1))
        return [(key, events & key.events) for fd, events in found if (key := keys.get(fd)) and events & key.events]

    def close(self) -> None:
        """Forget everything, and release what the selector holds."""
        self._map = None
        try:
            self._watcher.close()
        finally:
            self._modes.clear()
            self._keys.clear()  # last: it runs the finalisers of what was registered as data

    def get_map(self) -> Mapping[int | HasFileno, SelectorKey]:
        """The registered keys by file object; None once closed."""
        return self._map  # type: ignore[return-value]

    def _fd(self, fileobj: int | HasFileno) -> int:
        """The descriptor of a file object, even if that was closed since it was registered."""
        try:
            return _descriptor(fileobj)
        except ValueError:
            for key in list(self._keys.values()):  # a copy: a signal handler may register meanwhile
                if key.fileobj is fileobj:
                    return key.fd
            raise

    def _key(self, fileobj: int | HasFileno) -> SelectorKey:
        key = self._keys.get(self._fd(fileobj))
        if key is None:
            raise KeyError(f"{fileobj!r} is not registered")
        return key

    def _set_mode(self, fd: int, mode: Mode) -> None:
        if mode != "level":
            self._modes[fd] = mode
        else:
            self._modes.pop(fd, None)

    def _forget(self, fd: int) -> None:
        _held = self._keys.pop(fd, None)  # its finaliser may register the same number again
        self._modes.pop(fd, None)
        try:
            self._watcher.unregister(fd)
        except (OSError, ValueError):
            pass  # it was closed, and so has left the kernel's set by itself; or the selector was


class _Keys(Mapping["int | HasFileno", SelectorKey]):
    """The view that get_map() gives."""

    def __init__(self, selector: Selector) -> None:
        self._selector = selector

    def __len__(self) -> int:
        return len(self._selector._keys)

    def __getitem__(self, fileobj: int | HasFileno) -> SelectorKey:
        return self._selector._key(fileobj)

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._selector._keys))


class _EpollWatcher:
    modes: tuple[str, ...] = MODES

    def __init__(self) -> None:
        self.epoll = Epoll()

    def mask(self, events: int, mode: Mode) -> int:
        wanted = (select.EPOLLIN if events & EVENT_READ else 0) | (select.EPOLLOUT if events & EVENT_WRITE else 0)
        if mode == "level":
            return wanted
        if mode == "edge":
            return wanted | select.EPOLLET
        return wanted | (select.EPOLLONESHOT if mode == "oneshot" else select.EPOLLEXCLUSIVE)

    def register(self, fd: int, events: int, mode: Mode) -> None:
        self.epoll.register(fd, self.mask(events, mode))

    def modify(self, fd: int, events: int, mode: Mode, before: Mode) -> None:
        if "exclusive" in (mode, before):  # the kernel refuses to modify to or from EPOLLEXCLUSIVE (EINVAL)
            self.epoll.unregister(fd)
            self.epoll.register(fd, self.mask(events, mode))
        else:
            self.epoll.modify(fd, self.mask(events, mode))

    def unregister(self, fd: int) -> None:
        self.epoll.unregister(fd)

    def wait(self, timeout: float | None, limit: int) -> list[tuple[int, int]]:
        return [(fd, EPOLL_EVENTS[mask & 31]) for fd, mask in self.epoll.poll(timeout, limit)]

    def close(self) -> None:
        self.epoll.close()


# What EPOLLIN (1), PRI (2), OUT (4), ERR (8) and HUP (16) mean to a selector: ERR and HUP make both calls return.
EPOLL_EVENTS = [(EVENT_READ if mask & ~4 else 0) | (EVENT_WRITE if mask & ~3 else 0) for mask in range(32)]


class _PollWatcher:
    modes: tuple[str, ...] = ("level",)

    def __init__(self, backend: str) -> None:
        from ._fallback.pollers import POLLERS

        self.poller = POLLERS[backend]()

    def register(self, fd: int, events: int, mode: Mode) -> None:
        self.poller.watch(fd, (READ if events & EVENT_READ else 0) | (WRITE if events & EVENT_WRITE else 0))

    def modify(self, fd: int, events: int, mode: Mode, before: Mode) -> None:
        self.register(fd, events, mode)

    def unregister(self, fd: int) -> None:
        self.poller.unwatch(fd)

    def wait(self, timeout: float | None, limit: int) -> list[tuple[int, int]]:
        found = self.poller.wait(timeout)
        both = ERROR | HANGUP | INVALID  # the last: it was closed, and a read or write fails
        return [
            (fd, (EVENT_READ if mask & (READ | both) else 0) | (EVENT_WRITE if mask & (WRITE | both) else 0))
            for fd, mask in found
        ]

    def close(self) -> None:
        self.poller.close()


def _check_events(events: int) -> None:
    if not events or events & ~(EVENT_READ | EVENT_WRITE):
        raise ValueError(f"Invalid events: {events!r}")


def _check_mode(mode: str, known: tuple[str, ...]) -> None:
    if mode not in known:
        raise ValueError(f"mode must be one of {known} here, not {mode!r}")


def _descriptor(fileobj: int | HasFileno) -> int:
    try:
        fd = fileobj if isinstance(fileobj, int) else int(fileobj.fileno())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"Invalid file object: {fileobj!r}") from None
    if fd < 0:
        raise ValueError(f"Invalid file descriptor: {fd}")
    return fd
