"""The measurements. Each returns rows of the table."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import estimates, real_engines, tables
from bench.children import ROOT, Usage, engine, run, worker
from bench.decoding import Cost, Decoder, floor, mixed_lengths
from bench.gpu.measuring import CLIENTS
from bench.peers import Llmflux, plain_loop
from bench.row import Row, say
from bench.workload import write_input

COST = Cost()
_MB = 1_000_000
_MEAN_LENGTH = 43
_CLIMB = 15
_SHARE = 0.97
_ENGINES, _EACH = 8, 8


@dataclass
class Bench:
    """Shared state of the measurements.

    Attributes:
        quick: take seconds rather than minutes, with less precise figures.
        folder: directory for inputs and outputs.
    """

    quick: bool
    folder: Path
    _peer: Llmflux | None = field(default=None)

    @property
    def peer(self) -> Llmflux:
        """llmflux, installed on first use."""
        if self._peer is None:
            self._peer = Llmflux()
        return self._peer

    def scratch(self) -> Path:
        """Return a new directory."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def input(self, lengths: Sequence[int], size: int = 1024) -> Path:
        """Write an input and return its path."""
        path = self.scratch() / "in.jsonl"
        write_input(path, lengths, size)
        return path


Runner = Callable[[str, Path, Path], Usage]


def occupancy(bench: Bench) -> list[Row]:
    """Measure slot use, relative to the possible maximum."""
    rows = []
    for slots in (32, 64, 256):
        say(f"occupancy at {slots} slots")
        seconds, alone = (5, 3) if bench.quick else (20, 5)
        count = int(seconds * slots / (_MEAN_LENGTH * COST.step(slots)))
        fixed = str(slots + max(2, slots // 4))
        lengths = mixed_lengths(count)
        few = mixed_lengths(max(8, int(alone / (_MEAN_LENGTH * COST.step(1)))))
        plain = _serial(bench, slots, few, plain_loop)
        peer = bench.peer.problem or _serial(bench, slots, few, bench.peer.run)
        for name, options in (
            (f"--concurrency {fixed}", ("--concurrency", fixed)),
            ("adaptive", ()),
        ):
            figure, share = _occupancy_of(
                bench, slots, lengths, lambda *paths, given=options: worker(*paths, *given)
            )
            strict = bool(options)
            rows.append(
                Row(
                    f"slots used, {slots} slots, {name}",
                    figure,
                    ">= 98 % of possible" if strict else "",
                    share >= 0.98 if strict else None,
                    plain,
                    peer,
                )
            )
    return rows


def _occupancy_of(
    bench: Bench, slots: int, lengths: Sequence[int], runner: Runner
) -> tuple[str, float]:
    """Return the figure as text, and the share of the possible occupancy."""
    stats, best = _simulated(bench, slots, lengths, runner)
    share = stats["occupancy"] / best.occupancy
    return (
        f"{stats['occupancy']:.1%} of {best.occupancy:.1%} = {share:.1%} "
        f"({stats['makespan']:.1f} s, floor {best.makespan:.1f} s)",
        share,
    )


def _serial(bench: Bench, slots: int, lengths: Sequence[int], runner: Runner) -> str:
    """Return a peer's figure over its full time, as its few requests cannot fill the slots."""
    stats, best = _simulated(bench, slots, lengths, runner)
    return f"{stats['occupancy']:.1%} ({stats['makespan'] / best.makespan:.1f} x the floor)"


def _simulated(
    bench: Bench, slots: int, lengths: Sequence[int], runner: Runner
) -> tuple[dict[str, Any], Decoder]:
    """Return the engine's statistics of a run, and those of the best possible run."""
    source = bench.input(lengths, 400)
    with engine(slots, COST) as running:
        runner(running.url, source, source.with_name("out.json"))
        return running.stats(), floor(lengths, slots, COST)


def adaptive(bench: Bench) -> list[Row]:
    """Measure slot use without ``--concurrency`` under changing load, after the climb."""
    phase = 20 if bench.quick else 45
    rows = []
    for slots in (32, 64, 256, 1024):
        each = COST.step(slots) * _MEAN_LENGTH / slots
        count = int(phase / each)
        short, long = mixed_lengths(count), [10 * n for n in mixed_lengths(count // 10)]
        half = (slots // 2, float(phase), 2.0 * phase)
        for name, lengths, others in (
            ("lengths x 10 and back", [*short, *long, *short], (0, 0.0, 0.0)),
            ("another user comes and goes", [*short, *short, *short], half),
        ):
            say(f"adaptive at {slots} slots: {name}")
            share = _used(bench, slots, lengths, others)
            title = f"slots used after {_CLIMB} s, {slots} slots, adaptive, {name}"
            rows.append(Row(title, f"{share:.1%}", ">= 97 %", share >= 0.97))
    return rows


def _used(
    bench: Bench, slots: int, lengths: Sequence[int], others: tuple[int, float, float]
) -> float:
    """Return the share of slots in use (by anyone) between the climb and the last arrival."""
    source = bench.input(lengths, 400)
    with engine(slots, COST, others) as running:
        worker(running.url, source, source.with_name("out.json"))
        stats = running.stats()
    busy = stats["busy_by_second"][_CLIMB : int(stats["arriving"])]
    return float(sum(busy)) / (slots * len(busy))


def ceiling(bench: Bench) -> list[Row]:
    """Measure requests per second and CPU time per request with an instant server."""
    count, repeats, few = (4000, 1, 500) if bench.quick else (15000, 3, 1000)
    rows = []
    plain = _rate_of(bench, few, plain_loop)
    peer = None if bench.peer.problem else _rate_of(bench, few, bench.peer.run)
    say("ceiling: the worker")
    for concurrency in (16, 64, 256):
        runs = [
            _rate_of(
                bench,
                count,
                lambda *paths, n=concurrency: worker(*paths, "--concurrency", str(n)),
            )
            for _ in range(repeats)
        ]
        rate = statistics.median(figure[0] for figure in runs)
        cpu = statistics.median(figure[1] for figure in runs)
        rows.append(
            Row(
                f"requests/s, zero latency, {concurrency} in flight",
                f"{rate:,.0f}",
                ">= 3,500",
                rate >= 3500,
                f"{plain[0]:,.0f}",
                bench.peer.problem if peer is None else f"{peer[0]:,.0f}",
            )
        )
        rows.append(
            Row(
                f"CPU per request, all in, {concurrency} in flight",
                f"{cpu * 1000:.2f} ms",
                "<= 0.3 ms",
                cpu <= 0.0003,
                f"{plain[1] * 1000:.2f} ms",
                bench.peer.problem if peer is None else f"{peer[1] * 1000:.2f} ms",
            )
        )
    say(f"ceiling: {_ENGINES} engines")
    rate = statistics.median(_rate_of_engines(bench, 4 * count) for _ in range(repeats))
    title = f"requests/s, zero latency, {_ENGINES} engines, {_EACH} in flight in each"
    return [*rows, Row(title, f"{rate:,.0f}", ">= 8,000", rate >= 8000)]


def _rate_of_engines(bench: Bench, count: int) -> float:
    """Return requests/s by several engines of one job, from when all of them have answered."""
    source = bench.input([200] * count)
    output = source.with_name("out.json")
    server = shlex.join([sys.executable, "-m", "bench.engine"])
    run(
        [sys.executable, "-m", "aiflux.worker", str(source), str(output),
         "--engine-command", f"{server} --port {{port}}", "--concurrency", str(_EACH)],
        limit=600,
        environ={
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(_ENGINES))),
            "AIFLUX_ALLOW_CPU": "1",
            "PYTHONPATH": str(ROOT),
        },
    )  # fmt: skip
    first: dict[int, float] = {}
    ends: list[float] = []
    for entry in json.loads(output.read_bytes()):
        metadata = entry["metadata"]
        ends.append(datetime.fromisoformat(metadata["timestamp"]).timestamp())
        first[metadata["engine"]] = min(ends[-1], first.get(metadata["engine"], ends[-1]))
    if len(first) < _ENGINES:
        raise RuntimeError(f"only {len(first)} of {_ENGINES} engines answered")
    begin, end = max(first.values()), max(ends)
    return sum(moment > begin for moment in ends) / (end - begin)


def _rate_of(bench: Bench, count: int, runner: Runner) -> tuple[float, float, int]:
    """Return requests/s according to the server, CPU seconds per request, and peak memory."""
    source = bench.input([200] * count)
    with engine() as running:
        usage = runner(running.url, source, source.with_name("out.json"))
        stats = running.stats()
    return stats["done"] / stats["makespan"], usage.cpu / count, usage.rss


def memory(bench: Bench) -> list[Row]:
    """Measure peak memory of a complete run over a large input, including its output."""
    count, few = (50_000, 500) if bench.quick else (1_000_000, 5000)
    say(f"memory: {count:,} requests")
    rows = []
    plain = _rate_of(bench, few, plain_loop)[2]
    peer = None if bench.peer.problem else _rate_of(bench, few, bench.peer.run)[2]
    source = bench.input([200] * count)
    with engine() as running:
        usage = worker(
            running.url, source, source.with_name("out.json"), "--concurrency", "256", limit=3000.0
        )
        stats = running.stats()
    rows.append(
        Row(
            f"peak memory, {count:,} requests of 1 KB, 256 in flight",
            f"{usage.rss / _MB:.0f} MB ({usage.wall:.0f} s, {stats['done']:,} answered)",
            "<= 200 MB",
            usage.rss <= 200 * _MB and stats["done"] == count,
            f"{plain / _MB:.0f} MB after {few:,}",
            bench.peer.problem if peer is None else f"{peer / _MB:.0f} MB after {few:,}",
        )
    )
    return rows


def reading(bench: Bench) -> list[Row]:
    """Measure the passes over whole files, compared with plain reading of the same files."""
    count = 50_000 if bench.quick else 1_000_000
    say(f"reading: {count:,} requests: check, plan, resume scan, finalise")
    source = bench.input([200] * count)
    one, many = (source.with_name(name) for name in ("one.json", "many.json"))
    speed = _Speed(bench, 1 if bench.quick else 3)
    rows = [
        speed.row("input check, one process", [source], "check", source, "0"),
        speed.row("input check", [source], "check", source, "all"),
        _planning(bench, source, one, 1),
        _planning(bench, source, source.with_name("thousand.json"), 1000),
    ]
    _timed(bench, "plan", str(source), str(many), "100")
    for output in (one, many):
        _timed(bench, "fill", str(source), str(output))
    journals = {
        output: sorted(Path(f"{output}.aiflux/journal").iterdir()) for output in (one, many)
    }
    rows.append(speed.row("resume scan", journals[one], "scan", journals[one][0]))
    for name, output in (("finalise one journal", one), ("merge 100 journals", many)):
        read = [source, *journals[output]]
        rows.append(speed.row(f"{name}, input + journals read", read, "finalise", source, output))
    return rows


@dataclass(frozen=True)
class _Speed:
    """Measures passes over files that are in the page cache, to exclude the disk."""

    bench: Bench
    repeats: int

    def row(self, name: str, read: Sequence[Path], *arguments: str | Path) -> Row:
        """Return a row: medians of the pass, and of plain reading of the same files."""
        size = sum(path.stat().st_size for path in read)
        plain = self._median(lambda: sum(_timed(self.bench, "plain", str(path)) for path in read))
        words = [str(argument) for argument in arguments]
        usages: list[Usage] = []
        seconds = self._median(lambda: _timed(self.bench, *words, usages=usages))
        speed = size / seconds / _MB
        figure = (
            f"{speed:.0f} MB/s ({size / _MB:.0f} MB in {seconds:.2f} s, "
            f"{statistics.median(usage.cpu for usage in usages):.2f} s of CPU, "
            f"{max(usage.rss for usage in usages) / _MB:.0f} MB, "
            f"{seconds / plain:.0f} x plain reading)"
        )
        return Row(name, figure, ">= 100 MB/s", speed >= 100)

    def _median(self, measure: Callable[[], float]) -> float:
        return statistics.median(measure() for _ in range(self.repeats))


def _planning(bench: Bench, source: Path, output: Path, shards: int) -> Row:
    seconds = _timed(bench, "plan", str(source), str(output), str(shards))
    name = f"plan {shards:,} shard{'s'[: shards > 1]}, including the check"
    size = source.stat().st_size / _MB
    return Row(name, f"{seconds:.2f} s for {size:,.0f} MB", "< 5 s", seconds < 5)


def _timed(bench: Bench, *arguments: str, usages: list[Usage] | None = None) -> float:
    """Return the seconds of a pass; its resource usage is added to ``usages``."""
    path = bench.scratch() / "seconds"
    with open(path, "wb") as file:
        command = [sys.executable, "-m", "bench.reading", *arguments]
        usage = run(command, limit=600.0, output=file.fileno())
    if usages is not None:
        usages.append(usage)
    return float(path.read_text())


def start(bench: Bench) -> list[Row]:
    """Measure the time from the worker's process start to its first request."""
    say("start")
    repeats = 3 if bench.quick else 9
    ours = statistics.median(_first_request(bench, worker) for _ in range(repeats))
    plain = _first_request(bench, plain_loop)
    peer = bench.peer.problem or f"{_first_request(bench, bench.peer.run):.2f} s"
    row = Row(
        "process start to first request", f"{ours:.2f} s", "< 0.5 s", ours < 0.5, f"{plain:.2f} s"
    )
    return [Row(row.case, row.figure, row.wanted, row.good, row.plain, peer)]


def _first_request(bench: Bench, runner: Runner) -> float:
    source = bench.input([1] * 10)
    with engine() as running:
        usage = runner(running.url, source, source.with_name("out.json"))
        return float(running.stats()["first"]) - usage.began


def cli(bench: Bench) -> list[Row]:
    """Measure the time of ``aiflux --help``."""
    say("help")
    command = [str(Path(sys.executable).with_name("aiflux")), "--help"]
    usages = [run(command, limit=60.0) for _ in range(5 if bench.quick else 21)]
    seconds = statistics.median(usage.wall for usage in usages)
    return [Row("aiflux --help", f"{seconds * 1000:.0f} ms", "< 200 ms", seconds < 0.2)]


def llamacpp(bench: Bench) -> list[Row]:
    """Measure AI-Flux on a real llama-server."""
    say("llama-server")
    folder = bench.scratch()
    measured = _clients(bench, real_engines.llama_server(folder), folder)
    return _shares("llama-server", measured)


def vllm(bench: Bench) -> list[Row]:
    """Measure AI-Flux on a real vLLM, and ``vllm run-batch`` over as many requests."""
    say("vLLM")
    folder = bench.scratch()
    server = real_engines.vllm_server(folder)
    measured = _clients(bench, server, folder)
    count = measured.runs[CLIENTS[0]][0].requests
    say("vllm run-batch")
    batch = statistics.median(
        real_engines.run_batch(folder, count).wall for _ in range(1 if bench.quick else 3)
    )
    ours = measured.start + measured.wall(CLIENTS[1])
    rows = [
        *_shares("vLLM", measured),
        Row(
            f"vLLM, {count} requests, engine's start included",
            f"{ours:.0f} s, vllm run-batch {batch:.0f} s",
            "less",
            ours < batch,
        ),
    ]
    if bench.quick:
        return rows
    say("vLLM: memory")
    mine, peer = real_engines.memory_of_long_input(server, folder)
    title = f"peak memory, {real_engines.LONG_INPUT:,} requests, without the engine"
    figure = f"{mine / _MB:.0f} MB, vllm run-batch with its API server {peer / _MB:.0f} MB"
    return [*rows, Row(title, figure, "not more", mine <= peer)]


def _clients(bench: Bench, server: real_engines.Server, folder: Path) -> real_engines.Measured:
    rounds, count = (1, 128) if bench.quick else (5, 256)
    return real_engines.measure(server, bench.peer, folder, rounds, count, say)


def _shares(name: str, measured: real_engines.Measured) -> list[Row]:
    rows = []
    for client, how in zip(CLIENTS[1:], ("--concurrency", "adaptive"), strict=True):
        share, rate, bare = (
            measured.share(client), measured.rate(client), measured.rate(CLIENTS[0])
        )  # fmt: skip
        wanted = how != "adaptive"
        rows.append(
            Row(
                f"{name}, {real_engines.SLOTS} in flight, {how}: share of a bare aiohttp client",
                f"{share:.1%} ({rate:.0f} and {bare:.0f} tokens/s)",
                ">= 97 %" if wanted else "",
                share >= _SHARE if wanted else None,
                "",
                measured.llmflux,
            )
        )
    return rows


def converting(bench: Bench) -> list[Row]:
    """Measure the ways from a table or a folder to requests, and from results to a table."""
    return tables.measure(
        bench.scratch(), *((50_000, 1000) if bench.quick else (5_000_000, 50_000))
    )


def estimated(bench: Bench) -> list[Row]:
    """Measure how often the interval of an estimate has the figure of the run; needs a cluster."""
    return estimates.measure(bench.scratch(), 3 if bench.quick else 50)


CASES: dict[str, Callable[[Bench], list[Row]]] = {
    "occupancy": occupancy,
    "adaptive": adaptive,
    "ceiling": ceiling,
    "reading": reading,
    "converting": converting,
    "estimates": estimated,
    "start": start,
    "help": cli,
    "memory": memory,
    "llamacpp": llamacpp,
    "vllm": vllm,
}
