"""Run the benchmark tools of engines, for ``aiflux benchmark --against``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

from aiflux.cli.benchmarks import Measuring, Sweep
from aiflux.core.config.config import Config
from aiflux.core.runs.serve_directory import ServeDirectory
from aiflux.core.runs.status_file import PointFigures
from aiflux.engines.base import EngineKind
from aiflux.engines.gpus import visible_devices
from aiflux.engines.kinds import engine_kind
from aiflux.engines.own_benchmark import BenchmarkLoad, OwnBenchmark
from aiflux.engines.process import find_program
from aiflux.errors import EngineError, ModelError, UsageError
from aiflux.estimates.benchmark import Compared, knees
from aiflux.util.process_limits import engine_threads

# llama-batched-bench prints in a thread, and loses lines at its end: with a quick model, all.
_ATTEMPTS = 3


def refuse_own(sweep: Sweep) -> None:
    """Refuse ``--against`` where the engines' tools cannot run.

    Raises:
        UsageError, EngineError: one of them cannot.
    """
    for settings in sweep.engines:
        options = Config(arguments=settings).run_options()
        if not sweep.local and options.engine_url is None:
            raise UsageError(
                "--against needs the engine's own tool on this machine",
                "add --local or --engine-url",
            )
        if options.engine_url is not None and ServeDirectory.of_url(options.engine_url, os.environ):
            raise UsageError(
                f"--against cannot use {options.engine_url}, which needs a key and a certificate",
                "leave out --against",
            )
        _own_program(engine_kind(options), os.environ)


def compare_knees(measuring: Measuring) -> None:
    """Measure the knees with the engines' own tools."""
    found = {point.name for point in knees(measuring.points)}
    for at, point in enumerate(measuring.points):
        if point.name in found and point.figures is not None:
            print(f"{point.name}: the engine's own tool", file=sys.stderr)
            config = Config(arguments=measuring.settings_of(point))
            compared = _compare(config, point.series.model, point.figures)
            measuring.points[at] = replace(point, compared=compared)


def _compare(config: Config, model: str, figures: PointFigures) -> Compared:
    """Return what an engine's own tool measures, or why it measures nothing."""
    options = config.run_options()
    kind = engine_kind(options)
    own, program = _own_program(kind, os.environ)
    if figures.engines > 1:
        several = f"the point has {figures.engines} engines, and the tool is one"
        return Compared(
            own.tool, program, error=f"{several}: let CUDA_VISIBLE_DEVICES name one GPU"
        )
    load = BenchmarkLoad(
        model=model,
        models_dir=config.models_dir,
        url=options.engine_url,
        requests=figures.requests,
        in_flight=min(figures.in_flight, figures.slots or figures.in_flight),
        prompt_tokens=max(1, round(figures.prompt_tokens)),
        answer_tokens=max(1, round(figures.answer_tokens)),
        on_gpus=bool(visible_devices()),
        threads=engine_threads(os.environ),
    )
    try:
        words = own.words(load)
    except ModelError as error:
        return Compared(own.tool, program, error=error.message)
    return _run(own, [program, *words])


def _own_program(kind: EngineKind, environ: Mapping[str, str]) -> tuple[OwnBenchmark, str]:
    """Return a kind's tool and its program.

    Raises:
        UsageError: it has no such tool.
        EngineError: the tool is not installed.
    """
    own = kind.own_benchmark
    if own is None:
        raise UsageError(
            f"the engine {kind.name} has no benchmark of its own", "leave out --against"
        )
    program = own.find(find_program(kind, environ) if kind.program else None, environ)
    if program is None:
        raise EngineError(
            f"{own.tool} is not installed next to the engine or on PATH",
            "install it, or leave out --against",
        )
    return own, program


def _run(own: OwnBenchmark, command: list[str]) -> Compared:
    shown = shlex.join(command)
    # The tool may be written in Python and have its own path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for _ in range(_ATTEMPTS):
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            return Compared(own.tool, shown, error=os.strerror(error.errno or 0))
        if done.returncode:
            break
        found = own.tokens_per_second(done.stdout)
        if found is not None:
            return Compared(own.tool, shown, found)
    last = next((line.strip() for line in reversed(done.stdout.splitlines()) if line.strip()), "")
    ended = f"it ended with exit code {done.returncode}"
    return Compared(own.tool, shown, error=f"{ended}: {last}" if last else ended)
