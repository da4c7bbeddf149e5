"""Sign and verify images with the PGP keys of Apptainer's keyring.

No network is used: only the keys in this user's own keyring count (``apptainer key list``).
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aiflux.errors import ImageError
from aiflux.image.run_tool import apptainer
from aiflux.image.sif import how_to_build
from aiflux.util.diagnosis import Diagnosis, fail, ok, warn

State = Literal["verified", "unsigned", "unknown key", "broken"]


@dataclass(frozen=True)
class Signature:
    """What is known of an image's signature.

    Attributes:
        state: ``verified`` (each part of the image is what the signer signed), ``unsigned``,
            ``unknown key`` (none of the keyring's) or ``broken`` (the image was changed since).
        signer: name and address of the key's owner; "" where none is known.
        fingerprint: of the key, in capitals; "" where none is known.
        why: Apptainer's own words where it is not verified.
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
            return "signed with a key that is not in your keyring: not verified"
        if self.state == "broken":
            return f"signed, but the image was changed since: {self.why}"
        return f"verified: signed by {self.signer} ({self.fingerprint})"


def sign(image: Path, signer: Signer) -> None:
    """Sign an image with a key that was found to sign (``find_signer``).

    Raises:
        ImageError: it could not be signed.
    """
    done = sign_with(signer, image)
    if done.returncode:
        raise ImageError(
            f"{image.name} could not be signed: {last_words(done.stderr)}",
            f"see that you may write {image}, and that there is room beside it",
        )


def signature(image: Path) -> Signature:
    """Tell who signed an image, by the keys of this user's keyring alone.

    Raises:
        ImageError: there is no Apptainer, or it cannot tell.
    """
    done = apptainer(["verify", "--local", "--json", str(image)])
    return judge(done.stdout, done.stderr, done.returncode)


def judge(stdout: str, stderr: str, code: int) -> Signature:
    """Read what ``apptainer verify --local --json`` answered.

    Raises:
        ImageError: it told nothing about signatures.
    """
    why = last_words(stderr)
    if "signature not found" in why:
        return Signature("unsigned", why=why)
    told = _json(stdout)
    if told is None:
        raise ImageError(
            f"the signature cannot be checked: {why or f'exit status {code}'}",
            "try it by hand: apptainer verify --local IMAGE",
        )
    signers = [each.get("Signer") or {} for each in told.get("SignerKeys") or []]
    names = dict.fromkeys(str(each.get("Name", "")) for each in signers)
    prints = dict.fromkeys(str(each.get("Fingerprint", "")).upper() for each in signers)
    by = (" and ".join(names), " and ".join(prints))
    if code == 0 and signers:
        return Signature("verified", *by)
    if "unknown entity" in why:
        return Signature("unknown key", why=why)
    return Signature("broken", *by, why=why)


def diagnose(image: Path) -> Diagnosis:
    """Tell of an image's signature; that there is none is no fault."""
    try:
        found = signature(image)
    except ImageError as error:
        return warn("signature", error.message, error.remedy or "")
    if found.state == "broken":
        return fail("signature", found.words, f"copy the image again, or {how_to_build()}")
    if found.state == "unknown key":
        return warn(
            "signature", found.words,
            "get the signer's public key from a place you trust: apptainer key import FILE",
        )  # fmt: skip
    return ok("signature", found.words)


def _json(text: str) -> Mapping[str, Any] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) and "Signatures" in content else None


Ask = Callable[[str], str | None]
"""Asks the user for what is named; None where nobody answers."""

_KEY = re.compile(r"^\s*(\d+)\)\s+User:\s+(.*?)\s*$", re.MULTILINE)
_TRIES = 3
_BY_NUMBER = "say which: --key N"
_GENERIC = "7"  # SIF's data type of no special meaning


@dataclass(frozen=True)
class Signer:
    """A key that was tried, and signs.

    Attributes:
        key: its number in ``apptainer key list --secret``.
        passphrase: "" where it has none.
    """

    key: int
    passphrase: str = field(default="", repr=False)


def no_answer(_: str) -> str | None:
    """Answer nothing: there is nobody to ask."""
    return None


def secret_keys() -> list[str]:
    """Return the owners of the keys that can sign, as Apptainer counts them.

    Raises:
        ImageError: Apptainer cannot read its keyring.
    """
    done = apptainer(["key", "list", "--secret"])
    if done.returncode:
        raise ImageError(
            f"apptainer cannot list your keys: {last_words(done.stderr)}",
            "try it by hand: apptainer key list --secret",
        )
    return [owner for _, owner in _KEY.findall(done.stdout)]


def find_signer(key: int | None = None, ask: Ask = no_answer) -> Signer:
    """Return a key that signs: it is tried on a small image of its own.

    Args:
        key: number of the key in ``apptainer key list --secret``; None for the only one.
        ask: asks for the key's passphrase, where it has one.

    Raises:
        ImageError: there is none, none of that number, or several and none was named; or it does
            not sign, or its passphrase is not told.
    """
    owners = secret_keys()
    chosen = _choose(key, owners)
    with tempfile.TemporaryDirectory(prefix="aiflux-key.") as folder:
        image = _small_image(Path(folder))
        done = sign_with(Signer(chosen), image)
        if done.returncode == 0:
            return Signer(chosen)
        whose = f"key {chosen} ({owners[chosen]})"
        if "passphrase" not in done.stdout.lower():
            raise ImageError(
                f"{whose} does not sign: {last_words(done.stderr)}", "sign with another: --key N"
            )
        return _with_passphrase(chosen, whose, image, ask)


def sign_with(signer: Signer, image: Path) -> subprocess.CompletedProcess[str]:
    """Have Apptainer sign an image; the passphrase goes to its standard input."""
    command = ["sign", "--keyidx", str(signer.key), str(image)]
    return apptainer(command, typed=f"{signer.passphrase}\n")


def last_words(stderr: str) -> str:
    """Return the last line that Apptainer wrote, without its colours and marks."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", stderr).splitlines()]
    words = next((line for line in reversed(lines) if line), "")
    return re.sub(r"^(FATAL|ERROR):\s*(Failed to (verify|sign) container:)?\s*", "", words)


def _choose(key: int | None, owners: Sequence[str]) -> int:
    if not owners:
        raise ImageError(
            "there is no PGP key to sign with in Apptainer's keyring",
            "make one (apptainer key newpair --push=false), or bring one of gpg's: "
            "gpg --export-secret-keys ADDRESS > KEY; apptainer key import KEY",
        )
    if key is None and len(owners) == 1:
        return 0
    held = f"your keyring holds {len(owners)} to sign with: " + ", ".join(
        f"{number} {owner}" for number, owner in enumerate(owners)
    )
    if key is None:
        raise ImageError(f"no key is named, and {held}", _BY_NUMBER)
    if not 0 <= key < len(owners):
        raise ImageError(f"there is no key {key}: {held}", _BY_NUMBER)
    return key


def _with_passphrase(chosen: int, whose: str, image: Path, ask: Ask) -> Signer:
    told = f"{whose} has a passphrase, and there is nobody to type it"
    for _ in range(_TRIES):
        passphrase = ask(f"passphrase of {whose}: ")
        if not passphrase:
            break
        signer = Signer(chosen, passphrase)
        done = sign_with(signer, image)
        if done.returncode == 0:
            return signer
        told = f"{whose} does not sign with this passphrase: {last_words(done.stderr)}"
    raise ImageError(
        told, "type it at a terminal, or have it read from a file of yours alone: ... < FILE"
    )


def _small_image(folder: Path) -> Path:
    """Make an image of one small file, as what is signed has to be one."""
    image, content = folder / "small.sif", folder / "content"
    content.write_text("to see whether a key signs\n", encoding="utf-8")
    add = ["--datatype", _GENERIC, "--groupid", "1", str(image), str(content)]
    for words in (["sif", "new", str(image)], ["sif", "add", *add]):
        done = apptainer(words)
        if done.returncode:
            raise ImageError(
                f"no key can be tried: apptainer {' '.join(words[:2])} ended with "
                f"{done.returncode}: {last_words(done.stderr)}",
                f"see that there is room in {folder.parent} (TMPDIR)",
            )
    return image
