"""``aiflux benchmark``: measure engines and settings, and recommend the best."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from aiflux import __version__
from aiflux.cli.benchmarks import REQUESTS, Measuring, Sweep
from aiflux.cli.engine_list import given_engines, refuse_one_program
from aiflux.cli.json_output import json_option, print_json
from aiflux.cli.own_benchmark import compare_knees, refuse_own
from aiflux.cli.parser import (
    FILE,
    FOLDER,
    Choice,
    WholeNumber,
    command,
    option,
    settings_options,
)
from aiflux.cli.render.benchmark import benchmark_lines
from aiflux.cli.run_argument import make_console, show, text_width
from aiflux.cli.start import refuse_local_at_url, show_unused_settings
from aiflux.core.config.config import Config
from aiflux.core.config.declaration import parse_setting
from aiflux.core.config.settings import BY_NAME, given_settings
from aiflux.core.runs.directory import refuse_precious
from aiflux.engines.kinds import kind_named
from aiflux.errors import (
    AifluxError,
    ConfigError,
    StoppedError,
    StorageError,
    TooManyFailuresError,
    UsageError,
)
from aiflux.estimates.benchmark import Benchmark, Point, Workload, knees, recommended
from aiflux.estimates.pilot import FEWEST
from aiflux.estimates.workload import MIXES, Mix
from aiflux.report.benchmark_plot import benchmark_plot
from aiflux.slurm.config_template import run_settings
from aiflux.util.files import (
    absolute,
    atomic_write,
    expanded,
    may_write,
    refuse_existing,
    refuse_special,
    short,
    write_json,
)
from aiflux.util.records import to_json
from aiflux.util.text import public_url
from aiflux.util.times import utc_now

RECORD = "benchmark.json"
PLOT = "benchmark.svg"
_LISTS = ("concurrency", "slots", "context_length")


@command(
    "benchmark",
    examples=[
        "aiflux benchmark --model llama3.2:3b --local --write-config aiflux.yaml",
    ],
    exclusive=[("mix", "input")],
)
@option("--mix", type=Choice([*MIXES]), default="chat", metavar="NAME",
        help=f"Prompts: {', '.join(MIXES)}")  # fmt: skip
@option("-i", "--input", metavar="FILE", type=FILE, help="Your own requests instead, *.jsonl")
@option("--requests", type=WholeNumber(FEWEST), default=REQUESTS, metavar="K",
        help=f"Requests per point, or more (default: {REQUESTS})")  # fmt: skip
@option("--concurrency", metavar="N,...",
        help="Requests in flight (default: doubled, up to the best)")  # fmt: skip
@option("--slots", metavar="N,...", help="Sequences that an engine decodes in parallel")
@option("--context-length", metavar="N,...", help="Tokens of context for each slot")
@option("-o", "--output", metavar="DIR", type=FOLDER,
        help="Directory for the results (default: NAME.benchmark)")  # fmt: skip
@option("--write-config", metavar="FILE", type=FILE, help="Write the recommended settings")
@option("--against", is_flag=True, help="Run the engine's own tool at the best points, too")
@option("--local", is_flag=True, help="Measure on this machine, in the foreground")
@option("--wait", is_flag=True, help="Wait for the jobs")
@option("--again", is_flag=True, rare=True, help="Measure again what was measured")
@option("--force", is_flag=True, help="Overwrite the file of --write-config")
@option("--seed", type=WholeNumber(), default=1, metavar="N", rare=True,
        help="Other prompts of the same lengths (default: 1)")  # fmt: skip
@option("--no-preflight", is_flag=True, rare=True,
        help="Skip the checks of Slurm, image and disk space")  # fmt: skip
@json_option("Print everything as JSON")
@settings_options(
    "run", "slurm", "paths", repeatable=["engine"], without=(*_LISTS, "tune"),
    rare=["validate", "max_failures", "retry_failed", "max_tokens", "shards", "mem"],
)  # fmt: skip
def benchmark(output: str | None, write_config: str | None, **more: Any) -> int:
    """Measure throughput and time per request, and recommend settings.

    Runs prompts with several numbers of requests in flight, and several --engine KIND[=MODEL].
    """
    sweep = _sweep(output, more)
    target = None if write_config is None else _target(write_config, sweep, force=more["force"])
    first = Config(arguments=sweep.engines[0])
    refuse_local_at_url(first, local=sweep.local)
    show_unused_settings(kind_named(first.engine), sweep.engines[0])
    refuse_one_program(local=sweep.local and len(sweep.engines) > 1)
    if more["against"]:
        refuse_own(sweep)
    measuring = Measuring(sweep)
    _refuse_used(sweep.folder)
    measuring.begin(lambda: _begin_record(measuring))
    try:
        measuring.measure()
        if more["against"] and measuring.stopped is None:
            compare_knees(measuring)
    except KeyboardInterrupt as signal:
        measuring.stopped = StoppedError(f"stopped by {str(signal) or 'Ctrl-C'} before the end")
    return _finish(measuring, target)


def _sweep(output: str | None, more: dict[str, Any]) -> Sweep:
    """Return what the command line asks for.

    Raises:
        UsageError: a value is wrong.
    """
    source = None if more["input"] is None else Path(more["input"])
    name = more["mix"] if source is None else source.name
    lists = {name: _numbers(name, more[name]) for name in _LISTS}
    engines = given_engines("benchmark", given_settings({**more, **dict.fromkeys(_LISTS)}))
    return Sweep(
        absolute(output or f"{name}.benchmark"),
        [{name: value for name, value in each.items() if value is not None} for each in engines],
        MIXES[more["mix"]] if source is None else source,
        concurrency=lists["concurrency"],
        slots=lists["slots"] or (None,),
        contexts=lists["context_length"] or (None,),
        requests=more["requests"],
        seed=more["seed"],
        local=more["local"],
        wait=more["wait"],
        again=more["again"],
        preflight=not more["no_preflight"],
        as_json=more["as_json"],
    )


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    """Return the numbers in a list such as ``1,4,16``, each once.

    Raises:
        ConfigError: one is not a possible value of the setting.
    """
    if text is None:
        return None
    setting = BY_NAME[name]
    place = f"aiflux benchmark: {setting.option} {text}"
    return tuple(dict.fromkeys(parse_setting(setting, each, place) for each in text.split(",")))


def _target(name: str, sweep: Sweep, *, force: bool) -> Path:
    """Return the file of the recommended settings.

    Raises:
        UsageError: it exists, or cannot be a file.
    """
    target = expanded(name)
    refuse_special(target)
    if not target.parent.is_dir():
        raise UsageError(
            f"the directory of {target} does not exist", "create it, or choose another"
        )
    refuse_precious(target, *([sweep.prompts] if isinstance(sweep.prompts, Path) else []))
    if not force:
        refuse_existing(target)
    folder = Path(os.path.realpath(target)).parent
    if not may_write(folder):
        raise UsageError(
            f"{target} cannot be written: its directory {folder} is not writable",
            "choose another file: --write-config FILE",
        )
    return target


def _refuse_used(folder: Path) -> None:
    """Refuse a directory that has files of something else.

    Raises:
        UsageError: it has, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the output {folder} is not a directory", "choose another: --output DIR")
    known = folder.is_dir() and any(folder.iterdir())
    if known and not (folder / RECORD).is_file():
        raise UsageError(
            f"the directory {folder} exists and has no benchmark", "choose another: --output DIR"
        )


def _record(measuring: Measuring) -> Benchmark:
    sweep, points = measuring.sweep, measuring.points
    best = recommended(points)
    return Benchmark(
        version=__version__,
        created=utc_now(),
        where=public_url(measuring.where),
        workload=_workload(sweep),
        points=tuple(points),
        knees=tuple(point.name for point in knees(points)),
        recommended=None if best is None else best.name,
        settings={} if best is None else _settings(measuring, best),
        complete=bool(points) and not measuring.waiting and measuring.stopped is None,
    )


def _workload(sweep: Sweep) -> Workload:
    prompts, requests, seed = sweep.prompts, sweep.requests, sweep.seed
    if isinstance(prompts, Mix):
        return Workload(prompts.name, None, prompts.source, requests, seed)
    return Workload(None, str(prompts), None, requests, seed)


def _settings(measuring: Measuring, point: Point) -> dict[str, Any]:
    """Return the settings of a point, as in ``aiflux.yaml``: those that were given, and its own.

    Variables of the engine are left out, as they can contain secrets.
    """
    given = measuring.settings_of(point)
    options = Config(arguments=given).run_options(tune=False)
    own = not (options.engine_url or options.engine_command)
    found = {
        "engine_url": None if options.engine_url is None else public_url(options.engine_url),
        "engine_command": options.engine_command,
        "engine": options.engine if own else None,
        "model": options.model,
        "concurrency": point.concurrency,
        "slots": point.series.slots,
        "context_length": point.series.context_length,
    }
    more = [name for name in given if BY_NAME[name].section == "run" and name != "engine_env"]
    found |= {name: getattr(options, name) for name in more if name not in found}
    return {name: value for name, value in found.items() if value is not None}


def _begin_record(measuring: Measuring) -> None:
    """Write the record of a new benchmark, by which its directory is known."""
    if not (measuring.sweep.folder / RECORD).exists():
        _keep(measuring.sweep, _record(measuring))


def _keep(sweep: Sweep, found: Benchmark) -> None:
    write_json(sweep.folder / RECORD, to_json(found), 0o666)


def _finish(measuring: Measuring, target: Path | None) -> int:
    """Write and print what was measured; return the exit code.

    Raises:
        StoppedError: the sweep was stopped.
    """
    sweep, found = measuring.sweep, _record(measuring)
    measured = any(point.figures is not None for point in found.points)
    try:
        _keep(sweep, found)
        if measured:
            _write_plot(sweep.folder / PLOT, found)
    except StorageError as error:  # the figures are known, and are shown
        print(f"warning: {error}", file=sys.stderr)
    if sweep.as_json:
        print_json(to_json(found))
    elif found.points:
        console = make_console()
        show(console, benchmark_lines(found, text_width(console)))
    out = sys.stderr if sweep.as_json else sys.stdout
    if measured:
        print(f"\nresults: {short(sweep.folder)}", file=out)
    for line in measuring.waiting:
        print(line, file=out)
    if measuring.stopped is not None:
        measuring.stopped.remedy = "run the same command again to continue"
        raise measuring.stopped
    if measuring.waiting:
        print("  run the same command again for the figures; --wait waits for the jobs", file=out)
        return 0
    if target is not None and found.settings:
        with atomic_write(target) as file:
            file.write(f"# Written by `aiflux benchmark`.\n{run_settings(found.settings)}".encode())
        print(f"wrote {short(target)}", file=out)
    if found.recommended is None and measuring.failures:
        raise measuring.failures[0]
    figures = [point.figures for point in found.points if point.figures is not None]
    if figures and not any(each.answered for each in figures):
        failed = sum(each.failed for each in figures)
        all_ = "the only request" if failed == 1 else f"all {failed} requests"
        raise TooManyFailuresError(
            f"{all_} failed; the most frequent reason: {figures[0].reason}",
            "correct what it names, and measure again: --again",
        )
    return _exit_code(measuring.failures)


def _exit_code(failures: list[AifluxError]) -> int:
    return int(failures[0].exit_code) if failures else 0


def _write_plot(path: Path, found: Benchmark) -> None:
    try:
        content = benchmark_plot(found.points, found.knees)
    except ConfigError as error:
        print(f"note: no plot was drawn: {error}", file=sys.stderr)
        return
    with atomic_write(path) as file:
        file.write(content)
