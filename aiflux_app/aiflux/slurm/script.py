"""Render the batch script: its directives and its body, as pure functions."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path

from aiflux.core.config.config import SlurmConfig
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory, user_output
from aiflux.core.runs.plan import Plan
from aiflux.core.runs.registry import state_folder
from aiflux.engines.base import LIBRARY_VARIABLES
from aiflux.engines.kinds import engine_kind
from aiflux.errors import ConfigError
from aiflux.util.files import storage_error
from aiflux.util.text import named_options

_NAME_LENGTH = 64


@dataclass(frozen=True)
class JobScript:
    """The content of a job's script. Paths are absolute and not resolved.

    Attributes:
        name: the job's name.
        log: folder of the job's logs.
        image: None if the worker runs outside a container.
        models_dir: None if the models are the server's.
        shard: the shard of a job that is not an array.
        tasks: the value of ``--array``, such as ``0-99%8``; None for a job that is not an array.
        first: the shard of an array's task 0.
        drain_seconds: time for the requests in flight when the time limit is near.
        max_requeues: 0 keeps the job from going back to the queue by itself; the worker counts.
        model_paths: models that are not in the models directory.
        engine_ca: certificates to trust at an engine elsewhere; the container must see them.
        worker: command of the worker outside a container (see ``package_command``).
        nodes: those of the job's engine.
        plan_step: command that plans the run when the job starts; empty if it is planned.
    """

    name: str
    slurm: SlurmConfig
    image: Path | None
    input: Path
    output_dir: Path
    models_dir: Path | None
    run_dir: Path
    log: Path
    shard: int = 0
    tasks: str | None = None
    first: int = 0
    drain_seconds: float = 20.0
    max_requeues: int = 20
    engine_ca: str | None = None
    model_paths: tuple[Path, ...] = ()
    worker: tuple[str, ...] = ()
    nodes: int = 1
    plan_step: tuple[str, ...] = ()

    def with_models(self, plan: Plan) -> JobScript:
        """Return the same for the models and the input of a plan.

        The input is a plain copy if the user named a compressed one.
        """
        kind = engine_kind(plan.options)
        names = (*plan.models, *(adapter.path for adapter in plan.adapters))
        paths = [kind.model_path(name) for name in names]
        found = tuple(path for path in paths if path is not None)
        return replace(self, input=plan.input_path, model_paths=found)

    @classmethod
    def of_run(
        cls,
        input_path: Path,
        output: Path,
        options: RunOptions,
        models_dir: Path | None,
        slurm: SlurmConfig,
        image: Path | None,
        log: Path,
    ) -> JobScript:
        """Return the script of a run."""
        kind = engine_kind(options)
        return cls(
            name=job_name(output),
            slurm=slurm,
            image=image,
            input=input_path,
            output_dir=output.parent,
            models_dir=models_dir,
            run_dir=RunDirectory.of_output(output).path,
            log=log,
            drain_seconds=options.drain_seconds,
            max_requeues=options.max_requeues,
            engine_ca=None if kind.managed else options.engine_ca,
            worker=() if kind.worker_in_image else package_command("aiflux.worker", os.environ),
            nodes=options.nodes_per_engine,
        )


def package_command(module: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the command of this package's worker or command line, for a job without a container.

    Args:
        module: such as ``aiflux.worker``.
        environ: the environment of this process, whose Python the command uses.
    """
    needed = {name: environ[name] for name in LIBRARY_VARIABLES if environ.get(name)}
    for name in needed.keys() & {"PYTHONPATH", "LD_LIBRARY_PATH"}:
        # The command starts in another directory.
        folders = (os.path.abspath(folder) for folder in needed[name].split(os.pathsep))
        needed[name] = os.pathsep.join(folders)
    env = ("env", *(f"{name}={value}" for name, value in needed.items())) if needed else ()
    return (*env, sys.executable, "-m", module)


def job_name(output: Path) -> str:
    """Return ``aiflux-<output stem>``, of letters, digits and ``._-`` only."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", user_output(output).stem).strip("-")
    return f"aiflux-{stem}"[:_NAME_LENGTH].rstrip("-")


def render(job: JobScript) -> str:
    """Return the script that works on one shard of a plan, or on several as an array.

    Raises:
        ConfigError: a value is wrong, or cannot be in a batch script.
    """
    slurm = job.slurm.checked()
    directives = job_directives(
        job.name,
        slurm,
        job.log,
        tasks=job.tasks,
        nodes=job.nodes,
        drain_seconds=job.drain_seconds,
    )
    lines = [
        "#!/bin/bash",
        *directives,
        "",
        "# Written by `aiflux run`. Submitted again as it is, it resumes the run.",
        "",
        *_of_run(job, slurm),
    ]
    return _script(lines)


def render_local(job: JobScript) -> str:
    """Return the script that works on a plan on this machine, without the directives of a job."""
    return _script(["#!/bin/bash", *_of_run(job, job.slurm)])


def checked_then(command: str) -> str:
    """Return the shell command to execute after a run.

    Raises:
        ConfigError: it is empty, or cannot be in a batch script.
    """
    if not command.strip():
        raise ConfigError("the command to execute then (--then) is empty", "name one, or omit it")
    if re.search(r"[\n\r\0]", command):
        raise ConfigError(
            "the command to execute then (--then) has a line break, or a character that a batch "
            "script cannot contain",
            "separate commands with ; or &&, or write them into a file: --then 'bash FILE'",
        )
    return command


def render_then(job: JobScript, command: str) -> str:
    """Return the script of the small job that executes a shell command after a run.

    Raises:
        ConfigError: see ``checked_then``.
    """
    lines = [
        "#!/bin/bash",
        *then_directives(job),
        "",
        _array("cli", package_command("aiflux.cli", os.environ)),
        _assign("run_dir", job.run_dir),
        _assign("command", checked_then(command)),
    ]
    return _script(lines, "then.sh")


def render_models(image: Path, models_dir: Path, arguments: Sequence[str]) -> str:
    """Return the script that changes the models directory with the worker of an image.

    Args:
        arguments: of the worker, such as ``--pull NAME``.
    """
    # There is no input and no output: image and models directory take their place in the mounts.
    paths = _paths(image, image, models_dir, models_dir, None, None, (), ())
    no_gpus = SlurmConfig(gpus_per_node="0")
    worker = [_assign("shard", 0), _assign("max_requeues", 0), _assign("want_seal", 0)]
    worker.append(_assign("nodes", 1))
    lines = ["#!/bin/bash", *paths, *worker, _array("prepare_args", arguments), *_site(no_gpus)]
    return _script(lines)


def _of_run(job: JobScript, slurm: SlurmConfig) -> Iterator[str]:
    yield from _paths(
        job.image,
        job.input,
        job.output_dir,
        job.models_dir,
        job.engine_ca,
        job.run_dir,
        job.model_paths,
        job.worker,
    )
    yield from _shard(job)
    if job.plan_step:
        yield _array("plan_step", job.plan_step)
    yield _assign("max_requeues", job.max_requeues)
    yield _assign("want_seal", int(slurm.seal and not job.worker))
    yield _assign("nodes", job.nodes)
    yield _assign("gpu_vendor", slurm.gpu_vendor)
    yield 'prepare_args=(--run-dir "$run_dir" --prepare --shard "$shard")'
    yield from _site(slurm)


def _paths(
    image: Path | None,
    input_path: Path,
    output_dir: Path,
    models_dir: Path | None,
    engine_ca: str | None,
    run_dir: Path | None,
    model_paths: Sequence[Path],
    worker: Sequence[str],
) -> Iterator[str]:
    yield _assign("image", image or "")
    yield _array("worker", worker)
    yield _array("libraries", LIBRARY_VARIABLES if worker else ())
    yield _assign("input", input_path)
    yield _assign("output_dir", output_dir)
    yield _assign("models_dir", models_dir or "")
    yield _assign("engine_ca", engine_ca or "")
    yield _assign("run_dir", run_dir or "")
    yield _array("model_paths", map(str, model_paths))


def _script(lines: Sequence[str], part: str = "job.sh") -> str:
    for line in lines:
        _refuse_ends(line)
    return "\n".join([*lines, "", _part(part)])


def generic_script() -> str:
    """Return ``slurm/run.sbatch``, for any input on sbatch's command line."""
    slurm = SlurmConfig().checked()
    lines = [
        "#!/bin/bash",
        *job_directives("aiflux", slurm, None),
        "",
        "# Made by `make slurm/run.sbatch`; edit aiflux_app/aiflux/slurm/*.sh instead.",
        "",
        _part("lookup.sh"),
        *_site(slurm),
        "",
        _part("job.sh"),
    ]
    return "\n".join(lines)


def _shard(job: JobScript) -> Iterator[str]:
    if job.tasks is None:
        yield _assign("shard", job.shard)
    else:
        yield _assign("first", job.first)
        yield "shard=$((first + SLURM_ARRAY_TASK_ID))"


def _site(slurm: SlurmConfig) -> Iterator[str]:
    yield _assign("want_gpus", int(wants_gpus(slurm)))
    yield _array("modules", slurm.modules)
    yield "site_setup() {"
    yield "    :"
    yield from (f"    {line}" for line in slurm.setup)
    yield "}"


def _assign(name: str, value: str | int | Path) -> str:
    return f"{name}={shlex.quote(str(value))}"


def _array(name: str, values: Iterable[str]) -> str:
    return f"{name}=({' '.join(shlex.quote(value) for value in values)})"


def _part(name: str) -> str:
    text = files("aiflux.slurm").joinpath(name).read_text(encoding="utf-8")
    return re.sub(r"\A# shellcheck .*\n", "", text)


def _refuse_ends(line: str) -> None:
    """Refuse characters that would end a line of the script early.

    sbatch refuses a script with DOS line ends, and bash drops a NUL.
    """
    if re.search(r"[\n\0]|\r\Z", line):
        raise ConfigError(
            f"a line of the batch script cannot contain a line break or a NUL: {line!r}",
            "remove it from the setting, or choose another name for the file",
        )


SIGNAL_MARGIN = 60  # seconds in addition to the drain: Slurm signals up to 60 s early
_LONGEST_SIGNAL = 65535  # seconds; the maximum of sbatch

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./%-]+\Z")
_OWN = {
    "account", "partition", "qos", "gpus-per-node", "gres", "constraint", "time", "time-min", "mem",
    "cpus-per-task", "mail-user", "mail-type", "exclude", "reservation",
}  # fmt: skip
_MANAGED = {
    "array", "chdir", "error", "export", "export-file", "get-user-env", "help", "hold", "input",
    "no-requeue", "nodes", "ntasks", "ntasks-per-node", "ntasks-per-gpu", "open-mode", "output",
    "parsable", "quiet", "requeue", "signal", "test-only", "uid", "gid", "usage", "verbose",
    "version", "wait", "workdir", "wrap",
}  # fmt: skip
_OWN_ALIASES = {"gpus": "gpus_per_node", "gpus-per-task": "gpus_per_node"}


def directive(name: str, value: str | int | None) -> str:
    """Return one ``#SBATCH`` line; a value of ``""`` makes a flag.

    Quoting follows sbatch's parser (``get_argument`` in Slurm's src/sbatch/opt.c), which is not a
    shell: a backslash escapes inside both kinds of quotes, and ``#`` starts a comment.
    """
    text = str(value)
    if text == "":
        return f"#SBATCH --{name}"
    if not _PLAIN.match(text):
        text = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return f"#SBATCH --{name}={text}"


def log_pattern(folder: Path, *, array: bool = False) -> str:
    """Return the value of ``--output`` for logs in ``folder``.

    Raises:
        ConfigError: see ``slurm_path``.
    """
    path = str(slurm_path(folder)).replace("%", "%%")
    return path + ("/slurm-%A_%a.out" if array else "/slurm-%j.out")


def slurm_path(folder: Path) -> Path:
    r"""Return the path of a folder for ``--output``: a link to it if the path has a backslash.

    With a backslash, Slurm replaces no ``%`` symbols, and since 25.11 it drops the backslash
    (``fname_create`` in Slurm's src/slurmd/common/fname.c). This includes one of the job's
    directory, at which a relative ``--output`` starts.

    Raises:
        ConfigError: there is no place for the link.
    """
    if "\\" not in str(folder):
        return folder
    links = state_folder(os.environ) / "logs"
    if "\\" in str(links):
        raise ConfigError(
            f"Slurm cannot write a log in {folder}, as its path contains a backslash; nor can it "
            f"use a link in {links}",
            "set logs_dir to a directory without one (AIFLUX_LOGS_DIR)",
        )
    return links / blake2b(os.fsencode(folder), digest_size=8).hexdigest()


def make_logs(folder: Path) -> None:
    """Create the folder of a job's logs, and the link to it if Slurm needs one.

    Raises:
        StorageError: this is not possible.
    """
    path = slurm_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path != folder:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(FileExistsError):
                path.symlink_to(folder)
    except OSError as error:
        raise storage_error(error, path) from error


def log_file(folder: Path, job_id: str, task: int | None = None) -> Path:
    """Return the log that ``log_pattern(folder)`` gives for a job, or for a task of an array."""
    return folder / f"slurm-{job_id}{'' if task is None else f'_{task}'}.out"


def signal_seconds(drain_seconds: float) -> int:
    """Return the seconds before the time limit at which Slurm signals the batch script."""
    return min(math.ceil(drain_seconds) + SIGNAL_MARGIN, _LONGEST_SIGNAL)


def job_directives(
    name: str,
    slurm: SlurmConfig,
    log: Path | None,
    *,
    tasks: str | None = None,
    nodes: int = 1,
    drain_seconds: float = 20.0,
) -> Iterator[str]:
    """Yield the ``#SBATCH`` lines of a job.

    Args:
        slurm: checked (see ``SlurmConfig.checked``).
        log: folder of the logs; None leaves Slurm's default.
        tasks: the value of ``--array``; None for a job that is not an array.
        nodes: number of nodes, with the resources of ``slurm`` each.
        drain_seconds: time for the requests in flight when the time limit is near.

    Raises:
        ConfigError: an extra option is one that AI-Flux sets itself.
    """
    extra = checked_extras(slurm.sbatch_arg)
    wanted: dict[str, str | int | None] = {
        "job-name": name,
        "array": tasks,
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "nodes": nodes,
        "ntasks": nodes,
        "ntasks-per-node": None if nodes == 1 else 1,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": None if {"mem-per-cpu", "mem-per-gpu"} & extra.keys() else slurm.mem,
        "gres": slurm.gres,
        "gpus-per-node": None if slurm.gres or not wants_gpus(slurm) else slurm.gpus_per_node,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "reservation": slurm.reservation,
        "time": slurm.time,
        "time-min": slurm.time_min,
        "mail-user": slurm.mail_user,
        "mail-type": slurm.mail_type,
        "output": None if log is None else log_pattern(log, array=tasks is not None),
        "open-mode": "append",
        "requeue": "",
        "signal": f"B:USR1@{signal_seconds(drain_seconds)}",
    }
    wanted.update(extra)
    return (directive(key, value) for key, value in wanted.items() if value is not None)


_OF_WORK = re.compile(r"(dependency|exclusive|core-spec|thread-spec)\Z|gpu|mem-per-|tres-per-")


def then_directives(job: JobScript) -> Iterator[str]:
    """Yield the ``#SBATCH`` lines of the job after a run: one core, no GPU, and no second start."""
    slurm = job.slurm.checked()
    extra = {name: text for name, text in slurm.sbatch_arg.items() if not _OF_WORK.match(name)}
    wanted: dict[str, str | int | None] = {
        "job-name": f"{job.name}-then",
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "ntasks": 1,
        "cpus-per-task": 1,
        "reservation": slurm.reservation,
        "time": slurm.time,
        "output": log_pattern(job.log),
        "no-requeue": "",
        **extra,
    }
    return (directive(key, value) for key, value in wanted.items() if value is not None)


def wants_gpus(slurm: SlurmConfig) -> bool:
    """Return whether a job requests GPUs (generic resources count as GPUs)."""
    return slurm.gres is not None or str(slurm.gpus_per_node) != "0"


def checked_extras(extras: Mapping[str, str]) -> dict[str, str]:
    """Return the user's additional sbatch options.

    Raises:
        ConfigError: one of them is not a long option, or AI-Flux sets it itself.
    """
    for key in extras:
        if not re.fullmatch(r"[a-z][a-z0-9-]+", key):
            raise ConfigError(
                f"sbatch_arg {key!r} is not the long name of an sbatch option",
                "write it without dashes, such as comment=TEXT",
            )
        _refuse_own(key)
        _refuse_managed(key)
    return dict(extras)


def _refuse_own(key: str) -> None:
    own = _OWN_ALIASES.get(key) or (key if key in _OWN else None)
    if own:
        field = own.replace("-", "_")
        raise ConfigError(
            f"sbatch_arg {key!r} has its own setting",
            f"use --{field.replace('_', '-')} ({field} in aiflux.yaml)",
        )


def _refuse_managed(key: str) -> None:
    remedy = "remove it, or submit your own job: sbatch [options] slurm/run.sbatch INPUT"
    if key in _MANAGED:
        raise ConfigError(f"sbatch_arg {key!r} is not available: AI-Flux controls --{key}", remedy)
    # sbatch accepts any unambiguous prefix of an option's name.
    found = sorted(name for name in _MANAGED | _OWN if name.startswith(key))
    if found:
        raise ConfigError(
            f"sbatch_arg {key!r} is not available: it is the beginning of {named_options(found)}",
            "write the option's whole name",
        )


if __name__ == "__main__":  # `make slurm/run.sbatch`
    sys.stdout.write(generic_script())
