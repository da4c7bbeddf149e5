"""Estimate the full run from a pilot: sampling, pace, recommendation and comparison."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.cli.render.estimate import comparison, count, forecast, full_command
from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.plan import Plan, make_plan
from aiflux.core.runs.status_file import Counts, EngineFacts, StatusDetails, StatusFile, Totals
from aiflux.engines.kinds import kind_named
from aiflux.estimates.estimate import (
    Estimate,
    Range,
    compare,
    estimate,
    share_of,
    total,
    unevenness,
)
from aiflux.estimates.pilot import Drawn, Observation, Pilot, chosen, pace, start_up
from aiflux.util.records import from_json
from aiflux.util.times import utc_text, walltime_seconds
from tests.unit.helpers import write_input

START = 1_700_000_000.0


def in_lanes(
    lengths: Sequence[int], lanes: int, speed: float = 10.0, **more: Any
) -> tuple[Observation, ...]:
    """Return the observations of an engine with ``lanes`` parallel requests at ``speed`` each."""
    free = [START + 5.0] * lanes
    made = []
    for length in lengths:
        lane = free.index(min(free))
        began, free[lane] = free[lane], free[lane] + length / speed
        made.append(Observation("m", began, free[lane], 0, length, 100, **more))
    return tuple(made)


def plan_of(folder: Path, requests: int, **options: Any) -> Plan:
    summary = scan_input(write_input(folder / "in.jsonl", requests))
    return make_plan(
        summary, folder / "out.json", RunOptions(**options), folder, kind_named("ollama")
    )


def status(gpus: int = 1, slots: int = 4, **details: Any) -> StatusFile:
    found = StatusDetails(
        started=utc_text(START),
        totals=Totals(seconds=100.0, gpu_seconds=100.0 * gpus),
        engines=(EngineFacts(slots=slots),),
    )
    return StatusFile("completed", Counts(1, 1, 0), replace(found, **details))


def estimated(**changes: Any) -> Estimate:
    few = Range(1.0, 1.0, 1.0)
    usual = Estimate(
        plan="p",
        where="slurm",
        created="2026-01-01T00:00:00.000Z",
        requests=1000,
        pilot=100,
        pilot_failures=0,
        prompt_tokens=few,
        completion_tokens=few,
        in_flight=8,
        work_seconds=Range(1000.0, 900.0, 1100.0),
        fixed_seconds=Range(15.0, 10.0, 20.0),
        uneven=1.0,
        gpus=2,
        failures=few,
        walltime=3600.0,
        shards=1,
        time_seconds=1500.0,
        warnings=(),
    )
    return replace(usual, **changes)


class TestSampling:
    def test_every_part_of_the_input_is_represented(self) -> None:
        drawn = chosen(10_000, 100)
        assert [index // 100 for index in drawn] == list(range(100))
        assert drawn == chosen(10_000, 100)

    @given(st.integers(1, 3000), st.integers(2, 300))
    def test_indexes_are_distinct_ordered_and_in_range(self, requests: int, k: int) -> None:
        drawn = chosen(requests, k)
        assert len(drawn) == min(requests, k)
        assert drawn == sorted(set(drawn))
        assert drawn[0] >= 0
        assert drawn[-1] < requests

    def test_small_inputs_give_every_request_the_same_chance(self) -> None:
        """Parts of one or two requests would draw every third request twice as often."""
        drawn = chosen(1500, 1000)
        thirds = [sum(index % 3 == rest for index in drawn) for rest in range(3)]
        assert max(thirds) < 1.2 * min(thirds)

    @pytest.mark.parametrize("kind", ["lognormal", "bimodal", "uniform", "with the size"])
    def test_the_interval_covers_the_truth(self, kind: str) -> None:
        source = random.Random(kind)
        covered = 0
        for _ in range(200):
            sizes = [source.randint(200, 4000) for _ in range(3000)]
            values = [_value(kind, size, source) for size in sizes]
            drawn = sorted(source.sample(range(3000), 100))
            result = total(
                [values[at] for at in drawn], [sizes[at] for at in drawn], 3000, sum(sizes)
            )
            covered += result.low <= sum(values) <= result.high
        assert covered >= 180

    def test_correlated_sizes_make_the_interval_narrow(self) -> None:
        source = random.Random(1)
        sizes = [source.randint(100, 10_000) for _ in range(100)]
        values = [size / 4 + source.uniform(-9, 9) for size in sizes]
        result = total(values, sizes, 10_000, 50_000_000)
        assert result.high - result.low < 0.01 * result.value

    def test_a_complete_sample_has_no_interval(self) -> None:
        result = total([1.0, 5.0, 9.0], [10, 10, 10], 3, 30)
        assert result == Range(15.0, 15.0, 15.0)

    def test_a_single_request_has_a_wide_interval(self) -> None:
        result = total([10.0], [10], 100, 1000)
        assert result.value == 1000
        assert result.high > 2000

    def test_a_sample_without_failures_still_has_an_upper_bound(self) -> None:
        few = share_of(0, 100, 10_000)
        assert (few.value, few.low) == (0, 0)
        assert 300 < few.high < 400
        assert share_of(3, 10, 10) == Range(3, 3, 3)

    def test_unevenness_ignores_chance(self) -> None:
        source = random.Random(2)
        even = [source.lognormvariate(3, 0.8) for _ in range(100)]
        assert unevenness(even) == 1.0
        assert 1.8 < unevenness([*even[:75], *(5 * cost for cost in even[75:])]) < 3.5


def _value(kind: str, size: int, source: random.Random) -> float:
    if kind == "lognormal":
        return source.lognormvariate(4, 0.8)
    if kind == "bimodal":
        return 500.0 if source.random() < 0.2 else 20.0
    if kind == "uniform":
        return source.uniform(0, 100)
    return size / 4 * source.uniform(0.8, 1.2)


class TestPace:
    def test_the_speed_is_measured_with_full_engines(self) -> None:
        source = random.Random(3)
        lengths = [int(source.lognormvariate(4, 0.8)) + 1 for _ in range(200)]
        result = pace(in_lanes(lengths, 8))
        assert result.in_flight == 8
        assert sum(result.costs) == pytest.approx(sum(lengths) / 80, rel=0.05)

    def test_the_last_long_request_does_not_reduce_the_speed(self) -> None:
        result = pace(in_lanes([100] * 80 + [2000], 8))
        assert sum(result.costs) == pytest.approx(10_000 / 80, rel=0.1)

    def test_a_pause_in_the_middle_is_excluded(self) -> None:
        first = in_lanes([100] * 40, 8)
        later = [replace(item, began=item.began + 999, ended=item.ended + 999) for item in first]
        assert sum(pace([*first, *later]).costs) == pytest.approx(100, rel=0.01)

    def test_engines_without_token_counts_are_measured_in_requests(self) -> None:
        made = [replace(item, completion_tokens=0) for item in in_lanes([50] * 80, 4)]
        assert sum(pace(made).costs) == pytest.approx(100, rel=0.01)

    def test_rounded_times_do_not_increase_requests_in_flight(self) -> None:
        made = [replace(item, began=item.began - 0.002) for item in in_lanes([50] * 100, 4)]
        assert pace(made).in_flight == 4

    def test_startup_is_the_time_before_the_first_request(self) -> None:
        assert start_up(in_lanes([10] * 20, 4), START) == pytest.approx(5.0)

    def test_loading_the_second_model_counts_as_startup(self) -> None:
        first = in_lanes([100] * 8, 4)
        second = [
            replace(item, model="n", began=item.began + 60, ended=item.ended + 60) for item in first
        ]
        assert start_up([*first, *second], START) == pytest.approx(5 + 40)

    def test_results_of_an_earlier_start_do_not_count_as_startup(self) -> None:
        assert start_up(in_lanes([10] * 4, 4), START + 1000) == 0.0


class TestEstimate:
    def test_a_uniform_input_is_estimated_precisely(self, tmp_path: Path) -> None:
        whole = plan_of(tmp_path, 4000, model="m:1", concurrency=8)
        result = estimate(whole, Drawn(200, 400_000), in_lanes([80] * 200, 8), status(), "04:00:00")
        assert result.requests == 4000
        assert result.completion_tokens == Range(320_000, 320_000, 320_000)
        assert result.work_seconds.value == pytest.approx(4000, rel=0.02)
        assert result.fixed_seconds == Range(9.0, 5.0, 13.0)
        assert result.gpu_hours(1).value == pytest.approx(4009 / 3600, rel=0.02)
        assert (result.shards, result.time) == (1, "01:40:00")
        assert result.warnings == ()

    def test_an_estimate_is_restored_from_json(self, tmp_path: Path) -> None:
        whole = plan_of(tmp_path, 400, model="m:1", concurrency=8)
        seen = estimate(whole, Drawn(50, 40_000), in_lanes([80] * 50, 8), status(), None)
        assert seen.walltime is None
        assert from_json(Estimate, json.loads(json.dumps(seen.to_json()))) == seen

    def test_each_model_has_its_own_pace(self, tmp_path: Path) -> None:
        slow = in_lanes([80] * 100, 8, speed=10.0)
        late = max(item.ended for item in slow) - START
        quick = [
            replace(item, model="n", began=item.began + late, ended=item.ended + late)
            for item in in_lanes([80] * 100, 8, speed=40.0)
        ]
        whole = plan_of(tmp_path, 2000, model="m:1", concurrency=8)
        result = estimate(whole, Drawn(200, 1), [*slow, *quick], status(), None)
        assert result.work_seconds.value == pytest.approx(1000 + 250, rel=0.02)

    def test_failed_requests_alone_can_fill_the_engines_at_the_end(self) -> None:
        made = in_lanes([80] * 6, 1)
        last = made[-1].ended
        failed = [replace(made[0], began=last, ended=last + 9, completion_tokens=0, error="e: no")]
        found = pace([*made, *failed * 2])
        assert found.in_flight == 2
        assert sum(found.costs) == pytest.approx(36)

    def test_a_pilot_that_cannot_fill_the_engines_warns(self, tmp_path: Path) -> None:
        whole = plan_of(tmp_path, 4000, model="m:1", concurrency=64)
        result = estimate(whole, Drawn(16, 1600), in_lanes([80] * 16, 8), status(), None)
        assert "too small to fill the engines" in result.warnings[0]
        assert result.work_seconds.low < result.work_seconds.value / 4

    def test_failed_and_truncated_requests_are_warnings(self, tmp_path: Path) -> None:
        whole = plan_of(tmp_path, 400, model="m:1", concurrency=4)
        made = in_lanes([80] * 60, 4)
        bad = [replace(item, error="http_400: no", completion_tokens=0) for item in made[:30:3]]
        cut = [replace(item, cut=True, filtered=True, truncated=True) for item in made[:5]]
        result = estimate(whole, Drawn(60, 9), [*bad, *cut, *made[15:]], status(), None)
        assert result.pilot_failures == 10
        assert "10 of 60 requests failed, most often with http_400: no" in result.warnings
        assert any("5 of 60 answers reached the token limit" in text for text in result.warnings)
        assert any("a content filter stopped 5 of 60 answers" in text for text in result.warnings)
        assert any("the engine truncated 5 of 60 prompts" in text for text in result.warnings)

    @given(
        work=st.floats(1, 1e7),
        wide=st.floats(0, 1),
        start=st.floats(0, 3000),
        longest=st.floats(0.1, 900),
        time=st.sampled_from(["5", "30", "01:00:00", "04:00:00", "1-00:00:00", None]),
        requests=st.integers(1, 10**7),
    )
    def test_the_recommendation_covers_the_upper_bound(
        self, work: float, wide: float, start: float, longest: float, time: str, requests: int
    ) -> None:
        fixed = Range(start + longest / 2, start, start + longest)
        result = estimated(
            requests=requests,
            work_seconds=Range(work, work * (1 - wide), work * (1 + wide)),
            fixed_seconds=fixed,
        ).recommended(time)
        assert 1 <= result.shards <= requests
        assert result.shard_seconds.high <= result.time_seconds
        assert result.shards * result.time_seconds >= result.work_seconds.high
        assert walltime_seconds(result.time) >= result.time_seconds
        limit = walltime_seconds(time)
        fewer = result.seconds_of_shard(max(1, result.shards - 1)).high
        if result.time_seconds <= limit:
            assert result.shard_seconds.high <= 0.8 * limit or math.isinf(limit)
            assert result.shards == 1 or fewer > 0.8 * limit
        else:
            assert result.seconds_of_shard(requests).high > 0.8 * limit

    def test_shards_for_another_time_limit(self) -> None:
        assert estimated().recommended("00:10:00").shards == 3
        assert estimated().recommended("UNLIMITED").shards == 1


class TestPilotFiles:
    def test_lines_are_copied_unchanged(self, tmp_path: Path) -> None:
        source = write_input(tmp_path / "in.jsonl", 500)
        source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n\r\n"))
        lines = [line for line in source.read_bytes()[3:].split(b"\r\n") if line]
        pilot = Pilot.of_output(tmp_path / "out.json")
        drawn = pilot.begin(scan_input(source), 20, {"a": 1})
        assert pilot.input.read_bytes().splitlines() == [lines[at] for at in chosen(500, 20)]
        assert drawn == Drawn(20, sum(map(len, lines)))
        assert pilot.folder.stat().st_mode & 0o777 == 0o700

    def test_a_pilot_is_found_by_its_settings(self, tmp_path: Path) -> None:
        summary = scan_input(write_input(tmp_path / "in.jsonl", 50))
        pilot = Pilot.of_output(tmp_path / "out.json")
        assert pilot.drawn({"a": (1, 2)}) is None
        drawn = pilot.begin(summary, 20, {"a": (1, 2)})
        assert pilot.drawn({"a": (1, 2)}) == drawn
        assert pilot.drawn({"a": (1, 3)}) is None

    def test_a_new_pilot_removes_the_earlier_one(self, tmp_path: Path) -> None:
        summary = scan_input(write_input(tmp_path / "in.jsonl", 50))
        pilot = Pilot.of_output(tmp_path / "out.json")
        pilot.begin(summary, 20, {})
        pilot.run.create()
        for path in (pilot.estimate, pilot.output):
            path.write_text("old")
        pilot.begin(summary, 10, {})
        assert sorted(path.name for path in pilot.folder.iterdir()) == ["input.jsonl", "pilot.json"]


class TestShown:
    def test_everything_fits_in_80_columns(self) -> None:
        warned = estimated(warnings=("long words " * 20,), shards=12, gpus=4)
        lines = [line.plain for line in forecast(warned, "aiflux run")]
        assert max(map(len, lines)) <= 80
        assert any(line.startswith("in 12 shards, each") for line in lines)
        assert "recommended: 12 shards of 00:25:00" in lines

    def test_the_suggested_command_has_the_user_s_options_with_shards_and_time(self) -> None:
        given_ = {
            "input": "my file.jsonl",
            "output": None,
            "model": "m:1",
            "engine_env": ["A=1", "B=2"],
            "allow_cpu": True,
            "seal": False,
            "stop": ("a b", "c"),
            "time": "8:00:00",
        }
        assert full_command(given_, True, estimated(shards=3)) == (
            "aiflux run --input 'my file.jsonl' --model m:1 --engine-env A=1 --engine-env B=2 "
            "--allow-cpu --no-seal --stop 'a b' --stop c --time 00:25:00 --shards 3"
        )

    @pytest.mark.parametrize(
        ("number", "text"),
        [(0.4, "0"), (9999, "9999"), (12_345, "12.3 k"), (999_999, "1 M"), (4.2e9, "4.2 G")],
    )
    def test_counts(self, number: float, text: str) -> None:
        assert count(number) == text

    def test_actual_figures_are_compared_with_the_estimate(self) -> None:
        totals = Totals(550.0, 1100.0, prompt_tokens=10, completion_tokens=20, starts=1)
        statuses = [
            status(started=utc_text(START + 50 * number), updated=START + 600.0, totals=totals)
            for number in range(2)
        ]
        whole = StatusFile("completed", Counts(4, 1, 3), StatusDetails(), completed_at=START + 700)
        rows = {row.name: row for row in compare(estimated(), statuses, whole)}
        assert rows["answer tokens"].actual == 40
        assert rows["failed requests"].actual == 3
        assert rows["time of all jobs"].actual == 1100
        assert rows["time of all jobs"].estimated.value == 1030
        assert rows["start to output"].actual == 700
        assert rows["GPU-hours"].actual == pytest.approx(2200 / 3600)
        lines = [line.plain for line in comparison(list(rows.values()))]
        assert any(line.split()[:3] == ["answer", "tokens", "40"] for line in lines)
