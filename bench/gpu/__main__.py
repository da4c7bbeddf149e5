"""``python -m bench.gpu``: compare AI-Flux's throughput with a real engine's on this GPU.

Finds or builds the engines, creates a model with random weights, and measures output tokens per
second of the engine's own tool, of a bare aiohttp client, and of AI-Flux with the same requests.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.gpu import llamacpp
from bench.gpu.measuring import CLIENTS, Engine, Figure, Mix, Report, Session, serving
from bench.gpu.models import SHAPES, make_gguf, make_hf, words
from bench.gpu.smi import Sampler, gpu_name
from bench.gpu.transformers_serve import TransformersServe

WANTED = 0.97
REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every engine; exit 1 if AI-Flux's share is below its target, or an engine failed."""
    arguments = _parser().parse_args(argv)
    folder: Path = arguments.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.pack:
        pack(folder, arguments.pack)
        return 0
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # also ends the engine
    good = True
    for name in arguments.engine or ENGINES:
        try:
            report = measure(ENGINES[name](arguments, folder), arguments, folder)
        except (RuntimeError, OSError) as error:
            print(f"{name}: failed: {error}", flush=True)
            good = False
        else:
            good = show(report) and good
    return int(not good)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    add = parser.add_argument
    add("--engine", action="append", choices=list(ENGINES), help="only this engine (repeatable)")
    add("--work", type=Path, default=Path("bench-gpu"), help="folder for engines, models, results")
    add("--shape", choices=list(SHAPES), default="8b", help="the model's sizes (default: 8b)")
    add("--llama", type=Path, help="llama.cpp: programs, source, or an archive of the source")
    add("--python", default=sys.executable, help="Python with transformers[serving]")
    add("--levels", type=_numbers, default=[1, 4, 16, 32, 64, 128, 256], help="requests in flight")
    add("--mix", type=_mix, action="append", help="PROMPT:ANSWER in tokens (default: 128:128)")
    add("--seconds", type=float, default=30.0, help="approximate duration of a run")
    add("--rounds", type=int, default=3, help="runs of each client")
    add("--pack", metavar="3.N", help="download everything for a machine without network")
    add("--option", action="append", default=[], help="additional server option (repeatable)")
    return parser


def pack(folder: Path, python: str) -> None:
    """Download llama.cpp's source, and wheels for a machine with torch and transformers."""
    print(llamacpp.pack(folder))
    target = [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:"]
    target += [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_17", "2014")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", *target]
    wheels = str(folder / "wheels")
    subprocess.run([*pip, f"--dest={wheels}", f"--requirement={REQUIREMENTS}"], check=True)
    print(wheels)


def _numbers(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def _mix(text: str) -> Mix:
    prompt, answer = text.split(":")
    return Mix(int(prompt), int(answer))


def _llama(arguments: argparse.Namespace, folder: Path) -> Engine:
    programs = llamacpp.programs(arguments.llama, folder)
    model = folder / f"{arguments.shape}-q8_0.gguf"
    if not model.exists():
        make_gguf(model, SHAPES[arguments.shape])
    context = max(mix.prompt + 2 * mix.answer + 32 for mix in _mixes(arguments))
    options = tuple(arguments.option)
    return llamacpp.LlamaCpp(programs, model, max(arguments.levels), context, options)


def _transformers(arguments: argparse.Namespace, folder: Path) -> Engine:
    model = folder / f"{arguments.shape}-bf16"
    if not (model / "config.json").exists():
        make_hf(model, SHAPES[arguments.shape])
    options = tuple(arguments.option)
    return TransformersServe(arguments.python, model, folder / "hf-home", options)


ENGINES: dict[str, Callable[[argparse.Namespace, Path], Engine]] = {
    "llama.cpp": _llama,
    "transformers": _transformers,
}


def _mixes(arguments: argparse.Namespace) -> list[Mix]:
    return arguments.mix or [Mix(128, 128)]


def measure(engine: Engine, arguments: argparse.Namespace, folder: Path) -> Report:
    """Measure an engine: its own tool, the sweep, then the clients in turn."""
    shape = SHAPES[arguments.shape]
    report = Report(engine.name, engine.version(), engine.command(0), arguments.shape)
    mixes, levels = _mixes(arguments), arguments.levels
    print(f"{engine.name}: {report.version}; {gpu_name()}", flush=True)

    def save() -> None:
        about = {"date": datetime.date.today().isoformat(), "gpu": gpu_name()}
        about |= {"python": platform.python_version(), "cpus": str(os.cpu_count())}
        content = json.dumps(about | report.to_json(), indent=1)
        (folder / f"results-{engine.name.split()[0]}-{arguments.shape}.json").write_text(content)

    for mix in mixes:
        report.own_command, rates = engine.own_tool(
            levels, mix.prompt, mix.answer, arguments.seconds / 3
        )
        report.own_tool[str(mix)] = rates
        print(f"own tool, {mix}:", {level: round(rate) for level, rate in rates.items()})
        save()
    with (
        Sampler() as sampler,
        tempfile.TemporaryDirectory(prefix="aiflux-gpu-") as scratch,
        serving(engine, folder / f"{engine.name.split()[0]}.log") as url,
    ):
        session = Session(url, engine.served_name, words(shape), Path(scratch), sampler)
        for mix in mixes:
            rate = session.measure(CLIENTS[0], mix, levels[0], 2 * levels[0]).rate  # warms up
            best = _sweep(session, mix, rate, arguments, report)
            save()
            for figure in _compare(session, mix, best, arguments):
                report.runs.append(figure)
                save()
    return report


def _sweep(
    session: Session, mix: Mix, rate: float, arguments: argparse.Namespace, report: Report
) -> Figure:
    """Return the bare client's best run over all levels."""
    figures = []
    for level in arguments.levels:
        count = max(2 * level, int(rate * arguments.seconds / 3 / mix.answer))
        figure = session.measure(CLIENTS[0], mix, level, count)
        print(_line(figure), flush=True)
        figures.append(figure)
        rate = figure.rate
    report.sweep += figures
    return max(figures, key=lambda figure: figure.rate)


def _compare(
    session: Session, mix: Mix, best: Figure, arguments: argparse.Namespace
) -> Iterator[Figure]:
    """Run the clients in turn, each after a single request that shows the startup time."""
    count = max(4 * best.in_flight, int(best.rate * arguments.seconds / mix.answer))
    for turn in range(arguments.rounds):
        place = turn % len(CLIENTS)
        for client in (*CLIENTS[place:], *CLIENTS[:place]):
            alone = session.measure(client, Mix(mix.prompt, 2), 1, 1)
            figure = session.measure(client, mix, best.in_flight, count)
            figure = dataclasses.replace(figure, alone=alone.wall)
            print(_line(figure), flush=True)
            yield figure


def _line(figure: Figure) -> str:
    gpu = ", ".join(f"{name} {value:.0f}" for name, value in figure.gpu.items())
    cpu = figure.cpu / figure.requests * 1000
    return (
        f"{figure.client}, {figure.mix}, {figure.in_flight} in flight: {figure.rate:.0f} tokens/s, "
        f"{figure.requests} requests, {figure.wall:.1f} s, {cpu:.2f} ms CPU each; GPU: {gpu}"
    )


def show(report: Report) -> bool:
    """Print medians and shares; return whether AI-Flux's share meets its target."""
    good = True
    print(f"\n{report.engine}, {report.version}, shape {report.model}, {gpu_name()}")
    for mix in dict.fromkeys(figure.mix for figure in report.runs):
        runs = [figure for figure in report.runs if figure.mix == mix]
        level = runs[0].in_flight
        own = report.own_tool.get(mix, {}).get(level)
        print(f"mix {mix}, {level} in flight; own tool without HTTP: {own or 0:.0f} tokens/s")
        found = {name: [run for run in runs if run.client == name] for name in CLIENTS}
        bare = statistics.median(run.rate for run in found[CLIENTS[0]])
        steady = statistics.median(run.steady_rate for run in found[CLIENTS[0]])
        for client, figures in found.items():
            rate = statistics.median(run.rate for run in figures)
            share = statistics.median(run.steady_rate for run in figures) / steady
            of_own = f"; {rate / own:.1%} of its own tool" if own else ""
            print(
                f"  {client}: {rate:.0f} tokens/s, {rate / bare:.1%} of the bare client, "
                f"{share:.1%} without start and end{of_own}"
            )
            good = good and (client != CLIENTS[1] or share >= WANTED)
    return good


if __name__ == "__main__":
    sys.exit(main())
