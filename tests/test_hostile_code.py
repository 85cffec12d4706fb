"""Hostile user code at every point, for some seconds; and that the harness of tests/hostile sees what it is for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from hostile.points import POINTS
from hostile.run import Report, play_all
from hostile.scenario import Injection, Scenario, at_random, exhaustive
from hostile.without import HERE, ROOT, Patch

pytestmark = pytest.mark.linux_only("it reads /proc")

ACTIONS = ("close_here", "abort_all", "send_other", "framer_here", "raise_interrupt", "abort_and_replace")
SEEDS = range(120)


def found(report: Report) -> list[str]:
    return [f"{finding}: --replay '{name}'" for found in report.kinds.values() for name, finding in found[:2]]


def test_user_code_at_any_point_harms_no_other_connection(backend: str) -> None:
    report = Report(quiet=True)
    play_all((scenario for scenario in exhaustive([backend]) if scenario.injections[0].action in ACTIONS), report)
    assert found(report) == []
    assert report.played > 300
    assert report.performed > 0.9 * report.played


def test_programs_of_several_injections_harm_no_other_connection(backend: str) -> None:
    report = Report(quiet=True)
    play_all((at_random(seed, [backend], gc=seed % 2 == 0) for seed in SEEDS), report)
    assert found(report) == []


PAST_FAULTS = {  # what once was wrong, behind the backend of a name; README.md of the harness explains each
    "a framer replaced in feed": ["message,custom,poll,0|feed_before@2=framer_here"],
    "a framer replaced by its own kind": ["messages,custom,poll,0|feed_between@1=own_framer_here"],
    "a framer replaced by a finaliser of one": ["message,custom,poll,0|del_framer@2=own_framer_here"],
    "closed in feed": ["message,custom,poll,0|feed_between@1=close_here"],
    "aborted in feed": ["pull,custom,poll,0|feed_between@1=signal>abort_here"],
    "closed while a request is made": ["message,resp,gc2,poll,0|cycle@2=close_here"],
    "closed while an inline command is split": [
        "message,inline,gc1,poll,1|cycle@1=close_here",
        "message,inline,gc2,poll,0|reply_str@2=cycle>close_here",
    ],
    "a message removed during a search for it": ["message,inline,gc4,poll,0|reply_str@2=cycle>recv_here"],
    "sent elsewhere in a reply": ["message,resp,poll,0|reply_str@2=send_reply"],
    "a factory that raises": ["message,custom,poll,1|factory@1=raise_exception"],
    "a factory that is interrupted": ["pull,custom,poll,1|factory@1=raise_interrupt"],
    "a framer replaced by one that has found a message": ["message,custom,poll,0|feed_found@1=framer_here"],
    "aborted by a signal": ["message,inline,poll,0|instruction:split_inline@3=abort_here"],
    "a collection while select looks": ["message,fixed,poll,0|collection@12=attach"],
    "interrupted, and nothing more comes": ["message,lines,poll,0|on_message@13=raise_interrupt"],
    "recv_all interrupted": ["pull,custom,poll,0|feed_between@3=raise_interrupt"],
    "a list interrupted": ["messages,custom,poll,0|feed_between@2=raise_interrupt"],
    "a message kept by an error": ["message,custom,poll,0|on_message@2=raise_exception"],
    "a timer set while the heap is swept": [
        f"message,none,poll,0|instruction_timers:Timers._sweep@{nth}=timer" for nth in range(1, 10)
    ],
    "a log handler that raises": ["message,lines,poll,0|log@2=raise_exception"],
    "an address that raises": ["pull,none,poll,0|address_eq@1=raise_exception"],
    "a signal handler replaced by the user": ["message,lines,poll,0|signal_handler@1=steal_signal"],
    "another thread sends while a framer is made": ["message,custom,poll,1|factory@1=thread_send_other"],
    "sent by a finaliser": ["message,custom,gc5,poll,0|feed_after@2=cycle>send_other"],
}


def test_what_once_was_wrong_stays_mended(backend: str) -> None:
    report = Report(quiet=True)
    play_all((Scenario.parse(f"{backend},{name}") for names in PAST_FAULTS.values() for name in names), report)
    assert found(report) == []


@pytest.mark.parametrize("path", sorted((HERE / "without").glob("*.patch")), ids=lambda path: path.stem)
def test_a_fix_can_be_removed(path: Path) -> None:
    """To check that the harness then finds the fault needs longer: make hostile-without."""
    if shutil.which("patch") is None:
        pytest.skip("there is no patch(1)")
    command = ["patch", "-p1", "--fuzz=0", "--dry-run", "--force", "-d", str(ROOT), "-i", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert Patch.read(path).kind
    assert "find: " in path.read_text()


def test_every_point_is_reached(backend: str) -> None:
    """A point that nothing reaches any more would prove nothing."""
    report = Report(quiet=True)
    play_all((scenario for scenario in exhaustive([backend]) if scenario.injections[0].action == "look_around"), report)
    assert set(POINTS) - set(report.reached) == {name for name, point in POINTS.items() if point.never}


@pytest.mark.parametrize(
    ("mistake", "finding"),
    [
        ("crash", "the process ended with -6"),
        ("hang", "Timeout"),
        ("loss", "messages these were delivered"),
        ("double", "messages these were delivered"),
        ("foreign", "output of another connection"),
        ("descriptor", "1 descriptors are left open"),
        ("wakeup", "the wakeup descriptor"),
    ],
)
def test_a_planted_mistake_is_found(mistake: str, finding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTILE_WATCHDOG", "6")
    report = Report(quiet=True)
    injection = Injection("on_message", 1, f"plant_{mistake}")
    play_all([Scenario("select", "message", "lines", (injection,))], report)
    assert [text for text in found(report) if finding in text]


def test_a_name_describes_all_of_a_scenario(backend: str) -> None:
    for seed in range(50):
        scenario = at_random(seed, [backend], gc=True, signals=True)
        assert Scenario.parse(scenario.name) == scenario
