"""Signatures, with the output of Apptainer 1.4.5."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aiflux.errors import ImageError
from aiflux.image import run_tool
from aiflux.image.base import BuildOptions
from aiflux.image.build import build
from aiflux.image.signing import Signer, diagnose, find_signer, judge, sign, signature
from tests.tools.make_sif import make_sif
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
         "not verified: signed with a key that is not in your keyring"),
        (answer("FS", whole=False), f"{INFO}{FATAL}data object integrity compromised: 3\n", 255,
         "broken", "signed, but modified since: integrity: data object integrity "
         "compromised: 3"),
    ],
)  # fmt: skip
def test_verify_output_is_parsed(
    stdout: str, stderr: str, code: int, state: str, words: str
) -> None:
    found = judge(stdout, stderr, code)
    assert (found.state, found.words) == (state, words)


def test_unrelated_output_is_an_error() -> None:
    with pytest.raises(ImageError, match="could not be opened"):
        judge("", "FATAL:   x.sif could not be opened\n", 255)


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    fakes = FakeCommands(tmp_path / "bin")
    monkeypatch.setenv("PATH", fakes.path)
    return fakes


# Like the real command. Key 1 has the passphrase "a b $c", which is read from standard input.
KEYRING = r"""
case "$1 $2" in
'key list')
  printf 'Private key listing:\n'
  for ((key = 0; key < KEYS; key++)); do
    printf '%d)  User:              Key %d (t) <a@example.org>\n    Fingerprint: F\n' $key $key
  done ;;
'sign --keyidx')
  [[ $3 != 2 ]] || { echo 'FATAL:   Failed to sign container: openpgp: key expired' >&2; exit 255; }
  [[ $3 != 1 ]] || {
    printf 'Enter key passphrase : '; read -r typed
    [[ $typed == 'a b $c' ]] || { echo 'FATAL: private key checksum failure' >&2; exit 255; }
  } ;;
esac
"""


def keyring(fakes: FakeCommands, count: int, more: str = "") -> None:
    fakes.add("apptainer", KEYRING.replace("KEYS", str(count)) + more)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo out; echo warned >&2", (0, "out\n", "warned\n")),
        ("echo warned >&2; exit 3", (3, "warned\n", "warned\n")),
        ("exit 4", (4, "", "")),
        ("yes | head -c 300000 >&2; echo out", (0, "out\n", "y\n" * 150_000)),
    ],
)
def test_output_and_errors_of_apptainer_are_captured(
    apptainer: FakeCommands,
    capfd: pytest.CaptureFixture[str],
    script: str,
    expected: tuple[int, str, str],
) -> None:
    apptainer.add("apptainer", script + "\n")
    done = run_tool.apptainer(["--version"])
    assert (done.returncode, done.stdout, done.stderr) == expected
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("script", ["printf '\\377'", "printf '\\377' >&2; exit 2"])
def test_binary_output_of_apptainer_is_an_error(apptainer: FakeCommands, script: str) -> None:
    apptainer.add("apptainer", script + "\n")
    with pytest.raises(
        ImageError, match="apptainer key failed: byte 0xff at offset 0 is not valid UTF-8"
    ):
        find_signer()


@pytest.mark.parametrize(
    ("count", "key", "words"),
    [
        (0, None, "no PGP key"),
        (2, None, "keyring: 0 Key 0 .* 1 Key 1"),
        (2, 2, "no key 2; secret keys in your keyring"),
        (1, -1, "no key -1"),
        (3, 2, r"key 2 \(Key 2 .*\) does not sign: openpgp: key expired"),
        (2, 1, "key 1 .* needs a passphrase, and none was entered"),
    ],
)
def test_a_key_that_cannot_sign_is_reported_before_the_build(
    apptainer: FakeCommands, tmp_path: Path, count: int, key: int | None, words: str
) -> None:
    keyring(apptainer, count)
    output = tmp_path / "a.sif"
    with pytest.raises(ImageError, match=words) as error:
        build(BuildOptions(output=output, base="debian", sign=True, key=key))
    assert error.value.remedy
    assert not any(call.argv[0] == "build" for call in apptainer.calls("apptainer"))


def test_an_unreadable_keyring_is_reported(apptainer: FakeCommands) -> None:
    apptainer.say("apptainer", stderr="ERROR:   key list command failed: denied", status=2)
    with pytest.raises(ImageError, match="cannot list your keys: key list command failed: denied"):
        find_signer()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["a b $c"], None),
        (["x", "y", "a b $c"], None),
        (["x", "y", "z", "a b $c"], "does not sign with this passphrase: private key checksum"),
        (["x", ""], "does not sign with this passphrase"),
        ([""], "none was entered"),
    ],
)
def test_a_passphrase_is_requested_and_tested(
    apptainer: FakeCommands, typed: list[str], words: str | None
) -> None:
    keyring(apptainer, 2)
    answers = iter(typed)
    if words is not None:
        with pytest.raises(ImageError, match=words):
            find_signer(1, lambda _: next(answers))
        return
    signer = find_signer(1, lambda _: next(answers))
    assert signer == Signer(1, "a b $c")
    assert "a b" not in repr(signer)
    sign(Path("x.sif"), signer)
    assert not any("a b" in str(call) for call in apptainer.calls("apptainer"))


def test_a_passphrase_is_read_from_a_pipe(apptainer: FakeCommands, tmp_path: Path) -> None:
    image = make_sif(tmp_path / "an image.sif", version="1")
    labels = """'{"data": {"attributes": {"labels": {"aiflux.version": "1"}}}}'"""
    more = f"[ $1 = inspect ] && echo {labels}\n[ $1 = verify ] && echo '{answer('FS')}'\nexit 0\n"
    keyring(apptainer, 2, more)
    done = subprocess.run(
        [sys.executable, "-m", "aiflux.cli", "image", "sign", str(image), "--key", "1"],
        input="a b $c\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "verified: signed by Ann" in done.stdout


def test_an_image_is_signed_and_verified(apptainer: FakeCommands, tmp_path: Path) -> None:
    keyring(apptainer, 1, f"[ $1 = verify ] && echo '{answer('FS')}'\nexit 0\n")
    image = tmp_path / "an image.sif"
    sign(image, find_signer())
    assert apptainer.calls("apptainer")[-1].argv == ["sign", "--keyidx", "0", str(image)]
    assert signature(image).state == "verified"
    asked = apptainer.calls("apptainer")[-1].argv
    assert asked == ["verify", "--local", "--json", str(image)], "no key server is contacted"
    assert diagnose(image).level == "ok"


def test_a_key_without_sign_is_an_error() -> None:
    with pytest.raises(ImageError, match="--key has no effect"):
        BuildOptions(key=1)
