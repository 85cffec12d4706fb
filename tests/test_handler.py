"""What counts as a handler (Promise bad-arguments)."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from support import DEADLINE, LOCALHOST, Recorder, receive, until

import muxcore
from muxcore._impl import BACKENDS
from muxcore.handler import observed, resolve


def test_a_plain_function_is_on_message() -> None:
    def handler(conn: object, message: object) -> None: ...

    callbacks = resolve(handler)
    assert callbacks.on_message is handler
    assert sum(callback is not None for callback in callbacks) == 1


def test_methods_that_are_not_overridden_cost_no_call() -> None:
    class Quiet(muxcore.Handler):
        def on_message(self, conn: object, message: object) -> None: ...

    assert [name for name, value in resolve(Quiet())._asdict().items() if value] == ["on_message"]


def test_a_handler_has_neither_message_method_at_run_time() -> None:
    assert not hasattr(muxcore.Handler, "on_message")
    assert not hasattr(muxcore.Handler, "on_messages")


def test_any_object_with_the_methods_will_do(mux: muxcore.Mux) -> None:
    class Duck:
        on_message = staticmethod(lambda conn, message: conn.send(message))

    ours, theirs = socket.socketpair()
    mux.attach(ours, Duck())
    theirs.send(b"quack")
    assert receive(mux, theirs, 5) == b"quack"
    theirs.close()
    until(mux, lambda: not mux.stats().connections)


def test_on_messages_wins_and_gets_a_list(mux: muxcore.Mux) -> None:
    batches: list[list[bytes]] = []

    class Both(Recorder):
        def on_messages(self, conn: muxcore.Connection, messages: list[bytes]) -> None:
            batches.append(messages)

    both = Both()
    ours, theirs = socket.socketpair()
    mux.attach(ours, both)
    theirs.send(b"chunk")
    until(mux, lambda: batches)
    assert batches == [[b"chunk"]]
    assert both.count("message") == 0
    theirs.close()
    until(mux, lambda: both.count("close"))


def test_a_handler_without_a_message_method_discards_input(mux: muxcore.Mux) -> None:
    class Greeter(muxcore.Handler):
        def on_open(self, conn: muxcore.Connection) -> None:
            conn.send(b"hello")

    ours, theirs = socket.socketpair()
    mux.attach(ours, Greeter())
    theirs.send(bytes(1000))
    assert receive(mux, theirs, 5) == b"hello"
    theirs.close()
    until(mux, lambda: not mux.stats().connections)


class Coroutine:
    async def on_message(self, conn: object, message: object) -> None: ...


class NotCallable:
    on_message = 5


class Requiring(muxcore.Handler):
    def __init__(self, database: object, size: int = 5, *more: object, name: str, port: int = 5, **rest: int) -> None:
        raise AssertionError


class Uninspectable(muxcore.Handler):
    __signature__ = 5


@pytest.mark.parametrize(
    ("handler", "match"),
    [
        (muxcore.Handler, r"pass Handler\(\)"),
        (muxcore.Threaded, r"must be an instance, not the class: pass Threaded\(handler\)"),
        (Requiring, r"pass Requiring\(database, name=\.\.\.\)"),
        (Uninspectable, r"pass Uninspectable\(\.\.\.\)"),
        (Coroutine.on_message, "not a coroutine function"),
        (Coroutine(), r"handler.on_message must be a plain method, not a coroutine function"),
        (NotCallable(), "handler.on_message must be callable, not int"),
        (5, "handler must be a function"),
        ("echo", "handler must be a function"),
    ],
)
def test_anything_else_is_refused_with_advice(handler: object, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        resolve(handler)


# --- mistakes --------------------------------------------------------------------------------------


def test_a_misspelt_callback_is_named() -> None:
    class Misspelt(muxcore.Handler):
        def on_mesage(self, conn: object, message: object) -> None: ...

    with pytest.warns(RuntimeWarning, match=r"handler\.on_mesage is never called: .* did you mean on_message\?"):
        resolve(Misspelt())


@pytest.mark.parametrize("name", ["onmessage", "onMessage", "OnMessage", "on_Message", "onMessages", "onClose"])
def test_a_callback_in_another_spelling_is_named(name: str) -> None:
    meant = {"onclose": "on_close", "onmessages": "on_messages"}.get(name.lower(), "on_message")
    with pytest.warns(RuntimeWarning, match=rf"handler\.{name} is never called: .* did you mean {meant}\?"):
        resolve(type("Spelt", (muxcore.Handler,), {name: lambda self, conn, message: None})())


def test_another_spelling_beside_the_callback_or_of_a_private_name_is_the_users_own() -> None:
    class Adapter(muxcore.Handler):
        def on_message(self, conn: object, message: object) -> None: ...

        def onMessage(self, message: object) -> None: ...

        def _on_close(self) -> None: ...

        onopen = None

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(Adapter())


class Mistaken(muxcore.Handler):
    def on_message(self, conn: object, message: object) -> None: ...

    def on_datagrams(self, datagram: object, messages: object) -> None: ...


@pytest.mark.parametrize(
    "use",
    [
        lambda mux, handler: mux.listen(LOCALHOST, handler),
        lambda mux, handler: mux.datagram(LOCALHOST, handler),
        lambda mux, handler: muxcore.Threaded(handler),
        lambda mux, handler: muxcore.serve(handler, LOCALHOST, ready=lambda mux, listener: mux.stop()),
    ],
    ids=["listen", "datagram", "Threaded", "serve"],
)
def test_the_warning_of_a_misspelt_callback_points_to_the_users_line(mux: muxcore.Mux, use: Any) -> None:
    class Misspelt(Mistaken):
        def on_cloze(self, conn: object, exc: object) -> None: ...

    with pytest.warns(RuntimeWarning, match=r"did you mean on_close\?") as caught:
        use(mux, Misspelt())
    code = use.__code__
    assert [(one.filename, one.lineno) for one in caught] == [(code.co_filename, code.co_firstlineno)]


@pytest.mark.parametrize(
    ("name", "meant"), [("on_connect", "on_open"), ("on_data", "on_message"), ("on_disconnect", "on_close")]
)
def test_a_callback_of_another_library_is_named_with_its_counterpart(name: str, meant: str) -> None:
    with pytest.warns(RuntimeWarning, match=rf"handler\.{name} is never called: .* did you mean {meant}\?"):
        resolve(type("Foreign", (muxcore.Handler,), {name: lambda self, conn: None})())


def test_a_method_of_the_users_own_is_named_in_development_mode_alone() -> None:
    program = """
        from muxcore.handler import Handler, resolve
        class Other(Handler):
            def on_xyzzy(self): ...
        resolve(Other())
    """
    for options, warned in ([], False), (["-X", "dev"], True):
        command = [sys.executable, *options, "-c", textwrap.dedent(program)]
        stderr = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True).stderr
        assert ("handler.on_xyzzy is never called: muxcore has no such callback\n" in stderr) == warned


def generator(conn: object, message: object) -> Iterator[None]:
    yield


async def asynchronous_generator(conn: object, message: object) -> AsyncIterator[None]:
    yield


class Generating(muxcore.Handler):
    def on_message(self, conn: object, message: object) -> Iterator[None]:
        yield


class Called:
    def __call__(self, conn: object, message: object) -> Iterator[None]:
        yield


@pytest.mark.parametrize("handler", [generator, asynchronous_generator, Generating(), Called()])
def test_a_generator_function_is_refused_since_it_would_never_run(handler: object) -> None:
    with pytest.raises(TypeError, match="generator function: a call would not run its body"):
        resolve(handler)


def test_a_handler_that_holds_the_loop_is_named(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    def dawdle(conn: muxcore.Connection, message: bytes) -> None:
        begun = time.monotonic()
        while time.monotonic() - begun < 0.02:
            pass
        conn.close()

    with muxcore.Mux(backend=backend, slow_handler=0.01) as mux:
        ours, theirs = socket.socketpair()
        mux.attach(ours, dawdle)
        theirs.sendall(b"x")
        until(mux, lambda: caplog.records)
        theirs.close()
    [record] = caplog.records
    said = r"on_message .*dawdle.* blocked the loop for 0\.0\d\d s \(slow_handler=0\.01\)"
    assert re.search(said, record.getMessage())


def test_a_callback_that_is_quick_is_not_named(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    with muxcore.Mux(backend=backend, slow_handler=DEADLINE) as mux:
        ours, theirs = socket.socketpair()
        mux.attach(ours, recorder := Recorder())
        theirs.sendall(b"x")
        until(mux, lambda: recorder.count("message"))
        theirs.close()
    assert caplog.records == []


def test_without_the_option_a_callback_is_called_as_it_is() -> None:
    callbacks = resolve(Recorder())
    assert observed(callbacks, None) is callbacks


def test_development_mode_warns_of_what_a_handler_returns() -> None:
    program = """
        import socket, sys, muxcore
        with muxcore.Mux(backend=sys.argv[1]) as mux:
            for handler in (lambda conn, message: message, lambda conn, message: conn.send(message)):
                ours, theirs = socket.socketpair()
                mux.attach(ours, handler)
                theirs.sendall(b"forgotten")
                mux.poll(1)
                mux.poll(0)
                theirs.close()
    """
    for backend in BACKENDS:
        command = [sys.executable, "-X", "dev", "-c", textwrap.dedent(program), backend]
        stderr = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True).stderr
        warned = re.findall(r"on_message .*lambda.* returned (.*), which is ignored: use conn\.send", stderr)
        assert warned == ["b'forgotten'"]


@pytest.mark.parametrize(("value", "error"), [("1", TypeError), (-1, ValueError), (float("nan"), ValueError)])
def test_a_bad_slow_handler_is_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="slow_handler must be"):
        muxcore.Mux(slow_handler=value)
