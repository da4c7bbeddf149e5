"""The start of a job that works on a step of a chain: ``-m aiflux.api.chain_step DIR STEP SHARD``.

When the jobs are submitted, the requests of the step are not known: they depend on the answers of
earlier steps. The first job of the step that starts makes them, and the plan. It runs outside the
container, with the Python that submitted the chain: the container has no reader for tables.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from aiflux.converters.chain.folder import ChainFolder, ChainRuns, LaterStep
from aiflux.core.runs.open import draft_run
from aiflux.core.runs.plan import read_plan
from aiflux.engines.kinds import engine_kind
from aiflux.errors import AifluxError, StoppedError
from aiflux.util.lease import acquire
from aiflux.util.records import read_record
from aiflux.util.text import counted

_log = logging.getLogger(__name__)
NOTHING = 10
"""Exit code: this task has nothing to do; see ``slurm/job.sh``."""


def plan_step(folder: ChainFolder, name: str, shard: int) -> bool:
    """Make the requests of a step and the plan of its run, unless that was done before.

    Returns:
        Whether the run has this shard.

    Raises:
        AifluxError: an earlier step is not finished, or the requests cannot be made.
    """
    with acquire(folder.lease(name), f"the step {name}", wait=True, on_wait=_log.info):
        if not folder.run(name).plan.is_file() and not folder.asks_nothing(name):
            _plan(folder, name)
    return not folder.asks_nothing(name) and shard < len(read_plan(folder.run(name)).shards)


def _plan(folder: ChainFolder, name: str) -> None:
    record, later = folder.record(), read_record(LaterStep, folder.later(name))
    if record is None or later is None:
        raise StoppedError(
            f"{folder.directory.path} is incomplete", "run the `aiflux chain` command again"
        )
    runs = ChainRuns(record.chain(), folder)
    at = [step.name for step in runs.chain.steps].index(name)
    for before in runs.chain.steps[:at]:
        if not folder.finished(before.name):
            raise StoppedError(
                f"step {before.name} is not finished, so step {name} cannot begin",
                f"run the same command again: aiflux chain {record.file}",
            )
    _, _ = runs.prepare(runs.chain.steps[at], later.options.allowed_failures)
    made = folder.record()
    text = "" if made is None else made.steps[at].filter_text
    if folder.asks_nothing(name):
        _log.info("step %s has nothing to ask%s", name, f": {text}" if text else "")
        return
    options = later.options
    opened = draft_run(
        folder.requests(name),
        folder.results(name),
        options,
        later.models_dir,
        engine_kind(options),
        shards=later.shards,
    ).open()
    asked = counted(opened.plan.requests, "request")
    _log.info("step %s: %s%s", name, asked, f"; {text}" if text else "")


def main() -> int:
    """Plan the step that the command line names; return the exit code."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    directory, name, shard = sys.argv[1:]
    folder = ChainFolder(Path(directory.removesuffix(".aiflux")))
    try:
        return 0 if plan_step(folder, name, int(shard)) else NOTHING
    except AifluxError as error:
        _log.error("error: %s", error)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
