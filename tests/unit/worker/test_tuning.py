"""``--tune``: the first requests of a run show how many slots and requests in flight are best."""

from __future__ import annotations

import heapq
import json
import os
import shlex
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.config.config import Config
from aiflux.core.runs.status_file import Tuning
from aiflux.engines.base import SlotLimits
from aiflux.engines.sizing import in_flight
from aiflux.errors import ConfigError, ExitCode
from aiflux.worker.tuning import LONGEST, Start, Tuner
from tests.tools import make_tiny_gguf
from tests.tools.engine_contract import until
from tests.unit.helpers import write_program
from tests.unit.made_models import put_model
from tests.unit.working import Working

TOOLS = Path(__file__).parents[2] / "tools"


class Simulation:
    """An engine whose throughput rises with its requests in flight up to a capacity.

    Args:
        slots: what it starts with.
        most: slots with which it still starts.
        refused: why the engine does not start again, once it has started this often.
    """

    def __init__(
        self,
        slots: int,
        capacity: float,
        most: int = 1024,
        refused: tuple[int, Start] = (1000, Start.TOO_LONG),
        tuning: Tuning | None = None,
    ) -> None:
        self.now = 0.0
        self.slots = slots
        self.capacity = capacity
        self.most = most
        self.refused = refused
        self.wanted: int | None = None
        self.starts: list[int] = [slots]
        self.printed: list[str] = []
        self.answers = 0
        self.tuner = Tuner(
            tuning or Tuning("m"),
            restart=self._restart,
            keep=lambda _: None,
            say=self.printed.append,
            clock=lambda: self.now,
        )

    def _restart(self, slots: int, rate: float | None) -> Start:
        starts, reason = self.refused
        if rate is not None and len(self.starts) >= starts:
            return reason
        self.wanted = slots
        return Start.BEGUN

    def run(self, answers: int) -> Tuning:
        """Process requests until it has chosen, or has given so many answers."""
        tuner = self.tuner
        tuner.engine_ready(0, self.slots)
        active: list[tuple[float, int, float]] = []
        waiting: list[tuple[int, float]] = []
        sent = 0
        while self.answers < answers and (not tuner.tuning.chosen or self.wanted is not None):
            while len(active) + len(waiting) < tuner.value and self.wanted is None:
                sent += 1
                waiting.append((sent, self.now))
            while waiting and len(active) < self.slots:
                number, since = waiting.pop(0)
                seconds = (0.5 + number * 7 % 11 / 10) * max(1, (len(active) + 1) / self.capacity)
                heapq.heappush(active, (self.now + seconds, number, since))
            if active:
                self.now, number, since = heapq.heappop(active)
                self.answers += 1
                tuner.note(50 + number * 7 % 11 * 10, self.now - since, overloaded=False)
            if self.wanted is not None and not active and not waiting:
                self.slots = min(self.wanted, self.most)
                self.starts.append(self.slots)
                self.wanted = None
                self.now += 30
                tuner.engine_ready(0, self.slots)
        return tuner.tuning


@pytest.mark.parametrize(
    ("slots", "capacity", "starts", "chosen"),
    [
        (8, 8, [8, 16, 8], {"slots": 8, "concurrency": 10}),
        (8, 100, [8, 16, 32, 64, 128, 256, 128], {"slots": 128, "concurrency": 160}),
        (8, 2, [8], {"slots": 8, "concurrency": 2}),
        (32, 8, [32], {"slots": 32, "concurrency": 8}),
    ],
)
def test_slots_are_doubled_while_that_gains(
    slots: int, capacity: float, starts: list[int], chosen: dict[str, int]
) -> None:
    simulation = Simulation(slots, capacity)
    tuning = simulation.run(20000)
    assert tuning.chosen == chosen, tuning
    assert simulation.starts == starts
    assert simulation.tuner.value == chosen["concurrency"]


def test_slots_that_do_not_fit_end_the_search() -> None:
    simulation = Simulation(8, 100, most=16)
    tuning = simulation.run(20000)
    assert tuning.chosen == {"slots": 16, "concurrency": 20}
    assert tuning.note == "no start with 32 slots"


@pytest.mark.parametrize("start", [Start.TOO_LONG, Start.IMPOSSIBLE])
def test_no_start_if_it_is_not_worth_it(start: Start) -> None:
    simulation = Simulation(8, 100, refused=(1, start))
    tuning = simulation.run(20000)
    assert tuning.chosen == {"slots": 8, "concurrency": 10}
    assert tuning.note == f"no start with 16 slots: {start.value}"
    assert simulation.starts == [8]


def test_nothing_is_chosen_because_the_job_ends() -> None:
    simulation = Simulation(8, 100, refused=(1, Start.LATER))
    tuning = simulation.run(1000)
    assert not tuning.chosen
    assert simulation.tuner.value == 10
    assert simulation.printed[-1] == (
        "tuning: no start with 16 slots: too little of the job's time is left; the next job "
        "continues"
    )
    again = Simulation(8, 100, tuning=tuning)
    assert again.run(20000).chosen == {"slots": 128, "concurrency": 160}
    assert again.starts[:3] == [8, 16, 32]


def test_engines_that_do_not_return_to_the_best_slots_keep_the_requests_of_their_own() -> None:
    simulation = Simulation(8, 8, refused=(2, Start.TOO_LONG))
    assert simulation.run(20000).chosen == {"slots": 8, "concurrency": 10}
    assert simulation.starts == [8, 16]
    assert simulation.tuner.value == 20


def test_the_search_ends_after_a_while() -> None:
    simulation = Simulation(8, 100)
    simulation.run(60)
    assert len(simulation.tuner.tuning.tried) == 1
    simulation.now += LONGEST
    simulation.tuner.tick()
    assert simulation.tuner.tuning.chosen == {"slots": 8, "concurrency": 10}
    assert simulation.tuner.value == 10


def test_a_later_start_continues_with_what_was_tried() -> None:
    first = Simulation(8, 8)
    tuning = first.run(120)
    assert len(tuning.tried) == 2
    again = Simulation(8, 8, tuning=tuning)
    assert again.run(20000).chosen == {"slots": 8, "concurrency": 10}
    assert again.tuner.tuning.tried[:2] == tuning.tried
    assert again.tuner.tuning.tried[2].concurrency == 10


def test_crashes_with_many_slots_lead_to_fewer() -> None:
    simulation = Simulation(8, 100, most=64)
    tuner = simulation.tuner
    simulation.run(20000)
    assert tuner.tuning.chosen == {"slots": 64, "concurrency": 80}
    tuner.engine_crashed(0, 64)
    assert tuner.tuning.chosen == {"slots": 32, "concurrency": 40}
    assert simulation.wanted == 32
    assert tuner.tuning.note == "the engine crashed with 64 slots"
    tuner.engine_ready(0, 32)
    simulation.now += LONGEST + 1
    tuner.engine_crashed(0, 32)  # long after the start, it has another reason
    assert tuner.tuning.chosen == {"slots": 32, "concurrency": 40}
    tuner.engine_ready(0, 32)
    for slots in (32, 16):
        tuner.engine_crashed(0, slots)
        tuner.engine_ready(0, slots // 2)
    assert tuner.tuning.chosen == {"slots": 8, "concurrency": 10}
    tuner.engine_crashed(0, 8)
    assert tuner.tuning.note == "the engine crashed with 16 slots"


def test_engines_with_other_slots_than_chosen_keep_the_requests_of_their_own() -> None:
    simulation = Simulation(8, 100)
    chosen = simulation.run(20000)
    assert chosen.slots == 128
    again = Simulation(32, 100, tuning=chosen)
    again.run(1)
    assert again.tuner.value == 40


def test_the_search_ends_when_an_engine_is_lost() -> None:
    simulation = Simulation(8, 100, tuning=Tuning("m", engines=2))
    tuner = simulation.tuner
    tuner.engine_ready(1, 8)
    tuner.engine_ready(0, 8)
    assert tuner.value == 2
    tuner.engine_lost(1)
    assert tuner.value == 10
    assert not simulation.run(1000).tried
    assert tuner.value == 10
    tuner.end()
    assert simulation.printed == [
        "tuning of m did not finish (engine 1 failed); it keeps its default settings"
    ]


def test_an_engine_with_more_slots_than_another_does_not_raise_the_limit_of_both() -> None:
    """As where one of two engines did not start with more."""
    tuner = Simulation(8, 8, tuning=Tuning("m", engines=2, slots=8, concurrency=10)).tuner
    tuner.engine_ready(0, 8)
    tuner.engine_ready(1, 16)
    assert tuner.value == 10


def test_nothing_is_measured_while_an_engine_is_down() -> None:
    simulation = Simulation(8, 8, tuning=Tuning("m", engines=2))
    tuner = simulation.tuner
    tuner.engine_ready(0, 8)
    tuner.engine_ready(1, 8)
    tuner.engine_crashed(1, 8)
    assert tuner.value == 10
    assert not simulation.run(500).tried
    tuner.engine_ready(1, 8)
    for _ in range(200):
        simulation.now += 0.1
        tuner.note(50, 0.05, overloaded=False)
    assert simulation.tuner.tuning.tried


def test_the_advice_works_as_it_is_printed(tmp_path: Path) -> None:
    advice = Tuning("m", slots=8, concurrency=10).advice
    words, _, line = advice.partition(", or in aiflux.yaml: ")
    assert words == "tuned m; to keep it: --slots 8 --concurrency 10 instead of --tune"
    (tmp_path / "aiflux.yaml").write_text(line, encoding="utf-8")
    options = Config(directory=tmp_path).run_options()
    assert (options.slots, options.concurrency) == (8, 10)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Working]:
    """Return a run with a stand-in that needs eight slots, started with two."""
    tool = shlex.join([sys.executable, str(TOOLS / "fake_llama_server.py")])
    program = write_program(tmp_path / "llama-server", f'#!/bin/sh\nexec {tool} "$@"\n')
    monkeypatch.setenv("AIFLUX_ENGINE_PROGRAM", str(program))
    models = tmp_path / "models"
    put_model(models, "tiny:latest", make_tiny_gguf.tiny())

    def make(**options: object) -> Working:
        settings = {"engine": "llamacpp", "model": "tiny:latest", "allow_cpu": True, "tune": True}
        return Working(tmp_path, None, models_dir=models, **settings | options)

    return make


def prompts(working: Working, count: int) -> Working:
    return working.prompts(*(f"work {at}" for at in range(count)), model="tiny:latest")


def work_until_tuned(working: Working) -> None:
    """Process requests until the settings are chosen, and a few more."""

    def watch() -> None:
        while not any(each.startswith("tuned") for each in messages):
            time.sleep(0.01)
        working.stop_soon(results=30)

    messages = working.reporter.messages
    threading.Thread(target=watch, daemon=True).start()
    assert working.run() is ExitCode.STOPPED, working.error


def journalled(working: Working) -> Counter[str]:
    lines = working.journal.read_text(encoding="utf-8").splitlines()
    return Counter(json.loads(line)["custom_id"] for line in lines)


def tuning_of(working: Working) -> dict[str, Any]:
    (tuning,) = working.status["aiflux"]["tunings"]
    return dict(tuning)


def test_a_run_tunes_itself_with_its_own_requests(tuned: Callable[..., Working]) -> None:
    working = prompts(tuned(), 20000)
    work_until_tuned(working)
    assert set(journalled(working).values()) == {1}
    found = tuning_of(working)
    tried = [(each["slots"], each["concurrency"]) for each in found["tried"]]
    first = tried[0][0]  # it depends on the cores of this machine
    assert (2 * first, in_flight(2 * first)) in tried
    assert found["slots"] >= 2 * first
    printed = "\n".join(working.reporter.messages)
    assert f"--slots {found['slots']} --concurrency {found['concurrency']}" in printed
    assert "is down" not in printed
    again = tuned()
    again.stop_soon(results=20)
    assert again.run() is ExitCode.STOPPED
    assert tuning_of(again) == found
    assert again.status["aiflux"]["engines"][0]["slots"] == found["slots"]
    assert not any(line.startswith("tun") for line in again.reporter.messages)


def test_a_stop_while_it_tunes_loses_nothing_and_measures_nothing_twice(
    tuned: Callable[..., Working],
) -> None:
    working = prompts(tuned(), 300)
    working.stop_soon(results=100)
    assert working.run() is ExitCode.STOPPED
    before = tuning_of(working)
    assert before["tried"]
    assert before["concurrency"] is None
    again = tuned()
    assert again.run() is ExitCode.OK, again.error
    assert tuning_of(again)["tried"][: len(before["tried"])] == before["tried"]
    assert len(again.results) == 300
    assert set(journalled(again).values()) == {1}


def test_a_stop_while_the_engine_starts_with_more_slots_ends_no_search(
    tuned: Callable[..., Working],
) -> None:
    working = prompts(tuned(), 20000)
    more = f"engine 0 starts again with {2 * plain_slots()} slots"

    def watch() -> None:
        until(lambda: more in working.reporter.messages, 60)
        working.stopper.stop("a test")

    threading.Thread(target=watch, daemon=True).start()
    assert working.run() is ExitCode.STOPPED, working.error
    assert tuning_of(working)["concurrency"] is None
    again = tuned()
    work_until_tuned(again)
    assert more in again.reporter.messages
    found = tuning_of(again)
    assert found["slots"] >= 2 * plain_slots()
    assert "no start" not in found["note"]


def test_shards_that_start_later_use_what_the_first_found(tuned: Callable[..., Working]) -> None:
    working = prompts(tuned(slots=4), 400)
    working.open(shards=2)
    assert working.shard(0) is ExitCode.OK, working.error
    chosen = tuning_of(working)
    assert chosen["slots"] == 4
    working.reporter.messages.clear()
    assert working.shard(1) is ExitCode.OK, working.error
    assert not any(line.startswith("tun") for line in working.reporter.messages)
    assert any(
        line.startswith("from an earlier start or shard: tuned")
        for line in working.reporter.messages
    )
    other = working.status_file.with_name("shard-0001.json")
    assert json.loads(other.read_text(encoding="utf-8"))["aiflux"]["tunings"] == [chosen]


def test_an_engine_that_does_not_start_with_more_slots_gets_its_own_again(
    tuned: Callable[..., Working],
) -> None:
    first = plain_slots()
    working = prompts(tuned(engine_env={"MOST_SLOTS": str(first)}), 20000)
    work_until_tuned(working)
    assert set(journalled(working).values()) == {1}
    assert tuning_of(working)["note"] == f"no start with {2 * first} slots"
    assert working.status["aiflux"]["engines"][0]["slots"] == first


@pytest.mark.parametrize("answers", [20, 200])
def test_slots_with_which_the_engine_crashes_are_not_used(
    tuned: Callable[..., Working], answers: int
) -> None:
    """It crashes while they are measured, or once they are chosen."""
    first = plain_slots()
    crash = json.dumps([2 * first, answers])
    working = prompts(tuned(engine_env={"CRASH_AT": crash}), 20000)
    note = f"the engine crashed with {2 * first} slots"

    def watch() -> None:
        until(lambda: any(note in line for line in working.reporter.messages), 60)
        working.stop_soon(results=30)

    threading.Thread(target=watch, daemon=True).start()
    assert working.run() is ExitCode.STOPPED, working.error
    found = tuning_of(working)
    assert (found["slots"], found["note"]) == (first, note)
    assert {each["slots"] for each in found["tried"]} == {first}
    assert working.status["aiflux"]["engines"][0]["slots"] == first
    down = [line for line in working.reporter.messages if "is down" in line]
    assert down[-1] == f"engine 0 is down; restarting it with {first} slots (1)"
    assert set(journalled(working).values()) == {1}


def plain_slots() -> int:
    return min(SlotLimits().cpu, len(os.sched_getaffinity(0)))


def test_given_slots_are_kept(tuned: Callable[..., Working]) -> None:
    working = prompts(tuned(slots=4), 2000)
    work_until_tuned(working)
    found = tuning_of(working)
    assert [each["concurrency"] for each in found["tried"]] == [1, 2, 6]
    assert {each["slots"] for each in found["tried"]} == {4}
    assert found["note"] == ""


def test_a_run_that_ends_first_says_so(tuned: Callable[..., Working]) -> None:
    working = tuned().prompts("work", "work too", model="tiny:latest")
    assert working.run() is ExitCode.OK, working.error
    assert tuning_of(working)["note"] == "the requests ended before"
    (line,) = [each for each in working.reporter.messages if each.startswith("tun")]
    assert line.startswith("tuning of tiny:latest did not finish (the requests ended before)")


@pytest.mark.parametrize(
    ("lines", "arguments", "words", "remedy"),
    [
        (
            "  concurrency: 4",
            {"tune": True},
            "tune (argument) and concurrency = 4 ({file}, line 2)",
            "to tune, remove concurrency from {file}, line 2; to keep 4, omit --tune",
        ),
        (
            "  tune: true",
            {"concurrency": 4},
            "tune ({file}, line 2) and concurrency = 4 (argument)",
            "to tune, omit --concurrency; to keep 4, give --no-tune",
        ),
    ],
)
def test_the_refusal_of_tune_with_concurrency_shows_where_each_is_from(
    tmp_path: Path, lines: str, arguments: dict[str, Any], words: str, remedy: str
) -> None:
    (tmp_path / "aiflux.yaml").write_text(f"run:\n{lines}\n")
    config = Config(arguments=arguments, directory=tmp_path)
    with pytest.raises(ConfigError) as caught:
        config.run_options()
    file = tmp_path / "aiflux.yaml"
    assert words.format(file=file) in caught.value.message
    assert remedy.format(file=file) == caught.value.remedy
    assert not config.run_options(tune=False).tune  # as for a pilot


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine_url": "http://127.0.0.1:9"}, "--tune starts the engine with other numbers"),
        ({"engine_command": "server {port}"}, "--tune starts the engine with other numbers"),
        ({"engine": "llamacpp", "concurrency": 4}, "--tune and --concurrency cannot be combined"),
    ],
)
def test_runs_that_have_nothing_to_tune_are_refused(
    tmp_path: Path, options: dict[str, object], words: str
) -> None:
    working = Working(tmp_path, None, model="m:1", tune=True, **options).prompts("a")
    assert working.run() is ExitCode.USAGE
    assert working.error is not None
    assert words in working.error.message
    assert "--no-tune" in str(working.error.remedy)
