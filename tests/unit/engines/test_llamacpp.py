"""llama.cpp: supported models, their names, and what is refused at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from aiflux.core.batch.input_file import scan_input
from aiflux.core.config.settings import RunOptions, SlurmConfig
from aiflux.core.runs.plan import Plan, make_plan
from aiflux.engines.llamacpp.kind import KIND
from aiflux.errors import AifluxError, ConfigError, EngineError, InputError
from aiflux.models.catalog import read_catalog
from aiflux.slurm.preflight.local import check_models
from aiflux.slurm.preflight.nodes import check_endpoints, check_names
from aiflux.slurm.script import JobScript
from tests.tools import make_tiny_gguf
from tests.tools.engine_contract import engine_of
from tests.unit.helpers import request_line, write_program
from tests.unit.made_models import put_model


def plan_of(folder: Path, model: str, *bodies: dict[str, Any], **options: Any) -> Plan:
    lines = [request_line(f"r{at}", **body) for at, body in enumerate(bodies or ({"body": {
        "messages": [{}]}},))]  # fmt: skip
    path = folder / "in.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    chosen = RunOptions(engine="llamacpp", model=model, **options)
    summary = scan_input(path, model, rules=KIND.input_rules)
    return make_plan(summary, folder / "o.json", chosen, folder / "models", KIND)


def tiny_file(folder: Path) -> Path:
    path = folder / "tiny one.gguf"
    path.write_bytes(make_tiny_gguf.tiny())
    return path


def test_a_path_is_made_absolute_and_requests_may_use_the_file_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job does not run in this directory."""
    path = tiny_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    named = [{"body": {"model": name, "messages": [{}]}}
             for name in ("tiny one.gguf", "tiny one", str(path))]  # fmt: skip
    plan = plan_of(tmp_path, path.name, *named)
    assert plan.models == (str(path),)
    assert plan.served(plan.models[0]) == str(path)
    assert not [*check_models(plan)]
    with pytest.raises(InputError, match="but the run's model is"):
        plan_of(tmp_path, path.name, {"body": {"model": "other", "messages": [{}]}})
    with pytest.raises(ConfigError, match="without a comma"):
        plan_of(tmp_path, "a,b.gguf")


def test_a_job_mounts_the_file(tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    plan = plan_of(tmp_path, str(path))
    script = JobScript.of_run(plan.input_path, plan.output, plan.options, plan.models_dir,
                              SlurmConfig(), tmp_path / "i.sif", tmp_path)  # fmt: skip
    assert script.with_models(plan).model_paths == (path,)
    assert script.with_models(plan_of(tmp_path, "m:1")).model_paths == ()


def test_the_catalog_is_used_for_names_only(tmp_path: Path) -> None:
    catalog = read_catalog()
    for finding in (check_names, check_endpoints):
        assert not [*finding(plan_of(tmp_path, str(tiny_file(tmp_path))), catalog)]
    ((_, misspelt),) = check_names(plan_of(tmp_path, "lama3.2:3b"), catalog)
    assert "did you mean llama3.2:3b?" in misspelt.fix


@pytest.mark.parametrize(
    ("model", "what", "fix"),
    [
        ("absent.gguf", "model file not found", "check the path"),
        ("absent:1b", "llama.cpp does not pull models", "aiflux models pull absent:1b"),
    ],
)
def test_a_missing_model_is_refused_before_submission(
    tmp_path: Path, model: str, what: str, fix: str
) -> None:
    (finding,) = check_models(plan_of(tmp_path, model))
    assert finding.level == "error"
    assert what in finding.what
    assert fix in finding.fix


def test_a_path_that_is_no_file_shows_what_it_is(tmp_path: Path) -> None:
    folder, link, loop = (tmp_path / f"{name}.gguf" for name in ("folder", "link", "loop"))
    folder.mkdir()
    link.symlink_to("nowhere.gguf")
    loop.symlink_to(loop.name)
    for path, what in (
        (folder, "is a directory"),
        (link, "is a link to nowhere.gguf, which does not exist"),
        (loop, "is a link to loop.gguf, which does not exist"),
    ):
        (finding,) = check_models(plan_of(tmp_path, str(path)))
        assert finding.what == f"the model is not a file: {path} {what}"


def test_more_slots_than_the_server_has_are_refused(tmp_path: Path) -> None:
    """llama.cpp is built for 256 sequences (LLAMA_MAX_SEQ)."""
    assert plan_of(tmp_path, "m:1", slots=256).options.slots == 256
    with pytest.raises(ConfigError, match=r"llama\.cpp has at most 256 slots, but slots = 257"):
        plan_of(tmp_path, "m:1", slots=257)


def test_a_file_in_another_format_is_refused_before_submission(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\3\4 a torch file")
    (finding,) = check_models(plan_of(tmp_path, str(path)))
    assert "GGUF file" in finding.what


def test_an_image_reader_in_the_models_own_file_is_refused(tmp_path: Path) -> None:
    """Ollama's own converter writes such files; llama.cpp expects a second one."""
    entries = [make_tiny_gguf.entry("llama.vision.block_count", make_tiny_gguf.UINT32, 1)]
    plain = make_tiny_gguf.tiny("llama", entries)
    put_model(tmp_path / "models", "seeing:1b", plain.replace(b"blk.0.attn_q", b"v.k.0.attn_q"))
    put_model(tmp_path / "models", "plain:1b", plain)
    assert not [*check_models(plan_of(tmp_path, "plain:1b"))]
    (finding,) = check_models(plan_of(tmp_path, "seeing:1b"))
    assert "processes images in the model's own file" in finding.what
    assert "--engine ollama" in finding.fix


def test_another_digest_than_the_one_in_the_name_is_refused(tmp_path: Path) -> None:
    put_model(tmp_path / "models", "tiny:1b", make_tiny_gguf.tiny())
    (finding,) = check_models(plan_of(tmp_path, "tiny:1b@sha256:" + "0" * 12))
    assert "digest" in finding.what or "insists" in finding.what


def test_text_and_embeddings_in_one_input_are_refused(tmp_path: Path) -> None:
    chat = {"body": {"messages": [{}]}}
    embedding = {"url": "/v1/embeddings", "body": {"input": "x"}}
    rerank = {"url": "/v1/rerank", "body": {"query": "x", "documents": ["y"]}}
    for pair in ((chat, embedding), (embedding, rerank), (rerank, chat)):
        with pytest.raises(InputError, match="supports only one of text, embeddings and scores"):
            plan_of(tmp_path, "m:1", *pair)
    assert plan_of(tmp_path, "m:1", embedding, embedding).requests == 2


def test_all_models_get_slots_and_top_k_is_sent(tmp_path: Path) -> None:
    figures = KIND.figures(None, "embeddinggemma:300m", read_catalog())
    assert figures is not None
    options = RunOptions(engine="llamacpp")
    needed = [KIND.memory_needed(figures, 2048, slots, 1, options) for slots in (1, 16)]
    assert needed[1] > needed[0]
    assert plan_of(tmp_path, "m:1", top_k=3).options.parameters == {"top_k": 3}


RECORDER = """\
#!/bin/sh
if [ "$1" = --list-devices ]; then
    echo "Available devices:"
    [ "$CUDA_VISIBLE_DEVICES" = 7 ] || echo "  CUDA0: H100 (81559 MiB, 81008 MiB free)"
    exit 0
fi
printf '%s\\n' "$@" >"$0.arguments"
echo "main: failed to allocate buffer of 12 GiB: out of memory"
exit 1
"""


@pytest.mark.parametrize(
    ("body", "devices", "options", "wanted", "unwanted"),
    [
        ({}, (), {}, "-lv 2", "-ngl"),
        ({}, ("0", "1"), {}, "-ngl 999 -lv 2", "-np 1"),
        ({}, (), {"log_level": "DEBUG"}, "-lv 5", "-ngl"),
        # Each request in flight has a connection, and a connection keeps its thread.
        ({}, (), {}, "--threads-http 9", "-ngl"),
        ({}, (), {"concurrency": 40}, "--threads-http 44", "-ngl"),
        ({}, ("0",), {"allow_cpu": True}, "--metrics --offline --no-webui", "-ngl"),
        ({"url": "/v1/embeddings", "body": {"input": "x"}}, (), {},
         "--embeddings -b 1024 -ub 1024 --pooling mean", "--mmproj"),
        ({"url": "/v1/rerank", "body": {"query": "x", "documents": ["y"]}}, (), {},
         "--reranking -b 1024 -ub 1024", "--embeddings"),
    ],
)  # fmt: skip
def test_the_command_line(
    tmp_path: Path,
    body: dict[str, Any],
    devices: tuple[str, ...],
    options: dict[str, Any],
    wanted: str,
    unwanted: str,
) -> None:
    program = write_program(tmp_path / "llama-server", RECORDER)
    path = tiny_file(tmp_path)
    plan = plan_of(tmp_path, str(path), body or {"body": {"messages": [{}]}}, slots=3,
                   context_length=1024, **options)  # fmt: skip
    environ = {"AIFLUX_ENGINE_PROGRAM": str(program), "PATH": "/usr/bin:/bin"}
    engine = engine_of(KIND, plan, tmp_path, environ, devices)
    with pytest.raises(EngineError, match="out of memory"):
        engine.start()
    line = " ".join(program.with_name("llama-server.arguments").read_text().splitlines())
    assert f"-m {path} --alias {path} --host 127.0.0.1 --port 0 -np 3 -c 3072" in line
    assert wanted in line
    assert f" {unwanted} " not in line


def test_threads_are_limited_to_the_cpus_of_a_gpu_job(tmp_path: Path) -> None:
    program = write_program(tmp_path / "llama-server", RECORDER)
    plan = plan_of(tmp_path, str(tiny_file(tmp_path)))
    environ = {"AIFLUX_ENGINE_PROGRAM": str(program), "PATH": "/usr/bin:/bin",
               "SLURM_CPUS_ON_NODE": "1"}  # fmt: skip
    engine = engine_of(KIND, plan, tmp_path, environ, ("0",))
    with pytest.raises(EngineError, match="out of memory"):
        engine.start()
    line = " ".join(program.with_name("llama-server.arguments").read_text().splitlines())
    assert ("-t 1" in line) == ((os.cpu_count() or 1) > 1)


def test_a_server_that_sees_no_gpu_in_a_gpu_job_is_refused(tmp_path: Path) -> None:
    program = write_program(tmp_path / "llama-server", RECORDER)
    plan = plan_of(tmp_path, str(tiny_file(tmp_path)))
    environ = {"AIFLUX_ENGINE_PROGRAM": str(program), "PATH": "/usr/bin:/bin"}
    engine = engine_of(KIND, plan, tmp_path, environ, ("7",))
    with pytest.raises(EngineError, match="sees no GPU in a job with the GPUs 7"):
        engine.start()
    assert not program.with_name("llama-server.arguments").exists()


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, str(tiny_file(tmp_path)))
    with pytest.raises(AifluxError, match="no llama-server on PATH"):
        engine_of(KIND, plan, tmp_path, {"PATH": str(tmp_path)})
