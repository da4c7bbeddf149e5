"""Signatures, as Apptainer 1.4.5 tells of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aiflux.errors import ImageError
from aiflux.image.options import BuildOptions
from aiflux.image.signing import check_key, diagnose, judge, sign, signature
from tests.unit.fake_commands import FakeCommands

INFO = "INFO:    Verifying image with PGP key material\n"
FATAL = "\x1b[31mFATAL:  \x1b[0m Failed to verify container: integrity: "
KEY = "fcd96b4d5ef26ff00041a4b3f86b6f445a34b74f"


def answer(*parts: str, whole: bool = True) -> str:
    signers = [
        {
            "Signer": {
                "Partition": part,
                "Name": "Ann (test) <ann@example.org>",
                "Fingerprint": KEY,
                "KeyLocal": True,
                "KeyCheck": True,
                "DataCheck": whole,
            }
        }
        for part in parts
    ]
    return json.dumps({"Signatures": 1, "SignerKeys": signers or None}, indent=2)


@pytest.mark.parametrize(
    ("stdout", "stderr", "code", "state", "words"),
    [
        (answer("Def.FILE", "FS"), INFO, 0, "verified",
         f"verified: signed by Ann (test) <ann@example.org> ({KEY.upper()})"),
        ('{"Signatures": 0, "SignerKeys": null}',
         f"{INFO}{FATAL}signature not found for object group 1\n", 255, "unsigned", "not signed"),
        (answer(), f"{INFO}{FATAL}signature object 4 not valid: openpgp: signature made by unknown "
         "entity\n", 255, "unknown key",
         "signed with a key that is not in your keyring: not verified"),
        (answer("FS", whole=False), f"{INFO}{FATAL}data object integrity compromised: 3\n", 255,
         "broken", "signed, but the image was changed since: integrity: data object integrity "
         "compromised: 3"),
    ],
)  # fmt: skip
def test_what_apptainer_answers(
    stdout: str, stderr: str, code: int, state: str, words: str
) -> None:
    found = judge(stdout, stderr, code)
    assert (found.state, found.words) == (state, words)


def test_an_answer_about_something_else_is_no_verdict() -> None:
    with pytest.raises(ImageError, match="could not be opened"):
        judge("", "FATAL:   x.sif could not be opened\n", 255)


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    fakes = FakeCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


def keys(count: int) -> str:
    listed = "".join(f"{number})  User:   A\n    Fingerprint: F\n" for number in range(count))
    return f"case $1 in key) printf '%s' 'Private key listing:\n{listed}' ;; esac\n"


@pytest.mark.parametrize(
    ("count", "key", "words"),
    [(0, None, "no PGP key"), (2, None, "holds 2 keys"), (2, 2, "no key 2"), (1, -1, "no key -1")],
)
def test_a_key_that_cannot_sign_is_told_before_the_build(
    apptainer: FakeCommands, count: int, key: int | None, words: str
) -> None:
    apptainer.add("apptainer", keys(count))
    with pytest.raises(ImageError, match=words) as error:
        check_key(key)
    assert "apptainer key" in str(error.value.remedy)


def test_signing_and_asking(apptainer: FakeCommands, tmp_path: Path) -> None:
    apptainer.add("apptainer", keys(2) + f"[ $1 = verify ] && echo '{answer('FS')}'\nexit 0\n")
    image = tmp_path / "an image.sif"
    sign(image, 1)
    assert apptainer.calls("apptainer")[-1].argv == ["sign", "--keyidx", "1", str(image)]
    assert signature(image).state == "verified"
    asked = apptainer.calls("apptainer")[-1].argv
    assert asked == ["verify", "--local", "--json", str(image)], "no key server is asked"
    assert diagnose(image).level == "ok"


def test_a_key_without_signing_is_a_mistake() -> None:
    with pytest.raises(ImageError, match="--key names"):
        BuildOptions(key=1)
