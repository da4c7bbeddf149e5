"""Shards as the tasks of job arrays."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.errors import ConfigError
from aiflux.slurm.jobs import array_ranges, parse_ranges, split_arrays

indexes = st.lists(st.integers(0, 5000), min_size=1, unique=True).map(sorted)


@pytest.mark.parametrize(
    ("tasks", "text"),
    [((), ""), ((3,), "3"), ((0, 1), "0-1"), ((3, 7, 9, 10, 11, 12), "3,7,9-12")],
)
def test_task_numbers_are_written_as_ranges(tasks: tuple[int, ...], text: str) -> None:
    assert array_ranges(tasks) == text


@given(indexes)
def test_ranges_read_back_as_they_were_written(tasks: list[int]) -> None:
    text = array_ranges(tasks)
    assert re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text)
    assert [*parse_ranges(text)] == tasks
    assert [*parse_ranges(f"[{text}%8]")] == tasks


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("0-8:4%1", [0, 4, 8]), ("[1,3,...]", [1, 3]), ("7", [7]), ("N/A", []), ("", [])],
)
def test_the_ranges_that_slurm_prints_are_parsed(text: str, tasks: list[int]) -> None:
    assert [*parse_ranges(text)] == tasks


@given(indexes, st.integers(1, 1200))
def test_shards_are_split_into_arrays_that_the_cluster_accepts(
    shards: list[int], size: int
) -> None:
    arrays = split_arrays(shards, size)
    assert [first + task for first, tasks in arrays for task in tasks] == shards
    assert all(0 <= task < size for _, tasks in arrays for task in tasks)
    # One array fewer could not do: each begins where the one before it must end.
    assert all(arrays[i + 1][0] - arrays[i][0] >= size for i in range(len(arrays) - 1))


def test_a_run_that_fits_is_one_array() -> None:
    assert split_arrays(range(1001), 1001) == [(0, tuple(range(1001)))]
    assert split_arrays([5, 900, 1005, 1006], 1001) == [(5, (0, 895, 1000)), (1006, (0,))]


def test_a_cluster_without_arrays_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no job arrays") as caught:
        split_arrays([0, 1], 0)
    assert "--shards" in str(caught.value.remedy)
