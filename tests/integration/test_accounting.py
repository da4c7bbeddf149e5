"""A cluster with accounts, associations and QOS: slurmdbd on Debian's MariaDB."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import Cluster, User, answers, second_stack
from tests.integration.test_command import command, questions

__all__ = ["command"]  # the fixture
pytestmark = pytest.mark.slow  # it installs a database
STACK = Path("/var/tmp/aiflux-accounting")  # noqa: S108 - users must be able to read it


@pytest.fixture(scope="module")
def accounting(user: User) -> Iterator[User]:
    """The user on the other cluster."""
    with second_stack(STACK, "tests/stack/slurm.sh", {"AIFLUX_STACK_ACCOUNTING": "1"}):
        yield dataclasses.replace(user, slurm_conf=str(STACK / "slurm" / "slurm.conf"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--account", "nobody"], "you cannot use the account 'nobody'"),
        (["--qos", "gold"], "this cluster has no QOS 'gold'"),
        (["--qos", "short", "--time", "1:00:00"], "--time 1:00:00 is more than the QOS 'short'"),
        (["--qos", "short", "--gpus-per-node", "2"],
         "a job requests 2 GPUs, but the QOS 'short' permits 1: it would wait forever"),
        (["--account", "teaching", "--gpus-per-node", "2"],
         "a job requests 2 GPUs, but the account 'teaching' permits 1: it would wait forever"),
        (["--account", "physics", "--gpus-per-node", "2"],
         "2 GPUs, but the group limit of account 'science' (above 'physics') permits 1: it would"),
    ],
)  # fmt: skip
def test_what_the_accounts_do_not_permit_is_refused_before_submission(
    accounting: User, checkout: Path, place: Path, command: list[str | Path], options: list[str],
    message: str,
) -> None:  # fmt: skip
    accounting.write(place / "in.jsonl", questions(2, 2))
    run = [checkout / ".venv/bin/aiflux", "run", "in.jsonl", "-o", "out.json", *command]
    assert message in accounting.run(*run, *options, cwd=place, code=2)
    assert not accounting.run("squeue", "-h").strip()


def test_a_run_is_charged_and_known_after_slurm_forgot_it(
    accounting: User, checkout: Path, place: Path, command: list[str | Path]
) -> None:
    aiflux = checkout / ".venv/bin/aiflux"
    shown = accounting.run(aiflux, "doctor", cwd=place, code=None)
    yours = "your accounts: physics, research, teaching; default: research"
    assert f"accounting: is enforced; {yours}" in shown
    accounting.write(place / "in.jsonl", questions(4, 8))
    run = [aiflux, "run", "in.jsonl", "-o", "out.json", *command, "--account", "teaching",
           "--qos", "short", "--gpus-per-node", "1"]  # fmt: skip
    printed = accounting.run(*run, cwd=place)
    job = printed.split("submitted job ")[1].split(":")[0]
    end = Cluster(accounting).end(job)
    assert (end.state, end.code) == ("COMPLETED", 0)
    assert len(answers(place / "out.json")) == 4
    asked = ["sacct", "-X", "-n", "-P", "-j", job, "-o", "Account,State,AllocTRES"]
    account, state, resources = accounting.run(*asked).strip().split("|")
    assert (account, state) == ("teaching", "COMPLETED")
    assert "gres/gpu=1" in resources
    status = json.loads(accounting.run(aiflux, "status", "out.json", "--json", cwd=place))
    assert status["state"] == "finished"
    assert status["energy"]["slurm_kwh"] is None, "this Slurm keeps no energy"
