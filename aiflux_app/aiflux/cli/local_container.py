"""The container in the foreground: the two steps of a job, on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from aiflux.core.runs.open import OpenedRun
from aiflux.errors import ExitCode
from aiflux.image.container import (
    ContainerSpec,
    prepare_command,
    prepare_environment,
    probe_command,
    work_command,
    work_environment,
)
from aiflux.util.files import storage_error

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def run_in_container(opened: OpenedRun, runtime: Path, image: Path, *, seal: bool) -> int:
    """Prepare with the network, then work, sealed where that works; return the worker's exit code.

    Args:
        seal: False lets the work keep the network.
    """
    plan = opened.plan
    with tempfile.TemporaryDirectory(prefix="aiflux-") as workdir:
        spec = ContainerSpec(
            runtime=runtime,
            image=image,
            input=plan.input_path,
            output_dir=plan.output.parent,
            models_dir=plan.models_dir,
            workdir=Path(workdir),
            nv=shutil.which("nvidia-smi") is not None,
        )
        _make(plan.models_dir)
        run_dir = ["--run-dir", str(opened.run.path)]
        code = _run(
            prepare_command(spec, [*run_dir, "--prepare"]), prepare_environment(spec, os.environ)
        )
        if code:
            return code
        spec = replace(spec, unsealed=_unsealed(spec) if seal else "--no-seal")
        return _run(work_command(spec, run_dir), work_environment(spec, os.environ))


def pull_in_container(
    model: str, models_dir: Path, runtime: Path, image: Path, *, again: bool = False
) -> int:
    """Pull a model with the image's Ollama; return the exit code."""
    more = ["--again"] if again else []
    return _on_models(["--pull", model, *more], models_dir, runtime, image)


def create_in_container(model: str, models_dir: Path, runtime: Path, image: Path) -> int:
    """Make a model of the GGUF file that is staged, with the image's Ollama."""
    return _on_models(["--create", model], models_dir, runtime, image)


def _on_models(args: Sequence[str], models_dir: Path, runtime: Path, image: Path) -> int:
    _make(models_dir)
    with tempfile.TemporaryDirectory(prefix="aiflux-") as workdir:
        # There is neither input nor output: the models directory stands in for both.
        spec = ContainerSpec(runtime, image, image, models_dir, models_dir, Path(workdir), nv=False)
        return _run(prepare_command(spec, args), prepare_environment(spec, os.environ))


def _make(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error


def _unsealed(spec: ContainerSpec) -> str:
    """Return why a container cannot be sealed here; "" where it can."""
    if spec.models_dir is None:
        return "the engine is elsewhere"
    probe = subprocess.run(
        probe_command(spec.runtime, spec.image),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if probe.returncode == 0:
        return ""
    words = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
    why = f"this node cannot take the network from a container ({words})"
    print(f"not sealed: {why}", file=sys.stderr)
    return why


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run in the foreground, passing signals on; the child ends in good order."""
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    # SIGHUP stays ignored where it is, as under nohup.
    numbers = [n for n in _FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        process = subprocess.Popen(command, env=dict(environment), start_new_session=True)
        for number in early:
            process.send_signal(number)
        return _explained(process.wait())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explained(code: int) -> int:
    """Return the exit code for how a container ended that could not say it itself."""
    if code == 255:
        print(
            "the container could not be started (the runtime's words stand above)", file=sys.stderr
        )
        return int(ExitCode.ENGINE)
    killed = -code if code < 0 else code - 128
    if killed > 0:
        print(
            f"the container was killed by signal {killed}; what was done is kept", file=sys.stderr
        )
        return int(ExitCode.STOPPED)
    return code
