"""Signs images with a PGP key of Apptainer's keyring, and tells who signed one.

No network is used: only the keys in this user's own keyring count (``apptainer key list``).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aiflux.core.container import find_runtime
from aiflux.core.diagnosis import Diagnosis, fail, ok, warn
from aiflux.errors import ImageError
from aiflux.image.tools import ask, run

State = Literal["verified", "unsigned", "unknown key", "broken"]
_KEY_REMEDY = (
    "apptainer key list --secret shows your keys and their numbers (--key N); without one: "
    "apptainer key newpair"
)


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


def check_key(key: int | None) -> None:
    """Let a key pass that can be signed with.

    Raises:
        ImageError: there is none, none of that number, or several and none was named.
    """
    told = ask([find_runtime(), "key", "list", "--secret"]) or ""
    count = len(re.findall(r"^\s*\d+\)", told, re.MULTILINE))
    if not count:
        raise ImageError(
            "there is no PGP key to sign with in your keyring",
            "make one (apptainer key newpair), or import one (apptainer key import FILE)",
        )
    if key is None and count > 1:
        raise ImageError(f"your keyring holds {count} keys to sign with", _KEY_REMEDY)
    if key is not None and not 0 <= key < count:
        raise ImageError(f"there is no key {key}: your keyring holds {count}", _KEY_REMEDY)


def sign(image: Path, key: int | None = None) -> None:
    """Sign an image; Apptainer asks at the terminal for the key's passphrase, where it has one.

    Args:
        key: number of the key in ``apptainer key list --secret``; None for the only one.

    Raises:
        ImageError: it could not be signed.
    """
    check_key(key)
    chosen = [] if key is None else ["--keyidx", str(key)]
    command = [str(find_runtime()), "sign", *chosen, str(image)]
    run(command, f"{image.name} could not be signed", _KEY_REMEDY, ask_user=True)


def signature(image: Path) -> Signature:
    """Tell who signed an image, by the keys of this user's keyring alone.

    Raises:
        ImageError: there is no Apptainer, or it cannot tell.
    """
    command = [str(find_runtime()), "verify", "--local", "--json", str(image)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", check=False,
        )  # fmt: skip
    except OSError as error:
        raise ImageError(f"apptainer verify cannot be started: {error}", None) from error
    return judge(done.stdout, done.stderr, done.returncode)


def judge(stdout: str, stderr: str, code: int) -> Signature:
    """Read what ``apptainer verify --local --json`` answered.

    Raises:
        ImageError: it told nothing about signatures.
    """
    why = _last_words(stderr)
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
        return fail("signature", found.words, "copy the image again, or build it: make image")
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


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", stderr).splitlines()]
    words = next((line for line in reversed(lines) if line), "")
    return re.sub(r"^FATAL:\s*(Failed to verify container:)?\s*", "", words)
