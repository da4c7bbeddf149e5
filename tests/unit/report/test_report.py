"""``aiflux report``: figures that add up, and a self-contained page that escapes all text."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from aiflux.cli.main import main
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.journal import JournalWriter, NewResult
from aiflux.core.runs.plan import EarlierPlan, write_plan
from aiflux.core.runs.status_file import GpuUse, read_status
from aiflux.estimates.estimate import Estimate, Range
from aiflux.report.build import earlier_settings
from aiflux.report.journal_summary import Histogram, Tally, Timeline, tally, throughput
from aiflux.util.records import to_json
from aiflux.util.times import utc_text
from aiflux.worker.node import GpuWatch, rounded, with_sample
from tests.tools.engine_contract import until
from tests.unit.fake_commands import FakeCommands
from tests.unit.made_runs import MadeRun

START = 1_790_000_000.0
NASTY = "\"><script>alert('1')</script>&amp;\u202e\n\x00 ' onload=x"
VOID = {"meta", "br", "hr"}
FIGURES = some.floats(min_value=0.001, max_value=1e6)


def answer(text: str = "yes", prompt: int = 10, completion: int = 5) -> bytes:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
    return json.dumps(body).encode()


def result(
    number: int,
    moment: float = START,
    *,
    code: str | None = None,
    message: str = "no",
    custom_id: str | None = None,
    seconds: float = 1.0,
    body: bytes | None = None,
    **metadata: Any,
) -> NewResult:
    data = {
        "model": "llama3.2:3b",
        "timestamp": utc_text(moment),
        "processing_time": seconds,
        "attempts": 1,
        "engine": 0,
        **metadata,
    }
    error = None if code is None else {"code": code, "message": message, "status": 400}
    content = b"null" if code else answer()
    key = number.to_bytes(16, "big")
    name = custom_id or f"r{number}"
    return NewResult(key, name, 200, data, error, content if body is None else body)


def lines(*results: NewResult) -> list[tuple[bytes, bytes]]:
    return [(each.key, each.to_line()) for each in results]


def write(made: MadeRun, shard: int, *results: NewResult) -> None:
    journal = JournalWriter(made.run.journal(shard))
    for each in results:
        journal.append(each)
    journal.close()


def report(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["report", str(made.output), "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in the right order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.links: list[str] = []
        self.ids: Counter[str] = Counter()
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value or "")
            if name == "id":
                self.ids[value or ""] += 1
            if name.startswith("on"):
                self.handlers.append(name)


def page_words(made: MadeRun) -> str:
    """Write the page; return what people read on it."""
    assert main(["report", str(made.output)]) == 0
    return Page(made.run.report.read_text()).text


@given(some.lists(FIGURES, min_size=1), some.floats(min_value=0.01, max_value=1.0))
def test_quantiles_are_accurate_to_one_percent(figures: list[float], share: float) -> None:
    histogram = Histogram()
    for figure in figures:
        histogram.add(figure)
    exact = sorted(figures)[max(1, math.ceil(share * len(figures))) - 1]
    assert histogram.quantile(share) == pytest.approx(exact, rel=0.0101)
    assert histogram.quantile(1.0) == max(figures)
    assert (histogram.lowest, histogram.count) == (min(figures), len(figures))
    assert histogram.mean == pytest.approx(math.fsum(figures) / len(figures))


@given(some.lists(FIGURES), some.lists(FIGURES), some.integers(1, 60))
def test_histograms_add_up(left: list[float], right: list[float], most: int) -> None:
    one, other, both = Histogram(), Histogram(), Histogram()
    for figures, parts in ((left, (one, both)), (right, (other, both))):
        for figure in figures:
            for part in parts:
                part.add(figure)
    one.merge(other)
    assert one._bins == both._bins
    assert (one.count, one.lowest, one.highest) == (both.count, both.lowest, both.highest)
    bars = list(one.bars(most))
    assert len(bars) <= most
    assert sum(count for _, _, count in bars) == len(left) + len(right)
    assert all(before[1] == pytest.approx(after[0]) for before, after in pairwise(bars))


MOMENTS = some.lists(some.floats(min_value=0, max_value=1e7), min_size=1, max_size=60)


def reference(moments: list[float], most: int) -> tuple[int, Counter[int]]:
    width = 1
    while len({int(moment) // width for moment in moments}) > most:
        width *= 2
    return width, Counter(int(moment) // width for moment in moments)


@given(MOMENTS, MOMENTS, some.integers(1, 12))
@settings(deadline=None)
def test_timelines_use_the_finest_step_that_fits(
    left: list[float], right: list[float], most: int
) -> None:
    one, other = Timeline(most=most), Timeline(most=most)
    for timeline, moments in ((one, left), (other, right)):
        for moment in moments:
            timeline.add(moment, False, 1, 2)
        spans = {at: span.results for at, span in timeline.spans.items()}
        assert (timeline.width, spans) == reference(moments, most)
    one.merge(other)
    spans = {at: span.results for at, span in one.spans.items()}
    assert (one.width, spans) == reference(left + right, most)
    assert (one.first, one.last) == (min(left + right), max(left + right))
    flow = throughput(one)
    assert sum(bar.results for bar in flow.bars) == len(left) + len(right)
    assert sum(bar.completion_tokens for bar in flow.bars) == 2 * (len(left) + len(right))


def test_pauses_have_no_bars() -> None:
    timeline = Timeline()
    for moment in (*range(100), *range(90_000, 90_100)):
        timeline.add(START + moment, False, 0, 1)
    flow = throughput(timeline)
    assert flow.pauses == ((START + 100, START + 90_000),)
    assert sum(bar.seconds for bar in flow.bars) == 200
    assert flow.requests_per_second == 1


def test_a_short_remainder_has_no_bar_of_its_own() -> None:
    timeline = Timeline()
    for moment in range(361):
        timeline.add(START + moment, False, 0, 1)
    flow = throughput(timeline)
    assert flow.width == 10
    assert [bar.seconds for bar in flow.bars[-2:]] == [10, 11]
    assert {bar.results / bar.seconds for bar in flow.bars} == {1}


@pytest.mark.parametrize(
    ("seconds", "per_second", "width"),
    [
        (8, 1, 1),
        (60, 1, 5),  # 12 bars of 5 results
        (60, 100, 1),
        (600, 100, 5),  # at most 120 bars
        (4000, 1, 60),  # longer than the timeline's one-second stretches
    ],
)
def test_bars_fit_the_length_and_the_results_of_a_run(
    seconds: int, per_second: int, width: int
) -> None:
    timeline = Timeline()
    for moment in range(seconds):
        for _ in range(per_second):
            timeline.add(START + moment, False, 0, 1)
    assert throughput(timeline).width == width


def test_a_histogram_of_few_figures_has_few_bars() -> None:
    histogram = Histogram()
    for figure in range(1, 9):
        histogram.add(figure)
    assert len(list(histogram.bars(40))) <= 4


def test_a_tally_counts_the_last_result_of_a_request() -> None:
    data = tally(
        lines(
            result(1, code="http_400"),
            result(2, code="timeout"),
            result(3),
            result(2, code="http_500"),
            result(1),
        )
    )
    assert (data.results, data.superseded, data.failed, data.completed) == (5, 2, 1, 2)
    assert {code: kind.count for code, kind in data.failures.items()} == {
        "http_400": 0,
        "timeout": 0,
        "http_500": 1,
    }


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (answer(prompt=7, completion=3), (7, 3)),
        (answer(text='he wrote "usage": {"prompt_tokens": 99}'), (10, 5)),
        (b'{"usage": null}', (0, 0)),
        (b'{"usage":{"prompt_tokens":4}}', (4, 0)),
        (b'{"usage":{"prompt_tokens":4,"completion_tokens":2},"role":"usage"}', (4, 2)),
        (b'{"usage":{"prompt_tokens_details":{"a":1},"completion_tokens":2}}', (0, 2)),
        (b"null", (0, 0)),
        (b'"usage"', (0, 0)),
    ],
)
def test_tokens_are_read_from_the_usage(body: bytes, tokens: tuple[int, int]) -> None:
    data = tally(lines(result(1, body=body)))
    assert (data.prompt_tokens, data.completion_tokens) == tokens


def test_tallies_of_shards_add_up() -> None:
    one = tally(lines(result(1, finish_reason_length=True), result(2, code="timeout")))
    whole = Tally()
    whole.merge(one)
    more = result(3, START + 60, attempts=2, truncated_prompt=True)
    filtered = result(4, START + 60, finish_reason_content_filter=True)
    whole.merge(tally(lines(more, filtered)))
    assert (whole.results, whole.failed, whole.cut, whole.truncated) == (4, 1, 1, 1)
    assert whole.filtered == 1
    assert whole.attempts == {1: 3, 2: 1}
    assert whole.latency.count == 3
    assert (whole.timeline.first, whole.timeline.last) == (START, START + 60)


def a_run(folder: Path, **options: Any) -> MadeRun:
    made = MadeRun(folder, shards=2, each=100, options=RunOptions(max_failures="5%", **options))
    engines = [{"index": 0, "devices": ["0"], "version": "0.9.3", "slots": 4, "gpu_bytes": 1}]
    totals = {"seconds": 100.0, "gpu_seconds": 100.0, "starts": 1, "prompt_tokens": 1,
              "completion_tokens": 1, "sealed_starts": 1, "results": 100}  # fmt: skip
    for shard in range(2):
        failed = 2 * shard
        made.status(
            shard,
            "completed",
            100 - failed,
            failed,
            engines=engines,
            totals=totals,
            started=utc_text(START - 5),
            sealed=True,
            version="0.1.0",
            model_digests={"llama3.2:3b": "c0ffee"},
            gpu_use=to_json(with_sample(with_sample(GpuUse(), 80, 1024, 2048), 90, 2048, 2048)),
        )
        numbers = range(shard * 100, shard * 100 + 100)
        write(
            made,
            shard,
            *(
                result(
                    number,
                    START + number,
                    seconds=2.0,
                    code="http_400" if number in (150, 151) else None,
                    message=NASTY,
                    custom_id=f"{NASTY}-{number}",
                )
                for number in numbers
            ),
        )
    made.whole("completed", 198, 2)
    return made


def test_the_report_of_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = report(a_run(tmp_path), capsys)
    assert data["form"] == 1
    assert data["condition"]["state"] == "finished with failures"
    assert data["what"]["models"] == [
        {"name": "llama3.2:3b", "results": 200, "digests": ["c0ffee"]}
    ]
    assert data["what"]["engines"] == {"Ollama 0.9.3": 2}
    assert data["what"]["gpus"] == {"NVIDIA A100-SXM4-40GB": 2}
    counts = data["counts"]
    assert (counts["total"], counts["completed"], counts["failed"], counts["left"]) == (
        200, 198, 2, 0,
    )  # fmt: skip
    assert data["tokens"] == {"prompt": 1980, "completion": 990, "per_answer": 5.0}
    assert data["throughput"]["requests_per_second"] == 1.0
    assert data["latency"]["quantiles"]["50"] == 2.0
    assert data["attempts"] == {"1": 200}
    (failure,) = data["failures"]
    assert (failure["code"], failure["count"], len(failure["examples"])) == ("http_400", 2, 2)
    assert "--" not in failure["code"]
    assert failure["remedy"]
    assert [shard["failed"] for shard in data["shards"]] == [0, 2]
    assert [engine["results"] for engine in data["engines"]] == [100, 100]
    use = data["use"]
    assert (use["slots"], use["slot_use"], use["in_flight"]) == (4, 0.5, 2.0)
    assert use["gpu_utilization"] == {"mean": 85.0, "highest": 90}
    assert use["gpu_memory"] == {"mean": 1536.0, "highest": 2048, "whole": 2048}
    assert use["gpu_hours"] == pytest.approx(200 / 3600, abs=1e-4)
    assert data["estimate"] == []
    for words in ("200 requests", "sha256:c0ffee", "198 requests were answered", "http_400: 2"):
        assert words in data["methods"]


def test_what_tune_tried_is_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"in_flight": 4, "requests": 48, "failed": 0, "seconds": 3.0,
               "requests_per_second": 2.0, "p50": 0.5}  # fmt: skip
    tried = [
        {"slots": 4, "concurrency": count, "tokens_per_second": speed, **figures}
        for count, speed in ((1, 77.0), (6, 88.0))
    ]
    tuning = {"model": "llama3.2:3b", "tried": tried, "slots": 4, "concurrency": 6}
    made = MadeRun(tmp_path)
    made.status(0, tunings=[tuning])
    write(made, 0, result(0, START))
    data = report(made, capsys)
    assert data["tunings"][0]["tuning"]["concurrency"] == 6
    page_words(made)
    page = made.run.report.read_text(encoding="utf-8")
    assert (
        "to keep it: --slots 4 --concurrency 6 instead of --tune, or in aiflux.yaml: run: {slots: 4"
        in page
    )
    first, chosen = (row for row in page.split("<tr>") if "<td>llama3.2:3b</td>" in row)
    assert "77" in first
    assert "chosen" not in first
    assert "88" in chosen
    assert "chosen" in chosen


def test_slot_use_is_at_most_100_percent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time of a result includes its wait in the engine, here of four requests for one slot."""
    made = MadeRun(tmp_path)
    engines = [{"index": 0, "slots": 1, "devices": []}, {"index": 1, "slots": 1, "devices": []}]
    made.status(0, engines=engines, totals={"seconds": 10.0, "starts": 1})
    busy = [result(n, START + 2.5 * (n // 4), seconds=10.0, engine=0) for n in range(4)]
    write(made, 0, *busy, result(4, START, seconds=5.0, engine=1))
    use = report(made, capsys)["use"]
    assert use["in_flight"] == 2.25
    assert use["slot_use"] == 0.75, "one engine full, one half full"


def test_estimated_and_actual_figures_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = a_run(tmp_path)
    one = Range(1, 1, 1)
    data = Estimate(
        plan=made.plan.id, where="slurm", created="", requests=200, pilot=10, pilot_failures=0,
        prompt_tokens=one, completion_tokens=one, in_flight=4, work_seconds=Range(180, 170, 190),
        fixed_seconds=one, uneven=1.0, gpus=1, failures=Range(2, 0, 4),
    )  # fmt: skip
    made.run.estimate.write_text(json.dumps(data.to_json()))
    rows = {row["name"]: row for row in report(made, capsys)["estimate"]}
    assert rows["failed requests"]["actual"] == 2
    assert rows["time of all jobs"]["actual"] == 200
    assert main(["report", str(made.output)]) == 0
    page = made.run.report.read_text()
    assert "Estimate and actual" in page
    assert "outside" in Page(page).text


@pytest.mark.parametrize("state", ["in_progress", "cancelled", "failed"])
def test_unfinished_runs_have_a_report(
    state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path, shards=2)
    made.status(0, state, 2, 1, ended="the job's time is nearly over")
    write(made, 0, result(1), result(2, START + 86400.0), result(3, START + 86401, code="timeout"))
    data = report(made, capsys)
    running = state == "in_progress"
    assert data["condition"]["finished"] is False
    assert data["condition"]["ended"] is (not running)
    assert data["counts"]["left"] == 197
    words = page_words(made)
    assert ("The run is active" in words) is running
    assert ("aiflux resume" in words) is (not running)
    assert data["condition"]["state"] in capsys.readouterr().out


def test_a_run_with_an_unsealed_start_is_not_called_sealed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = a_run(tmp_path)
    data = report(made, capsys)
    assert (data["what"]["sealed"], data["what"]["unsealed"]) == (True, "")
    assert "without network access" in data["methods"]
    totals = {"starts": 2, "sealed_starts": 1, "unsealed_starts": 1, "unsealed": "--no-seal"}
    made.status(1, "completed", 98, 2, sealed=True, totals={**totals, "results": 100})
    data = report(made, capsys)
    assert data["what"]["sealed"] is False
    assert data["what"]["unsealed"] == "1 of 2 starts had a network (--no-seal)"
    assert "without network access" not in data["methods"]
    assert main(["report", str(made.output)]) == 0
    assert "no: 1 of 2 starts had a network (--no-seal)" in made.run.report.read_text()
    capsys.readouterr()
    sealed_again = {"starts": 1, "sealed_starts": 1, "results": 99}  # one result of another plan
    made.status(1, "completed", 98, 2, sealed=True, totals=sealed_again)
    data = report(made, capsys)
    assert data["what"]["sealed"] is None
    assert "without network access" not in data["methods"]


def test_settings_of_earlier_starts_have_no_secrets(tmp_path: Path) -> None:
    plan = MadeRun(tmp_path).plan
    identity = {"models": ["m"], "command": ["serve", "--api-key", "s3cret"],
                "engine_env": {"HF_TOKEN": "s3cret"}}  # fmt: skip
    earlier = EarlierPlan("a", "b", identity, {}, "http://ann:s3cret@host:1/v1")
    (found,) = earlier_settings(replace(plan, earlier=(earlier,)))
    assert "s3cret" not in json.dumps(found)
    assert found["identity"]["command"].startswith("serve --api-key (not")


@pytest.mark.parametrize(
    ("damage", "warning"),
    [
        (lambda path: path.unlink(), "100 results that the run counted are not in the journals"),
        (lambda path: path.write_bytes(b""), "100 results that the run counted are not"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "1 result that the run counted is"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x\n"),
         "the journals have 1 damaged line that cannot count"),
    ],
)  # fmt: skip
def test_a_journal_that_lacks_results_is_reported(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    warning: str,
) -> None:
    made = a_run(tmp_path)
    assert report(made, capsys)["warnings"] == []
    damage(made.run.journal(0))
    data = report(made, capsys)
    assert warning in data["warnings"][0]
    assert f"Warning: {warning}" in data["methods"]
    assert main(["report", str(made.output)]) == 0
    assert f"warning: {warning}" in capsys.readouterr().err
    assert f"<strong>Warning:</strong> {warning}" in made.run.report.read_text()


def test_a_run_that_failed_to_start_shows_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path)
    made.status(0, "failed", exit_code=4, ended="")
    data = report(made, capsys)
    assert data["shards"][0]["ended"]
    assert "were to be processed with" in data["methods"]
    words = page_words(made)
    assert f"shard 0: {data['shards'][0]['ended']}" in words
    assert "none has started yet" in words


def test_a_run_without_any_result_has_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path)
    assert report(made, capsys)["latency"]["count"] == 0
    assert "No result was recorded yet" in page_words(made)


def test_the_page_loads_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = a_run(tmp_path)
    assert main(["report", str(made.output)]) == 0
    text = made.run.report.read_text(encoding="utf-8")
    page = Page(text)
    assert page.seen["svg"] == 4, "two plots, each in two widths"
    assert page.seen["script"] == page.seen["link"] == page.seen["img"] == page.seen["iframe"] == 0
    assert page.handlers == []
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert max(page.ids.values()) == 1
    assert all(target[0] == "#" for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert 'http-equiv="Content-Security-Policy"' in text
    assert "#a0000" not in text, "a colour that no style sheet gives"
    assert "<text" in text, "text in plots stays text"
    assert made.run.report.stat().st_mode & 0o777 == 0o600


def test_markup_in_requests_and_answers_is_escaped(tmp_path: Path) -> None:
    made = a_run(tmp_path, engine_env={"OLLAMA_NOTE": NASTY, "MY_API_KEY": "hunter2"})
    assert main(["report", str(made.output)]) == 0
    text = made.run.report.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "alert('1')" not in text
    assert "alert('1')" in Page(text).text
    assert "hunter2" not in text
    assert "MY_API_KEY=(not shown)" in Page(text).text


def test_an_address_is_shown_without_its_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path, options=RunOptions(engine_url="http://me:hunter2@gpu:8000/x"))
    made.status(0, "completed", 100, engines=[{"index": 0, "url": "http://me:hunter2@gpu:8000/x"}])
    made.whole("completed", 100)
    data = report(made, capsys)
    assert "hunter2" not in json.dumps(data)
    assert data["what"]["engines"] == {"server at http://gpu:8000/x": 1}
    assert data["engines"][0]["where"] == "http://gpu:8000/x"


def test_without_matplotlib_tables_replace_the_plots(tmp_path: Path) -> None:
    made = a_run(tmp_path)
    page = tmp_path / "page.html"
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "matplotlib.py").write_text("raise ImportError('not here')\n")
    code = "import sys; from aiflux.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(made.output), "--output", str(page)],
        env={**os.environ, "PYTHONPATH": str(blocked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "matplotlib>=3.8" in done.stdout
    data = Page(page.read_text())
    assert data.seen["svg"] == 0
    assert "matplotlib>=3.8" in data.text
    assert "from (UTC)" in data.text


@pytest.mark.parametrize("name", ["folder", "nowhere/page.html"])
def test_a_page_that_cannot_be_written_is_a_clear_error(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    assert main(["report", str(made.output), "--output", str(tmp_path / name)]) == 2
    assert "-> " in capsys.readouterr().err


def test_json_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = a_run(tmp_path)
    target = tmp_path / "report.json"
    assert main(["report", str(made.output), "--json", "--output", str(target)]) == 0
    assert "report.json" in capsys.readouterr().out
    data = json.loads(target.read_text())
    assert data["methods"]
    assert not made.run.report.exists()


def test_the_page_goes_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = a_run(tmp_path)
    assert main(["report", str(made.output), "--output", "-"]) == 0
    assert "Methods" in Page(capsys.readouterr().out).text
    assert not Path("-").exists()


def told_methods(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> str:
    return str(report(made, capsys)["methods"])


def test_one_request_is_written_in_the_singular(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path, each=1)
    made.status(0, "completed", 1)
    made.whole("completed", 1)
    write(made, 0, result(1, attempts=2))
    methods = told_methods(made, capsys)
    for words in (
        "1 request (", ") was processed with", "1 request was answered", "1 result took more",
    ):  # fmt: skip
        assert words in methods
    words = page_words(made)
    assert "of 1 request answered" in words
    assert "1 requests" not in words
    assert "1 results" not in words


def test_the_methods_name_the_source_of_default_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = {"llama3.2:3b": {"temperature": 0.6, "top_p": 0.9}}
    made = MadeRun(
        tmp_path,
        options=RunOptions(temperature=0.0, stop=('<end of "it">', "x"), model_defaults=defaults),
    )
    methods = told_methods(made, capsys)
    assert 'temperature = 0.0 and stop = "<end of \\"it\\">" or "x".' in methods
    assert "the default values for the model (top-p = 0.9)" in methods
    assert "temperature = 0.6" not in methods
    words = page_words(made)
    assert "Model defaults" in words
    assert "llama3.2:3b: top_p=0.9" in words
    assert "temperature=0.6" not in words


def test_the_methods_of_embeddings_name_no_sampling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path, each=2)
    made.plan.input.endpoints.clear()
    made.plan.input.endpoints["/v1/embeddings"] = 2
    write_plan(made.plan, made.run)
    write(made, 0, result(1, body=b'{"usage": {"prompt_tokens": 7}}'))
    methods = told_methods(made, capsys)
    assert "ampling" not in methods
    assert "Prompts came to 7 tokens" in methods
    assert "/v1/embeddings" in page_words(made)


def test_uncounted_tokens_are_unknown_not_zero(tmp_path: Path) -> None:
    made = MadeRun(tmp_path, each=1)
    made.status(0, "completed", 1)
    made.whole("completed", 1)
    write(made, 0, result(1, body=b'{"choices": []}'))
    words = page_words(made)
    assert "unknowntokens: the engine does not count them" in words
    assert "0prompt tokens" not in words


def test_secrets_in_slurm_options_are_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path)
    made.submit()
    jobs = json.loads(made.run.submissions.read_text())
    lines = ["export HF_TOKEN=hunter2", "module load x; MY_PASSWORD='hunter2 or 3' y"]
    jobs["slurm"] = {"setup": lines, "sbatch_arg": {"export": "A=1,API_KEY=hunter2,B=2"}}
    made.run.submissions.write_text(json.dumps(jobs))
    data = report(made, capsys)["what"]["slurm"]
    assert "hunter2" not in json.dumps(data)
    assert data["setup"][1] == "module load x; MY_PASSWORD=(not shown) y"
    assert data["sbatch_arg"]["export"] == "A=1,API_KEY=(not shown),B=2"


def test_a_run_of_failures_has_a_plot_but_no_latency(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = MadeRun(tmp_path, each=2)
    made.status(0, "completed", 0, 2)
    made.whole("completed", 0, 2)
    long = "x" * 5000
    write(made, 0, *(result(n, code="http_408", custom_id=f"{long}{n}") for n in range(2)))
    assert main(["report", str(made.output)]) == 0
    text = made.run.report.read_text()
    page = Page(text)
    assert page.seen["svg"] == 2, "the throughput, in two widths"
    assert "no answer" in page.text
    assert "0 ms" not in page.text
    assert "<pattern" in text, "failures differ by more than their colour"
    assert "... (5,001 characters)" in page.text
    assert "timed out repeatedly" in page.text


def test_the_page_says_why_two_rates_differ(tmp_path: Path) -> None:
    made = a_run(tmp_path)
    assert main(["report", str(made.output)]) == 0
    text = Page(made.run.report.read_text()).text
    assert "averages over the whole time of the jobs, in which the model is loaded, too" in text


def test_tables_have_captions_and_headings(tmp_path: Path) -> None:
    made = a_run(tmp_path)
    assert main(["report", str(made.output)]) == 0
    text = made.run.report.read_text()
    assert text.count('class="scroll"') == text.count('tabindex="0"') == text.count("<table")
    assert re.search(r"<th[^>]*></th>", text) is None
    assert "<details><summary>" in text


@given(some.floats(1e-3, 1e5), some.floats(1.02, 1e4), some.integers(4, 8))
def test_a_logarithmic_axis_always_has_marks(lowest: float, times: float, most: int) -> None:
    plots = pytest.importorskip("aiflux.report.plots")
    highest = lowest * times
    places = plots.round_places(lowest, highest, most)
    assert 2 <= len(places) <= most
    assert all(lowest <= place <= highest for place in places)
    assert len({f"{place:.4g}" for place in places}) == len(places)


@given(MOMENTS)
@settings(deadline=None)
def test_time_axes_have_marks_at_round_times(moments: list[float]) -> None:
    plots = pytest.importorskip("aiflux.report.plots")
    timeline = Timeline()
    for moment in moments:
        timeline.add(moment, False, 0, 0)
    flow = throughput(timeline)
    edges = plots._edges(flow.bars)
    marks = plots.time_marks(flow.bars, edges, 7)
    assert 1 <= len(marks) <= 9
    assert all(edges[0] <= place <= edges[-1] for place, _ in marks)
    for place, moment in marks:
        at = max(n for n, edge in enumerate(edges[:-1]) if edge <= place)
        assert moment == flow.bars[at].start + place - edges[at]


SMI = """\
case "$*" in
-L) printf "GPU %s: H (UUID: GPU-%s)\\n" 0 a 1 b ;;
*--query-gpu=index,*) printf "%s\\n" "0, 40, 1000, 100, 900" "1, 60, 1000, 300, 700" ;;
esac
"""


def test_gpus_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeCommands(tmp_path)
    fakes.add("nvidia-smi", SMI)
    monkeypatch.setenv("PATH", fakes.path)
    data: list[GpuUse] = []
    before = with_sample(GpuUse(), 100, 500, 1000)
    with GpuWatch(("0", "1"), before, data.append, interval=0.01):
        until(lambda: len(data) >= 2, 20)
    assert data[0] == GpuUse(
        samples=3,
        utilization_mean=66.67,
        utilization_max=100,
        memory_mib_mean=300.0,
        memory_mib_max=500,
        memory_mib_total=1000,
    )
    assert data[1].samples == 5
    assert "--id=0,1" in fakes.calls("nvidia-smi")[1].argv


@pytest.mark.parametrize("printed", ["0, 1, [N/A], 100, 1000", "", "No devices were found"])
def test_gpus_that_cannot_be_sampled_have_no_figures(
    printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeCommands(tmp_path)
    fakes.add("nvidia-smi", f'[[ $1 != -L ]] || echo "GPU 0: H (UUID: GPU-a)"; echo "{printed}"')
    monkeypatch.setenv("PATH", fakes.path)
    data: list[GpuUse] = []
    with GpuWatch(("0",), GpuUse(), data.append, interval=0.01):
        until(lambda: all(thread.name != "gpu-use" for thread in threading.enumerate()), 20)
    assert data == []


def test_a_slice_of_a_gpu_has_figures_of_memory_but_none_of_utilisation() -> None:
    use = with_sample(with_sample(GpuUse(), None, 100, 1000), None, 300, 1000)
    assert use == GpuUse(2, None, None, 200, 300, 1000)
    assert with_sample(use, 50, 100, 1000).utilization_mean is None
    assert rounded(use) == use


def test_samples_of_earlier_starts_are_read_back(tmp_path: Path) -> None:
    made = MadeRun(tmp_path)
    use = with_sample(GpuUse(), 50, 10, 20)
    made.status(gpu_use=to_json(use))
    status = read_status(made.run, 0, made.plan)
    assert status is not None
    assert status.details.gpu_use == use
    made.status(gpu_use=to_json(use), plan="another")
    assert read_status(made.run, 0, made.plan) is None


ENERGY = {"joules": 7.2e6, "counted_gpu_seconds": 36.0, "sampled_gpu_seconds": 0.0}


def energetic(folder: Path, monkeypatch: pytest.MonkeyPatch, sacct: str) -> MadeRun:
    """Return a finished run of one job whose GPU was measured for half of its time."""
    fakes = FakeCommands(folder / "bin")
    fakes.say("sacct", sacct)
    fakes.say("squeue")
    monkeypatch.setenv("PATH", fakes.path)
    monkeypatch.setenv("AIFLUX_CO2_PER_KWH", "250")
    made = MadeRun(folder)
    made.submit("100")
    totals = {"gpu_seconds": 72.0, "starts": 1}
    made.status(0, "completed", completed=100, energy=ENERGY, totals=totals)
    made.whole("completed", 100)
    return made


def test_the_report_has_the_energy_and_its_co2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = energetic(tmp_path, monkeypatch, "100|0\n100.batch|10800000\n")
    content = report(made, capsys)["energy"]
    assert content == {
        "gpu_kwh": 2.0,
        "method": "counter",
        "measured_share": 0.5,
        "slurm_kwh": 3.0,
        "slurm_jobs_kept": 1,
        "slurm_jobs": 1,
        "source": "gpus",
        "joules_per_1000_answers": 7.2e7,
        "co2_grams": 500.0,
        "co2_per_kwh": 250.0,
        "billing_units": None,
        "billing_per_gpu_hour": None,
    }
    assert main(["status", str(made.output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["energy"] == content
    words = page_words(made)
    assert "2 kWh (measured by the driver's counter, in 50 % of the GPU-hours)" in words
    assert "3 kWh (whole nodes; kept for 1 of 1 job)" in words
    assert "500 g (the GPUs' energy, 250 g/kWh)" in words
    assert "Billing" not in words


def test_the_rates_can_be_given_to_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = energetic(tmp_path, monkeypatch, "100|0\n100.batch|0\n")
    given = ["--co2-per-kwh", "100", "--billing-per-gpu-hour", "50"]
    assert main(["report", str(made.output), "--json", *given]) == 0
    energy = json.loads(capsys.readouterr().out)["energy"]
    assert (energy["co2_grams"], energy["billing_units"], energy["slurm_kwh"]) == (200, 1, None)


def test_a_run_without_measured_energy_has_no_section_for_it(tmp_path: Path) -> None:
    made = MadeRun(tmp_path)
    made.status(0, "completed", completed=100)
    made.whole("completed", 100)
    assert "Energy" not in page_words(made)


def test_slurm_is_not_asked_for_the_energy_of_an_active_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeCommands(tmp_path / "bin")
    fakes.say("sacct", "100|RUNNING|0:0|Unknown|00:01:00|n1\n")
    fakes.say("squeue", "100|N/A|RUNNING|N/A|0:10|n1|None\n")
    monkeypatch.setenv("PATH", fakes.path)
    made = MadeRun(tmp_path)
    made.submit("100")
    made.status(0, completed=10, energy=ENERGY)
    assert main(["status", str(made.output), "--json"]) == 0
    energy = json.loads(capsys.readouterr().out)["energy"]
    assert (energy["gpu_kwh"], energy["slurm_jobs"]) == (2.0, 0)
    assert report(made, capsys)["energy"] == energy
    assert not any("-D" in call.argv for call in fakes.calls("sacct"))
