"""What may live here: Selector, which takes the place of selectors.DefaultSelector."""

from __future__ import annotations

import select
import selectors
from collections.abc import Iterator, Mapping
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey

from ._impl import Epoll, resolve_backend
from ._typing import TYPE_CHECKING, Protocol
from ._watch import ERROR, HANGUP, READ, WRITE

if TYPE_CHECKING:
    from typing import Any, Literal

    Mode = Literal["level", "edge", "oneshot", "exclusive"]

MODES = ("level", "edge", "oneshot", "exclusive")


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Selector(selectors.BaseSelector):
    """A selectors.BaseSelector: pass it to asyncio.SelectorEventLoop, socketserver or subprocess.

    backend: as for Mux. With epoll, `register` and `modify` take a `mode`: "edge" reports a change once, "oneshot" one
    event until the next `modify`, "exclusive" wakes one of several processes that watch the same descriptor; the other
    backends only know "level", and raise ValueError. Raises what selectors.EpollSelector raises.
    """

    def __init__(self, *, backend: str = "auto") -> None:
        self.backend = resolve_backend(backend)[0]
        self._keys: dict[int, SelectorKey] = {}
        self._map: _Keys | None = _Keys(self)
        self._watcher: _EpollWatcher | _PollWatcher
        if self.backend == "epoll":
            self._watcher = _EpollWatcher()
            self.fileno = self._watcher.epoll.fileno  # the others have no descriptor, so they have no such method
        else:
            self._watcher = _PollWatcher(self.backend)

    def register(
        self, fileobj: int | HasFileno, events: int, data: Any = None, *, mode: Mode = "level"
    ) -> SelectorKey:
        """Watch a file object for EVENT_READ and EVENT_WRITE; see selectors.BaseSelector.register."""
        _check_events(events)
        fd = self._fd(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (FD {fd}) is already registered")
        self._watcher.register(fd, events, mode)
        self._keys[fd] = key = SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: int | HasFileno) -> SelectorKey:
        """Stop watching; a descriptor that was closed meanwhile is no error. KeyError if it is not registered."""
        try:
            key = self._keys.pop(self._fd(fileobj))
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None
        try:
            self._watcher.unregister(key.fd)
        except OSError:
            pass  # it was closed, and so has left the kernel's set by itself
        return key

    def modify(
        self, fileobj: int | HasFileno, events: int, data: Any = None, *, mode: Mode = "level"
    ) -> SelectorKey:
        """Change what is watched for, and the data. KeyError if it is not registered."""
        _check_events(events)
        try:
            key = self._keys[self._fd(fileobj)]
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None
        if events != key.events or mode != "level":
            try:
                self._watcher.modify(key.fd, events, mode)
            except BaseException:
                self._keys.pop(key.fd, None)
                raise
        if events != key.events or data != key.data:
            key = key._replace(events=events, data=data)
            self._keys[key.fd] = key
        return key

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """[(key, events), ...] of what is ready, after at most `timeout` seconds; None is for ever, <= 0 not at all."""
        timeout = None if timeout is None else max(timeout, 0)
        keys = self._keys
        found = self._watcher.wait(timeout, max(len(keys), 1))
        return [(key, events & key.events) for fd, events in found if (key := keys.get(fd)) and events & key.events]

    def close(self) -> None:
        """Forget everything, and release what the selector holds."""
        self._watcher.close()
        self._keys.clear()
        self._map = None

    def get_map(self) -> Mapping[int | HasFileno, SelectorKey]:
        """The registered keys by file object; None once closed."""
        return self._map  # type: ignore[return-value]

    def _fd(self, fileobj: int | HasFileno) -> int:
        """The descriptor of a file object, even if that was closed since it was registered."""
        try:
            return _descriptor(fileobj)
        except ValueError:
            for key in self._keys.values():
                if key.fileobj is fileobj:
                    return key.fd
            raise


class _Keys(Mapping["int | HasFileno", SelectorKey]):
    """The view that get_map() gives."""

    def __init__(self, selector: Selector) -> None:
        self._selector = selector

    def __len__(self) -> int:
        return len(self._selector._keys)

    def __getitem__(self, fileobj: int | HasFileno) -> SelectorKey:
        try:
            return self._selector._keys[self._selector._fd(fileobj)]
        except KeyError:
            raise KeyError(f"{fileobj!r} is not registered") from None

    def __iter__(self) -> Iterator[int]:
        return iter(self._selector._keys)


class _EpollWatcher:
    def __init__(self) -> None:
        self.epoll = Epoll()

    def mask(self, events: int, mode: Mode) -> int:
        _check_mode(mode, MODES)
        wanted = (select.EPOLLIN if events & EVENT_READ else 0) | (select.EPOLLOUT if events & EVENT_WRITE else 0)
        if mode == "level":
            return wanted
        if mode == "edge":
            return wanted | select.EPOLLET
        return wanted | (select.EPOLLONESHOT if mode == "oneshot" else select.EPOLLEXCLUSIVE)

    def register(self, fd: int, events: int, mode: Mode) -> None:
        self.epoll.register(fd, self.mask(events, mode))

    def modify(self, fd: int, events: int, mode: Mode) -> None:
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
    def __init__(self, backend: str) -> None:
        from ._fallback import POLLERS

        self.poller = POLLERS[backend]()

    def register(self, fd: int, events: int, mode: Mode) -> None:
        _check_mode(mode, ("level",))
        self.poller.watch(fd, (READ if events & EVENT_READ else 0) | (WRITE if events & EVENT_WRITE else 0))

    modify = register

    def unregister(self, fd: int) -> None:
        self.poller.unwatch(fd)

    def wait(self, timeout: float | None, limit: int) -> list[tuple[int, int]]:
        found = self.poller.wait(timeout)
        both = ERROR | HANGUP
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
