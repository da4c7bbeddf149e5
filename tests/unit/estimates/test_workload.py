"""The prompt mixes: lengths as published, the same for a seed, and no common beginnings."""

from __future__ import annotations

import json
from random import Random
from statistics import fmean

import pytest

from aiflux.estimates.workload import MIXES, Lengths, Mix, request_lines

per_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=lambda mix: mix.name)


@per_mix
def test_requests_have_the_lengths_of_the_mix(mix: Mix) -> None:
    bodies = [json.loads(line)["body"] for line in request_lines(mix, 2000, "1")]
    words = fmean(len(body["messages"][0]["content"].split()) for body in bodies)
    assert words * 1.1 == pytest.approx(mix.prompt.mean, rel=0.1)
    assert fmean(body["max_tokens"] for body in bodies) == pytest.approx(mix.answer.mean, rel=0.1)
    assert mix.source.rpartition(" ")[2].startswith("https://")


@per_mix
def test_requests_are_those_of_the_seed(mix: Mix) -> None:
    lines = [*request_lines(mix, 50, "1")]
    assert lines == [*request_lines(mix, 50, "1")]
    assert lines[:20] == [*request_lines(mix, 20, "1")]
    assert not {*lines} & {*request_lines(mix, 50, "2")}


@per_mix
def test_prompts_do_not_begin_alike(mix: Mix) -> None:
    prompts = [
        json.loads(line)["body"]["messages"][0]["content"]
        for seed in "12"
        for line in request_lines(mix, 200, seed)
    ]
    assert len({prompt[:25] for prompt in prompts}) == 400


def test_lengths_can_be_all_equal() -> None:
    source = Random(1)
    assert {Lengths(7).draw(source) for _ in range(10)} == {7}
    drawn = [Lengths(100, 2.0).draw(source) for _ in range(1000)]
    assert (min(drawn), max(drawn)) == (1, 300)
