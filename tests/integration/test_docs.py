"""Run every command of the pages as a reader types it, with the real Slurm, Apptainer and Ollama.

The blocks of a page run one after the other in one directory. Two tables list the differences from
a reader's environment: replaced texts, and commands that run elsewhere.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import requests

from aiflux.engines.ollama.api import ollama_environment
from aiflux.engines.ollama.store import model_digest
from aiflux.engines.process import ServerProcess
from aiflux.models.name import parse_model_name
from tests.integration.conftest import REPOSITORY, Cluster, User, create_model
from tests.integration.reader import MODEL, Reader, commands, furnish, page_blocks

PAGES = {
    str(path.relative_to(REPOSITORY)): path
    for path in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"),
                 *REPOSITORY.glob("examples/*.md")]
    if page_blocks(path, "sh", "python")
}  # fmt: skip

# Commands run by another test or fixture, because they take long or run the tests.
_BENCHMARK = "tests/integration/test_benchmark.py"
_BENCH = "tests/slow/test_bench.py::test_a_case_gives_figures"
_SIGNED = "test_a_build_asks_for_the_passphrase_first_and_signs_the_image"
_HUB = "tests/unit/cli/test_hub_models_command.py"
_OPTIONS = "tests/unit/engines/test_server_options.py"
_REACHED = "test_options_and_flags_reach_the_server"
_VLLM = "tests/unit/engines/test_vllm.py"
_COMMAND = "tests/integration/test_command.py"
_GATEWAY = "tests/integration/test_gateway.py"
_SERVE = "tests/integration/test_serve.py"
_TABLES = "tests/unit/converters/test_tables.py"
_PROMPTS = "tests/unit/converters/test_prompts.py"
_WAITING = (
    "tests/integration/test_dependency.py::"
    "test_a_run_waits_for_all_arrays_of_another_and_a_command_for_it"
)
_EVIDENCE = "tests/unit/cli/test_evidence.py::test_anyone_can_check_the_signature_with_ssh_keygen"
ELSEWHERE = {
    "tar -xOf bundle.tar aiflux-bundle/sbom.cdx.json > bundle.cdx.json":
        "tests/unit/image/test_sbom.py::test_a_bundle_has_its_own",
    "aiflux run --input second.jsonl --output second.json --model llama3.2:3b --after first.json":
        _WAITING,
    "aiflux run --input prompts.jsonl --output results.json --model llama3.2:3b "
    "--then 'Rscript analyse.R results.json'": _WAITING,
    "sbatch --dependency=$(aiflux status results.json --json | jq -r .dependency) analyse.sh":
        _WAITING,
    "aiflux report results.json --co2-per-kwh 380":
        "tests/unit/report/test_report.py::test_the_rates_can_be_given_to_the_report",
    "aiflux verify-run results.json --sample 200":
        "tests/integration/test_verify_run.py::test_a_job_is_verified_by_another",
    "aiflux report results.json --evidence evidence.json --key ~/.ssh/id_ed25519": _EVIDENCE,
    'echo "ann@example.org $(cat id_ed25519.pub)" >allowed': _EVIDENCE,
    "ssh-keygen -Y verify -f allowed -I ann@example.org -n aiflux-evidence "
    "-s evidence.json.sig <evidence.json": _EVIDENCE,
    "sha256sum prompts.jsonl results.json":
        "tests/unit/cli/test_evidence.py::test_the_record_has_the_hashes_of_input_and_output",
    "make image": "tests/integration/conftest.py::image",
    "make demo": "tests/integration/test_image.py::test_the_demo_shows_prompts_and_answers",
    "make test": "tests/integration/test_docs.py::test_every_command_of_a_page",
    "make test-fast": "tests/unit/test_docs.py::test_commands_parse",
    "make lint": "tests/unit/test_docs.py::test_make_targets_exist",
    "make docs": "tests/unit/test_site.py::test_every_page_is_on_the_website_and_can_be_searched",
    "make bench": _BENCH,
    "make bench BENCH=--quick": _BENCH,
    'make bench BENCH="occupancy adaptive"': _BENCH,
    "aiflux run azure.jsonl --model llama3.2:3b --replace-model --output results.json":
        "tests/unit/core/batch/test_other_services.py::test_check_and_run_report_it_in_one_line",
    'aiflux convert table in.xlsx --template "Sum up: {text}" --output q.jsonl':
        f"{_TABLES}::test_a_sheet_of_excel",
    'aiflux convert table survey.xlsx --table Answers --template "Summarize: {text}" '
    "--output prompts.jsonl":
        f"{_TABLES}::test_a_sheet_of_excel",
    'aiflux convert table reviews.db --query "SELECT id, text FROM reviews WHERE stars < 3" '
    '--id-column id --template "{text}" --output prompts.jsonl':
        f"{_TABLES}::test_a_query_and_a_view",
    "aiflux convert parquet 'reviews/*.parquet' --template \"Summarize: {text}\" "
    "--output prompts.jsonl":
        f"{_TABLES}::test_folders_patterns_and_partitions_of_parquet",
    **dict.fromkeys(
        ("aiflux chain steps.yaml", "aiflux status final.csv", "aiflux report final.csv"),
        "tests/integration/test_chain.py::test_a_chain_of_jobs",
    ),
    "make image ENGINE=llamacpp": "tests/integration/conftest.py::llama_image",
    "aiflux run --engine llamacpp --model llama3.2:3b --input prompts.jsonl --output results.json":
        "tests/integration/test_llamacpp.py::test_a_job_uses_the_image_of_its_engine",
    **{
        f"aiflux models {action} hf:Qwen/Qwen3-8B{revision}":
            f"{_HUB}::test_a_model_is_pulled_without_an_image_and_verified"
        for action, revision in (("pull", ""), ("pull", "@COMMIT"), ("verify", ""))
    },
    "aiflux models export hf:Qwen/Qwen3-8B qwen.tar":
        f"{_HUB}::test_a_snapshot_travels_in_one_file",
    "make image ENGINE=vllm": "tests/integration/test_vllm_image.py::vllm_image",
    "aiflux bundle create --model hf:Qwen/Qwen3-8B -o bundle.tar":
        "tests/integration/test_airgap.py::test_a_bundle_brings_a_model_of_hugging_face",
    "aiflux models remove hf:Qwen/Qwen3-8B":
        f"{_HUB}::test_removing_a_snapshot_leaves_what_others_use",
    **{
        f"aiflux run --engine vllm --model {model} --input prompts.jsonl --output results.json":
            f"{_VLLM}::test_the_server_gets_the_model_its_slots_and_its_context"
        for model in ("hf:Qwen/Qwen3-8B", "/shared/models/Qwen3-8B")
    },
    "aiflux run --engine vllm --nodes-per-engine 2 --gpus-per-node 4 --model "
    "hf:Qwen/Qwen3-235B-A22B --input prompts.jsonl --output results.json":
        "tests/integration/test_vllm_nodes.py::test_a_run_over_two_nodes_survives_the_death_of_a_rank",
    **{
        f"aiflux run prompts.jsonl --model {words}":
            f"{_COMMAND}::test_a_job_without_an_image_survives_the_kill_of_its_server"
        for words in (
            "Qwen/Qwen3-8B --modules vllm --engine-command"
            " 'vllm serve {model} --uds {socket} --max-num-seqs {slots}'",
            "Qwen/Qwen3-8B --engine-command 'apptainer exec --nv /shared/vllm.sif"
            " vllm serve {model} --host {host} --port {port}'",
            "Qwen/Qwen3-8B --engine-command 'python3 -m sglang.launch_server --model-path {model}"
            " --host {host} --port {port} --tp {gpus} --max-running-requests {slots}"
            " --enable-metrics'",
            "Qwen/Qwen3-8B --engine-command 'trtllm-serve {model} --host {host} --port {port}"
            " --tp_size {gpus} --max_batch_size {slots}'",
            "/shared/models/m.gguf --engine-command"
            " 'llama-server -m {model} --host {socket} -np {slots} --no-webui'",
        )
    },
    "aiflux run --engine vllm --engine-arg gpu-memory-utilization=0.85"
    " --engine-arg enable-expert-parallel ...": f"{_OPTIONS}::{_REACHED}",
    "aiflux run --engine llamacpp --engine-arg cache-type-k=q8_0 ...": f"{_OPTIONS}::{_REACHED}",
    "aiflux run --engine vllm --model hf:Qwen/Qwen3-8B --lora legal=/shared/adapters/legal"
    " --input prompts.jsonl ...":
        "tests/integration/test_vllm.py::test_adapters_parsers_and_options_in_one_engine",
    "aiflux run --engine llamacpp --model llama3.2:3b --lora legal=legal.gguf"
    " --input prompts.jsonl ...":
        "tests/integration/test_llamacpp.py"
        "::test_adapters_change_only_the_answers_of_their_requests",
    "aiflux run --engine vllm --model hf:Qwen/Qwen3-8B --tool-parser hermes"
    " --reasoning-parser qwen3 ...":
        f"{_OPTIONS}::test_the_parsers_reach_vllm_and_answers_with_tool_calls_count",
    "aiflux estimate --engine ollama,llamacpp --model llama3.2:3b --input prompts.jsonl"
    " --output results.json --wait":
        "tests/integration/test_llamacpp.py"
        "::test_the_estimate_compares_it_with_ollama_on_the_same_sample",
    "aiflux estimate --engine ollama=llama3.2:3b,vllm=hf:meta-llama/Llama-3.2-3B-Instruct"
    " --input prompts.jsonl --requests 600":
        "tests/unit/cli/test_estimate_command.py"
        "::test_several_engines_are_submitted_together_and_compared_on_one_sample",
    "aiflux benchmark --model llama3.2:3b --local --write-config aiflux.yaml":
        f"{_BENCHMARK}::test_engines_are_measured_on_this_machine",
    "aiflux benchmark --mix summarize --model llama3.2:3b --engine ollama,llamacpp --slots 4,8,16"
    " --wait":
        f"{_BENCHMARK}::test_settings_are_measured_in_jobs",
    "aiflux benchmark --input prompts.jsonl --engine-url http://127.0.0.1:8000 --model llama3.2:3b"
    " --json":
        "tests/unit/cli/test_benchmark_command.py::test_the_users_own_requests",
    "aiflux run --model llama3.2:3b --input prompts.jsonl --output results.json --tune":
        "tests/unit/worker/test_tuning.py::test_a_run_tunes_itself_with_its_own_requests",
    "aiflux benchmark --engine llamacpp --model llama3.2:3b --local --against":
        "tests/unit/cli/test_benchmark_command.py"
        "::test_the_engines_own_tool_is_shown_beside_the_same_point",
    "apptainer run --rocm aiflux-amd.sif input.jsonl output.json --model llama3.2:3b":
        "tests/integration/test_image.py::test_the_image_runs_directly",
    **dict.fromkeys(
        ("aiflux serve --model llama3.2:3b", "aiflux serve --model llama3.2:3b --time 02:00:00",
         "aiflux serve list", "aiflux serve stop llama3.2-3b",
         "aiflux run prompts.jsonl --engine-url serve:llama3.2-3b"),
        f"{_SERVE}::test_an_engine_is_served_and_protected",
    ),
    **dict.fromkeys(
        ("aiflux gateway --model llama3.2:3b",
         "aiflux gateway --model llama3.2:3b --time 08:00:00",
         "aiflux gateway --model llama3.2:3b --partition gpu --time 08:00:00 --shards 4"),
        f"{_GATEWAY}::test_a_batch_is_a_job_and_survives_the_gateway",
    ),
    "aiflux gateway --local --model llama3.2:3b":
        "tests/unit/gateway/test_places.py::test_an_engine_on_this_machine",
    "aiflux gateway --engine-url http://127.0.0.1:8000":
        f"{_GATEWAY}::test_another_user_at_the_port_needs_the_key",
    "aiflux gateway --socket ~/.aiflux-gateway.sock --model llama3.2:3b":
        f"{_GATEWAY}::test_another_user_gets_neither_the_key_nor_the_socket",
    "aiflux connect llama3.2-3b": f"{_SERVE}::test_a_tunnel_survives_preemption",
    "aiflux image build --base docker --output aiflux.sif":
        "tests/integration/test_image_docker.py::test_the_docker_base_builds_an_equivalent_image",
    "aiflux image build --sign --force": f"tests/integration/test_airgap.py::{_SIGNED}",
    'aiflux convert parquet found.parquet --endpoint rerank --template "{question}" '
    "--documents passages --output prompts.jsonl":
        "tests/unit/converters/test_endpoint_forms.py::test_documents_are_in_several_columns_or_fields_or_lists",
    'aiflux convert csv reviews.csv --template "{text}" --examples rated.csv '
    "--example-answer rating --output prompts.jsonl":
        f"{_PROMPTS}::test_examples_come_before_the_prompt",
    'aiflux convert csv reviews.csv --template "{text}" --system-template '
    '"The customer finds it {label}." --output prompts.jsonl':
        f"{_PROMPTS}::test_each_row_has_its_own_system_message",
    'aiflux convert csv reviews.csv --turn "user={text}" --turn "assistant=I find it {label}." '
    '--turn "user=Why?" --output prompts.jsonl':
        f"{_PROMPTS}::test_columns_become_a_conversation",
    "aiflux chain steps.yaml --local":
        "tests/integration/test_chain.py::test_a_chain_on_this_machine",
    "aiflux estimate steps.yaml --wait":
        "tests/unit/cli/test_chain.py::test_the_pilot_of_a_chain_in_slurm",
    "aiflux results to-npy embeddings.json":
        "tests/unit/converters/test_result_forms.py::test_embeddings_as_an_array",
    "aiflux results to-npy out.json --output vectors.npy":
        "tests/unit/converters/test_result_forms.py::test_embeddings_as_an_array",
    "cat passphrase | aiflux image build --sign --force":
        f"tests/integration/test_airgap.py::{_SIGNED}",
}  # fmt: skip

# Commands that a reader has run before a page or a command, and runs after a command.
_RUN = "aiflux run --model llama3.2:3b --input prompts.jsonl --output results.json"
_KEY = "apptainer key newpair --push=false"
BEFORE: dict[str, list[str]] = {
    "docs/chain.md": [
        "printf '%s\\n' 'source: reviews.csv' 'output: final.csv' 'model: llama3.2:3b' steps:"
        " '  summary:' '    template: \"Summarize: {text}\"' >steps.yaml"
    ],
    "docs/image.md": [_KEY, "cp prompts.jsonl input.jsonl"],
    "docs/running.md": [f"{_RUN} --shards 4"],
    "docs/report.md": [_RUN],
    "docs/reference.md": [_KEY, _RUN],
    "aiflux results to-csv results.json --source reviews.csv --id-column id": [
        "aiflux convert csv --input reviews.csv --id-column id --template '{text}'"
        " --schema rating.json --output rated.jsonl",
        "rm -r results.json*",
        "aiflux run --model llama3.2:3b --input rated.jsonl --output results.json",
    ],
    "aiflux results to-csv out.json --source reviews.csv --json-fields": [
        "aiflux convert csv --input reviews.csv --template '{text}' --schema rating.json"
        " --output rated.jsonl",
        "aiflux run --model llama3.2:3b --input rated.jsonl --output out.json",
    ],
    # Alternatives with the same output, of which a reader chooses one.
    "aiflux run --engine-url http://127.0.0.1:8000 --model llama3.2:3b --input prompts.jsonl": [
        "rm -r prompts.results.json*"
    ],
    **{
        f"examples/classify/run.sh --model {rest}": ["rm -r classified*"]
        for rest in (MODEL, f"{MODEL} --local", "MODEL --engine-url http://127.0.0.1:8000")
    },
}  # fmt: skip
AFTER = {"aiflux models remove llama3.2:3b": ["aiflux models pull llama3.2:3b"]}

# Texts that are replaced here.
HERE = {
    # The test cluster has no GPU types or features, and its nodes have 16 GB.
    "gpu:a100:2": "gpu:2",
    " --constraint a100": "",
    "--partition long": "--partition urgent",
    "sbatch slurm/": "sbatch --mem=1G slurm/",
    "sbatch --account": "sbatch --mem=1G --account",
    # Directories that only root could create, and a site's modules.
    "/sw/aiflux": "sw/aiflux",
    "/data/models": "data/models",
    "TMPDIR=/scratch": "TMPDIR=/var/tmp",
    " --modules apptainer": " --setup 'echo a module'",
    # Answers to Apptainer's questions, and commands for another machine.
    _KEY: f"{_KEY} --name Ann --email ann@example.org --comment '' --password ''"
          " --bit-length 2048",
    "apptainer key export": "echo 0 | apptainer key export",
    "apptainer key import": "mkdir other && HOME=$PWD/other apptainer key import",
    "--model MODEL": "--model smollm2:135m",
}  # fmt: skip

DIGEST = "a80c4f17acd5"
"""The model's digest on the pages."""

# Pages that pull their model, here from the test stack's registry.
PULLING = {"docs/models.md", "docs/reference.md"}


@pytest.fixture(scope="session")
def tiny_models(user: User, ollama: Path) -> Path:
    """A models directory with a random model under the names used on the pages."""
    folder = user.folder("models of the pages")
    user.run("python3", REPOSITORY / "tests/tools/make_tiny_gguf.py", folder / "tiny.gguf")
    for name in (MODEL, "smollm2:135m"):
        create_model(user, folder, ollama, name, f"FROM {folder / 'tiny.gguf'}")
    return folder


@pytest.fixture(scope="module")
def engine(user: User, ollama: Path, tiny_models: Path) -> Iterator[str]:
    """The server at 127.0.0.1:8000 of the pages, on a free port.

    It ends with this module, because other tests check for leftover processes.
    """
    home = user.folder("home of an engine")
    environ = ollama_environment(os.environ, tiny_models, home, {})
    server = ServerProcess([str(ollama), "serve"], environ, home / "serve.log")
    server.start()
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def registered(stack: dict[str, str], engine: str) -> str:
    """The model's name in the registry of the test stack."""
    name = f"{stack['AIFLUX_STACK_REGISTRY']}/library/docs-{uuid.uuid4().hex[:8]}:3b"
    with requests.Session() as session:
        session.trust_env = False  # no proxy for loopback
        copied = session.post(
            f"{engine}/api/copy", json={"source": MODEL, "destination": name}, timeout=60
        )
        copied.raise_for_status()
        asked = {"model": name, "insecure": True, "stream": False}
        pushed = session.post(f"{engine}/api/push", json=asked, timeout=120)
        assert pushed.json() == {"status": "success"}
        session.delete(f"{engine}/api/delete", json={"model": name}, timeout=60).raise_for_status()
    return f"http://{name}"


@pytest.fixture(scope="session")
def equipped(user: User, checkout: Path) -> Path:
    """The checkout with the package's extras, installed as described on the pages."""
    extras = "documents,duckdb,images,parquet,report,schema,spreadsheets"
    pip = (checkout / ".venv/bin/python", "-m", "pip", "install", "--quiet")
    user.run(*pip, "--disable-pip-version-check", "-e", f".[{extras}]", cwd=checkout)
    return checkout


@pytest.fixture
def reader(
    user: User, equipped: Path, image: Path, tiny_models: Path, engine: str, cluster: Cluster
) -> Reader:
    place = user.folder(f"{uuid.uuid4().hex[:6]} a reader's, place")
    furnish(user, equipped, image, place)
    user.run("cp", "-r", tiny_models, place / "store")
    env = {
        "AIFLUX_MODELS_DIR": str(place / "store"), "AIFLUX_ALLOW_CPU": "1",
        "SLURM_MEM": "1G", "SLURM_CPUS_PER_TASK": "1", "SLURM_PARTITION": "gpu",
        # The random model never ends an answer by itself.
        "MAX_TOKENS": "64",
    }  # fmt: skip
    digest = model_digest(tiny_models, parse_model_name(MODEL))
    assert digest is not None
    changes = {**HERE, "http://127.0.0.1:8000": engine, DIGEST: digest[:12]}
    return Reader(user, place, env, changes)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page(
    reader: Reader, page: str, image: Path, request: pytest.FixtureRequest
) -> None:
    if page in PULLING:
        name = request.getfixturevalue("registered")
        reader.changes[MODEL] = name
        reader.types(f"aiflux models pull {name}")
        digest = model_digest(reader.place / "store", parse_model_name(name))
        assert digest is not None
        reader.changes[DIGEST] = digest[:12]
    if any(" image sign " in text for text in page_blocks(PAGES[page], "sh")):
        own_image(reader, image)
    failed = [*type_all(reader, BEFORE.get(page, []))]
    for block in page_blocks(PAGES[page], "sh"):
        typed = [command for command in commands(block) if command not in ELSEWHERE]
        reader.makes_way(typed)
        for command in typed:
            around = (BEFORE.get(command, []), [command], AFTER.get(command, []))
            failed += type_all(reader, itertools.chain(*around))
    for block in page_blocks(PAGES[page], "python"):
        try:
            reader.runs_python(block)
        except pytest.fail.Exception as error:
            failed.append(str(error))
    failed += type_all(reader, ["true"])
    assert not failed, "\n\n".join(failed)


def type_all(reader: Reader, given: Iterable[str]) -> Iterator[str]:
    """Type commands; yield a message for each that fails."""
    for command in given:
        try:
            reader.types(command)
        except pytest.fail.Exception as error:
            yield f"{command}\n{error}"


def own_image(reader: Reader, image: Path) -> None:
    """Give the reader a writable copy of the image."""
    link = reader.place / "aiflux.sif"
    link.unlink()
    reader.user.run("cp", image, link)


@pytest.mark.parametrize("command", ELSEWHERE)
def test_commands_run_elsewhere_exist(command: str) -> None:
    """The table above names existing tests and fixtures, and commands of the pages."""
    assert any(
        command in commands(block) for page in PAGES.values() for block in page_blocks(page, "sh")
    )
    path, _, name = ELSEWHERE[command].partition("::")
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_in_blocks_that_are_run(page: str) -> None:
    """Blocks without a language contain no command, except usage lines in the reference."""
    for block in page_blocks(PAGES[page], ""):
        for command in commands(block):
            words = shlex.split(command) if command.count("'") % 2 == 0 else command.split()
            form = re.search(r"\[|\bR\b|NAME:TAG|BUNDLE|FILE", command)
            assert words[0] not in ("aiflux", "make", "apptainer", "sbatch") or form, command
