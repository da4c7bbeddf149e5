"""Which of several engines is recommended, and how large a sample would decide."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiflux.cli.render.estimate import engines_forecast
from aiflux.estimates.estimate import Estimate, Range, estimate
from aiflux.estimates.pilot import Drawn, chosen
from aiflux.estimates.recommendation import Recommendation, recommend
from tests.unit.estimates.test_estimate import estimated, in_lanes, plan_of, status


def taking(value: float, wide: float = 0.1, **more: object) -> Estimate:
    """Return an estimate with this time of work, and nothing added to it."""
    work = Range(value, value * (1 - wide), value * (1 + wide))
    none = Range(0.0, 0.0, 0.0)
    return replace(estimated(failures=none, fixed_seconds=none, work_seconds=work), **more)


@given(
    times=st.lists(st.floats(1, 1e6), min_size=2, max_size=3),
    wide=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    gpus=st.integers(0, 4),
)
def test_an_engine_is_recommended_only_if_its_interval_is_below_all_others(
    times: list[float], wide: list[float], gpus: int
) -> None:
    found = {
        str(number): taking(time, share, gpus=gpus)
        for number, (time, share) in enumerate(zip(times, wide, strict=False))
    }
    choice = recommend(found)
    work = {name: each.work_seconds for name, each in found.items()}
    assert work[choice.best].value == pytest.approx(min(times))
    others = [range_.low for name, range_ in work.items() if name != choice.best]
    assert choice.decided == (work[choice.best].high < min(others))
    assert (choice.engine is None) == bool(choice.overlapping)
    if choice.requests is not None:
        assert 100 < choice.requests <= 1000
        assert not choice.decided


def test_gpu_hours_count_and_not_only_time() -> None:
    found = {"one": taking(1000.0, gpus=1), "four": taking(400.0, gpus=4)}
    assert recommend(found).engine == "one"
    assert recommend({**found, "one": taking(1000.0, gpus=0)}).engine == "four"


def test_engines_within_the_uncertainty_of_every_pilot_are_not_decided_by_a_larger_one() -> None:
    choice = recommend({"a": taking(1000.0), "b": taking(1100.0)})
    assert (choice.decided, choice.requests) == (False, None)
    assert choice.overlapping == ("b",)


def test_an_engine_that_fails_clearly_more_requests_is_left_out() -> None:
    quick = taking(10.0, failures=Range(500.0, 400.0, 600.0))
    some = taking(900.0, failures=Range(20.0, 5.0, 60.0))
    usual = Range(0.0, 0.0, 40.0)
    found = {"quick": quick, "some": some, "none": taking(2000.0, failures=usual)}
    choice = recommend(found)
    assert choice.failing == ("quick",)
    assert choice.engine == "some"


def test_a_sample_of_the_recommended_size_decides(tmp_path: Path) -> None:
    """Pilots of 40 do not decide between engines of which one is 1.4 times as fast."""
    whole = plan_of(tmp_path, 1000, model="m:1", concurrency=4)

    def choice(size: int, lengths: list[int]) -> Recommendation:
        sample = [lengths[at] for at in chosen(len(lengths), size)]
        drawn = Drawn(size, 100 * len(lengths))
        found = {
            name: estimate(whole, drawn, in_lanes(sample, 4, speed), status(), None)
            for name, speed in {"slow": 10.0, "quick": 14.0}.items()
        }
        return recommend(found)

    enough = 0
    for seed in range(20):
        source = random.Random(seed)
        lengths = [source.randint(1, 200) for _ in range(1000)]
        first = choice(40, lengths)
        assert (first.best, first.decided) == ("quick", False)
        assert first.requests is not None
        enough += choice(round(1.3 * first.requests), lengths).decided
    assert enough >= 16


class TestShown:
    names = ("ollama", "llamacpp", "vllm")

    @settings(max_examples=40)
    @given(st.floats(0.1, 1e9), st.floats(0, 1), st.integers(0, 8), st.integers(100, 10**9))
    def test_the_table_fits_in_80_columns(
        self, time: float, wide: float, gpus: int, requests: int
    ) -> None:
        tokens = Range(time * 50, time, time * 90)
        each = taking(time, wide, gpus=gpus, requests=requests, completion_tokens=tokens)
        warned = replace(each.recommended("04:00:00"), warnings=("long words " * 20,))
        found = dict.fromkeys(self.names, warned)
        models = dict.fromkeys(self.names, "hf:meta-llama/Llama-3.2-3B-Instruct")
        shown = engines_forecast(found, models, dict.fromkeys(found, "aiflux"), recommend(found))
        lines = [line.plain for line in shown]
        assert max(map(len, lines)) <= 80
        heads = next(line for line in lines if line.split() == [*self.names])
        for line in lines[lines.index(heads) :][:7]:
            starts = [heads.index(name) for name in self.names]
            assert all(line[at - 1] == " " for at in starts), line

    def test_the_cost_is_that_of_the_engines_that_are_compared(self) -> None:
        failing = taking(10.0, gpus=0, failures=Range(500.0, 400.0, 600.0))
        found = {"ollama": taking(1000.0, gpus=1), "llamacpp": taking(400.0, gpus=4)}
        found["vllm"] = failing
        choice, names = recommend(found), dict.fromkeys(found, "m:1")
        text = "\n".join(line.plain for line in engines_forecast(found, names, names, choice))
        assert "Clearly the lowest GPU-hours: ollama." in " ".join(text.split())

    def test_an_undecided_pilot_says_how_large_a_sample_would_decide(self) -> None:
        found = {"ollama": taking(1000.0, 0.4), "vllm": taking(500.0, 0.4)}
        choice = recommend(found)
        models = {"ollama": "m:1", "vllm": "hf:org/m"}
        lines = [
            line.plain
            for line in engines_forecast(found, models, dict.fromkeys(found, "c"), choice)
        ]
        text = " ".join(" ".join(lines).split())
        assert "The pilot does not decide: the intervals of vllm and ollama overlap" in text
        assert f"A sample of about {choice.requests} would: --requests {choice.requests}" in text
        assert "full run with vllm, one job of" in text
