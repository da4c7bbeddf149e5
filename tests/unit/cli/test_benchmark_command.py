"""``aiflux benchmark``: at a server, with engines here, and in a Slurm that only takes notes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aiflux.cli.main import main
from aiflux.cli.render.benchmark import benchmark_lines
from aiflux.core.config.config import Config
from aiflux.core.runs.plan import read_plan
from aiflux.core.runs.status_file import PointFigures
from aiflux.estimates.benchmark import Benchmark, Point, Series, Workload
from aiflux.estimates.pilot import Pilot
from tests.tools import make_tiny_gguf
from tests.tools.faulty_engine import FaultyEngine
from tests.tools.make_sif import make_sif
from tests.unit.cli.test_estimate_command import do_the_pilot, fail_the_pilot
from tests.unit.fake_commands import FakeCommands, waiting_slurm
from tests.unit.helpers import request_line, write_input, write_program
from tests.unit.made_models import put_model
from tests.unit.made_serves import MadeServe, until

TOOLS = Path(__file__).parents[2] / "tools"
FOLDER = Path("classify.benchmark")


@pytest.fixture(autouse=True)
def place(awkward: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(awkward)
    return awkward


def benchmark(*more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    program = Path(sys.executable).with_name("aiflux")
    mix = [] if "--input" in more else ["--mix", "classify"]
    words = [program, "benchmark", *mix, "--model", "m:1", *more]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def record(*more: str, code: int = 0) -> dict[str, Any]:
    """Run the command with ``--json``; return what it prints."""
    found: dict[str, Any] = json.loads(benchmark(*more, "--json", code=code).stdout)
    return found


# --- at a server -----------------------------------------------------------------------------


def at(engine: FaultyEngine, *more: str) -> list[str]:
    return ["--engine-url", engine.url, "--requests", "8", *more]


def test_a_list_of_numbers_in_flight() -> None:
    with FaultyEngine(delay=0.05, lanes=2) as engine:
        found = record(*at(engine, "--concurrency", "1,2,8"))
        assert len(engine.bodies) == 8 + 8 + 32
        assert engine.most == 8
        again = record(*at(engine, "--concurrency", "1,2,8"))
        assert len(engine.bodies) == 48, "what was measured is not measured again"
        record(*at(engine, "--concurrency", "1,2,8", "--again"))
        assert len(engine.bodies) == 96
    prompts = [body["messages"][0]["content"] for body in engine.bodies[:48]]
    assert len(set(prompts)) == 48, "a cache of the server would know them"
    assert {**again, "created": ""} == {**found, "created": ""}
    assert found["where"] == engine.url
    assert found["complete"]
    points = {point["concurrency"]: point["figures"] for point in found["points"]}
    assert [*points] == [1, 2, 8]
    assert [each["requests"] for each in points.values()] == [8, 8, 32]
    assert [each["in_flight"] for each in points.values()] == [1, 2, 8]
    assert all(each["failed"] == 0 for each in points.values())
    assert all(each["answer_tokens"] == 5 for each in points.values())
    # The engine processes two at once.
    assert 1.5 < points[2]["requests_per_second"] / points[1]["requests_per_second"] < 2.5
    assert points[8]["p50"] > 2 * points[2]["p50"]
    kept = json.loads((FOLDER / "benchmark.json").read_text())
    assert [point["concurrency"] for point in kept["points"]] == [1, 2, 8]
    assert FOLDER.stat().st_mode & 0o777 == 0o700, "it has prompts and answers"


@pytest.mark.parametrize("left", [0, 0.5, -5, None])
def test_a_point_whose_journal_is_damaged_is_measured_again(left: float | None) -> None:
    """Cut in its last line, in the middle, emptied, or removed."""
    with FaultyEngine(delay=0.02) as engine:
        asked = at(engine, "--concurrency", "1,2")
        record(*asked)
        journal = Pilot(FOLDER / "server-c2").run.journal(0)
        content = journal.read_bytes()
        if left is None:
            journal.unlink()
        else:
            journal.write_bytes(content[: int(left if left < 0 else left * len(content))])
        done = benchmark(*asked, "--json")
        assert len(engine.bodies) == 8 + 8 + 8
    assert "server-c2: results of the finished point are missing or damaged" in done.stderr
    found = json.loads(done.stdout)
    assert [point["figures"]["requests"] for point in found["points"]] == [8, 8]
    assert found["complete"]


def test_requests_in_flight_are_doubled_until_the_engine_is_full(place: Path) -> None:
    with FaultyEngine(delay=0.5, lanes=2) as engine:  # on a busy machine, 0.2 s is too short
        printed = benchmark(*at(engine, "--write-config", "aiflux.yaml")).stdout
        (place / "sub").mkdir()
    lines = printed.splitlines()
    assert lines[0] == "the mix classify, 8 requests per point, more if many are in flight"
    table = lines[lines.index(f"a: server at {engine.url}  m:1") + 3 :]
    table = table[: table.index("")]
    assert [row.split()[0] for row in table] == ["1", "2", "4"]
    assert [row[:12].split()[-1] == "*" for row in table] == [False, True, False]
    assert any("a2*" in line for line in lines)
    assert max(map(len, lines)) <= 80
    config = Config(directory=place, environ={})
    options = config.run_options()
    assert (options.engine_url, options.concurrency, options.model) == (engine.url, 2, "m:1")


def test_sentences_fit_a_narrow_terminal_and_are_wrapped_at_words() -> None:
    series = Series("external", "m:1")
    reason = "http_400: the field 'max_tokens' of a-request-with-hyphens is larger than permitted"
    figures = PointFigures(4, 32, 18, 1.0, 2.0, 20.0, 20, 10, 1.0, 2.0, reason=reason)
    points = tuple(Point(series, count, figures) for count in (4, 64))
    workload = Workload("classify", None, None, 32, 1)
    found = Benchmark("1", "", "x", workload, points, (points[0].name,), points[0].name, {}, True)
    lines = [line.plain for line in benchmark_lines(found, 60)]
    sentences = [
        line
        for line in lines
        if line.startswith(("!", "  ", "the mix"))
        and " |" not in line
        and "median" not in line
        and "tokens/s " not in line
        and "--" not in line
    ]
    assert max(map(len, sentences)) <= 60
    text = " ".join(" ".join(lines).split())
    assert text.count(f"18 failed: {reason}") == 2
    assert "18 of 32 requests failed at the recommended point" in text


def test_without_matplotlib_there_is_no_plot(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "blocked").mkdir()
    (place / "blocked" / "matplotlib.py").write_text("raise ImportError('not here')\n")
    with FaultyEngine(delay=0.01) as engine:
        asked = at(engine, "--concurrency", "1")
        pytest.importorskip("matplotlib")
        benchmark(*asked)
        assert (FOLDER / "benchmark.svg").read_bytes().startswith(b"<?xml")
        (FOLDER / "benchmark.svg").unlink()
        # The variable separates paths by a colon, which the folder's name contains.
        monkeypatch.setenv("PYTHONPATH", "blocked")
        done = benchmark(*asked)
    assert "note: no plot was drawn: " in done.stderr
    assert "matplotlib>=3.8" in done.stderr
    assert not (FOLDER / "benchmark.svg").exists()


def test_the_users_own_requests(place: Path) -> None:
    write_input(place / "in.jsonl", 20)
    with FaultyEngine(delay=0.05) as engine:
        program = Path(sys.executable).with_name("aiflux")
        done = subprocess.run(
            [program, "benchmark", "--input", "in.jsonl", *at(engine, "--concurrency", "2,16")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert (place / "in.jsonl.benchmark" / "benchmark.json").is_file()
    sent = [body["messages"][0]["content"] for body in engine.bodies]
    assert len(sent) == 8 + 20
    assert {*sent} == {f"say r{number}" for number in range(20)}
    words = " ".join(done.stdout.split())
    assert "! too few requests to keep that many in flight (server-c16: " in words
    assert "recommended: server-c2" in words


def test_failed_requests_are_counted_and_shown(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        request_line(f"r{number}", body={"messages": [{"role": "user", "content": text}]})
        for number in range(40)
        for text in ["400" if number % 4 == 0 else f"say {number}"]
    ]
    (place / "in.jsonl").write_text("\n".join(lines) + "\n")
    with FaultyEngine(delay=0.01) as engine:
        assert main(["benchmark", "-i", "in.jsonl", "--model", "m:1", "--engine-url", engine.url,
                     "--requests", "40", "--concurrency", "4"]) == 0  # fmt: skip
    found = json.loads((place / "in.jsonl.benchmark/benchmark.json").read_text())
    (point,) = found["points"]
    assert (point["figures"]["requests"], point["figures"]["failed"]) == (40, 10)
    printed = " ".join(capsys.readouterr().out.split())
    assert "10 failed: http_400: " in printed
    assert "! 10 of 40 requests failed at the recommended point" in printed


def test_a_benchmark_whose_requests_all_fail_shows_why_and_ends_with_3(place: Path) -> None:
    body = {"messages": [{"role": "user", "content": "400"}]}
    write_input(place / "in.jsonl", 8, body=body)
    with FaultyEngine(delay=0.01) as engine:
        done = benchmark("--input", "in.jsonl", *at(engine, "--concurrency", "1,2"), code=3)
    rows = [line.split() for line in done.stdout.splitlines() if line[:2] in ("1 ", "2 ")]
    assert rows == [[count, *["-"] * 5, "all", "8"] for count in "12"]
    assert "  8 failed: http_400: " in done.stdout
    assert "recommended" not in done.stdout
    assert "all 16 requests failed; the most frequent reason: http_400: " in done.stderr


def test_options_of_slurm_have_no_effect_at_a_server() -> None:
    with FaultyEngine() as engine:
        done = benchmark(*at(engine, "--concurrency", "1", "--time-min", "00:10:00"))
    assert "note: --time-min has no effect: a running server needs no job" in done.stderr


def test_a_server_that_answers_nothing_is_an_error() -> None:
    def closed(method: str, path: str, _: object) -> tuple[int, bytes, dict[str, str]]:
        return 500, b"", {}

    with FaultyEngine(instead=closed) as engine:
        done = benchmark(*at(engine, "--engine-wait", "0.5", "--max-retries", "0"), code=4)
    assert "server-c1" in done.stderr
    assert json.loads((FOLDER / "benchmark.json").read_text())["recommended"] is None


def test_a_server_that_is_not_there_is_an_error_and_the_next_call_measures() -> None:
    engine = FaultyEngine(delay=0.01)
    with engine:
        pass
    asked = at(engine, "--engine-wait", "0.2", "--concurrency", "1,2")
    done = benchmark(*asked, code=4)
    assert engine.url.removeprefix("http://") in done.stderr
    with engine:
        found = record(*asked)
    assert [point["error"] for point in found["points"]] == [None, None]


def test_an_interrupt_keeps_and_prints_what_was_measured() -> None:
    with FaultyEngine(delay=0.05) as engine:
        program = Path(sys.executable).with_name("aiflux")
        process = subprocess.Popen(
            [program, "benchmark", "--mix", "classify", "--model", "m:1", "--drain-seconds", "0",
             *at(engine, "--concurrency", "1,2")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while len(engine.bodies) < 10:
            time.sleep(0.01)
        engine.delay = 60.0
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 5, errors
        assert "the same command again" in errors
        assert [line.split()[0] for line in printed.splitlines() if " ms " in line][:1] == ["1"]
        found = json.loads((FOLDER / "benchmark.json").read_text())
        assert [point["concurrency"] for point in found["points"]] == [1]
        assert not found["complete"]
        kept = (FOLDER / "benchmark.json").read_bytes()
        benchmark(*at(engine, "--input", "nothing.jsonl", "--output", str(FOLDER)), code=2)
        assert (FOLDER / "benchmark.json").read_bytes() == kept, "a refusal changes nothing"
        engine.delay = 0.01
        done = len(engine.bodies)
        found = record("--drain-seconds", "0", *at(engine, "--concurrency", "1,2"))
        assert len(engine.bodies) <= done + 8
    assert [point["concurrency"] for point in found["points"]] == [1, 2]
    assert found["complete"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--mix", "chats"], "--mix cannot be 'chats'"),
        (["--concurrency", "0"], "concurrency = '0' is wrong"),
        (["--concurrency", "1,,2"], "concurrency = '' is wrong"),
        (["--concurrency", "1,two"], "concurrency = 'two' is wrong"),
        (["--slots", "1,9999"], "slots = '9999' is wrong"),
        (["--context-length", "512,1"], "context_length = '1' is wrong"),
        (["--slots", "2,4"], "--slots cannot be set at a running server"),
        (["--context-length", "512"], "--context-length cannot be set at a running server"),
        (["--requests", "1"], "whole number of at least 2"),
        (["--seed", "-1"], "--seed '-1' is not a whole number of at least 0"),
        (["--input", "in.jsonl", "--mix", "chat"], "--mix and --input cannot be combined"),
        (["--input", "nothing.jsonl"], "nothing.jsonl"),
        (["--engine", "ollama,llamacpp"], "engine and engine_url are both given"),
        (["--local"], "--local and --engine-url cannot be combined"),
        (["--write-config", "there.yaml"], "output file already exists: there.yaml"),
        (["--write-config", "."], "is a directory"),
        (["--write-config", "no/aiflux.yaml"], "does not exist"),
        (["--output", "there.yaml"], "is not a directory"),
        (["--output", "other"], "exists and has no benchmark"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_sent(
    more: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "there.yaml").write_text("# mine\n")
    (place / "other").mkdir()
    (place / "other" / "file").write_text("mine")
    with FaultyEngine() as engine:
        assert main(["benchmark", "--model", "m:1", "--engine-url", engine.url, *more]) == 2
        assert not engine.bodies
    assert words in capsys.readouterr().err
    assert (place / "there.yaml").read_text() == "# mine\n"
    assert not [*place.glob("*.benchmark")], "a refused benchmark leaves nothing"


def test_a_mix_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--local"]) == 2
    assert "needs a model: the prompts of a mix name none" in capsys.readouterr().err


def test_without_force_no_settings_are_overwritten(place: Path) -> None:
    (place / "mine.yaml").write_text("# mine\n")
    with FaultyEngine(delay=0.01) as engine:
        asked = at(engine, "--concurrency", "1", "--write-config", "mine.yaml")
        assert "output file already exists" in benchmark(*asked, code=2).stderr
        assert not engine.bodies
        benchmark(*asked, "--force")
    assert "concurrency: 1" in (place / "mine.yaml").read_text()


@pytest.mark.ordinary_user
def test_settings_that_cannot_be_written_are_refused_first(place: Path) -> None:
    (place / "closed").mkdir(mode=0o500)
    with FaultyEngine() as engine:
        for name in ("closed/c.yaml", "link.yaml"):
            (place / "link.yaml").unlink(missing_ok=True)
            (place / "link.yaml").symlink_to("closed/c.yaml")
            done = benchmark(*at(engine, "--write-config", name), code=2)
            assert f"{name} cannot be written: its directory" in done.stderr
        assert not engine.bodies


@pytest.mark.ordinary_user
def test_figures_are_shown_although_they_cannot_be_written(place: Path) -> None:
    with FaultyEngine(delay=0.01) as engine:
        asked = at(engine, "--concurrency", "1")
        expected = benchmark(*asked).stdout
        (FOLDER / "benchmark.svg").unlink(missing_ok=True)
        (FOLDER / "benchmark.json").unlink()
        (FOLDER / "benchmark.json").symlink_to("gone/benchmark.json")
        (FOLDER / "gone").mkdir()
        (FOLDER / "gone" / "benchmark.json").write_text("{}")
        (FOLDER / "gone").chmod(0o500)
        done = benchmark(*asked)
    assert done.stdout == expected
    assert "warning: cannot write " in done.stderr


# --- on this machine -------------------------------------------------------------------------


@pytest.fixture
def programs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Ollama and llama-server on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, fake in (("ollama", "fake_ollama"), ("llama-server", "fake_llama_server")):
        write_program(folder / name, f'#!/bin/bash\nexec {sys.executable} {TOOLS}/{fake}.py "$@"\n')
    put_model(place / "models", "m:1", make_tiny_gguf.tiny())
    monkeypatch.setenv("AIFLUX_MODELS_DIR", str(place / "models"))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


HERE = ["--local", "--requests", "4", "--concurrency", "2", "--context-length", "512"]


def test_engines_and_slots_are_combined(programs: Path) -> None:
    found = record(*HERE, "--engine", "ollama,llamacpp", "--slots", "1,2")
    names = [point["series"]["engine"] for point in found["points"]]
    assert names == ["ollama", "ollama", "llamacpp", "llamacpp"]
    assert [point["series"]["slots"] for point in found["points"]] == [1, 2, 1, 2]
    assert [point["figures"]["slots"] for point in found["points"]] == [1, 2, 1, 2]
    assert len(found["knees"]) == 4
    assert found["recommended"] in found["knees"]
    assert found["settings"]["engine"] in ("ollama", "llamacpp")
    assert found["settings"]["context_length"] == 512
    inputs = [
        Pilot(FOLDER / f"{engine}-s{slots}-n512-c2").input.read_bytes()
        for engine in ("ollama", "llamacpp") for slots in (1, 2)
    ]  # fmt: skip
    assert len({*inputs}) == 1, "every engine has the same requests"
    plan = read_plan(Pilot(FOLDER / "llamacpp-s2-n512-c2").run)
    assert (plan.options.slots, plan.options.concurrency) == (2, 2)


def test_an_engine_that_does_not_start_leaves_the_other(programs: Path) -> None:
    write_program(programs / "ollama", "#!/bin/bash\nexit 1\n")
    found = record(*HERE, "--engine", "ollama,llamacpp", code=4)
    assert "ollama" in found["points"][0]["error"]
    assert found["recommended"] == "llamacpp-n512-c2"


def test_the_recommended_settings_are_those_that_were_measured(programs: Path, place: Path) -> None:
    more = ["--engine", "llamacpp", "--engine-arg", "cache-type-k=q8_0", "--max-tokens", "9",
            "--engine-env", "KEY=secret", "--write-config", "aiflux.yaml"]  # fmt: skip
    benchmark(*HERE, *more)
    written = (place / "aiflux.yaml").read_text()
    assert "secret" not in written + (FOLDER / "benchmark.json").read_text()
    options = Config(directory=place, environ={}).run_options()
    assert options.engine_arg == {"cache-type-k": "q8_0"}
    assert (options.engine, options.concurrency, options.max_tokens) == ("llamacpp", 2, 9)
    assert options.context_length == 512


def test_a_missing_model_of_any_engine_is_found_first(programs: Path) -> None:
    done = benchmark(*HERE, "--engine", "ollama,llamacpp=m:2", code=4)
    assert "llamacpp-n512-c2: m:2 is not (completely) stored" in done.stderr
    assert not FOLDER.exists()


def bench(programs: Path, text: str) -> None:
    write_program(programs / "llama-batched-bench", f"#!/bin/bash\n{text}\n")


def test_a_tool_that_lost_what_it_printed_is_asked_again(programs: Path) -> None:
    line = json.dumps({"pp": 3, "tg": 10, "pl": 2, "t": 0.5})
    again = f"{programs}/again"
    bench(programs, f"if [ -e {again} ]; then echo '{line}'; else touch {again}; fi")
    lines = benchmark(*HERE, "--engine", "llamacpp", "--slots", "2", "--against").stdout
    assert ", 40 by llama-batched-bench" in lines


def test_the_engines_own_tool_is_shown_beside_the_same_point(programs: Path) -> None:
    line = json.dumps({"n_kv_max": 9, "pp": 3, "tg": 10, "pl": 2, "t_pp": 0.1, "t": 0.5})
    bench(programs, f"printf '%s\\n' \"$@\" >{programs}/words; echo loading; echo '{line}'")
    lines = benchmark(*HERE, "--engine", "llamacpp", "--slots", "2", "--against").stdout
    assert ", 40 by llama-batched-bench" in lines
    words = (programs / "words").read_text().splitlines()
    assert words[words.index("-npl") + 1] == "2,1"
    assert Path(words[words.index("-m") + 1]).read_bytes()[:4] == b"GGUF"
    found = json.loads((FOLDER / "benchmark.json").read_text())["points"][0]
    assert found["compared"]["tokens_per_second"] == 40
    assert int(words[words.index("-ntg") + 1]) == max(1, found["figures"]["answer_tokens"])


def test_a_tool_that_fails_says_why(programs: Path) -> None:
    bench(programs, "echo 'failed to load' >&2; exit 3")
    printed = benchmark(*HERE, "--engine", "llamacpp", "--against").stdout
    assert "llama-batched-bench failed: it ended with exit code 3: failed to load" in " ".join(
        printed.split()
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_tool_ends_it_and_keeps_the_points(
    programs: Path, number: signal.Signals
) -> None:
    bench(programs, f"echo $$ >{programs}/pid; exec sleep 60")
    program = Path(sys.executable).with_name("aiflux")
    process = subprocess.Popen(
        [program, "benchmark", "--mix", "classify", "--model", "m:1", *HERE, "--engine",
         "llamacpp", "--against"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (programs / "pid").is_file() or not (programs / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=30)
    assert process.returncode == 5, errors
    assert "a: llamacpp  m:1" in printed
    tool = Path(f"/proc/{(programs / 'pid').read_text().strip()}")
    until(lambda: not tool.exists())  # it was killed just before
    assert not json.loads((FOLDER / "benchmark.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--local", "--engine", "llamacpp"], 4, "llama-batched-bench is not installed"),
        (["--local", "--engine", "ollama"], 2, "ollama has no benchmark of its own"),
        ([], 2, "--against needs the engine's own tool on this machine"),
    ],
)
def test_a_tool_that_cannot_run_is_refused_first(
    programs: Path, more: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", "--model", "m:1", "--against", *more]) == code
    assert words in capsys.readouterr().err
    assert not Path("chat.benchmark").exists()


def test_the_tool_is_not_used_at_an_engine_of_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with MadeServe(tmp_path) as made:
        monkeypatch.setenv("XDG_STATE_HOME", made.environ["XDG_STATE_HOME"])
        url = f"serve:{made.directory.name}"
        assert main(["benchmark", "--model", "m:1", "--against", "--engine-url", url]) == 2
    assert f"--against cannot use {url}" in capsys.readouterr().err


# --- in Slurm --------------------------------------------------------------------------------

SUBMIT = ["benchmark", "--mix", "classify", "--model", "m:1", "--no-preflight", "--image", "i.sif",
          "--concurrency", "1,4"]  # fmt: skip


@pytest.fixture
def slurm(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    make_sif(place / "i.sif", version="1")
    fakes = waiting_slurm(tmp_path / "bin", monkeypatch)
    fakes.add("sbatch", "echo $((100 + number))\n")
    fakes.say("squeue", "".join(f"{job}|N/A|PENDING|N/A|0:00||Priority\n" for job in (100, 101)))
    return fakes


def test_each_point_is_a_job_and_the_same_command_shows_the_figures(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SUBMIT) == 0
    printed = capsys.readouterr().out
    assert len(slurm.calls("sbatch")) == 2
    assert "ollama-c1 is waiting (job 100)" in printed
    assert "ollama-c4 is waiting (job 101)" in printed
    assert "run the same command again" in printed
    do_the_pilot(2.0, 1, Pilot(FOLDER / "ollama-c1"))
    assert main([*SUBMIT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["concurrency"] for point in found["points"]] == [1]
    assert not found["complete"]
    do_the_pilot(2.5, 4, Pilot(FOLDER / "ollama-c4"))
    assert main([*SUBMIT, "--write-config", "aiflux.yaml"]) == 0
    printed = capsys.readouterr().out
    assert len(slurm.calls("sbatch")) == 2
    rows = [line.split() for line in printed.splitlines() if line[:1] in "14" and line]
    assert [row[:3] for row in rows] == [["1", "0.5", "25"], ["4", "*", "1.6"]]
    assert "recommended: ollama-c4" in printed
    assert "concurrency: 4" in Path("aiflux.yaml").read_text()


def test_each_job_has_the_requests_for_its_number_in_flight(slurm: FakeCommands) -> None:
    four = ["--concurrency", "1,16,64", "--gpus-per-node", "4"]
    assert main([*SUBMIT[:-2], *four]) == 0
    counts = {
        count: len(Pilot(FOLDER / f"ollama-c{count}").input.read_bytes().splitlines())
        for count in (1, 16, 64)
    }
    assert counts == {1: 32, 16: 4 * 4 * 16, 64: 4 * 4 * 64}, "each GPU has an engine"


def test_the_default_points_in_slurm(slurm: FakeCommands) -> None:
    assert main(SUBMIT[:-2]) == 0
    for count, expected in ((1, 32), (4, 32), (16, 64), (64, 256)):
        pilot = Pilot(FOLDER / f"ollama-c{count}")
        assert read_plan(pilot.run).requests == expected
        assert json.loads(pilot.record.read_text())["drawn"]["requests"] == expected


def test_points_of_ones_own_requests_have_their_own_number(
    slurm: FakeCommands, place: Path
) -> None:
    write_input(place / "in.jsonl", 300)
    own = ["benchmark", "-i", "in.jsonl", *SUBMIT[3:-1], "16,32", "--requests", "16"]
    assert main(own) == 0
    for count in (16, 32):
        plan = read_plan(Pilot(Path("in.jsonl.benchmark") / f"ollama-c{count}").run)
        assert plan.requests == 4 * count


def test_a_job_whose_journal_is_damaged_is_submitted_again(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SUBMIT) == 0
    for count in (1, 4):
        do_the_pilot(2.0, count, Pilot(FOLDER / f"ollama-c{count}"))
    Pilot(FOLDER / "ollama-c4").run.journal(0).unlink()
    slurm.say("squeue", "102|N/A|PENDING|N/A|0:00||Priority\n")
    assert main(SUBMIT) == 0
    assert len(slurm.calls("sbatch")) == 3
    assert "ollama-c4 is waiting" in capsys.readouterr().out


def test_an_interrupt_while_waiting_shows_the_points_and_leaves_the_jobs(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SUBMIT) == 0
    do_the_pilot(2.0, 1, Pilot(FOLDER / "ollama-c1"))
    asked = len(slurm.calls("squeue"))
    program = Path(sys.executable).with_name("aiflux")
    process = subprocess.Popen(
        [program, *SUBMIT, "--wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(slurm.calls("squeue")) == asked:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=30)
    assert process.returncode == 5, errors
    assert "ollama-c4 is waiting (job 101)" in printed
    assert any(line.startswith("1 *") for line in printed.splitlines())
    assert "stopped waiting; the jobs continue" in errors
    assert not slurm.calls("scancel")


def test_a_job_that_fails_leaves_the_other_points(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SUBMIT) == 0
    do_the_pilot(2.0, 1, Pilot(FOLDER / "ollama-c1"))
    fail_the_pilot(slurm, Pilot(FOLDER / "ollama-c4"), 101, "no memory")
    capsys.readouterr()
    assert main(SUBMIT) == 4
    printed = capsys.readouterr().out
    assert "recommended: ollama-c1" in printed
    assert "the point has failed with 0 of 32 requests finished: no memory" in " ".join(
        printed.split()
    )


def test_a_job_of_other_settings_has_to_end_first(
    slurm: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(SUBMIT) == 0
    assert main([*SUBMIT[:4], "m:2", *SUBMIT[5:]]) == 2
    assert "job 100 of a point with other settings is PENDING" in capsys.readouterr().err
    assert len(slurm.calls("sbatch")) == 2
