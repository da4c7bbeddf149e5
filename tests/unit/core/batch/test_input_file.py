"""A whole input: the problems that the check reports, and its memory."""

from __future__ import annotations

import gzip
import resource
import shlex
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.core.batch.input_file import InputDigest, InputRules, scan_input, scan_part
from aiflux.errors import ExitCode, InputError
from aiflux.util.lines import cut_at_lines, read_lines
from tests.unit.helpers import request_line, write_input


def refused(path: Path, model: str | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        scan_input(path, model)
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.remedy
    return caught.value


def test_a_valid_input_is_summarized(awkward: Path) -> None:
    summary = scan_input(write_input(awkward / "in.jsonl", 10))
    assert summary.requests == 10
    assert summary.models == ("m:1",)
    assert summary.endpoints == {"/v1/chat/completions": 10}
    assert summary.size == (awkward / "in.jsonl").stat().st_size


def test_bom_crlf_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    plain = write_input(tmp_path / "plain.jsonl", 3)
    lines = plain.read_text(encoding="utf-8").splitlines()
    other = tmp_path / "other.jsonl"
    text = "\r\n\r\n".join(["", *lines]) + "\r\n  \r\n"
    other.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert scan_input(other).digest == scan_input(plain).digest
    assert [raw for _, _, raw in read_lines(other)] == [line.encode() for line in lines]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b""), "contains no request"),
        (lambda path: path.write_bytes(b"\n \n"), "contains no request"),
    ],
)
def test_a_missing_or_empty_input_is_an_error(tmp_path: Path, prepare: object, words: str) -> None:
    path = tmp_path / "in.jsonl"
    prepare(path)  # type: ignore[operator]
    assert words in refused(path).message


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe").message


def test_every_invalid_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [request_line("a"), "{broken", request_line("b"), request_line("a"), request_line("")]
    path.write_text("\n".join(lines), encoding="utf-8")
    error = refused(path)
    assert error.message.startswith("3 lines are wrong")
    assert [text.split(":")[0] for text in error.problems] == ["line 2", "line 4", "line 5"]
    assert "'a' is already used on line 1" in error.problems[1]


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_a_repeated_custom_id_is_reported_in_an_invalid_line_too(
    tmp_path: Path, part_bytes: int
) -> None:
    path = tmp_path / "in.jsonl"
    wrong = request_line("a", url="/none")
    path.write_text("\n".join([wrong, request_line("a"), wrong]), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        scan_input(path, part_bytes=part_bytes, children=0)
    assert caught.value.message.startswith("3 lines are wrong")
    repeated = [text for text in caught.value.problems if "'a' is already used on line 1" in text]
    assert [text.split(":")[0] for text in repeated] == ["lines 2 and 3"]
    assert not any(text.startswith("...") for text in caught.value.problems)


def test_line_numbers_in_a_row_are_a_range(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [
        "{" if number in (1, 2, 4, 5, 6, 9) else request_line(str(number)) for number in range(10)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert refused(path).problems[0].startswith("lines 2, 3, 5-7 and 10: ")


@pytest.mark.parametrize("name", ["my reviews.csv", "r.tsv", "r.csv.gz"])
def test_the_command_that_converts_a_table_works(tmp_path: Path, name: str) -> None:
    """It is the remedy for a table that was named instead of requests."""
    text = "id,review\n1,good\n".replace(",", "\t" if "tsv" in name else ",").encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    remedy = str(refused(path).remedy)
    command = shlex.split(remedy.removeprefix("turn it into requests first: ").split(";")[0])
    assert command[0] == "aiflux"
    target = tmp_path / command[-1]
    assert main([*command[1:-1], str(target)]) == 0
    assert "good" in target.read_text()


def test_equal_problems_are_grouped_with_twenty_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("{\n" * 1000 + request_line(""), encoding="utf-8")
    error = refused(path)
    assert error.message.startswith("1001 lines are wrong")
    assert len(error.problems) == 2
    assert error.problems[0].startswith("lines 1-20 and 980 more: ")
    assert error.problems[1].startswith("line 1,001: ")


def test_after_twenty_different_problems_only_a_count_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [request_line(f"n{index}", url=f"/v{index}") for index in range(300)]
    path.write_text("\n".join(lines), encoding="utf-8")
    error = refused(path)
    assert error.message.startswith("300 lines are wrong")
    assert [text.split(":")[0] for text in error.problems[:20]] == [
        f"line {number}" for number in range(1, 21)
    ]
    assert error.problems[20] == "... and 280 more"


@given(
    kinds=st.lists(st.integers(0, 40), min_size=1, max_size=400),
    part_bytes=st.integers(1, 4000),
)
def test_every_invalid_line_is_counted_once(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[int], part_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "kinds.jsonl"
    path.write_text("".join(f"{kind:{kind + 1}}\n" for kind in kinds), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        scan_input(path, part_bytes=part_bytes, children=1)
    assert f"{len(kinds)} line" in caught.value.message
    assert caught.value.problems[0].split(":")[0].split()[1].rstrip(",").split("-")[0] == "1"


def test_another_model_is_named(tmp_path: Path) -> None:
    error = refused(write_input(tmp_path / "in.jsonl", 2), "other:2")
    assert len(error.problems) == 1
    assert error.problems[0].startswith("lines 1 and 2: ")
    assert '"other:2"' in error.problems[0]


def test_context_follows_the_longest_prompts(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    body = {
        "model": "m:1",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "x" * 3000}],
    }
    path.write_text(request_line("a", body=body) + "\n", encoding="utf-8")
    summary = scan_input(path)
    assert 1100 <= summary.longest_tokens <= 1300
    assert summary.context_tokens == summary.longest_tokens


def test_the_check_runs_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    line = request_line("%09d", padding="x" * 1000)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(line.replace("%09d", str(index)) + "\n" for index in range(40_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scan_input(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30_000, "kilobytes; the file has 48,000"


_pieces = st.sampled_from([b"a", b"{}", b"\n", b"\r\n", b"\r", b" ", b"\x0b", b"\x00", b"xyz"])


@example(b"\na", b"", 9)
@example(b"a\r", b"", 9)
@example(b"a \n", b"\xef\xbb\xbf", 9)
@given(
    content=st.lists(_pieces).map(b"".join),
    bom=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    part_bytes=st.integers(1, 12),
)
def test_the_digest_depends_on_the_lines_only(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, bom: bytes, part_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "digested.jsonl"
    path.write_bytes(bom + content)
    digest = InputDigest(path)
    for start, end in cut_at_lines(path, part_bytes):
        part = scan_part(path, start, end, None, InputRules())
        digest.add(start, end, part.plain)
    lines = b"".join(raw + b"\n" for _, _, raw in read_lines(path))
    assert digest.hexdigest() == blake2b(lines, digest_size=16).hexdigest()
