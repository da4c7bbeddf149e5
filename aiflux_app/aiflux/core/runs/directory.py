"""The run directory: one class names every file of a run."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from aiflux.core.batch.results_file import output_paths
from aiflux.errors import ConfigError, RunConflictError, UsageError
from aiflux.util.compression import plain_name
from aiflux.util.files import (
    absolute,
    may_write,
    nearest_there,
    read_error,
    refuse_special,
    storage_error,
    user_name,
)

OUTPUT_SUFFIXES = (".json", ".jsonl")
_SUFFIX = ".aiflux"
TABLE_RESULTS = "results.json"
"""The output of a run that answers a table (`aiflux ask`), inside ``TABLE.aiflux``."""
CHAIN_STEPS = "steps"
"""The folder of the runs of a chain (`aiflux chain`), inside ``TABLE.aiflux``."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run; ``path`` is ``<output>.aiflux``."""

    path: Path

    @classmethod
    def of_output(cls, output: Path) -> RunDirectory:
        """Return the run directory that belongs to an output file."""
        return cls(output.with_name(output.name + _SUFFIX))

    @property
    def plan(self) -> Path:
        """The plan: everything decided before the first request was sent."""
        return self.path / "plan.json"

    @property
    def splits(self) -> Path:
        """How the requests are split whose prompts are too long (``--too-long chunk``)."""
        return self.path / "splits.jsonl"

    @property
    def script(self) -> Path:
        """The sbatch script as it was submitted."""
        return self.path / "run.sbatch"

    def script_part(self, number: int) -> Path:
        """The script of the ``number``-th array (from 1) of a run with several arrays."""
        return self.script if number == 1 else self.path / f"run-{number}.sbatch"

    @property
    def then_script(self) -> Path:
        """The sbatch script of the job that executes a command after the run."""
        return self.path / "then.sbatch"

    @property
    def submissions(self) -> Path:
        """The Slurm jobs that were submitted for the run."""
        return self.path / "jobs.json"

    @property
    def process(self) -> Path:
        """The process on this machine that was last started for the run in the background."""
        return self.path / "process.json"

    @property
    def local_script(self) -> Path:
        """The script of that process, if the run uses an image."""
        return self.path / "run.sh"

    @property
    def estimate(self) -> Path:
        """The estimate of the run by a pilot."""
        return self.path / "estimate.json"

    @property
    def report(self) -> Path:
        """The page that ``aiflux report`` writes."""
        return self.path / "report.html"

    @property
    def run_status(self) -> Path:
        """Status of the whole run, replaced atomically."""
        return self.path / "status" / "run.json"

    @property
    def plan_lease(self) -> Path:
        """Held while the plan is made or changed."""
        return self.path / ".plan.lease"

    @property
    def merge_lease(self) -> Path:
        """Held by the process that writes the output."""
        return self.path / ".merge.lease"

    @property
    def logs(self) -> Path:
        """Logs of the job, the worker and the engines."""
        return self.path / "logs"

    def lease(self, shard: int) -> Path:
        """Held by the worker that writes a shard's journal."""
        return self.path / f".shard-{shard:04d}.lease"

    def journal(self, shard: int) -> Path:
        """Journal of one shard."""
        return self.path / "journal" / f"shard-{shard:04d}.jsonl"

    def status(self, shard: int) -> Path:
        """Status of one shard, replaced atomically."""
        return self.path / "status" / f"shard-{shard:04d}.json"

    def done_mark(self, shard: int, plan: str) -> Path:
        """Created by a worker whose shard is done, for the plan with this id (see ``merge``)."""
        return self.path / "status" / f"shard-{shard:04d}.{plan}.done"

    def requeue_mark(self, shard: int) -> Path:
        """Created by a worker that asks for its job to go back to the queue."""
        return self.path / "status" / f"shard-{shard:04d}.requeue"

    def engine_log(self, shard: int, engine: int) -> Path:
        """Log of one engine."""
        return self.logs / f"engine-{shard:04d}-{engine}.log"

    def worked_on(self) -> bool:
        """Return whether a worker has begun a shard."""
        marks = (".shard-*.lease", "status/shard-*.json", "journal/*.jsonl")
        return any(True for mark in marks for _ in self.path.glob(mark))

    def unused(self) -> bool:
        """Return whether no plan was made: at most, a start was killed, or jobs wait to make it."""
        if not self.path.exists():
            return True
        unfinished = (f".{self.plan.name}.", f".{self.splits.name}.", self.plan_lease.name)
        submitted = (self.submissions, self.splits, *self.path.glob("run*.sbatch"))
        files = (path for path in self.path.rglob("*") if not path.is_dir())
        return all(
            path in submitted
            or path.parent == self.logs
            or (path.parent == self.path and path.name.startswith(unfinished))
            for path in files
        )

    def refuse_foreign(self) -> None:
        """Refuse a run directory in which other users can create or change files.

        Its files decide where prompts go and which files are written.

        Raises:
            RunConflictError: it belongs to another user, or others can write it.
            StorageError: the directory cannot be examined.
        """
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return
        except PermissionError:
            raise self._unreadable(nearest_there(self.path)) from None
        except OSError as error:
            raise read_error(error, self.path) from error
        if not stat.S_ISDIR(found.st_mode):
            raise RunConflictError(
                f"{self.path} is a file, but must be the run directory",
                "move it away, or choose another output",
            )
        if found.st_uid != os.geteuid():
            owner = user_name(found.st_uid)
            raise RunConflictError(
                f"the run directory {self.path} belongs to another user ({owner})",
                "choose another output, in a directory of your own",
            )
        self.refuse_unreadable()
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RunConflictError(
                f"others can write the run directory {self.path} "
                f"(mode {stat.S_IMODE(found.st_mode):04o})",
                f"make sure that its files are yours, then: chmod go-w {quote(str(self.path))}",
            )

    def refuse_unreadable(self) -> None:
        """Refuse a run whose directory or plan this user may not read.

        Raises:
            RunConflictError: names the owner.
        """
        for path, needed in ((self.path, os.R_OK | os.X_OK), (self.plan, os.R_OK)):
            if os.path.exists(path) and not os.access(path, needed):
                raise self._unreadable(path)

    def _unreadable(self, path: Path) -> RunConflictError:
        found = os.stat(path)
        if found.st_uid == os.geteuid():
            return RunConflictError(
                f"permissions deny reading {path} (mode {stat.S_IMODE(found.st_mode):04o})",
                f"chmod u+rwX {quote(str(path))}",
            )
        owner = user_name(found.st_uid)
        return RunConflictError(
            f"permissions deny reading {path}, which belongs to {owner}",
            f"ask {owner}, or choose another output; `aiflux results` needs only the output file",
        )

    def make(self) -> None:
        """Create the directory (mode 0700) if it does not exist."""
        self.refuse_foreign()
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self.refuse_foreign()

    def create(self) -> None:
        """Create the directory and its subdirectories if they do not exist."""
        self.make()
        try:
            for name in ("journal", "status", "logs"):
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(error, self.path) from error


def user_output(output: Path) -> Path:
    """Return the file that the user named for a run: its output, or the table made of it."""
    folder = output.parent
    if output.name != TABLE_RESULTS or folder.suffix != _SUFFIX:
        return output
    return folder.with_name(folder.name.removesuffix(_SUFFIX))


def own_command(output: Path) -> str:
    """Return the command that makes a run's output: it resumes the run, with other options too."""
    if output.parent.name == CHAIN_STEPS and output.parent.parent.suffix == _SUFFIX:
        return "aiflux chain"
    return "aiflux run" if user_output(output) == output else "aiflux ask"


def refuse_precious(target: Path, *inputs: Path) -> None:
    """Refuse to write over a file of a run, its output or an input, also if that is forced.

    A run's report may be replaced.

    Args:
        inputs: files that are read, or that the user needs in another way.

    Raises:
        UsageError: ``target`` is such a file.
    """
    real = Path(os.path.realpath(target))
    for folder in real.parents:
        if folder.suffix == _SUFFIX and real != RunDirectory(folder).report:
            raise UsageError(f"{target} is in the run directory {folder}", "choose another file")
    errors = ".errors.jsonl"
    output = real.with_name(f"{real.name.removesuffix(errors)}.jsonl")
    for each in (real, output) if real.name.endswith(errors) else (real,):
        if os.path.isdir(RunDirectory.of_output(each).path):
            raise UsageError(f"{target} is the output of a run", "choose another file")
    if str(real) in map(os.path.realpath, inputs):
        raise UsageError(f"{target} is a file that is needed", "choose another file")


def default_output(input_path: Path, directory: Path) -> Path:
    """Return the default output: ``<input stem>.results.json`` in ``directory``."""
    return directory / f"{plain_name(input_path).stem}.results.json"


def named_output(text: str | None, input_path: Path) -> Path:
    """Return the output that the user names, or the default output in the current directory.

    Raises:
        ConfigError: the name is that of a directory.
    """
    if text is None:
        return default_output(input_path, Path.cwd())
    if not text or text.endswith(("/", "/.")):  # pathlib drops both endings
        raise ConfigError(
            f"the output {text!r} is a directory", f"name a file: {Path(text) / 'results.json'}"
        )
    return Path(text)


# The longest addition to an output's name, and the longest path inside its directories: that of a
# pilot's status while it is written.
_LONGEST_ADDITION = len(".partial.errors.jsonl") - len(".jsonl")
_LONGEST_INSIDE = 160
_PATH_MAX = 4096


def _refuse_long_path(output: Path) -> None:
    length = len(os.fsencode(output))
    if length > _PATH_MAX - _LONGEST_INSIDE:
        raise ConfigError(
            f"the output's path is {length:,} bytes long, and its run directory needs room for "
            f"{_LONGEST_INSIDE} of at most {_PATH_MAX:,}",
            "choose a directory with a shorter path",
        )


def _refuse_long_name(output: Path) -> None:
    most = os.pathconf(output.parent, "PC_NAME_MAX") - _LONGEST_ADDITION
    length = len(os.fsencode(output.name))
    if length > most:
        raise ConfigError(
            f"the output's name is {length} bytes long; at most {most} leave room for the "
            "additions of AI-Flux, such as .errors.jsonl",
            f"choose a name of at most {most} bytes",
        )


def checked_output(output: Path) -> Path:
    """Return the absolute output path.

    Raises:
        ConfigError: the suffix of the output is unknown, its directory does not exist or is not
            writable, or its name is too long.
        UsageError: it exists and is not a file.
    """
    output = absolute(output)
    if output.suffix not in OUTPUT_SUFFIXES:
        raise ConfigError(
            f"output {str(output)!r} does not end in {' or '.join(OUTPUT_SUFFIXES)}",
            "name it *.json (one array) or *.jsonl (OpenAI Batch output)",
        )
    if {"\n", "\0"} & set(str(output)):
        raise ConfigError("the output's path contains a line break or NUL", "choose another name")
    _refuse_long_path(output)
    if not os.path.isdir(output.parent):
        raise ConfigError(
            f"the output's directory {str(output.parent)!r} does not exist",
            f"mkdir -p {quote(str(output.parent))}",
        )
    _refuse_long_name(output)
    begun = RunDirectory.of_output(output).path.exists()  # it may even be finished
    if not begun and not may_write(output.parent):
        raise ConfigError(
            f"you cannot write in the output's directory {str(output.parent)!r}",
            "choose another directory",
        )
    for path in output_paths(output):
        refuse_special(path)
    return output
