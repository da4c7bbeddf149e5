"""Sign and verify images with the PGP keys in Apptainer's keyring.

No network is used: only keys in the user's own keyring count (``apptainer key list``).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aiflux.errors import ImageError
from aiflux.image.run_tool import apptainer
from aiflux.image.sif import how_to_build
from aiflux.util.diagnosis import Diagnosis, fail, ok, warn
from aiflux.util.files import temporary_folder

State = Literal["verified", "unsigned", "unknown key", "broken"]


@dataclass(frozen=True)
class Signature:
    """Signature state of an image.

    Attributes:
        state: ``verified`` (every part of the image is as signed), ``unsigned``, ``unknown key``
            (not in the keyring) or ``broken`` (the image was modified after signing).
        signer: name and address of the key's owner; "" if unknown.
        fingerprint: of the key, in capitals; "" if unknown.
        why: Apptainer's message if the image is not verified.
    """

    state: State
    signer: str = ""
    fingerprint: str = ""
    why: str = ""

    @property
    def words(self) -> str:
        """One line for the user."""
        if self.state == "unsigned":
            return "not signed"
        if self.state == "unknown key":
            return "not verified: signed with a key that is not in your keyring"
        if self.state == "broken":
            return f"signed, but modified since: {self.why}"
        return f"verified: signed by {self.signer} ({self.fingerprint})"


def sign(image: Path, signer: Signer) -> None:
    """Sign an image with a key from ``find_signer``.

    Raises:
        ImageError: the image could not be signed.
    """
    done = sign_with(signer, image)
    if done.returncode:
        raise ImageError(
            f"{image.name} could not be signed: {last_words(done.stderr)}",
            f"check that {image} is writable and that its disk has free space",
        )


def signature(image: Path) -> Signature:
    """Return who signed an image, according to the user's keyring alone.

    Raises:
        ImageError: Apptainer is missing, or cannot check the signature.
    """
    done = apptainer(["verify", "--local", "--json", str(image)])
    return judge(done.stdout, done.stderr, done.returncode)


def judge(stdout: str, stderr: str, code: int) -> Signature:
    """Parse the output of ``apptainer verify --local --json``.

    Raises:
        ImageError: the output has no information about signatures.
    """
    why = last_words(stderr)
    if "signature not found" in why:
        return Signature("unsigned", why=why)
    report = _json(stdout)
    if report is None:
        raise ImageError(
            f"the signature cannot be checked: {why or f'exit status {code}'}",
            "try it manually: apptainer verify --local IMAGE",
        )
    signers = [each.get("Signer") or {} for each in report.get("SignerKeys") or []]
    names = dict.fromkeys(str(each.get("Name", "")) for each in signers)
    prints = dict.fromkeys(str(each.get("Fingerprint", "")).upper() for each in signers)
    by = (" and ".join(names), " and ".join(prints))
    if code == 0 and signers:
        return Signature("verified", *by)
    if "unknown entity" in why:
        return Signature("unknown key", why=why)
    return Signature("broken", *by, why=why)


def diagnose(image: Path) -> Diagnosis:
    """Report an image's signature; a missing one is not an error."""
    try:
        found = signature(image)
    except ImageError as error:
        return warn("signature", error.message, error.remedy or "")
    if found.state == "broken":
        return fail("signature", found.words, f"copy the image again, or {how_to_build()}")
    if found.state == "unknown key":
        return warn(
            "signature", found.words,
            "get the signer's public key from a trusted source: apptainer key import FILE",
        )  # fmt: skip
    return ok("signature", found.words)


def _json(text: str) -> Mapping[str, Any] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) and "Signatures" in content else None


Ask = Callable[[str], str | None]
"""Prompts the user; returns None if there is no answer."""

_KEY = re.compile(r"^\s*(\d+)\)\s+User:\s+(.*?)\s*$", re.MULTILINE)
_TRIES = 3
_BY_NUMBER = "choose one with --key N"
_GENERIC = "7"  # SIF's generic data type


@dataclass(frozen=True)
class Signer:
    """A key that was tested and can sign.

    Attributes:
        key: its number in ``apptainer key list --secret``.
        passphrase: "" if it has none.
    """

    key: int
    passphrase: str = field(default="", repr=False)


def no_answer(_: str) -> str | None:
    """Return None: there is no terminal."""
    return None


def secret_keys() -> list[str]:
    """Return the owners of the secret keys, in Apptainer's order.

    Raises:
        ImageError: Apptainer cannot read its keyring.
    """
    done = apptainer(["key", "list", "--secret"])
    if done.returncode:
        raise ImageError(
            f"apptainer cannot list your keys: {last_words(done.stderr)}",
            "try it manually: apptainer key list --secret",
        )
    return [owner for _, owner in _KEY.findall(done.stdout)]


def find_signer(key: int | None = None, ask: Ask = no_answer) -> Signer:
    """Return a key after testing it on a small image.

    Args:
        key: number of the key in ``apptainer key list --secret``; None for the only one.
        ask: returns the key's passphrase, if it has one.

    Raises:
        ImageError: there is no such key, several keys but none was named, or the key does not sign.
    """
    owners = secret_keys()
    chosen = _choose(key, owners)
    with temporary_folder() as folder:
        image = _small_image(folder)
        done = sign_with(Signer(chosen), image)
        if done.returncode == 0:
            return Signer(chosen)
        whose = f"key {chosen} ({owners[chosen]})"
        if "passphrase" not in done.stdout.lower():
            raise ImageError(
                f"{whose} does not sign: {last_words(done.stderr)}",
                "sign with another key: --key N",
            )
        return _with_passphrase(chosen, whose, image, ask)


def sign_with(signer: Signer, image: Path) -> subprocess.CompletedProcess[str]:
    """Sign an image with Apptainer; the passphrase is passed on standard input."""
    command = ["sign", "--keyidx", str(signer.key), str(image)]
    return apptainer(command, typed=f"{signer.passphrase}\n")


def last_words(stderr: str) -> str:
    """Return Apptainer's last line of output, without colours and prefixes."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", stderr).splitlines()]
    words = next((line for line in reversed(lines) if line), "")
    return re.sub(r"^(FATAL|ERROR):\s*(Failed to (verify|sign) container:)?\s*", "", words)


def _choose(key: int | None, owners: Sequence[str]) -> int:
    if not owners:
        raise ImageError(
            "there is no PGP key to sign with in Apptainer's keyring",
            "create one (apptainer key newpair --push=false), or import one from gpg: "
            "gpg --export-secret-keys ADDRESS > KEY; apptainer key import KEY",
        )
    if key is None and len(owners) == 1:
        return 0
    held = "secret keys in your keyring: " + ", ".join(
        f"{number} {owner}" for number, owner in enumerate(owners)
    )
    if key is None:
        raise ImageError(f"no key was chosen; {held}", _BY_NUMBER)
    if not 0 <= key < len(owners):
        raise ImageError(f"there is no key {key}; {held}", _BY_NUMBER)
    return key


def _with_passphrase(chosen: int, whose: str, image: Path, ask: Ask) -> Signer:
    problem = f"{whose} needs a passphrase, and none was entered"
    for _ in range(_TRIES):
        passphrase = ask(f"passphrase of {whose}: ")
        if not passphrase:
            break
        signer = Signer(chosen, passphrase)
        done = sign_with(signer, image)
        if done.returncode == 0:
            return signer
        problem = f"{whose} does not sign with this passphrase: {last_words(done.stderr)}"
    raise ImageError(problem, "type it in a terminal, or pass it from a private file: ... < FILE")


def _small_image(folder: Path) -> Path:
    """Create an image with one small file; Apptainer can only sign images."""
    image, content = folder / "small.sif", folder / "content"
    content.write_text("test of a signing key\n", encoding="utf-8")
    add = ["--datatype", _GENERIC, "--groupid", "1", str(image), str(content)]
    for words in (["sif", "new", str(image)], ["sif", "add", *add]):
        done = apptainer(words)
        if done.returncode:
            raise ImageError(
                f"no key can be tried: apptainer {' '.join(words[:2])} ended with "
                f"{done.returncode}: {last_words(done.stderr)}",
                f"check the free space in {folder.parent} (TMPDIR)",
            )
    return image
