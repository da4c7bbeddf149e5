"""What AI-Flux advises can be followed, and fits the situation."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.core.config.config import Config
from aiflux.image.sif import CHECKOUT, how_to_build
from aiflux.models.catalog import read_catalog
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.tools.make_tiny_gguf import tiny
from tests.unit.fake_commands import FakeCommands
from tests.unit.helpers import request_line, write_input, write_program
from tests.unit.made_models import put_model
from tests.unit.made_runs import MadeRun
from tests.unit.made_serves import until

TOOLS = Path(__file__).parents[2] / "tools"


def aiflux(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does who has neither Slurm nor Apptainer nor Ollama."""
    clean = {"HOME": str(cwd), "PATH": str(cwd / "no-programs"), **environ}
    return subprocess.run(
        [sys.executable, "-m", "aiflux.cli", *words],
        cwd=cwd,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )


def test_status_advises_what_resumes_a_foreground_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path / "in.jsonl", 3)
    with FaultyEngine() as engine:
        url = engine.url
    words = ["--input", "in.jsonl", "--output", "out.json", "--engine-wait", "0.1"]
    assert main(["run", "--engine-url", url, *words]) == 4
    capsys.readouterr()
    assert main(["status", "out.json"]) == 0
    advised = re.findall(r"aiflux resume [^\n]+", capsys.readouterr().out)
    assert advised
    # Nobody answers at the old address, so the advised command gets as far as the run did.
    assert main(shlex.split(advised[0].strip())[1:]) == 4
    assert "never submitted" not in capsys.readouterr().err


def test_a_foreground_run_resumes_and_keeps_what_is_done(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 4)
    with FaultyEngine() as engine:
        words = ("--engine-url", engine.url, "--input", "in.jsonl", "--output", "out.json")
        assert aiflux("run", *words, cwd=tmp_path).returncode == 0
        sent = len(engine.bodies)
        (tmp_path / "out.json").unlink()
        done = aiflux("resume", "out.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(json.loads((tmp_path / "out.json").read_text())) == 4
        assert len(engine.bodies) == sent, "no request is sent again"


def test_a_foreground_run_of_this_machine_is_cancelled(tmp_path: Path) -> None:
    body = {"model": "m:1", "messages": [{"role": "user", "content": "hang"}]}
    (tmp_path / "in.jsonl").write_text(request_line("a", body=body) + "\n")
    words = ("run", "in.jsonl", "--output", "out.json", "--drain-seconds", "1")
    with FaultyEngine() as engine:
        command = [sys.executable, "-m", "aiflux.cli", *words, "--engine-url", engine.url]
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as run:
            try:
                until(lambda: engine.seen["hang"])
                done = aiflux("cancel", "out.json", cwd=tmp_path)
                assert done.returncode == 0, done.stderr
                assert done.stdout.startswith(f"process {run.pid} stops: ")
                assert run.wait() == 5
            finally:
                run.kill()
    assert "has no pending or running job" in aiflux("cancel", "out.json", cwd=tmp_path).stdout


def test_a_wrong_engine_command_is_to_be_corrected_and_not_repeated(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 3)
    words = ("run", "--local", "--input", "in.jsonl", "--output", "out.json", "--engine-command")
    done = aiflux(*words, "/bin/sh -c 'echo no such option --foo; exit 3' {port}", cwd=tmp_path)
    assert done.returncode == 4
    assert done.stderr.count("no such option --foo") == 1
    shown = aiflux("status", "out.json", cwd=tmp_path).stdout
    assert "fix: see its log: " in shown
    assert "; correct --engine-command, and run the whole `aiflux run` command again" in shown
    assert "aiflux resume" not in shown
    again = json.loads(aiflux("status", "out.json", "--json", cwd=tmp_path).stdout)
    assert (again["state"], again["next_command"]) == ("failed", None)
    server = [sys.executable, str(TOOLS / "command_server.py"), "--port", "{port}"]
    done = aiflux(*words, shlex.join(server), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out.json").read_text())) == 3


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (3, "is shorter than when the run was planned: 3 requests instead of 6"),
        (8, "is longer than when the run was planned: 8 requests instead of 6"),
        (0, "no longer exists"),
    ],
)
def test_a_changed_input_is_not_resumed_and_finished_runs_are(
    tmp_path: Path, count: int, words: str
) -> None:
    write_input(tmp_path / "in.jsonl", 6)
    with FaultyEngine() as engine:
        run = ("--engine-url", engine.url, "--input", "in.jsonl", "--output", "out.json")
        assert aiflux("run", *run, cwd=tmp_path).returncode == 0
        before = (tmp_path / "out.json").read_bytes()
        if count:
            write_input(tmp_path / "in.jsonl", count)
        else:
            (tmp_path / "in.jsonl").unlink()
        assert aiflux("resume", "out.json", cwd=tmp_path).returncode == 0
        assert (tmp_path / "out.json").read_bytes() == before
        (tmp_path / "out.json").unlink()
        done = aiflux("resume", "out.json", cwd=tmp_path)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
        assert "run the same `aiflux run` command again" in done.stderr
        assert not (tmp_path / "out.json").exists()
        assert len(engine.bodies) == 6


@pytest.mark.parametrize(
    ("words", "command", "named"),
    [
        (["run", "q.jsonl", "--engine-url", "http://h:1", "-o", "gone/o.json"], "mkdir -p", "gone"),
        (["convert", "json", "--input", "d.json", "-o", "gone/q.jsonl"], "mkdir -p", "gone"),
        (["report", "results.json", "--output", "gone/r.html"], "mkdir -p", "gone"),
        (["results", "to-csv", "results.json"], "aiflux merge --partial", "results.json"),
        (["check", "d.json", "-m", "m"], "--input", "d.json"),
        (["run", "q.jsonl", "--engine-url", "http://h:1", "-o", "results.json"], "away: mv",
         "results.json.aiflux"),
        (["models", "export", "m:1", "a b $(x) it's.tar"], "models import", "a b $(x) it's.tar"),
        (["run", "q.jsonl", "--engine", "vllm", "-m", "hf:a/b", "--engine-arg",
          "dtype=--a $(x) it's", "--local"], "--engine-arg dtype", "--engine-arg=--a $(x) it's"),
    ],
)  # fmt: skip
def test_an_advised_command_can_be_typed_whatever_the_names_are(
    words: list[str], command: str, named: str, awkward: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(awkward)
    monkeypatch.setenv("AIFLUX_MODELS_DIR", str(awkward))
    put_model(awkward, "m:1", tiny())
    write_input(
        awkward / "q.jsonl", 1, body={"model": "a/b", "messages": [{"role": "user", "content": ""}]}
    )
    (awkward / "d.json").write_text('{"a": 1}')
    MadeRun(awkward).status(0, "in_progress", 1)
    main(words)
    printed = capsys.readouterr()
    path = named if " " in named else str(awkward / named)
    assert f"{command} {shlex.quote(path)}" in printed.out + printed.err


def test_building_an_image_is_advised_where_there_is_a_makefile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    assert how_to_build() == "build it: make image"
    monkeypatch.chdir(tmp_path)
    assert how_to_build("BASE=docker") == f"build it: make -C {shlex.quote(str(CHECKOUT))} image BASE=docker"  # fmt: skip  # noqa: E501


def test_an_installed_package_advises_a_clone(tmp_path: Path) -> None:
    """The package alone, as a wheel installs it, has no Makefile next to it."""
    site = tmp_path / "lib" / "site" / "packages"
    site.mkdir(parents=True)
    (site / "aiflux").symlink_to(CHECKOUT / "aiflux_app" / "aiflux")
    code = "from aiflux.image.sif import how_to_build; print(how_to_build())"
    copied = tmp_path / "copied" / "x"
    copied.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(CHECKOUT / "aiflux_app" / "aiflux"), str(copied)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(copied), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "in a clone of AI-Flux" in done.stdout


def test_check_says_once_that_the_model_is_missing(tmp_path: Path) -> None:
    line = request_line("%d", body={"messages": [{"role": "user", "content": "x"}]})
    text = "".join(line.replace("%d", str(index)) + "\n" for index in range(50))
    (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
    done = aiflux("check", "in.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("body.model is missing") == 1
    assert "aiflux check" not in done.stderr, "the command that was just run is no advice"
    assert "--model" in done.stderr


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("smolm2:135m", "smollm2:135m"),
        ("lama3.2:3b", "llama3.2:3b"),
        ("qwen3:8b", None),
        ("llama3.2:3b-instruct-q8_0", None),
        ("registry.example/team/smolm2:135m", None),
        ("my-own-model:1", None),
    ],
)
def test_a_misspelt_model_has_a_suggestion(name: str, near: str | None) -> None:
    assert read_catalog().nearest(name) == near


def test_a_misspelt_model_is_not_submitted_and_all_problems_are_told(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 1, body={"messages": [{"role": "user", "content": "x"}]})
    words = ("run", "--model", "smolm2:135m", "--input", "in.jsonl", "--output", "out.json")
    done = aiflux(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean smollm2:135m?" in done.stderr
    assert "sbatch is not on PATH" in done.stderr
    assert "no image aiflux.sif" in done.stderr
    local = aiflux(*words, "--local", cwd=tmp_path)
    assert "did you mean smollm2:135m?" in local.stderr
    assert local.returncode == 4


def test_a_local_run_gets_the_gpus_of_this_machine_or_is_refused(tmp_path: Path) -> None:
    fakes = FakeCommands(tmp_path / "fakes")
    fakes.add("apptainer")
    own = {"version": "1", "engine": "ollama", "engine_version": "0.33.3"}
    write_input(tmp_path / "in.jsonl", 1, body={"messages": [{"role": "user", "content": "x"}]})
    make_sif(tmp_path / "aiflux.sif", gpu_vendors="nvidia", **own)
    words = ("run", "--local", "--model", "llama3.2:3b", "--input", "in.jsonl", "--output",
             "out.json", "--gpu-vendor", "amd")  # fmt: skip
    there = {"PATH": fakes.path, "ROCR_VISIBLE_DEVICES": "0", "HOME": str(tmp_path)}
    refused = aiflux(*words, cwd=tmp_path, **there)
    assert refused.returncode == 2
    assert "aiflux.sif is for GPUs of NVIDIA, and the run gets GPUs of AMD" in refused.stderr
    assert "make -C" in refused.stderr
    assert "image GPU=amd" in refused.stderr
    assert fakes.calls("apptainer") == []
    make_sif(tmp_path / "aiflux-amd.sif", gpu_vendors="amd", **own)
    aiflux(*words, cwd=tmp_path, **there)
    prepare = fakes.calls("apptainer")[0]
    assert {"--rocm", str(tmp_path / "aiflux-amd.sif")} <= {*prepare.argv}
    assert prepare.environ["APPTAINERENV_ROCR_VISIBLE_DEVICES"] == "0"
    aiflux("resume", "out.json", "--local", "--gpu-vendor", "amd", cwd=tmp_path, **there)
    assert {"--rocm", str(tmp_path / "aiflux-amd.sif")} <= {*fakes.calls("apptainer")[-1].argv}
    aiflux("resume", "out.json", "--local", cwd=tmp_path, **there)
    assert str(tmp_path / "aiflux.sif") in fakes.calls("apptainer")[-1].argv


def test_a_local_run_uses_its_engine_s_program_if_the_image_has_another_engine(
    tmp_path: Path,
) -> None:
    fakes = FakeCommands(tmp_path / "fakes")
    fakes.add("apptainer")
    write_input(tmp_path / "in.jsonl", 1, body={"messages": [{"role": "user", "content": "x"}]})
    (tmp_path / "m.gguf").write_bytes(tiny("llama"))
    make_sif(tmp_path / "aiflux.sif", version="1", engine="ollama", engine_version="0.33.3")
    words = ("run", "--local", "--engine", "llamacpp", "--model", "m.gguf", "--allow-cpu",
             "--input", "in.jsonl", "--output", "out.json")  # fmt: skip
    there = {"PATH": fakes.path, "HOME": str(tmp_path)}
    other = "aiflux.sif has the engine ollama, and the run needs llama.cpp"
    without = aiflux(*words, cwd=tmp_path, **there)
    assert (without.returncode, other in without.stderr) == (2, True)
    fakes.add("llama-server", "exit 1")
    named = aiflux(*words, "--image", "aiflux.sif", cwd=tmp_path, **there)
    assert (named.returncode, other in named.stderr) == (2, True)
    assert fakes.calls("llama-server") == []
    assert aiflux(*words, cwd=tmp_path, **there).returncode == 4
    assert fakes.calls("llama-server") != []
    assert fakes.calls("apptainer") == []


def test_a_dry_run_needs_no_slurm_and_with_an_engine_no_image(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 1)
    words = ("run", "--dry-run", "--input", "in.jsonl", "--output", "out.json")
    assert "sbatch" not in aiflux(*words, cwd=tmp_path).stderr
    done = aiflux(*words, "--engine-url", "http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dry run: 1 request, nothing was started\n")
    assert "in the foreground" in done.stdout
    assert not (tmp_path / "out.json.aiflux").exists()


def test_a_dry_run_shows_that_the_run_is_tuned_and_its_resources(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 1)
    make_sif(tmp_path / "aiflux.sif", version="1.0.0")
    words = ("run", "--dry-run", "--input", "in.jsonl", "--output", "out.json", "--no-preflight")
    done = aiflux(*words, "--tune", "--cpus-per-task", "1", cwd=tmp_path)
    assert "  tuning     the first requests try several numbers of slots" in done.stdout, (
        done.stderr
    )
    assert ", 1 CPU core, " in done.stdout
    assert "tuning" not in aiflux(*words, cwd=tmp_path).stdout


def test_an_estimate_does_not_offer_to_tune(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 1)
    done = aiflux("estimate", "in.jsonl", "--tune", cwd=tmp_path)
    assert done.returncode == 2
    assert "--tune" in done.stderr


def test_a_dry_run_with_a_server_of_its_own_shows_the_command(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 1)
    command = "vllm serve {model} --uds {socket}"
    words = ("run", "--dry-run", "--input", "in.jsonl", "--output", "out.json")
    done = aiflux(*words, "--show-script", "--engine-command", command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"  engine     {command}\n" in done.stdout
    assert "  image " not in done.stdout
    assert " -m aiflux.worker)\n" in done.stdout
    assert "the job loads no modules" in done.stderr
    as_json = aiflux(*words, "--json", "--engine-command", command, cwd=tmp_path)
    assert json.loads(as_json.stdout)["image"] is None
    wrong = aiflux(*words, "--engine-command", "vllm serve {model}", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "the argument --engine-command: engine_command = 'vllm serve {model}' is wrong" in (
        wrong.stderr
    )


def test_the_demo_s_ollama_is_found(tmp_path: Path) -> None:
    from aiflux.engines.kinds import kind_named
    from aiflux.engines.process import find_program

    environ = {"HOME": str(tmp_path), "PATH": str(tmp_path)}
    kind = kind_named("ollama")
    assert find_program(kind, environ) is None
    program = tmp_path / ".cache/aiflux/ollama-cpu/bin/ollama"
    program.parent.mkdir(parents=True)
    write_program(program, "#!/bin/sh\n")
    assert find_program(kind, environ) == str(program)
    environ["AIFLUX_OLLAMA"] = "/other"
    assert find_program(kind, environ) == "/other"
    environ["AIFLUX_ENGINE_PROGRAM"] = "/first"
    assert find_program(kind, environ) == "/first"
    environ["AIFLUX_ENGINE"] = "llamacpp"
    assert find_program(kind, environ) == "/other", "the program is that of another engine"
    assert find_program(kind_named("llamacpp"), environ) == "/first"
    del environ["AIFLUX_ENGINE"]
    demo = (CHECKOUT / "examples" / "demo.sh").read_text(encoding="utf-8")
    assert "AIFLUX_MODELS_DIR:-$data/models" in demo
    assert Config(environ=environ, directory=tmp_path).models_dir == (
        tmp_path / ".local/share/aiflux/models"
    )


def test_a_kind_of_data_that_convert_does_not_know(tmp_path: Path) -> None:
    done = aiflux("convert", "xlsx", "--input", "x.xlsx", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown command 'aiflux convert xlsx'" in done.stderr
    assert "csv" in done.stderr
    assert "no option" not in done.stderr


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(("suffix", "kind"), [("csv", "csv"), ("tsv", "csv"), ("json", "json")])
def test_a_table_given_to_run_leads_to_convert(
    tmp_path: Path, suffix: str, kind: str, command: str
) -> None:
    (tmp_path / f"t.{suffix}").write_text("a,b\n1,2\n", encoding="utf-8")
    done = aiflux(command, f"t.{suffix}", "--model", "smollm2:135m", cwd=tmp_path)
    assert done.returncode == 2
    assert f"aiflux convert {kind} --input " in done.stderr


def test_a_misspelt_name_in_dotenv_is_reported_and_a_foreign_one_is_not(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 1)
    (tmp_path / ".env").write_text("SLURM_ACOUNT=me\nOPENAI_API_KEY=x\n", encoding="utf-8")
    done = aiflux("check", "in.jsonl", cwd=tmp_path)
    assert "SLURM_ACOUNT is not a setting; did you mean SLURM_ACCOUNT?" in done.stderr
    assert "OPENAI" not in done.stderr


def test_results_of_an_input_are_refused_in_words(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 1)
    done = aiflux("results", "show", "in.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not an output of AI-Flux" in done.stderr
    assert "KeyError" not in done.stderr
