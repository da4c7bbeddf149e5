"""``aiflux report --evidence``: the record of a run, and its signature."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.core.batch.input_file import digest_of_lines
from aiflux.core.batch.request import request_key
from aiflux.core.config.settings import RunOptions
from aiflux.core.runs.directory import RunDirectory
from aiflux.core.runs.journal import JournalWriter, NewResult
from aiflux.core.runs.plan import Shard, write_plan
from aiflux.errors import ExitCode
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands
from tests.unit.helpers import write_input
from tests.unit.made_models import put_model
from tests.unit.made_runs import MadeRun
from tests.unit.working import Working

EVIDENCE = ["report", "out.json", "--evidence", "evidence.json"]


@pytest.fixture(autouse=True)
def place(awkward: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(awkward)
    return awkward


@pytest.fixture
def finished(place: Path) -> Path:
    """A run that is finished, with one failure."""
    with FaultyEngine() as engine:
        Working(place, engine.url, "out.jsonl", max_failures="1").prompts("fine", "400").run()
        Working(place, engine.url, max_failures="1").prompts("fine", "400").run()
    return place / "out.json"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "ann", "-f", path], check=True
    )
    return path


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def evidence(*more: str) -> dict[str, Any]:
    """Write the record without a signature, and read it."""
    assert main([*EVIDENCE, "--unsigned", *more]) == 0
    content: dict[str, Any] = json.loads(Path("evidence.json").read_text())
    return content


def change_status(output: Path, **changes: Any) -> None:
    """Change AI-Flux's part of the shard's status."""
    path = RunDirectory.of_output(output).status(0)
    content = json.loads(path.read_text())
    content["aiflux"] |= changes
    path.write_text(json.dumps(content))


def sealed(output: Path, starts: int = 1, sealed_starts: int = 1, results: int = 2) -> None:
    totals = {"starts": starts, "sealed_starts": sealed_starts, "results": results}
    change_status(output, sealed=True, unsealed="", totals=totals)


def test_the_record_has_the_hashes_of_input_and_output(finished: Path, place: Path) -> None:
    content = evidence()
    assert (content["form"], content["kind"]) == (1, "aiflux-evidence")
    given = place / "in.jsonl"
    assert content["input"]["sha256"] == digest(given)
    assert content["input"]["path"] == str(given)
    (written,) = content["output"]
    assert written == {
        "path": str(finished),
        "bytes": finished.stat().st_size,
        "sha256": digest(finished),
        "as_written": True,
    }
    assert content["run"]["requests"] == {"total": 2, "completed": 1, "failed": 1}
    assert content["models"] == [{"name": "m:1", "results": 2, "digests": []}]
    assert (content["mixed"], content["earlier"]) == (None, [])
    assert (content["image"], content["verification"]) == (None, None)
    assert Path("evidence.json").stat().st_mode & 0o777 == 0o600
    assert "fine" not in json.dumps(content), "the record has no prompt and no answer"


def test_both_files_of_the_batch_form_are_hashed(finished: Path, place: Path) -> None:
    assert main(["report", "out.jsonl", "--evidence", "e.json", "--unsigned"]) == 0
    written = json.loads(Path("e.json").read_text())["output"]
    assert [Path(each["path"]).name for each in written] == ["out.jsonl", "out.errors.jsonl"]


def test_a_run_at_a_server_could_send_data_out(finished: Path) -> None:
    content = evidence()
    assert content["seal"]["sealed"] is False
    (check,) = content["seal"]["checks"]
    assert (check["starts"], check["sealed_starts"]) == (1, 0)
    assert check["why"] == "the engine is elsewhere"
    assert content["egress"] == {
        "possible": True,
        "statement": "Egress was possible: the requests went to an engine elsewhere.",
    }


def test_no_egress_follows_from_a_check_at_each_start(finished: Path) -> None:
    sealed(finished, starts=3, sealed_starts=3)
    content = evidence()
    assert content["seal"]["sealed"] is True
    assert content["egress"]["possible"] is False
    assert content["egress"]["statement"].startswith("No egress: each start of each worker found")


@pytest.mark.parametrize(
    "totals",
    [
        {"starts": 3, "sealed_starts": 2},
        {"starts": 1, "sealed_starts": 0},  # an earlier version noted only the last start
        {"results": 1},  # a result of an earlier plan
    ],
)
def test_what_was_not_recorded_of_each_start_is_unknown(
    finished: Path, totals: dict[str, int]
) -> None:
    sealed(finished, **totals)
    content = evidence()
    assert (content["seal"]["sealed"], content["egress"]["possible"]) == (None, None)
    assert content["egress"]["statement"].startswith("Unknown: ")


def test_a_result_that_was_tried_again_counts_twice(finished: Path) -> None:
    """So a result of an earlier plan is not mistaken for one of this plan."""
    sealed(finished)
    journal = RunDirectory.of_output(finished).journal(0)
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([first, first, *rest]))
    assert evidence()["seal"]["sealed"] is None
    sealed(finished, results=3)
    assert evidence()["seal"]["sealed"] is True


def test_a_start_with_a_network_is_never_forgotten(finished: Path) -> None:
    totals = {"starts": 2, "sealed_starts": 1, "unsealed_starts": 1, "unsealed": "--no-seal"}
    change_status(finished, sealed=True, unsealed="", totals={**totals, "results": 2})
    content = evidence()
    assert content["seal"]["sealed"] is False
    assert content["seal"]["checks"][0]["why"] == "1 of 2 starts had a network (--no-seal)"
    assert content["egress"]["possible"] is True


def test_the_worker_records_why_an_earlier_start_had_a_network(place: Path) -> None:
    with FaultyEngine(delay=0.05) as engine:
        working = Working(place, engine.url, concurrency=1).prompts("a", "b", "c", "d", "e", "f")
        working.stop_soon()
        assert working.run() is ExitCode.STOPPED
        assert Working(place, engine.url).run() is ExitCode.OK
    totals = working.status["aiflux"]["totals"]
    assert (totals["starts"], totals["unsealed_starts"]) == (2, 2)
    assert totals["unsealed"] == "the engine is elsewhere"


@pytest.mark.parametrize("damage", ["gone", "empty", "garbage", "cut"])
def test_a_run_without_its_journal_has_no_evidence(
    finished: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    sealed(finished)
    journal = RunDirectory.of_output(finished).journal(0)
    if damage == "gone":
        shutil.rmtree(journal.parent)
    else:
        whole = journal.read_bytes()
        content = {"empty": b"", "garbage": b"garbage\n" * 3, "cut": whole[:-9]}
        journal.write_bytes(content[damage])
    assert main([*EVIDENCE, "--unsigned"]) == int(ExitCode.STOPPED)
    assert "no result in" in capsys.readouterr().err
    assert not Path("evidence.json").exists()


def test_a_damaged_line_leaves_the_seal_unknown(finished: Path) -> None:
    """It can be the result of a start that had a network."""
    sealed(finished)
    journal = RunDirectory.of_output(finished).journal(0)
    with journal.open("ab") as file:
        file.write(b"damaged\n")
    content = evidence()
    assert (content["seal"]["sealed"], content["egress"]["possible"]) == (None, None)
    assert content["egress"]["statement"] == "Unknown: the journals have 1 damaged line."


def test_a_key_in_the_engines_options_is_not_written(place: Path) -> None:
    options = {"engine_arg": {"api-key": "s3cret", "port": "1"}}
    made = MadeRun(place / "made", options=RunOptions(**options))
    write_input(made.plan.input_path, 100)
    lines = digest_of_lines(made.plan.input_path).hexdigest()
    size = made.plan.input_path.stat().st_size
    facts = replace(made.plan.input, digest=lines, size=size)
    plan = replace(made.plan, input=facts, shards=(Shard(0, 0, size, 0, 100),))
    write_plan(plan, made.run)
    with closing(JournalWriter(made.run.journal(0))) as journal:
        for line in made.plan.input_path.read_bytes().splitlines():
            metadata = {"model": plan.models[0]}
            journal.append(NewResult(request_key(line), "r", 200, metadata, None, b"{}"))
    made.plan = plan
    made.status(state="completed", completed=100)
    made.whole("completed", 100)
    words = ["report", str(made.output), "--evidence", "e.json", "--unsigned"]
    assert main(words) == 0
    text = Path("e.json").read_text()
    assert "s3cret" not in text
    content = json.loads(text)
    assert content["engine"]["settings"] == {"engine_arg": {"api-key": "(not shown)", "port": "1"}}
    assert content["output"][0]["as_written"] is None, "the run noted no checksum"


def test_the_worker_counts_its_sealed_starts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyEngine() as engine:
        working = Working(place, engine.url).prompts("fine")
        working.run()
    totals = working.status["aiflux"]["totals"]
    assert (totals["starts"], totals["sealed_starts"], totals["results"]) == (1, 0, 1)


# --- results of several starts ---------------------------------------------------------------


@pytest.fixture
def mixed(place: Path) -> dict[str, int]:
    """A run that was begun with one model and ended with another; returns their results."""
    prompts = ("a", "b", "c", "d", "e", "f")
    with FaultyEngine(delay=0.05) as one, FaultyEngine() as other:
        started = Working(place, one.url, concurrency=1, model="first", temperature=0.9)
        started.prompts(*prompts, model=None).stop_soon()
        assert started.run() is ExitCode.STOPPED
        resumed = Working(place, other.url, model="second")
        assert resumed.run(force_resume=True) is ExitCode.OK
        assert resumed.open().finished
        return {**Counter(each["metadata"]["model"] for each in resumed.results), one.url: 0}


def test_all_models_and_settings_of_a_mixed_run_are_listed(
    mixed: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    *_, address = mixed
    content = evidence()
    assert {each["name"]: each["results"] for each in content["models"]} == {
        "first": mixed["first"], "second": mixed["second"],
    }  # fmt: skip
    words = "results of different models (second and first) are mixed"
    assert content["mixed"] == words
    (earlier,) = content["earlier"]
    assert earlier["identity"]["models"] == ["first"]
    assert earlier["identity"]["parameters"] == {"temperature": 0.9}
    assert earlier["engine_url"] == address
    capsys.readouterr()
    assert main(["report", "out.json", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {each["name"]: each["results"] for each in report["what"]["models"]} == {
        "first": mixed["first"], "second": mixed["second"],
    }  # fmt: skip
    assert report["what"]["mixed"] == words
    assert "the models second and first" in report["methods"]
    assert "Results of different models (second and first) are mixed" in report["methods"]
    assert main(["verify-run", "out.json"]) == 2
    assert f"cannot be verified: {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [({"temperature": 0.1}, "results of different settings are mixed"), ({}, None)],
)
def test_other_parameters_are_mixed_too_but_another_address_is_not(
    place: Path, more: dict[str, float], words: str | None
) -> None:
    with FaultyEngine(delay=0.05) as one, FaultyEngine() as other:
        started = Working(place, one.url, concurrency=1)
        started.prompts("a", "b", "c", "d", "e", "f").stop_soon()
        assert started.run() is ExitCode.STOPPED
        assert Working(place, other.url, **more).run(force_resume=True) is ExitCode.OK
        content = evidence()
        assert content["mixed"] == words
        assert content["engine"]["address"] == other.url
        assert [each["engine_url"] for each in content["earlier"]] == [one.url]
        assert Working(place, other.url, **more).run(force=True) is ExitCode.OK
    assert evidence()["earlier"] == [], "a run that starts over mixes nothing"


def test_a_resumed_run_with_the_same_settings_is_not_mixed(place: Path) -> None:
    with FaultyEngine(delay=0.05) as engine:
        started = Working(place, engine.url, concurrency=1).prompts("a", "b", "c", "d", "e", "f")
        started.stop_soon()
        assert started.run() is ExitCode.STOPPED
        assert Working(place, engine.url).run() is ExitCode.OK
    assert (evidence()["mixed"], evidence()["earlier"]) == (None, [])


# --- the image -------------------------------------------------------------------------------


VERIFIED = json.dumps(
    {"Signatures": 1, "SignerKeys": [{"Signer": {"Name": "Ann", "Fingerprint": "ab12"}}]}
)
ID = "00010203-0405-0607-0809-0a0b0c0d0e0f"


def with_image(output: Path, id_: str | None = ID) -> Path:
    """Have the run use an image, as a job does."""
    image = make_sif(output.with_name("i.sif"), version="1")
    run = RunDirectory.of_output(output)
    run.submissions.write_text(json.dumps({"image": str(image), "slurm": {}, "submissions": []}))
    change_status(output, image={"version": "1", "engine": "ollama", "id": id_})
    return image


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    fakes = FakeCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


def test_the_image_has_its_hash_and_its_signature(finished: Path, apptainer: FakeCommands) -> None:
    image = with_image(finished)
    apptainer.say("apptainer", VERIFIED)
    content = evidence()["image"]
    assert content["path"] == str(image)
    assert content["sha256"] == digest(image)
    assert content["same_id"] is True
    assert content["signature"] == "verified"
    assert content["signature_text"] == "verified: signed by Ann (AB12)"
    assert content["content"]["engine"] == "ollama"


@pytest.mark.parametrize(("id_", "same"), [("another", False), (None, None)])
def test_another_image_than_that_of_the_run_is_recognized(
    finished: Path, apptainer: FakeCommands, id_: str | None, same: bool | None
) -> None:
    with_image(finished, id_)
    apptainer.say("apptainer", '{"Signatures": 0}', "signature not found for object group 1", 255)
    content = evidence()["image"]
    assert (content["same_id"], content["signature"]) == (same, "unsigned")


def test_a_signature_that_cannot_be_checked_is_not_guessed(
    finished: Path, apptainer: FakeCommands
) -> None:
    image = with_image(finished)
    apptainer.say("apptainer", "", "FATAL: no keyring", 255)
    content = evidence()["image"]
    assert content["signature"] == "not checked"
    assert "no keyring" in content["signature_text"]
    assert content["sha256"] == digest(image)
    image.unlink()
    content = evidence()["image"]
    assert (content["signature"], content["sha256"], content["same_id"]) == (
        "not checked", None, None,
    )  # fmt: skip
    assert content["signature_text"] == "not checked: the image no longer exists"


# --- the signature ---------------------------------------------------------------------------


def check(key: Path, record: Path, signature: Path) -> int:
    """Check a signature as the documentation says; return ssh-keygen's exit code."""
    allowed = key.with_name("allowed")
    allowed.write_text(f"ann@example.org {key.with_suffix('.pub').read_text()}")
    words = ["-f", allowed, "-I", "ann@example.org", "-n", "aiflux-evidence", "-s", signature]
    with record.open("rb") as file:
        done = subprocess.run(
            ["ssh-keygen", "-Y", "verify", *words], stdin=file, capture_output=True, check=False
        )
    return done.returncode


def test_anyone_can_check_the_signature_with_ssh_keygen(
    finished: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # an earlier signature is replaced without a question
        assert main([*EVIDENCE, "--key", str(key)]) == 0
        assert capsys.readouterr().out == "wrote evidence.json and evidence.json.sig\n"
    record, signature = Path("evidence.json"), Path("evidence.json.sig")
    assert check(key, record, signature) == 0
    record.write_text(record.read_text().replace('"failed": 1', '"failed": 0'))
    assert check(key, record, signature) != 0


def test_an_unsigned_record_leaves_no_signature_of_an_earlier_one(
    finished: Path, key: Path
) -> None:
    assert main([*EVIDENCE, "--key", str(key)]) == 0
    evidence()
    assert not Path("evidence.json.sig").exists()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return why the record is refused; nothing is written."""
    assert main([*EVIDENCE, *words]) == 2
    assert not Path("evidence.json").exists()
    return capsys.readouterr().err


def test_a_record_needs_a_key_or_the_option_to_do_without(
    finished: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no key was given to sign the evidence with" in refused(capsys)
    assert "cannot be combined" in refused(capsys, "--unsigned", "--key", str(key))
    assert "there is no key" in refused(capsys, "--key", str(tmp_path / "none"))
    public = key.with_name("text")
    public.write_text("not a key\n")
    assert f"the key {public} does not sign" in refused(capsys, "--key", str(public))
    assert main(["report", "out.json", "--unsigned"]) == 2
    assert "--unsigned needs --evidence" in capsys.readouterr().err


RUN = "out.json.aiflux"


@pytest.mark.parametrize(
    "file",
    [
        *("out.json", "in.jsonl", "key", "key.pub", "foreign.txt", "out.jsonl", "link"),
        *(f"{RUN}/plan.json", f"{RUN}/journal/shard-0000.jsonl"),
    ],
)
@pytest.mark.parametrize("option", ["--evidence", "--output"])
def test_no_file_that_is_needed_is_overwritten(
    finished: Path, key: Path, capsys: pytest.CaptureFixture[str], file: str, option: str
) -> None:
    Path("foreign.txt").write_text("mine")
    Path("link").symlink_to("in.jsonl")
    path = key.parent / file if file.startswith("key") else Path(file)
    before = path.read_bytes()
    more = ["--key", str(key)] if option == "--evidence" else []
    assert main(["report", "out.json", option, str(path), *more]) == 2
    assert "choose another file" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("more", ["--unsigned", "--key"])
def test_a_file_with_the_name_of_the_signature_is_kept(
    finished: Path, key: Path, capsys: pytest.CaptureFixture[str], more: str
) -> None:
    signature = Path("evidence.json.sig")
    signature.write_text("mine")
    assert main([*EVIDENCE, more, *([str(key)] if more == "--key" else [])]) == 2
    assert "evidence.json.sig already exists" in capsys.readouterr().err
    assert (signature.read_text(), Path("evidence.json").exists()) == ("mine", False)


def test_an_earlier_report_and_an_empty_file_are_replaced(finished: Path) -> None:
    Path("page.html").touch()
    for words in (["-o", "page.html"], ["-o", "page.json", "--json"], ["-o", f"{RUN}/report.html"]):
        for _ in range(2):
            assert main(["report", "out.json", *words]) == 0


def test_tables_and_settings_never_replace_the_input_or_a_run(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("in.jsonl", "out.jsonl", f"{RUN}/plan.json"):
        before = Path(name).read_bytes()
        assert main(["results", "to-csv", "out.json", "-o", name, "--force"]) == 2
        prompts = ["--engine-url", "http://127.0.0.1:9", "--input", "in.jsonl"]
        assert main(["benchmark", *prompts, "--write-config", name, "--force"]) == 2
        assert "choose another file" in capsys.readouterr().err
        assert Path(name).read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ["models", "export", "--models-dir", "models", "m:1"],
        ["bundle", "create", "--image", "i.sif", "-o"],
        ["config", "init", "--output"],
        ["convert", "csv", "-i", "in.csv", "--template", "{text}", "--output"],
    ],
)
@pytest.mark.parametrize("name", ["out.json", f"{RUN}/plan.json"])
def test_no_other_command_replaces_a_file_of_a_run(
    finished: Path, capsys: pytest.CaptureFixture[str], words: list[str], name: str
) -> None:
    make_sif(Path("i.sif"), version="1")
    Path("in.csv").write_text("text\nhello\n")
    put_model(Path("models").absolute(), "m:1", b"weights")
    before = Path(name).read_bytes()
    assert main([*words, name, "--force"]) == 2
    assert "choose another file" in capsys.readouterr().err
    assert Path(name).read_bytes() == before


def test_evidence_does_not_go_to_stdout(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "out.json", "--evidence", "-", "--unsigned"]) == 2
    assert "the evidence cannot go to stdout" in capsys.readouterr().err
    assert not Path("-").exists()


def test_an_empty_or_public_key_file_has_a_clear_error(
    finished: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key.chmod(0o644)
    assert "others may read the key" in refused(capsys, "--key", str(key))
    assert main([*EVIDENCE, "--key", str(key)]) == 2
    assert "(mode 0644)" in capsys.readouterr().err
    key.write_text("")
    assert f"the key {key} is empty" in refused(capsys, "--key", str(key))


def test_a_missing_ssh_keygen_is_reported(
    finished: Path, key: Path, apptainer: FakeCommands, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(apptainer.folder))
    assert "ssh-keygen is not on PATH" in refused(capsys, "--key", str(key))


def test_an_unfinished_run_has_no_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(tmp_path)
    made.status(state="cancelled", completed=3)
    assert main(["report", str(made.output), "--evidence", "e.json", "--unsigned"]) == 2
    assert "is not finished, so there is no evidence of it" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "verify-run"])
def test_a_missing_output_is_named(
    finished: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    finished.unlink()
    more = ["--evidence", "evidence.json", "--unsigned"] if command == "report" else []
    assert main([command, "out.json.aiflux", *more]) == 2
    assert "is finished, but its output is missing" in capsys.readouterr().err


def test_the_run_is_not_finished_before_its_last_result(finished: Path) -> None:
    last = max(each["metadata"]["timestamp"] for each in json.loads(finished.read_text()))
    assert evidence()["run"]["finished"] >= last


def test_tasks_of_an_array_have_the_ids_that_users_see(finished: Path) -> None:
    with_image(finished)
    run = RunDirectory.of_output(finished)
    jobs = [
        {"job_id": "751", "array": "0-1", "first": 0, "shards": [0, 1]},
        {"job_id": "760", "array": None, "first": 0, "shards": [0]},
    ]
    submission = {"submitted": "x", "cluster": None, "jobs": jobs, "log": str(run.logs)}
    content = json.loads(run.submissions.read_text())
    run.submissions.write_text(json.dumps({**content, "submissions": [submission]}))
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    change_status(finished, slurm=dict(zip(names, ("752", "751", "0"), strict=True)))
    found = evidence()
    assert found["run"]["jobs"] == ["751_0", "751_1", "760"]
    assert [each["job"] for each in found["seal"]["checks"]] == ["751_0"]


@pytest.mark.parametrize(
    ("file", "message"),
    [("out.json", "is not the file that the run wrote"), ("in.jsonl", "was edited or reordered")],
)
def test_a_changed_file_is_refused(
    finished: Path, place: Path, capsys: pytest.CaptureFixture[str], file: str, message: str
) -> None:
    """Also where size and time are those of the original."""
    path = place / file
    found = path.stat()
    path.write_bytes(path.read_bytes().replace(b"fine", b"line"))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert message in refused(capsys, "--unsigned")


def test_the_outcome_of_a_verification_is_part_of_the_record(finished: Path, place: Path) -> None:
    with FaultyEngine() as engine:
        working = Working(place, engine.url, "new.json").prompts("fine", temperature=0)
        working.run()
        assert main(["verify-run", "new.json"]) == 0
    assert main(["report", "new.json", "--evidence", "e.json", "--unsigned"]) == 0
    content = json.loads(Path("e.json").read_text())["verification"]
    assert content["fixed"] == {"compared": 1, "identical": 1, "share": 1.0}
