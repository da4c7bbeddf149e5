"""Compare estimates with the runs that follow them: is the actual figure in the interval?

Each workload is estimated by ``aiflux estimate`` and then run, both as Slurm jobs with the
simulated engine as ``--engine-command``. The workloads differ in length, spread and order of their
answers, in slots, and in whether prompts are longer where answers are.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.children import ROOT, tool_output
from bench.decoding import LONGEST
from bench.row import Row, say
from bench.workload import request_line

_AT_ONCE = 3
_LIMIT = 900.0
_WANTED = 0.9
_SHOWN = ("answer tokens", "time of all jobs", "start to output")
_AIFLUX = [sys.executable, "-m", "aiflux.cli"]


@dataclass(frozen=True)
class Workload:
    """Requests whose answers have a lognormal length, and an engine for them.

    Attributes:
        mean: tokens of the median answer.
        spread: standard deviation of the length's logarithm.
        order: ``mixed``, ``sorted`` or ``late``: the last quarter is three times as long.
        longer: prompts are longer where answers are.
    """

    seed: int
    requests: int
    slots: int
    mean: float
    spread: float
    order: str
    longer: bool

    @classmethod
    def of(cls, seed: int) -> Workload:
        """Return one of an endless variety."""
        source = random.Random(seed)
        return cls(
            seed,
            source.randrange(500, 2000),
            source.choice((4, 8, 16, 32, 64)),
            source.uniform(10, 40),
            source.uniform(0.1, 1.1),
            source.choice(("mixed", "mixed", "mixed", "sorted", "late")),
            source.random() < 0.5,
        )

    def lines(self) -> Iterator[bytes]:
        """Yield the input."""
        source = random.Random(self.seed)
        lengths = [source.lognormvariate(0, self.spread) * self.mean for _ in range(self.requests)]
        if self.order == "sorted":
            lengths.sort()
        for number, length in enumerate(lengths):
            late = self.order == "late" and number >= 0.75 * self.requests
            tokens = min(10 * LONGEST, max(1, int(3 * length if late else length)))
            words = tokens if self.longer else source.randrange(1, 200)
            yield request_line(number, tokens, "word " * words)

    def command(self) -> str:
        """Return the engine's command line."""
        server = (sys.executable, "-m", "bench.engine", "--slots", str(self.slots))
        return f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.join(server)} --port {{port}}"


@dataclass(frozen=True)
class Compared:
    """One figure of one workload: its interval, and what it was."""

    name: str
    estimated: float
    low: float
    high: float
    actual: float

    @property
    def held(self) -> bool:
        """Whether the actual figure is in the interval."""
        return self.low <= self.actual <= self.high


def measure(folder: Path, count: int) -> list[Row]:
    """Estimate and run ``count`` workloads.

    Raises:
        RuntimeError: there is no Slurm here, or a run failed.
    """
    if shutil.which("sbatch") is None:
        raise RuntimeError("there is no sbatch here: this is measured on a cluster")
    found: dict[str, list[Compared]] = defaultdict(list)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, figures in enumerate(pool.map(lambda seed: _one(folder, seed), range(count)), 1):
            say(f"estimates: {done} of {count}")
            for each in figures:
                found[each.name].append(each)
                if not each.held:
                    say(f"{Workload.of(done - 1)}: {each}")
    return [_row(name, found[name]) for name in _SHOWN]


def _one(folder: Path, seed: int) -> list[Compared]:
    workload = Workload.of(seed)
    place = folder / str(seed)
    place.mkdir()
    with open(place / "in.jsonl", "wb") as file:
        file.writelines(workload.lines())
    paths = [str(place / "in.jsonl"), "--output", str(place / "out.json")]
    options = ["--engine-command", workload.command(), "--concurrency", str(workload.slots + 2)]
    slurm = ["--gpus-per-node", "0", "--mem", "512M", "--cpus-per-task", "1", "--time", "30:00"]
    tool_output([*_AIFLUX, "estimate", *paths, *options, *slurm, "--wait"], limit=_LIMIT)
    tool_output([*_AIFLUX, "run", *paths, *options, *slurm], limit=_LIMIT)
    tool_output([*_AIFLUX, "watch", str(place / "out.json")], limit=_LIMIT)
    text, _ = tool_output([*_AIFLUX, "status", "--json", str(place / "out.json")])
    return [
        Compared(each["name"], *(each["estimated"][at] for at in ("value", "low", "high")),
                 each["actual"])
        for each in json.loads(text)["estimate"]
        if each["name"] in _SHOWN
    ]  # fmt: skip


def _row(name: str, figures: list[Compared]) -> Row:
    held = sum(each.held for each in figures)
    off = sorted(abs(each.estimated / each.actual - 1) for each in figures)
    width = sorted((each.high - each.low) / 2 / each.estimated for each in figures)
    middle = len(figures) // 2
    return Row(
        f"estimate of 100 requests, then the run: {name}",
        f"in the interval: {held} of {len(figures)}; "
        f"median error {off[middle]:.1%}, interval +-{width[middle]:.1%}",
        f">= {_WANTED:.0%}",
        held >= _WANTED * len(figures),
    )
