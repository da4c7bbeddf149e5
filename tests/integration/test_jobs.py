"""Jobs with the real Slurm, Apptainer and Ollama."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.integration.conftest import (
    FRANCE,
    MODEL,
    PLANETS,
    Cluster,
    User,
    answers,
    lines,
    recorded,
    request,
    shard_status,
    until,
)


def sbatch(user: User, *arguments: str | Path, cwd: Path, env: dict[str, str]) -> str:
    """Submit a job and return its id."""
    return user.run("sbatch", "--parsable", "--mem=2G", *arguments, cwd=cwd, env=env).strip()


def submitted(text: str) -> str:
    """Return the job id that ``aiflux run`` printed."""
    return text.split("submitted job ", 1)[1].split(":", 1)[0]


def test_the_script_works_from_any_directory_with_any_name(
    user: User, checkout: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    name = "-in $(touch pwned) 'q\" ü,:.jsonl"
    user.write(place / name, lines(FRANCE, PLANETS))
    script = checkout / "slurm" / "run.sbatch"
    job = sbatch(user, script, f"./{name}", cwd=place, env=job_env)
    end = cluster.end(job)
    log = cluster.log(job, place)
    assert (end.state, end.code) == ("COMPLETED", 0), log
    assert "gres" in end.fields["TresPerNode"], "a GPU is requested"
    output = place / f"{Path(name).stem}.results.json"
    assert "Paris" in answers(output)["france"], log
    assert not list(place.rglob("pwned"))
    status = shard_status(place)
    assert status["aiflux"]["sealed"] is True
    assert status["aiflux"]["slurm"]["SLURM_JOB_ID"] == job
    assert status["aiflux"]["image"]["cpu_only"] in (True, "yes")


def test_aiflux_run_submits_and_prints_the_id(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    user.write(place / "in.jsonl", lines(FRANCE))
    arguments = ["run", "--model", MODEL, "--input", "in.jsonl", "--output", "out.json"]
    printed = user.run(aiflux, *arguments, "--mem", "2G", cwd=place, env=job_env)
    job = submitted(printed)
    assert cluster.end(job).code == 0, cluster.log(job, place)
    assert "Paris" in answers(place / "out.json")["france"]
    run_dir = place / "out.json.aiflux"
    assert run_dir.stat().st_mode & 0o077 == 0
    assert "#SBATCH" in (run_dir / "run.sbatch").read_text(encoding="utf-8")
    again = user.run(aiflux, *arguments, cwd=place, env=job_env)
    assert "is already finished: 1 succeeded, 0 failed; nothing was sent" in again


def test_a_table_is_asked_in_a_job_and_the_same_command_finishes(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    user.write(place / "in.csv", 'id;country\r\n007;"France"\r\n008;Peru\r\n')
    arguments = [
        "ask", "in.csv", "--template", "What is the capital of {country}?", "--model", MODEL,
        "--output", "out.csv", "--temperature", "0", "--max-tokens", "20", "--mem", "2G",
    ]  # fmt: skip
    printed = user.run(aiflux, *arguments, "--no-wait", cwd=place, env=job_env)
    job = submitted(printed)
    assert not (place / "out.csv").exists()
    shown = user.run(aiflux, *arguments, cwd=place, env=job_env)
    assert cluster.end(job).code == 0, cluster.log(job, place)
    assert "2 rows -> out.csv: 2 answered, 0 failed" in shown
    written = (place / "out.csv").read_bytes()
    rows = [*csv.reader(io.StringIO(written.decode(), newline=""), delimiter=";")]
    given = answers(place / "out.csv.aiflux" / "results.json")
    assert rows == [
        ["id", "country", "answer"],
        ["007", "France", given["row-1"]],
        ["008", "Peru", given["row-2"]],
    ]
    assert written.splitlines()[1].startswith(b'007;"France";')
    assert all(given.values())
    again = user.run(aiflux, *arguments, cwd=place, env=job_env)
    assert "is already finished: 2 succeeded, 0 failed; nothing was sent" in again
    assert (place / "out.csv").read_bytes() == written
    assert "finished" in user.run(aiflux, "status", "out.csv", cwd=place, env=job_env)


def test_the_python_quick_start(
    user: User, checkout: Path, image: Path, models: Path, cluster: Cluster,
    job_env: dict[str, str],
) -> None:  # fmt: skip
    place = user.folder("quick start")
    llama = models / "manifests" / "registry.ollama.ai" / "library" / "llama3.2" / "3b"
    user.run("mkdir", "-p", llama.parent)
    user.run("cp", models / "manifests/registry.ollama.ai/library/smollm2/135m", llama)
    user.write(place / "prompts.jsonl", lines(request("a", "Say yes.", model="llama3.2:3b")))
    user.write(
        place / "quick_start.py",
        "from aiflux.slurm import SlurmRunner\n"
        "from aiflux.core.config.config import Config\n"
        "config = Config()\n"
        "slurm_config = config.get_slurm_config()\n"
        'slurm_config.account = "myaccount"\n'
        "runner = SlurmRunner(config=slurm_config)\n"
        'job_id = runner.run(input_path="prompts.jsonl", output_path="results.json", '
        'model="llama3.2:3b", batch_size=4)\n'
        "print(job_id)\n",
    )
    python = checkout / ".venv" / "bin" / "python"
    env = {**job_env, "SLURM_MEM": "2G"}
    job = user.run(python, "quick_start.py", cwd=place, env=env).strip()
    assert job.isdigit()
    end = cluster.end(job)
    assert end.code == 0, cluster.log(job, place)
    assert end.fields["Account"] == "myaccount"
    entry = json.loads((place / "results.json").read_text(encoding="utf-8"))[0]
    assert entry["metadata"]["model"] == "llama3.2:3b"
    plan = json.loads((place / "results.json.aiflux/plan.json").read_text(encoding="utf-8"))
    assert plan["options"]["concurrency"] == 4


def states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, mode and modification time of all files in a directory."""
    found = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {
        str(path): (stat.st_size, stat.st_mode, stat.st_mtime_ns) for path, stat in found.items()
    }


def test_a_group_shares_models_that_only_the_owner_can_change(
    user: User, aiflux: Path, image: Path, models: Path, cluster: Cluster, place: Path
) -> None:
    shared = place / "group's models"
    user.run("cp", "-r", models, shared)
    user.run("chmod", "-R", "a-w,a+rX", shared)
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", "root:", shared], check=True)
    before = states(shared)
    env = {"AIFLUX_MODELS_DIR": str(shared), "AIFLUX_ALLOW_CPU": "1"}
    user.write(place / "in.jsonl", lines(FRANCE))
    run = [aiflux, "run", "--input", "in.jsonl", "--mem", "2G"]
    printed = user.run(*run, "--output", "job.json", cwd=place, env=env)
    assert cluster.end(submitted(printed)).code == 0, cluster.log(submitted(printed), place)
    user.run(*run, "--output", "here.json", "--local", cwd=place, env=env)
    for name in ("job.json", "here.json"):
        assert "Paris" in answers(place / name)["france"]
    for words in (["list"], ["show", MODEL], ["verify", MODEL], ["export", MODEL, "m.tar"]):
        user.run(aiflux, "models", *words, cwd=place, env=env)
    for words in (["remove", MODEL], ["import", "m.tar"], ["pull", "lab/other:1"]):
        printed = user.run(aiflux, "models", *words, cwd=place, env=env, code=2)
        assert "is read-only for you" in printed
    user.write(place / "other.jsonl", lines(request("a", "one", model=None)))
    other = ["--input", "other.jsonl", "--model", "lab/other:1", "--mem", "2G"]
    printed = user.run(aiflux, "run", *other, cwd=place, env=env, code=2)
    assert "cannot pull lab/other:1" in printed
    assert "you cannot write there" in printed
    printed = user.run(*run, "--output", shared / "out.json", cwd=place, env=env, code=2)
    assert "you cannot write in the output's directory" in printed
    assert states(shared) == before


def test_two_jobs_on_one_node_at_once(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    jobs = []
    for name in ("one", "two"):
        user.write(place / f"{name}.jsonl", lines(FRANCE, request(name, f"Say {name}.")))
        printed = user.run(
            aiflux, "run", "--input", f"{name}.jsonl", "--output", f"{name}.json", "--mem", "2G",
            "--sbatch-arg", "nodelist=n1", cwd=place, env=job_env,
        )  # fmt: skip
        jobs.append(submitted(printed))
    for job in jobs:
        cluster.wait_for(job, "RUNNING", "COMPLETING", "COMPLETED", timeout=120)
    for job, name in zip(jobs, ("one", "two"), strict=True):
        end = cluster.end(job)
        assert end.code == 0, cluster.log(job, place)
        assert end.fields["NodeList"] == "n1"
        assert set(answers(place / f"{name}.json")) == {"france", name}


def test_scancel_leaves_no_process_and_the_same_command_resumes(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    many = [request(f"r{index}", f"Count to {index}.", max_tokens=32) for index in range(14)]
    user.write(place / "in.jsonl", lines(*many))
    command = [aiflux, "run", "--input", "in.jsonl", "--output", "out.json", "--mem", "2G",
               "--drain-seconds", "2"]  # fmt: skip
    job = submitted(user.run(*command, cwd=place, env=job_env))
    journal = place / "out.json.aiflux" / "journal" / "shard-0000.jsonl"
    until(lambda: recorded(place) >= 2, "2 results", 240)
    user.run("scancel", job)
    end = cluster.end(job, timeout=180)
    assert end.state == "CANCELLED"
    assert user.none_left(), user.processes()
    assert not (place / "out.json").exists()
    done = journal.read_bytes().count(b"\n")
    assert 2 <= done < 14
    status = shard_status(place)
    log = cluster.log(job, place)
    assert status["status"] == "cancelled", log
    assert "signal SIGTERM" in log
    again = submitted(user.run(*command, cwd=place, env=job_env))
    assert cluster.end(again).code == 0
    assert list(answers(place / "out.json")) == [f"r{index}" for index in range(14)]
    assert journal.read_bytes().count(b"\n") == 14, "no request was processed twice"


def test_a_model_is_pulled_from_a_registry_inside_the_job(
    stack: dict[str, str], user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path,
    models: Path, ollama: Path, job_env: dict[str, str],
) -> None:  # fmt: skip
    name = f"{stack['AIFLUX_STACK_REGISTRY']}/library/pulled-{uuid.uuid4().hex[:8]}:1"
    push(user, ollama, models, name)
    fresh = place / "fresh models"
    user.write(place / "in.jsonl", lines(request("france", FRANCE_PROMPT, model=None)))
    env = {**job_env, "AIFLUX_MODELS_DIR": str(fresh)}
    printed = user.run(
        aiflux, "run", "--model", f"http://{name}", "--input", "in.jsonl", "--output", "out.json",
        "--mem", "2G", cwd=place, env=env,
    )  # fmt: skip
    job = submitted(printed)
    end = cluster.end(job)
    log = cluster.log(job, place)
    assert end.code == 0, log
    assert f"pulling {name}" in log
    assert "Paris" in answers(place / "out.json")["france"]
    assert not list((fresh / ".staging").iterdir())
    entry = json.loads((place / "out.json").read_text(encoding="utf-8"))[0]
    assert entry["metadata"]["model"] == name
    manifest = fresh / "manifests" / name.removesuffix(":1") / "1"
    assert manifest.exists()


FRANCE_PROMPT = "What is the capital of France?"


def push(user: User, ollama: Path, models: Path, name: str) -> None:
    """Push the small model to the local registry under another name."""
    script = user.write(
        user.home / "push.sh",
        "#!/bin/bash\n"
        "# Serves a models directory on a free port and pushes a copy of a model.\n"
        "set -euo pipefail\n"
        "export OLLAMA_MODELS=$2 OLLAMA_NOPRUNE=1 OLLAMA_HOST=127.0.0.1:$4\n"
        '"$1" serve > "$HOME/push.log" 2>&1 & server=$!\n'
        "trap 'kill $server; wait $server || true' EXIT\n"
        'for _ in $(seq 100); do "$1" list >/dev/null 2>&1 && break; sleep 0.1; done\n'
        f'"$1" cp {MODEL} "$3"\n'
        '"$1" push --insecure "$3"\n',
    )
    user.run("bash", script, ollama, models, name, free_port(), timeout=120)


def free_port() -> str:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("{registry}/library/no-such-model:1", "has no model"),
        ("127.0.0.1:9/library/m:1", "cannot be reached from here"),
    ],
)
def test_an_unavailable_model_is_exit_4(
    stack: dict[str, str], user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path,
    job_env: dict[str, str], model: str, words: str,
) -> None:  # fmt: skip
    name = model.format(registry=stack["AIFLUX_STACK_REGISTRY"])
    user.write(place / "in.jsonl", lines(request("a", "x", model=None)))
    printed = user.run(
        aiflux, "run", "--model", f"http://{name}", "--input", "in.jsonl", "--output", "out.json",
        "--mem", "2G", cwd=place, env=job_env,
    )  # fmt: skip
    job = submitted(printed)
    end = cluster.end(job)
    assert (end.state, end.code) == ("FAILED", 4), cluster.log(job, place)
    assert words in cluster.log(job, place)
    assert not (place / "out.json").exists()


def test_failed_requests_are_exit_3_and_recorded(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    bad = request("bad", "x", temperature="hot")
    user.write(place / "in.jsonl", lines(FRANCE, bad))
    printed = user.run(
        aiflux, "run", "--input", "in.jsonl", "--output", "out.json", "--mem", "2G",
        cwd=place, env=job_env,
    )  # fmt: skip
    job = submitted(printed)
    end = cluster.end(job)
    assert (end.state, end.code) == ("FAILED", 3), cluster.log(job, place)
    good, failed = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert good["output"]["choices"]
    assert failed["output"] is None
    assert failed["error"]["status"] == 400
    assert failed["metadata"]["attempts"] == 1


def test_a_gpu_job_on_the_cpu_is_exit_4(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, models: Path
) -> None:
    user.write(place / "in.jsonl", lines(FRANCE))
    run = [aiflux, "run", "--input", "in.jsonl", "--output", "out.json", "--mem", "2G"]
    env = {"AIFLUX_MODELS_DIR": str(models)}
    printed = user.run(*run, cwd=place, env=env, code=2)
    assert "--allow-cpu" in printed, "reported before submission"
    assert not (place / "out.json.aiflux").exists()
    job = submitted(user.run(*run, "--no-preflight", cwd=place, env=env))
    assert cluster.end(job).code == 4
    assert "runs on the CPU only" in cluster.log(job, place)


def test_a_missing_input_is_exit_2(
    user: User, checkout: Path, aiflux: Path, image: Path, cluster: Cluster, place: Path,
    job_env: dict[str, str],
) -> None:  # fmt: skip
    printed = user.run(aiflux, "run", "--input", "none.jsonl", cwd=place, env=job_env, code=2)
    assert "does not exist" in printed
    job = sbatch(user, checkout / "slurm" / "run.sbatch", "none.jsonl", cwd=place, env=job_env)
    end = cluster.end(job)
    assert (end.state, end.code) == ("FAILED", 2)
    assert "none.jsonl" in cluster.log(job, place)
    assert sorted(path.name for path in place.iterdir()) == [f"slurm-{job}.out"]


@pytest.mark.usefixtures("cluster")
def test_an_sbatch_error_is_exit_2_with_its_message(
    user: User, aiflux: Path, image: Path, place: Path, job_env: dict[str, str]
) -> None:
    user.write(place / "in.jsonl", lines(FRANCE))
    run = [aiflux, "run", "--input", "in.jsonl", "--partition", "nowhere", "--mem", "2G"]
    printed = user.run(*run, cwd=place, env=job_env, code=2)
    assert "no partition 'nowhere'" in printed
    assert "gpu" in printed, "the existing partitions are listed"
    printed = user.run(*run, "--no-preflight", cwd=place, env=job_env, code=2)
    assert "invalid partition specified: nowhere" in printed
    assert "submitted" not in printed


@pytest.mark.usefixtures("cluster")
def test_no_slurm_and_no_image_are_exit_2_with_the_remedy(
    user: User, aiflux: Path, image: Path, place: Path, job_env: dict[str, str]
) -> None:
    user.write(place / "in.jsonl", lines(FRANCE))
    run = [aiflux, "run", "--input", "in.jsonl"]
    printed = user.run(*run, "--image", "none.sif", cwd=place, env=job_env, code=2)
    assert re.search(r"make (-C .+ )?image", printed), printed
    bare = user.folder("bare bin")
    for tool in ("git",):
        user.run("ln", "-sf", shutil.which(tool) or tool, bare / tool)
    printed = user.run(*run, cwd=place, env={**job_env, "PATH": str(bare)}, code=2)
    assert "sbatch" in printed
    assert "--local" in printed
    assert not (place / "in.results.json").exists()


def test_a_site_whose_runtime_is_named_singularity(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    """Jobs use the name and variables of SingularityCE, which Apptainer accepts too."""
    programs = user.folder("without apptainer")
    for program in (*Path("/usr/bin").iterdir(), *Path("/usr/sbin").iterdir()):
        if program.name != "apptainer" and not (programs / program.name).is_symlink():
            (programs / program.name).symlink_to(program)
    env = {**job_env, "PATH": str(programs)}
    assert user.run("sh", "-c", "command -v apptainer", env=env, code=None) == ""
    printed = user.run(aiflux, "doctor", "--json", cwd=place, env=env, code=None)
    found = {line["name"]: line["level"] for line in json.loads(printed)}
    assert found["singularity"] == found["sealing"] == "ok"
    user.write(place / "in.jsonl", lines(FRANCE))
    run = [aiflux, "run", "--input", "in.jsonl", "--model", MODEL, "--output"]
    user.run(*run, "here.json", "--local", cwd=place, env=env)
    job = submitted(user.run(*run, "job.json", "--mem", "2G", cwd=place, env=env))
    assert cluster.end(job).code == 0, cluster.log(job, place)
    for output in (place / "here.json", place / "job.json"):
        assert "Paris" in answers(output)["france"]
        (status,) = output.with_name(f"{output.name}.aiflux").glob("status/shard-0000.json")
        assert json.loads(status.read_text(encoding="utf-8"))["aiflux"]["sealed"] is True


def test_local_runs_in_the_image_and_a_url_without_one(
    user: User, aiflux: Path, image: Path, place: Path, job_env: dict[str, str], ollama: Path
) -> None:
    user.write(place / "in.jsonl", lines(FRANCE))
    run = [aiflux, "run", "--input", "in.jsonl", "--output"]
    user.run(*run, "image.json", "--local", cwd=place, env=job_env)
    assert "Paris" in answers(place / "image.json")["france"]
    status = shard_status(place)
    assert status["aiflux"]["sealed"] is True
    host = f"127.0.0.1:{free_port()}"
    env = {"OLLAMA_HOST": host, "OLLAMA_MODELS": job_env["AIFLUX_MODELS_DIR"],
           "OLLAMA_NOPRUNE": "1"}  # fmt: skip
    server = user.popen(ollama, "serve", env=env)
    try:
        user.run(*run, "url.json", "--engine-url", f"http://{host}", cwd=place, env=job_env)
    finally:
        server.terminate()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()
    assert "Paris" in answers(place / "url.json")["france"]
    assert user.none_left(), user.processes()


def test_gpus_allocated_by_slurm_reach_the_engine(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    user.write(place / "in.jsonl", lines(FRANCE, PLANETS))
    printed = user.run(
        aiflux, "run", "--input", "in.jsonl", "--output", "out.json", "--mem", "4G",
        "--gpus-per-node", "2", cwd=place, env=job_env,
    )  # fmt: skip
    job = submitted(printed)
    assert cluster.end(job).code == 0, cluster.log(job, place)
    status = shard_status(place)
    assert [engine["devices"] for engine in status["aiflux"]["engines"]] == [["0"], ["1"]]


def test_the_stack_stops_only_its_own_processes(stack: dict[str, str]) -> None:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%N %T"], capture_output=True, text=True,
                          check=True, env={"SLURM_CONF": stack["SLURM_CONF"],
                                           "PATH": "/usr/bin:/bin"})  # fmt: skip
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"n1", "n2"}
