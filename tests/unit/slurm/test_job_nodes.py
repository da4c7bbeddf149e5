"""A job on several nodes: the batch script, the worker and the ranks, with stand-ins of programs.

Apptainer's stand-in runs the worker of this checkout, with the environment and the /tmp that a
container would have; srun's runs its tasks here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.core.config.config import SlurmConfig
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.plan import write_plan
from aiflux.slurm.script import JobScript, render
from tests.tools.engine_contract import until
from tests.tools.make_sif import make_sif
from tests.unit.engines.test_ranks import SRUN, runs
from tests.unit.engines.test_vllm import CHAT, FAKE, plan_of
from tests.unit.fake_commands import FakeCommands
from tests.unit.made_snapshots import put_snapshot

APPTAINER = """\
[[ $2 == run ]] || exit 0
words=("$@") inside=()
for ((at = 0; at < $#; at++)); do
    [[ ${words[at]} != --workdir ]] || workdir=${words[at + 1]}
    [[ ${words[at]} != *.sif ]] || break
done
words=("${words[@]:at+1}")
for at in "${!words[@]}"; do
    [[ ${words[at]} != /tmp ]] || words[at]=$workdir/tmp
done
while IFS= read -r -d '' pair; do
    [[ $pair != APPTAINERENV_* ]] || inside+=("${pair#APPTAINERENV_}")
done <"$call/env"
mkdir -p "$workdir/tmp"
printf '%s\\n' "${inside[@]}" >"$call/inside"
exec env -i PATH="$PATH" HOME="$workdir" TMPDIR="$workdir/tmp" "${inside[@]}" \\
    PYTHON -m aiflux.worker "${words[@]}"
"""


class Job:
    """A job of two nodes, ready to be run by bash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a b'c"
        self.folder.mkdir()
        self.fakes = FakeCommands(folder / "fakes")
        self.fakes.add("apptainer", APPTAINER.replace("PYTHON", sys.executable))
        self.fakes.add("srun", f'exec {sys.executable} {SRUN} "$@"\n')
        self.fakes.add("vllm", f'echo $$ >>"$here/servers"\nexec {sys.executable} {FAKE} "$@"\n')
        put_snapshot(self.folder / "models" / "hub", "org/tiny")
        plan = plan_of(self.folder, CHAT, copies=20, nodes_per_engine=2, slots=2, allow_cpu=True)
        self.run = RunDirectory.of_output(plan.output)
        write_plan(plan, self.run)
        image = self.folder / "aiflux-vllm.sif"
        make_sif(image, version="1")
        slurm = SlurmConfig(gpus_per_node="0")
        job = JobScript.of_run(plan.input_path, plan.output, plan.options, plan.models_dir, slurm,
                               image, self.run.logs)  # fmt: skip
        self.script = folder / "slurm_script"
        self.script.write_text(render(job), encoding="utf-8")
        # Slurm runs a copy of the script on one node; a resumed run writes another in its place.
        self.run.script_part(1).write_text("exit 9\n", encoding="utf-8")
        self.output = plan.output
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def start(self) -> subprocess.Popen[str]:
        environ = {
            "PATH": self.fakes.path,
            "HOME": "/nowhere",
            "TMPDIR": str(self.temporary),
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "2",
            "SLURMD_NODENAME": "n1",
        }
        return subprocess.Popen(
            ["bash", self.script], env=environ, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def servers(self) -> list[int]:
        """Return the processes of ranks that were started."""
        file = self.fakes.folder / "servers"
        return [*map(int, file.read_text().split())] if file.exists() else []

    def nothing_left(self) -> bool:
        return not any(map(runs, self.servers())) and not [*self.temporary.iterdir()]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_the_ranks_run_for_as_long_as_the_worker(job: Job) -> None:
    process = job.start()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    entries = json.loads(job.output.read_text(encoding="utf-8"))
    assert len(entries) == 20
    assert all(entry["output"]["choices"] for entry in entries)
    (call,) = job.fakes.calls("srun")
    assert call.argv == [
        "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--relative=1", "--export=ALL",
        "--mpi=none", "--kill-on-bad-exit=1", "--cpus-per-task=2", "bash", "-c",
        job.script.read_text(encoding="utf-8").rstrip("\n"), "bash", "rank",
    ]  # fmt: skip
    status = json.loads(job.run.status(0).read_text(encoding="utf-8"))["aiflux"]
    assert status["sealed"] is False
    assert status["unsealed"].startswith("--nodes-per-engine: ")
    assert status["engines"][0]["nodes"] == ["n1", "n2"]
    assert f"not sealed: {status['unsealed']}" in printed
    assert "engine 0 is up on the CPU of n1 and n2: vLLM 0.99.0" in printed
    assert job.nothing_left()
    assert "error" not in printed


def test_a_stop_during_the_start_leaves_nothing_behind(job: Job) -> None:
    job.fakes.add("vllm", 'echo $$ >>"$here/servers"; exec sleep 100\n')
    process = job.start()
    until(lambda: len(job.servers()) == 2, 30)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 5, printed
    assert job.nothing_left()


def test_a_worker_that_never_needs_the_ranks_starts_no_step(job: Job) -> None:
    job.run.plan.write_text("{}", encoding="utf-8")
    process = job.start()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2, printed
    assert job.fakes.calls("srun") == []
    assert job.nothing_left()


def test_a_killed_worker_takes_the_ranks_with_it(job: Job) -> None:
    job.fakes.add("vllm", 'echo $$ >>"$here/servers"; exec sleep 100\n')
    process = job.start()
    until(lambda: len(job.servers()) == 2, 30)
    os.kill(worker_of(job), signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 5, printed
    assert "the worker was killed by signal 9" in printed
    until(job.nothing_left)


def worker_of(job: Job) -> int:
    """Return the process that works on the shard."""
    for proc in Path("/proc").glob("[0-9]*"):
        words = (proc / "cmdline").read_bytes().split(b"\0") if proc.exists() else []
        if b"--shard" in words and str(job.run.path).encode() in words:
            return int(proc.name)
    raise AssertionError("no worker runs")
