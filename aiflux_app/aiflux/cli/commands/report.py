"""``aiflux report``: a run as one HTML page, or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from aiflux.api.evidence import (
    key_files,
    make_evidence,
    refuse_key,
    signature_of,
    write_evidence,
)
from aiflux.api.report import read_report, report_page, write_text
from aiflux.cli.chains import chain_named, chain_report
from aiflux.cli.json_output import json_option
from aiflux.cli.parser import FILE, command, option, settings_options
from aiflux.cli.run_argument import run_argument
from aiflux.core.config.config import Config
from aiflux.core.config.settings import given_settings
from aiflux.core.runs.directory import RunDirectory, refuse_precious
from aiflux.core.runs.plan import read_plan
from aiflux.errors import ConfigError, OutputExistsError, UsageError
from aiflux.estimates.energy import Rates
from aiflux.report.data import Report
from aiflux.report.methods import methods
from aiflux.slurm.commands import located
from aiflux.util.files import (
    absolute,
    expanded,
    is_there,
    may_write,
    open_regular,
    read_error,
    refuse_special,
    short,
    user_name,
)
from aiflux.util.streams import STDOUT
from aiflux.util.text import json_text, whole


@command(
    "report",
    examples=["aiflux report results.json --output report.html"],
    exclusive=[("key", "unsigned"), ("evidence", "output"), ("evidence", "as_json")],
)
@run_argument
@option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    help="Page to write (default: report.html in the run directory); - for stdout",
)
@json_option("Write JSON instead, to stdout or FILE")
@option(
    "--evidence",
    metavar="FILE",
    type=FILE,
    help="Write a signed record of a finished run instead: hashes, digests and the seal",
)
@option("--key", metavar="FILE", type=FILE, help="With --evidence: the SSH key to sign with")
@option("--unsigned", is_flag=True, help="With --evidence: do not sign the record")
@settings_options("accounting")
def report(
    run: str,
    output: str | None,
    as_json: bool,
    evidence: str | None,
    key: str | None,
    unsigned: bool,
    **settings: Any,
) -> int:
    """Write a report about a run, as one HTML page that needs no network.

    It shows what ran, the results and the resources used. The run may still be in progress.
    """
    if evidence is not None:
        return _write_evidence(run, evidence, key, unsigned=unsigned)
    if key is not None or unsigned:
        raise UsageError(
            f"{'--unsigned' if unsigned else '--key'} needs --evidence", "give --evidence FILE"
        )
    chain = chain_named(run)
    if chain is not None:
        own = None if output is None else _target(output, chain.directory)
        if own is not None and own != chain.report:
            _refuse_used(own, None, _REPORTS)
        return chain_report(chain, own, as_json=as_json)
    directory = located(run)
    place = output or (STDOUT if as_json else None)
    target = None if place == STDOUT else _target(output, directory)
    if target is not None and target != directory.report:
        _refuse_used(target, directory, _REPORTS)
    made = read_report(directory, Rates.of(Config(arguments=given_settings(settings))))
    text, no_plots = _json(made) if as_json else report_page(made)
    if target is None:
        print(text, end="")
    else:
        write_text(target, text)
        print(f"{made.condition.state}: wrote {short(target)}")
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if no_plots is not None:
        print(f"  without plots: {no_plots}", file=sys.stdout if target else sys.stderr)
    return 0


def _write_evidence(run: str, file: str, key: str | None, *, unsigned: bool) -> int:
    """Write the record of a run and its signature."""
    if chain_named(run) is not None:
        raise UsageError(
            f"{run} is a chain: there is evidence of its steps only",
            "name the run directory of a step, in OUTPUT.aiflux/steps",
        )
    if key is None and not unsigned:
        raise UsageError(
            "no key was given to sign the evidence with",
            "name a private SSH key: --key ~/.ssh/id_ed25519; or write it without a signature: "
            "--unsigned",
        )
    signer = None if key is None else expanded(key)
    if signer is not None:
        refuse_key(signer)
    if file == STDOUT:
        raise UsageError("the evidence cannot go to stdout", "name a file: --evidence FILE")
    directory = located(run)
    target = _target(file, directory, "--evidence")
    signed = signature_of(target)
    keys = [] if signer is None else [*key_files(signer)]
    _refuse_used(target, directory, (_EVIDENCE,), *keys)
    _refuse_used(signed, directory, (_SIGNATURE,), *keys)
    signature = write_evidence(make_evidence(directory), target, signer)
    print(f"wrote {short(target)}" + ("" if signature is None else f" and {short(signature)}"))
    return 0


_SIGNATURE = b"-----BEGIN SSH SIGNATURE-----"
_EVIDENCE = b'"kind": "aiflux-evidence"'
_REPORTS = (b": AI-Flux report</title>", b'{\n  "form": 1,\n  "written": ')
"""What the files of earlier reports have near their beginning."""
_HEAD = 4096


def _refuse_used(
    target: Path, run: RunDirectory | None, marks: Sequence[bytes], *needed: Path
) -> None:
    """Refuse to replace a file unless it is an earlier one of the same kind, or empty.

    Args:
        run: its files and its input are never replaced.
        marks: of which an earlier file has one.
        needed: other files that are never replaced.

    Raises:
        UsageError, OutputExistsError: the file is another one.
    """
    inputs: list[Path] = [*needed]
    if run is not None:
        given = read_plan(run).input
        inputs += [given.path, given.named]
    refuse_precious(target, *inputs)
    refuse_special(target)
    if not is_there(target):
        return
    try:
        with open(target, "rb", opener=open_regular) as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise read_error(error, target) from error
    if head and not any(mark in head for mark in marks):
        raise OutputExistsError(
            f"{target} already exists, and is not an earlier file of this kind",
            "choose another file, or remove it first",
        )


def _json(report: Report) -> tuple[str, None]:
    content = {**report.to_json(), "methods": methods(report)}
    return f"{json_text(whole(content), indent=2, only_ascii=True)}\n", None


def _target(given: str | None, run: RunDirectory, option: str = "--output") -> Path:
    if given is None:
        if not may_write(run.path):
            owner = user_name(run.path.stat().st_uid)
            raise ConfigError(
                f"permissions deny writing to {run.path}, which belongs to {owner}",
                "write the report elsewhere: --output report.html",
            )
        return run.report
    target = absolute(given)
    if target.is_dir():
        raise ConfigError(f"{option} {given!r} is a directory", "name a file, such as report.html")
    if not target.parent.is_dir():
        raise ConfigError(
            f"the directory of {option} {given!r} does not exist",
            f"mkdir -p {quote(str(target.parent))}",
        )
    return target
