"""The batch script, run by bash with a recording Apptainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiflux.core.config.config import SlurmConfig
from aiflux.engines.base import LIBRARY_VARIABLES
from aiflux.engines.command.engine import job_environment
from aiflux.image.container import probe_command
from aiflux.slurm.script import (
    JobScript,
    generic_script,
    package_command,
    render,
    render_local,
    render_models,
)
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import Call, FakeCommands

names = st.text(
    st.characters(exclude_characters="\0\n/", exclude_categories=["Cs"]), min_size=1, max_size=40
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)

ID = "00010203-0405-0607-0809-0a0b0c0d0e0f"
PASSED = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_RESTART_COUNT",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_END_TIME",
    "AIFLUX_ALLOW_CPU",
)


FLAGS = {"nvidia": ["--nv"], "amd": ["--rocm"], "": []}


@dataclass(frozen=True)
class Container:
    """The expected call of the runtime.

    Attributes:
        vendor: of the node's GPUs; "" if the container gets none.
        unsealed: why the container has a network.
    """

    image: Path
    input: Path
    output_dir: Path
    models_dir: Path | None
    workdir: str
    vendor: str = "nvidia"
    unsealed: str = ""
    runtime: str = "APPTAINER"

    def prepare(self, *arguments: str) -> list[str]:
        return self._command([], self._mounts(read_only=False), arguments)

    def work(self, *arguments: str) -> list[str]:
        seal = [] if self.unsealed else ["--net", "--network", "none"]
        return self._command(seal, self._mounts(read_only=True), arguments)

    def _command(self, seal: list[str], mounts: list[str], arguments: Sequence[str]) -> list[str]:
        return [
            *("--quiet", "run", "--containall", *FLAGS[self.vendor], *seal),
            *("--workdir", self.workdir, "--pwd", str(self.output_dir), *mounts),
            *(str(self.image), *arguments),
        ]

    def _mounts(self, *, read_only: bool) -> list[str]:
        folders = [mount(self.output_dir)]
        if self.models_dir not in (None, self.output_dir):
            inner = self.output_dir.is_relative_to(self.models_dir or "/nowhere")
            folders.insert(0 if inner else 1, mount(self.models_dir, read_only))
        options = [*folders, mount(self.input, True)]
        return [word for option in options for word in ("--mount", option)]

    def prepared(self, environ: Mapping[str, str], **more: str) -> dict[str, str]:
        """Return the variables that let values into the container while it prepares."""
        passed = {name: environ[name] for name in PASSED if name in environ}
        models = {} if self.models_dir is None else {"AIFLUX_MODELS_DIR": str(self.models_dir)}
        vendor = {"AIFLUX_GPU_VENDOR": self.vendor} if self.vendor else {}
        inside = {**passed, **models, **vendor, "AIFLUX_IMAGE_ID": ID, "LANG": "C.UTF-8", **more}
        names = {f"{self.runtime}ENV_{name}": value for name, value in inside.items()}
        return {**names, f"{self.runtime}_NO_EVAL": "1"}

    def worked(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return the same while it works."""
        if not self.unsealed:
            return self.prepared(environ, AIFLUX_SEALED="1")
        return self.prepared(environ, AIFLUX_SEALED="0", AIFLUX_UNSEALED=self.unsealed)


def mount(path: Path | None, read_only: bool = False) -> str:
    text = str(path).replace('"', '""')
    return f'type=bind,"source={text}","destination={text}"' + ",ro" * read_only


TRAPPING = """\
[[ $2 == run && $* == *'.aiflux --shard'* ]] || exit 0
trap 'echo TERM >>"$call/signals"; exit 5' TERM
trap 'echo USR1 >>"$call/signals"; exit 5' USR1
trap 'echo HUP >>"$call/signals"; exit 5' HUP
trap 'echo INT >>"$call/signals"; exit 5' INT
touch "$here/ready"
while :; do sleep 0.02 & wait $!; done
"""


class Place:
    """A directory with an input, models and an image, and a fake Apptainer."""

    def __init__(self, folder: Path, name: str = "in.jsonl") -> None:
        self.folder = folder
        self.fakes = FakeCommands(folder.parent / ".fakes")  # a colon would split PATH
        self.fakes.add("apptainer")
        self.input = folder / name
        self.input.write_text("{}\n", encoding="utf-8")
        self.image = folder / "image.sif"
        make_sif(self.image, version="1")
        self.models = folder / "models"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def job(self, **changes: object) -> JobScript:
        values: dict[str, object] = {
            "name": "aiflux",
            "slurm": SlurmConfig(),
            "image": self.image,
            "input": self.input,
            "output_dir": self.folder,
            "models_dir": self.models,
            "run_dir": self.folder / "out.json.aiflux",
            "log": self.folder,
        }
        return JobScript(**(values | changes))  # type: ignore[arg-type]

    def container(self, call: Call, **changes: object) -> Container:
        values: dict[str, object] = {
            "image": self.image,
            "input": self.input,
            "output_dir": self.folder,
            "models_dir": self.models,
            "workdir": call.argv[call.argv.index("--workdir") + 1],
        }
        return Container(**(values | changes))  # type: ignore[arg-type]

    def environ(self, **more: str) -> dict[str, str]:
        return {"PATH": self.fakes.path, "HOME": "/nowhere", "TMPDIR": str(self.temporary), **more}

    def bash(
        self, text: str, *arguments: str, environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        script = self.fakes.folder / "script"
        script.write_bytes(text.encode("utf-8", "surrogateescape"))
        return subprocess.run(
            ["bash", str(script), *arguments],
            env=self.environ() if environ is None else dict(environ),
            cwd=self.folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )


@pytest.fixture
def place(awkward: Path) -> Place:
    return Place(awkward)


def inside(call: Call) -> dict[str, str]:
    """Return the mounts of a call."""
    return {name: v for name, v in call.environ.items() if name.startswith("APPTAINER")}


# --- the two steps ---------------------------------------------------------------------------


def test_only_the_preparation_has_the_network(place: Place) -> None:
    environ = place.environ(
        SLURM_JOB_ID="7",
        SLURM_ARRAY_JOB_ID="5",
        SLURM_ARRAY_TASK_ID="2",
        SLURM_RESTART_COUNT="1",
        SLURM_JOB_NAME="a,b $(c)",
        SLURM_JOB_END_TIME="1790000000",
        CUDA_VISIBLE_DEVICES="0,1",
        AIFLUX_ALLOW_CPU="1",
        AIFLUX_DATA_DIR="/of/the/host",
        AIFLUX_IMAGE="/of/the/host",
        AIFLUX_OLLAMA="/of/the/host",
        AIFLUX_SEAL="yes",
        AIFLUX_SEALED="0",
        AIFLUX_UNSEALED="of the host",
        SECRET="/of/the/host",
        http_proxy="http://p:1",
        HTTPS_PROXY="http://p:2",
        all_proxy="http://p:3",
        LANG="xx",
    )
    done = place.bash(render(place.job()), environ=environ)
    assert (done.returncode, done.stderr) == (0, "")
    prepare, probe, work = place.fakes.calls("apptainer")
    container = place.container(prepare)
    run_dir = str(place.folder / "out.json.aiflux")
    deadline = ["--deadline", "1790000000"]
    shard = ["--shard", "0"]
    assert prepare.argv == container.prepare("--run-dir", run_dir, "--prepare", *shard, *deadline)
    assert probe.argv == probe_command(Path("apptainer"), place.image)[1:]
    assert work.argv == container.work("--run-dir", run_dir, "--shard", "0", *deadline)
    proxies = {"http_proxy": "http://p:1", "HTTPS_PROXY": "http://p:2"}
    assert inside(prepare) == container.prepared(environ, **proxies)
    assert inside(work) == container.worked(environ)
    assert not any(name.lower().endswith("_proxy") for name in work.environ)


def test_a_local_run_executes_the_containers_of_a_job(place: Place) -> None:
    """Only Slurm's part is missing: modules, setup and the job's time limit."""
    for script in (render(place.job()), render_local(place.job())):
        done = place.bash(script)
        assert (done.returncode, done.stderr) == (0, "")
    calls = place.fakes.calls("apptainer")
    of_job, local = calls[:3], calls[3:]
    for one, other in zip(of_job, local, strict=True):
        words = [word for word in other.argv if "aiflux." not in word or "json" in word]
        assert words == [word for word in one.argv if "aiflux." not in word or "json" in word]
        assert inside(one) == inside(other)
    assert "#SBATCH" not in render_local(place.job())


def test_models_are_pulled_with_the_network_and_nothing_else_is_mounted(place: Place) -> None:
    done = place.bash(render_models(place.image, place.models, ["--pull", "a b:1"]))
    assert (done.returncode, done.stderr) == (0, "")
    (call,) = place.fakes.calls("apptainer")
    container = place.container(call, input=place.image, output_dir=place.models, vendor="")
    assert call.argv == container.prepare("--pull", "a b:1")
    assert inside(call) == container.prepared({})
    assert place.models.is_dir()


def test_a_node_that_cannot_seal_warns_and_continues(place: Place) -> None:
    place.fakes.add("apptainer", "[[ $2 == run ]] || { echo no netns >&2; exit 255; }")
    done = place.bash(render(place.job()))
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    why = "this node cannot isolate a container from the network (no netns)"
    assert why in done.stderr
    work = place.fakes.calls("apptainer")[2]
    container = place.container(work, unsealed=why)
    assert work.argv == container.work(*work.argv[-4:])
    assert inside(work) == container.worked({})


def test_sealing_is_not_tried_where_the_site_forbids_it(place: Place) -> None:
    done = place.bash(render(place.job(slurm=SlurmConfig(seal=False))))
    assert (done.returncode, done.stderr) == (0, "")
    _, work = place.fakes.calls("apptainer")
    container = place.container(work, unsealed="--no-seal")
    assert work.argv == container.work(*work.argv[-4:])
    assert inside(work) == container.worked({})


def test_models_next_to_the_output_are_mounted_once(place: Place) -> None:
    done = place.bash(render(place.job(models_dir=place.folder)))
    assert (done.returncode, done.stderr) == (0, "")
    prepare, _, work = place.fakes.calls("apptainer")
    container = place.container(work, models_dir=place.folder)
    assert work.argv == container.work(*work.argv[-4:])
    assert [call.argv.count("--mount") for call in (prepare, work)] == [2, 2]


def test_an_engine_elsewhere_needs_the_network_and_no_models(place: Place) -> None:
    done = place.bash(render(place.job(models_dir=None)))
    assert (done.returncode, done.stderr) == (0, "")
    prepare, work = place.fakes.calls("apptainer")
    container = place.container(work, models_dir=None, unsealed="the engine is elsewhere")
    assert prepare.argv == container.prepare(*prepare.argv[-5:])
    assert work.argv == container.work(*work.argv[-4:])
    assert not place.models.exists()


def test_an_output_among_the_models_stays_writable(place: Place) -> None:
    output_dir = place.models / "out"
    output_dir.mkdir(parents=True)
    place.bash(render(place.job(output_dir=output_dir)))
    work = place.fakes.calls("apptainer")[2]
    assert work.argv == place.container(work, output_dir=output_dir).work(*work.argv[-4:])
    mounts = [value for value in work.argv if value.startswith("type=bind")]
    assert mounts == [mount(place.models, True), mount(output_dir), mount(place.input, True)]


def test_without_a_gpu_apptainer_gets_no_nv(place: Place) -> None:
    place.bash(render(place.job(slurm=SlurmConfig(gpus_per_node="0"))))
    words = [word for call in place.fakes.calls("apptainer") for word in call.argv]
    assert not {"--nv", "--rocm"} & {*words}


PRIVATE = ("unshare", "--user", "--map-root-user", "--mount")
# A private /dev, where device files are ordinary ones.
OTHER_DEV = """\
set -e
mount -t tmpfs dev "$1"
for name in null zero urandom tty; do : >"$1/$name"; mount --bind "/dev/$name" "$1/$name"; done
ln -s /proc/self/fd "$1/fd"
for name in $2; do : >"$1/$name"; done
mount --rbind "$1" /dev
exec bash "$3"
"""


@pytest.mark.parametrize(
    ("devices", "chosen", "vendor"),
    [
        ("kfd", "auto", "amd"),
        ("", "auto", "nvidia"),
        ("nvidiactl kfd", "auto", "nvidia"),  # an AMD processor with graphics, and an NVIDIA GPU
        ("kfd", "nvidia", "nvidia"),
        ("", "amd", "amd"),
    ],
)
def test_the_container_gets_the_gpus_that_the_node_has(
    place: Place, devices: str, chosen: str, vendor: str
) -> None:
    if subprocess.run([*PRIVATE, "true"], check=False).returncode != 0:
        pytest.skip("this machine has no user namespaces, so there is no private /dev")
    script = place.fakes.folder / "script"
    script.write_bytes(os.fsencode(render(place.job(slurm=SlurmConfig(gpu_vendor=chosen)))))
    dev = place.temporary / "dev"
    dev.mkdir()
    environ = place.environ(
        ROCR_VISIBLE_DEVICES="2,3", HIP_VISIBLE_DEVICES="0", AIFLUX_GPU_VENDOR="of the host"
    )
    done = subprocess.run(
        [*PRIVATE, "bash", "-c", OTHER_DEV, "bash", str(dev), devices, str(script)],
        env=environ, cwd=place.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    prepare, _, work = place.fakes.calls("apptainer")
    container = place.container(prepare, vendor=vendor)
    del environ["AIFLUX_GPU_VENDOR"]
    assert prepare.argv[:5] == container.prepare()[:5]
    assert inside(prepare) == container.prepared(environ)
    assert inside(work) == container.worked(environ)


@pytest.mark.parametrize("code", [2, 4, 5])
def test_a_failed_preparation_ends_the_job(place: Place, code: int) -> None:
    place.fakes.add("apptainer", f"exit {code}")
    assert place.bash(render(place.job())).returncode == code
    assert len(place.fakes.calls("apptainer")) == 1


@pytest.mark.parametrize(("code", "ends"), [(0, None), (10, 0), (2, 2), (5, 5)])
def test_a_step_of_a_chain_is_planned_before_the_container(
    place: Place, code: int, ends: int | None
) -> None:
    """Code 10 stands for nothing to do."""
    command = ("bash", "-c", f'echo "$@" >planned; exit {code}', "bash", "a b")
    done = place.bash(render(place.job(plan_step=command, tasks="0-3", first=4)),
                      environ=place.environ(SLURM_ARRAY_TASK_ID="2"))  # fmt: skip
    assert done.returncode == (ends or 0), done.stderr
    assert (place.folder / "planned").read_text() == "a b 6\n"
    assert len(place.fakes.calls("apptainer")) == (3 if ends is None else 0)


def test_a_step_without_its_python_is_a_usage_error_with_a_remedy(place: Place) -> None:
    done = place.bash(render(place.job(plan_step=("/nowhere/python",))))
    assert done.returncode == 2
    assert "/nowhere/python cannot run on" in done.stderr
    assert "install AI-Flux where every node sees it" in done.stderr


@pytest.mark.parametrize("code", [0, 1, 3, 4, 5])
def test_the_exit_code_is_that_of_the_worker(place: Place, code: int) -> None:
    place.fakes.add("apptainer", f"[[ $* != *'.aiflux --shard'* ]] || exit {code}")
    assert place.bash(render(place.job())).returncode == code


@pytest.mark.parametrize(
    ("code", "stands_for", "words"),
    [(255, 4, "could not start the container"), (137, 5, "killed by signal 9")],
)
@pytest.mark.parametrize("step", ["--prepare", "'.aiflux --shard'"])
def test_an_end_without_a_worker_s_message_is_explained(
    place: Place, code: int, stands_for: int, words: str, step: str
) -> None:
    place.fakes.add("apptainer", f"[[ $2 != run || $* != *{step}* ]] || exit {code}")
    done = place.bash(render(place.job()))
    assert done.returncode == stands_for
    assert words in done.stderr


def test_the_private_directory_is_removed_at_the_end(place: Place) -> None:
    place.fakes.add(
        "apptainer",
        'for d in "$TMPDIR"/*; do >"$d/x"; [[ $2 != run ]] || stat -c "%a %n" "$d"; done',
    )
    done = place.bash(render(place.job()))
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["700", "700"]
    assert list(place.temporary.iterdir()) == []


def test_the_next_start_removes_the_private_directory_of_a_killed_job(place: Place) -> None:
    """The directory of a running job stays, because its lock is held."""
    killed, living = start(place, TRAPPING), None
    try:
        (left,) = place.temporary.iterdir()
        children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
        killed.kill()
        killed.wait()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.2)  # the container's own child ends
        (place.fakes.folder / "ready").unlink()
        living = start(place, TRAPPING)
        (used,) = place.temporary.iterdir()
        assert used != left
        place.fakes.add("apptainer")
        assert place.bash(render(place.job())).returncode == 0
        assert list(place.temporary.iterdir()) == [used]
    finally:
        if living is not None:
            living.terminate()
            living.wait(10)


def test_modules_and_setup_run_before_apptainer_is_searched(place: Place) -> None:
    (place.fakes.folder / "apptainer").rename(place.folder / "apptainer")
    setup = (
        'module() { echo "module $*"; PATH=$PWD:$PATH; }',
        "export AIFLUX_ALLOW_CPU=1",
    )
    text = render(place.job(slurm=SlurmConfig(modules=("a b", "c"), setup=setup)))
    # `module` must be there before setup runs, as at a site.
    text = text.replace("prepare_args=", f"{setup[0]}\nprepare_args=", 1)
    (place.folder / "calls").mkdir()
    done = place.bash(text)
    assert done.stdout.splitlines() == ["module load a b c"]


def commands_only(folder: Path, *commands: str) -> str:
    """Return a PATH with these commands only."""
    folder.mkdir()
    for command in commands:
        source = next(p for d in ("/usr/bin", "/bin") if (p := Path(d) / command).exists())
        (folder / command).symlink_to(source)
    return str(folder)


def test_a_missing_apptainer_is_a_usage_error_with_a_remedy(place: Place) -> None:
    path = commands_only(place.folder.parent / "bin", "bash", "mktemp", "rm", "mkdir")
    done = place.bash(render(place.job()), environ={"PATH": path, "HOME": "/nowhere"})
    assert done.returncode == 2
    assert "neither apptainer nor singularity" in done.stderr
    assert "  -> " in done.stderr


def test_singularity_gets_its_own_variables(place: Place) -> None:
    path = commands_only(
        place.folder.parent / "bin",
        "bash",
        "env",
        "head",
        "grep",
        "od",
        "tr",
        "mktemp",
        "rm",
        "mkdir",
        "dirname",
        "basename",
    )
    place.fakes.add("singularity")
    (place.folder.parent / "bin" / "singularity").symlink_to(place.fakes.folder / "singularity")
    (place.folder.parent / "bin" / "calls").mkdir()
    environ = {**place.environ(), "PATH": path}
    done = place.bash(render(place.job()), environ=environ)
    assert (done.returncode, done.stderr) == (0, "")
    call = place.folder.parent / "bin" / "calls" / "singularity-2"
    recorded = dict(item.split("=", 1) for item in (call / "env").read_text().split("\0") if item)
    argv = (call / "argv").read_text().split("\0")
    kept = {key: value for key, value in recorded.items() if key.startswith("SINGULARITY")}
    assert kept == place.container(Call(argv, {}), runtime="SINGULARITY").worked({})


def test_an_older_slurm_is_queried_for_the_job_s_end(place: Place) -> None:
    place.fakes.say("squeue", "2026-11-23T12:00:00\n")
    place.bash(render(place.job()), environ=place.environ(SLURM_JOB_ID="7", TZ="UTC"))
    assert place.fakes.calls("apptainer")[2].argv[-2:] == ["--deadline", "1795435200"]
    assert place.fakes.calls("squeue")[0].argv == ["-h", "-j", "7", "-o", "%e"]


def test_the_end_of_a_task_is_not_that_of_its_array(place: Place) -> None:
    place.fakes.say("squeue", "2026-11-23T12:00:00\n")
    place.bash(render(place.job(tasks="0-2")), environ=place.environ(**TASK))
    assert place.fakes.calls("squeue")[0].argv == ["-h", "-j", "5_2", "-o", "%e"]


@pytest.mark.parametrize("answer", ["", "NONE", "N/A"])
def test_a_job_without_an_end_has_no_deadline(place: Place, answer: str) -> None:
    place.fakes.say("squeue", answer)
    done = place.bash(render(place.job()), environ=place.environ(SLURM_JOB_ID="7"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "--deadline" not in place.fakes.calls("apptainer")[2].argv


# --- back to the queue -------------------------------------------------------------------------

TASK = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}


def marking(shard: int, code: int = 5) -> str:
    """Return a worker that leaves the mark of a shard."""
    return f"""\
[[ $* == *'.aiflux --shard'* ]] || exit 0
mkdir -p out.json.aiflux/status
touch out.json.aiflux/status/shard-{shard:04d}.requeue
exit {code}
"""


def requeues(place: Place) -> list[list[str]]:
    return [call.argv for call in place.fakes.calls("scontrol")]


def mark(place: Place, shard: int) -> Path:
    return place.folder / "out.json.aiflux" / "status" / f"shard-{shard:04d}.requeue"


def test_a_job_is_requeued_at_the_worker_s_request(place: Place) -> None:
    place.fakes.add("apptainer", marking(0))
    place.fakes.add("scontrol", 'ls -A -- "$TMPDIR"')
    done = place.bash(render(place.job()), environ=place.environ(SLURM_JOB_ID="7"))
    assert done.returncode == 5
    assert requeues(place) == [["requeue", "7"]]
    assert not mark(place, 0).exists()
    assert len(done.stderr.splitlines()) == 1
    assert "job 7 goes back to the queue" in done.stderr
    assert done.stdout == "", "the private directory is gone before Slurm ends the job"


def test_a_task_is_requeued_without_the_rest_of_its_array(place: Place) -> None:
    place.fakes.add("apptainer", marking(42))
    place.fakes.add("scontrol")
    text = render(place.job(tasks="0-2", first=40))
    done = place.bash(text, environ=place.environ(**TASK))
    assert done.returncode == 5
    assert requeues(place) == [["requeue", "5_2"]]
    assert not mark(place, 42).exists()
    assert place.fakes.calls("apptainer")[2].argv[-2:] == ["--shard", "42"]


def test_the_generic_script_is_requeued_too(place: Place) -> None:
    place.fakes.add("apptainer", marking(0))
    place.fakes.add("scontrol")
    environ = {"SLURM_JOB_ID": "7", "AIFLUX_IMAGE": str(place.image)}
    assert generic(place, "in.jsonl", "out.json", **environ).returncode == 5
    assert requeues(place)[-1] == ["requeue", "7"]


@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_only_an_unfinished_run_is_requeued(place: Place, code: int) -> None:
    place.fakes.add("apptainer", marking(0, code))
    place.fakes.add("scontrol")
    environ = place.environ(SLURM_JOB_ID="7")
    assert place.bash(render(place.job()), environ=environ).returncode == code
    assert requeues(place) == []


def test_without_the_worker_s_mark_of_this_start_nothing_is_requeued(place: Place) -> None:
    mark(place, 0).parent.mkdir(parents=True)
    mark(place, 0).touch()
    place.fakes.add("apptainer", "[[ $* != *'.aiflux --shard'* ]] || exit 5")
    place.fakes.add("scontrol")
    environ = place.environ(SLURM_JOB_ID="7")
    assert place.bash(render(place.job()), environ=environ).returncode == 5
    assert requeues(place) == []
    assert not mark(place, 0).exists()


def test_nothing_is_requeued_where_requeues_are_disabled(place: Place) -> None:
    place.fakes.add("apptainer", marking(0))
    place.fakes.add("scontrol")
    environ = place.environ(SLURM_JOB_ID="7")
    assert place.bash(render(place.job(max_requeues=0)), environ=environ).returncode == 5
    assert place.bash(render(place.job()), environ=place.environ()).returncode == 5, "no job"
    assert requeues(place) == []


def test_a_cancelled_job_is_not_requeued(place: Place) -> None:
    place.fakes.add("scontrol")
    marked = TRAPPING.replace("exit 5", 'touch "$here/mark"; exit 5')
    link(place, 0)
    process = start(place, marked, SLURM_JOB_ID="7")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 5
    assert mark(place, 0).exists()
    assert requeues(place) == []


def test_a_job_whose_time_is_nearly_up_is_requeued(place: Place) -> None:
    place.fakes.add("scontrol")
    link(place, 0)
    process = start(place, TRAPPING.replace("exit 5", 'touch "$here/mark"; exit 5'),
                    SLURM_JOB_ID="7")  # fmt: skip
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 5
    assert requeues(place) == [["requeue", "7"]]


def test_slurm_s_refusal_is_shown_with_a_remedy(place: Place) -> None:
    place.fakes.add("apptainer", marking(0))
    place.fakes.say("scontrol", stderr="7: Access/permission denied\n", status=1)
    done = place.bash(render(place.job()), environ=place.environ(SLURM_JOB_ID="7"))
    assert done.returncode == 5
    assert "did not requeue job 7: 7: Access/permission denied" in done.stderr
    remedy = done.stderr.splitlines()[-1]
    assert "results so far are kept" in remedy
    quoted = remedy.partition("aiflux resume ")[2]
    printed = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True)
    assert printed.stdout.decode() == str(place.folder / "out.json.aiflux")


def test_a_node_without_scontrol_shows_a_remedy(place: Place) -> None:
    place.fakes.add("apptainer", marking(0))
    path = commands_only(
        *(
            place.folder.parent / "bin",
            "bash",
            "env",
            "head",
            "grep",
            "mktemp",
            "rm",
            "mkdir",
            "dirname",
        ),
        *("basename", "touch"),
    )
    environ = {**place.environ(SLURM_JOB_ID="7"), "PATH": f"{place.fakes.folder}:{path}"}
    done = place.bash(render(place.job()), environ=environ)
    assert done.returncode == 5
    assert "scontrol: command not found" in done.stderr
    assert "aiflux resume " in done.stderr


@pytest.mark.parametrize("end", ['kill "$(<"$here/script.pid")"; exit 1', "kill $$; sleep 1"])
def test_the_signal_of_an_accepted_requeue_is_not_a_refusal(place: Place, end: str) -> None:
    place.fakes.add("apptainer", 'echo "$PPID" >"$here/script.pid"\n' + marking(0))
    place.fakes.add("scontrol", end)
    done = place.bash(render(place.job()), environ=place.environ(SLURM_JOB_ID="7"))
    assert done.returncode == 5
    assert "error" not in done.stderr


# --- signals -----------------------------------------------------------------------------------


def link(place: Place, shard: int) -> None:
    """Let a fake leave the mark of a shard by touching ``$here/mark``."""
    mark(place, shard).parent.mkdir(parents=True)
    place.fakes.folder.joinpath("mark").symlink_to(mark(place, shard))


def start(place: Place, behaviour: str, **environ: str) -> subprocess.Popen[bytes]:
    place.fakes.add("apptainer", behaviour)
    return begin(place, render(place.job()), **environ)


def begin(place: Place, text: str, **environ: str) -> subprocess.Popen[bytes]:
    """Start a script; return when its worker is ready."""
    script = place.fakes.folder / "script"
    script.write_text(text, encoding="utf-8")
    process = subprocess.Popen(["bash", str(script)], env=place.environ(**environ))
    deadline = time.monotonic() + 10
    while not (place.fakes.folder / "ready").exists():
        assert process.poll() is None, "the job ended too early"
        assert time.monotonic() < deadline, "the container did not start"
        time.sleep(0.01)
    return process


def signals_seen(place: Place, call: int) -> list[str]:
    return (place.fakes.folder / "calls" / f"apptainer-{call}" / "signals").read_text().split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_reaches_the_worker_and_its_exit_code_is_the_job_s(
    place: Place, number: int
) -> None:
    process = start(place, TRAPPING)
    process.send_signal(number)
    assert process.wait(10) == 5
    assert signals_seen(place, 2) == [signal.Signals(number).name.removeprefix("SIG")]
    assert list(place.temporary.iterdir()) == []


def test_the_job_waits_for_the_worker_and_forwards_a_second_signal(place: Place) -> None:
    slow = TRAPPING.replace("; exit 5' TERM", "; sleep 0.2; exit 5' TERM")
    process = start(place, slow)
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.wait(10) == 5


def test_a_signal_never_replaces_the_worker_s_exit_code(place: Place) -> None:
    for delay in range(8):
        (place.fakes.folder / "ready").unlink(missing_ok=True)
        process = start(place, TRAPPING)
        process.send_signal(signal.SIGTERM)
        time.sleep(delay / 1000)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(10) == 5


def test_a_runtime_that_dies_of_the_signal_counts_as_stopped(place: Place) -> None:
    process = start(place, TRAPPING.replace("trap '", ": '"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 5


def test_a_signal_during_the_preparation_ends_the_job_before_the_work(place: Place) -> None:
    process = start(place, "trap 'exit 0' TERM; touch \"$here/ready\"; sleep 5 & wait $!; kill $!")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 5
    assert len(place.fakes.calls("apptainer")) == 1, "no work was begun"


# --- without an image --------------------------------------------------------------------------


def without_image(place: Place, behaviour: str = "", **changes: object) -> JobScript:
    """Return a job whose worker is a recording fake."""
    worker = place.fakes.add("worker python", behaviour)
    words = (str(worker), "-m", "aiflux.worker")
    return place.job(image=None, models_dir=None, worker=words, **changes)


def test_a_worker_without_an_image_runs_where_the_job_is(place: Place) -> None:
    job = without_image(place)
    environ = place.environ(SLURM_JOB_END_TIME="1790000000", AIFLUX_API_KEY="k", MINE="1")
    done = place.bash(render(job), environ=environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert place.fakes.calls("apptainer") == []
    check, work = place.fakes.calls("worker python")
    assert check.argv == ["-m", "aiflux.worker", "--version"]
    words = ["--run-dir", str(job.run_dir), "--shard", "0", "--deadline", "1790000000"]
    assert work.argv == ["-m", "aiflux.worker", *words]
    assert work.environ["AIFLUX_SEALED"] == "0"
    assert work.environ["AIFLUX_UNSEALED"] == "--engine-command: there is no container"
    assert (work.environ["AIFLUX_API_KEY"], work.environ["MINE"]) == ("k", "1")
    # Python would import files of its current directory.
    assert work.environ["PWD"] == work.environ["TMPDIR"] != str(place.folder)
    assert work.environ["AIFLUX_JOB_DIR"] == str(place.folder)
    assert os.listdir(place.temporary) == []


def test_the_modules_libraries_are_for_the_engines_and_not_for_the_worker(place: Place) -> None:
    setup = ("export PYTHONPATH=/module LD_LIBRARY_PATH=/module/lib", "unset LD_PRELOAD")
    job = without_image(place, slurm=SlurmConfig(setup=setup))
    words = ("env", "PYTHONPATH=/ours", *job.worker)
    script = render(replace(job, worker=words))
    environ = place.environ(PYTHONPATH="/login", PYTHONHOME="/home", LD_PRELOAD="/x")
    done = place.bash(script, environ=environ)
    assert done.returncode == 0, done.stderr
    for call in place.fakes.calls("worker python"):
        worker = {name: call.environ.get(name) for name in LIBRARY_VARIABLES}
        assert worker == {**dict.fromkeys(LIBRARY_VARIABLES), "PYTHONPATH": "/ours"}
    engine = job_environment(call.environ)
    assert {name: engine.get(name) for name in LIBRARY_VARIABLES} == {
        "PYTHONPATH": "/module",
        "PYTHONHOME": "/home",
        "LD_LIBRARY_PATH": "/module/lib",
        "LD_PRELOAD": None,
    }
    assert not any(name.startswith("AIFLUX_") for name in engine)


def test_the_worker_is_the_python_of_this_process() -> None:
    assert package_command("aiflux.worker", {}) == (sys.executable, "-m", "aiflux.worker")
    with_libraries = package_command(
        "aiflux.worker", {"LD_LIBRARY_PATH": "/a b", "HOME": "/x", "PYTHONPATH": ""}
    )
    assert with_libraries[:2] == ("env", "LD_LIBRARY_PATH=/a b")
    assert with_libraries[2:] == package_command("aiflux.worker", {})
    relative = package_command(
        "aiflux.worker", {"PYTHONPATH": f"src{os.pathsep}/b", "LD_PRELOAD": "libx.so"}
    )
    assert relative[1:3] == (f"PYTHONPATH={Path.cwd()}/src{os.pathsep}/b", "LD_PRELOAD=libx.so")


def test_a_node_without_the_package_says_so(place: Place) -> None:
    script = render(
        replace(without_image(place), worker=("/nowhere/python", "-m", "aiflux.worker"))
    )
    done = place.bash(script)
    assert done.returncode == 2
    assert "the worker cannot run on" in done.stderr
    assert "/nowhere/python" in done.stderr
    assert "-> install AI-Flux where every node sees it" in done.stderr


@pytest.mark.parametrize(("code", "ended"), [(0, 0), (3, 3), (4, 4), (255, 255)])
def test_the_exit_code_of_a_worker_without_an_image_comes_out(
    place: Place, code: int, ended: int
) -> None:
    fails = f"[[ $* != *--shard* ]] || exit {code}"
    assert place.bash(render(without_image(place, fails))).returncode == ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_a_worker_without_an_image(place: Place, number: int) -> None:
    job = without_image(place, TRAPPING.replace("$2 == run && ", ""))
    process = begin(place, render(job))
    process.send_signal(number)
    assert process.wait(10) == 5
    seen = place.fakes.folder / "calls" / "worker python-1" / "signals"
    assert seen.read_text().split() == [signal.Signals(number).name.removeprefix("SIG")]
    assert list(place.temporary.iterdir()) == []


def test_a_worker_without_an_image_that_was_killed_is_explained(place: Place) -> None:
    job = without_image(place, "[[ $* != *--shard* ]] || kill -KILL $$")
    done = place.bash(render(job))
    assert done.returncode == 5
    assert "the worker was killed by signal 9" in done.stderr


def test_a_worker_without_an_image_may_ask_for_a_requeue(place: Place) -> None:
    place.fakes.say("scontrol")
    job = without_image(place, '[[ $* != *--shard* ]] || { touch "$here/mark"; exit 5; }')
    link(place, 0)
    done = place.bash(render(job), environ=place.environ(SLURM_JOB_ID="7"))
    assert done.returncode == 5
    assert ["requeue", "7"] in [call.argv for call in place.fakes.calls("scontrol")]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_the_generic_script_refuses_a_command(place: Place, how: str) -> None:
    if how == "option":
        done = generic(place, "in.jsonl", "--engine-command=x {port}")
    else:
        done = generic(place, "in.jsonl", AIFLUX_ENGINE_COMMAND="x {port}")
    assert done.returncode == 2
    assert "--engine-command runs without an image" in done.stderr
    assert "aiflux run --engine-command" in done.stderr
    assert place.fakes.calls("apptainer") == []


# --- the generic script ------------------------------------------------------------------------


def generic(place: Place, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    values = {"AIFLUX_IMAGE": str(place.image), "AIFLUX_MODELS_DIR": str(place.models), **environ}
    return place.bash(generic_script(), *arguments, environ=place.environ(**values))


def test_the_generic_script_prepares_a_plan_and_works_on_it(place: Place) -> None:
    done = generic(place, "in.jsonl", "out.json", "--model", "a b", MODEL_NAME="m,1")
    assert (done.returncode, done.stderr) == (0, "")
    prepare, _, work = place.fakes.calls("apptainer")
    container = place.container(prepare)
    output = str(place.folder / "out.json")
    arguments = [str(place.input), output, "--prepare", "--model", "a b"]
    assert prepare.argv == container.prepare(*arguments)
    assert work.argv == container.work("--run-dir", f"{output}.aiflux", "--shard", "0")
    assert inside(prepare)["APPTAINERENV_MODEL_NAME"] == "m,1"


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("in.jsonl", "in.results.json"),
        ("a.b.jsonl", "a.b.results.json"),
        (".hidden", ".hidden.results.json"),
        ("plain", "plain.results.json"),
    ],
)
def test_the_default_output_is_that_of_the_command_line(
    tmp_path: Path, name: str, results: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    place = Place(folder, name)
    assert generic(place, name, "--force").returncode == 0
    argv = place.fakes.calls("apptainer")[0].argv
    assert argv[-4:] == [str(place.input), str(folder / results), "--prepare", "--force"]


def test_paths_are_relative_to_where_sbatch_was_called(place: Place) -> None:
    there = place.folder / "there"
    there.mkdir()
    (there / "in.jsonl").touch()
    assert generic(place, "in.jsonl", SLURM_SUBMIT_DIR=str(there)).returncode == 0
    assert str(there / "in.jsonl") in place.fakes.calls("apptainer")[0].argv


@pytest.mark.parametrize(
    ("arguments", "value", "why"),
    [
        ([], "", None),
        ([], "TRUE", None),
        ([], "1", None),
        ([], "No", "--no-seal"),
        ([], "0", "--no-seal"),
        (["--model", "m", "--no-seal", "--force"], "yes", "--no-seal"),
        (["--seal", "--force"], "no", None),
    ],
)
def test_the_generic_script_can_keep_the_network(
    place: Place, arguments: list[str], value: str, why: str | None
) -> None:
    done = generic(place, "in.jsonl", *arguments, AIFLUX_SEAL=value)
    assert done.returncode == 0, done.stderr
    calls = place.fakes.calls("apptainer")
    assert len(calls) == (3 if why is None else 2)
    assert not {"--no-seal", "--seal"} & {*calls[0].argv}, "they are no options of the worker"
    assert ("--force" in calls[0].argv) is bool(arguments)
    assert ("--net" in calls[-1].argv) is (why is None)
    assert inside(calls[-1]).get("APPTAINERENV_AIFLUX_UNSEALED") == why


def test_the_generic_script_uses_the_image_for_amd_gpus(place: Place) -> None:
    amd = {"AIFLUX_GPU_VENDOR": "amd", "AIFLUX_IMAGE": ""}
    done = generic(place, "in.jsonl", **amd)
    assert "no image aiflux-amd.sif" in done.stderr
    assert "make image ENGINE=ollama GPU=amd" in done.stderr
    image = make_sif(place.folder / "aiflux-amd.sif", version="1")
    assert generic(place, "in.jsonl", **amd).returncode == 0
    call = place.fakes.calls("apptainer")[-1]
    assert {str(image), "--rocm"} <= {*call.argv}
    assert inside(call)["APPTAINERENV_AIFLUX_GPU_VENDOR"] == "amd"
    done = generic(place, "in.jsonl", AIFLUX_GPU_VENDOR="intel")
    assert (done.returncode, "auto, nvidia or amd" in done.stderr) == (2, True)


def test_the_generic_script_refuses_an_invalid_seal_setting(place: Place) -> None:
    done = generic(place, "in.jsonl", AIFLUX_SEAL="perhaps")
    assert done.returncode == 2
    assert "AIFLUX_SEAL is 'perhaps'" in done.stderr
    assert place.fakes.calls("apptainer") == []


@pytest.mark.parametrize("how", ["option", "environment"])
def test_the_generic_script_is_not_sealed_from_an_engine_elsewhere(place: Place, how: str) -> None:
    url = "http://h:1"
    if how == "option":
        generic(place, "in.jsonl", f"--engine-url={url}")
    else:
        generic(place, "in.jsonl", AIFLUX_ENGINE_URL=url)
    assert len(place.fakes.calls("apptainer")) == 2
    assert inside(place.fakes.calls("apptainer")[1])["APPTAINERENV_AIFLUX_SEALED"] == "0"


@pytest.mark.parametrize("how", ["word", "words", "environment"])
def test_certificates_for_an_engine_elsewhere_are_mounted(place: Place, how: str) -> None:
    ca = place.folder / "our ca.pem"
    ca.touch()
    given = {"word": ["--engine-ca=our ca.pem"], "words": ["--engine-ca", "our ca.pem"]}
    variables = {"AIFLUX_ENGINE_CA": "our ca.pem"} if how == "environment" else {}
    done = generic(place, "in.jsonl", "--engine-url", "https://h", *given.get(how, []), **variables)
    assert done.returncode == 0, done.stderr
    prepare, work = place.fakes.calls("apptainer")
    assert mount(ca, True) in prepare.argv
    assert mount(ca, True) in work.argv
    assert prepare.argv[-2:] == ["--engine-ca", str(ca)], "the last one counts"


def test_missing_certificates_are_reported_before_the_container_starts(place: Place) -> None:
    done = generic(place, "in.jsonl", "--engine-url=https://h", "--engine-ca=no.pem")
    assert done.returncode == 2
    assert "no.pem, which cannot be read" in done.stderr
    assert place.fakes.calls("apptainer") == []
    done = generic(place, "in.jsonl", AIFLUX_ENGINE_CA="no.pem")
    assert done.returncode == 0, "there is no engine elsewhere"


def test_a_job_binds_the_certificates_of_its_run(place: Place) -> None:
    ca = place.folder / "ca.pem"
    ca.touch()
    script = render(place.job(models_dir=None, engine_ca=str(ca)))
    assert place.bash(script).returncode == 0
    for call in place.fakes.calls("apptainer"):
        assert mount(ca, True) in call.argv


def test_models_that_are_not_in_the_models_directory_are_mounted(place: Place) -> None:
    """A missing model is reported by the worker."""
    file = place.folder / "my, model.gguf"
    file.touch()
    script = render(place.job(model_paths=(file, place.folder / "absent.gguf")))
    assert place.bash(script).returncode == 0
    prepare, _, work = place.fakes.calls("apptainer")
    for call in (prepare, work):
        assert mount(file, True) in call.argv
        assert not any("absent" in word for word in call.argv)


def test_the_generic_script_mounts_a_model_that_a_path_names(place: Place) -> None:
    file = place.folder / "m.gguf"
    file.touch()
    for words in (("--model", str(file)), (f"--model={file}",), ("--lora", f"a={file}"),
                  (f"--lora=a={file}",)):  # fmt: skip
        assert generic(place, str(place.input), *words).returncode == 0
        assert mount(file, True) in place.fakes.calls("apptainer")[-1].argv


def test_the_generic_script_mounts_the_adapters_of_the_environment(
    place: Place, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    done = generic(place, str(place.input), AIFLUX_LORA=f"a={adapter} b=x")
    assert done.returncode == 0
    assert mount(adapter, True) in place.fakes.calls("apptainer")[-1].argv


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no input"),
        (["missing.jsonl"], "missing.jsonl"),
        (["."], "not a file"),
        (["in.jsonl", "no/such/out.json"], "no/such"),
        (["in.jsonl", "a\nb.json"], "line break"),
    ],
)
def test_wrong_arguments_are_a_usage_error(place: Place, arguments: list[str], words: str) -> None:
    done = generic(place, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "usage: sbatch slurm/run.sbatch" in done.stderr
    assert place.fakes.calls("apptainer") == []


def test_the_image_is_searched_in_four_places(place: Place) -> None:
    checkout = place.folder / "check out"
    containers = place.folder / "data" / "containers"
    places = [place.folder / "named.sif", place.folder / "aiflux.sif",
              checkout / "aiflux.sif", containers / "aiflux.sif"]  # fmt: skip
    place.fakes.say("scontrol", f"JobId=7\n   Command={checkout}/slurm/run.sbatch in.jsonl\n")
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1", "AIFLUX_IMAGE": "named.sif"}
    environ["AIFLUX_DATA_DIR"] = str(place.folder / "data")
    for image in reversed(places):
        image.parent.mkdir(parents=True, exist_ok=True)
        make_sif(image, version="1")
        if image.name != "named.sif":
            environ["AIFLUX_IMAGE"] = ""
        else:
            environ["AIFLUX_IMAGE"] = "named.sif"
        assert generic(place, "in.jsonl", **environ).returncode == 0
        assert str(image) in place.fakes.calls("apptainer")[-1].argv


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        (("--engine", "llamacpp"), {}),
        (("--engine=llamacpp",), {}),
        ((), {"AIFLUX_ENGINE": "llamacpp"}),
    ],
)
def test_the_image_of_the_run_s_engine_is_searched(
    place: Place, words: tuple[str, ...], environ: dict[str, str]
) -> None:
    image = place.folder / "aiflux-llamacpp.sif"
    make_sif(place.folder / "aiflux.sif", version="1")
    done = generic(place, "in.jsonl", *words, AIFLUX_IMAGE="", **environ)
    assert "make image ENGINE=llamacpp" in done.stderr
    make_sif(image, version="1")
    assert generic(place, "in.jsonl", *words, AIFLUX_IMAGE="", **environ).returncode == 0
    assert str(image) in place.fakes.calls("apptainer")[-1].argv
    elsewhere = ("--engine-url", "http://h:1")
    assert generic(place, "in.jsonl", *words, *elsewhere, AIFLUX_IMAGE="").returncode == 0
    assert str(place.folder / "aiflux.sif") in place.fakes.calls("apptainer")[-1].argv


def test_a_job_refuses_an_image_of_another_user(place: Place) -> None:
    make_sif(place.image, engine="theirs")
    for done in (place.bash(render(place.job())), generic(place, "in.jsonl")):
        assert done.returncode == 2
        assert "is not an AI-Flux image" in done.stderr
    assert place.fakes.calls("apptainer") == []


def test_a_missing_image_shows_a_remedy(place: Place) -> None:
    done = generic(place, "in.jsonl", AIFLUX_IMAGE="")
    assert done.returncode == 2
    assert "make image" in done.stderr
    assert "AIFLUX_IMAGE=" in done.stderr


def test_a_missing_named_image_is_not_replaced(place: Place) -> None:
    make_sif(place.folder / "aiflux.sif", version="1")
    done = generic(place, "in.jsonl", AIFLUX_IMAGE="/no/such.sif")
    assert done.returncode == 2
    assert "/no/such.sif" in done.stderr


# --- any name ----------------------------------------------------------------------------------


def csv_fields(option: str) -> list[str]:
    import csv

    return next(csv.reader([option], strict=True))


def expect(path: Path, *, read_only: bool = False) -> list[str]:
    return ["type=bind", f"source={path}", f"destination={path}"] + ["ro"] * read_only


@settings(max_examples=15, deadline=None)
@given(names, names)
@example("$(touch x)'\"\\,:;&|<> *?[#] %j ~!{}", "-rf --prepare")
@example("`id`", "a\rb\tc\x7f\x1b")
def test_any_name_reaches_the_worker_unchanged(folder_name: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / folder_name
        folder.mkdir()
        place = Place(folder, f"{name}.in")
        text = render(place.job(run_dir=folder / f"{name}.aiflux"))
        done = place.bash(text)
        assert (done.returncode, done.stderr) == (0, "")
        argv = place.fakes.calls("apptainer")[2].argv
        assert argv[-4:] == ["--run-dir", str(folder / f"{name}.aiflux"), "--shard", "0"]
        mounts = [csv_fields(word) for word in argv if word.startswith("type=bind")]
        assert mounts == [
            expect(folder),
            expect(place.models, read_only=True),
            expect(place.input, read_only=True),
        ]


@settings(max_examples=15, deadline=None)
@given(names, names)
@example("$(touch x)'\"\\,:;&|<> *?[#] %j ~!{}", "-rf --prepare")
def test_any_name_reaches_the_worker_through_the_generic_script(
    folder_name: str, name: str
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / folder_name
        folder.mkdir()
        place = Place(folder, f"{name}.in")
        done = generic(place, f"{name}.in", f"x{name}.json")
        assert (done.returncode, done.stderr) == (0, "")
        argv = place.fakes.calls("apptainer")[0].argv
        assert argv[-3:] == [str(place.input), str(folder / f"x{name}.json"), "--prepare"]
        assert os.listdir(place.temporary) == []


def test_an_early_usr1_does_not_end_the_preparation(place: Place) -> None:
    """Slurm can send it before the worker starts; the worker determines the job's end by itself."""
    end = str(int(time.time()) + 600)
    # The runtime has no handler of its own yet, as Apptainer while it starts.
    slow = '[[ $* != *--prepare* ]] || { touch "$here/ready"; sleep 0.5; }'
    process = start(place, slow, SLURM_JOB_END_TIME=end, SLURM_JOB_ID="7")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 0
    assert any("--shard" in call.argv for call in place.fakes.calls("apptainer"))
