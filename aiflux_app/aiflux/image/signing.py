"""Signs images with a PGP key of Apptainer's keyring, and tells who signed one.

No network is used: only the keys in this user's own keyring count (``apptainer key list``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aiflux.errors import ImageError
from aiflux.image.run_tool import apptainer
from aiflux.image.sif import how_to_build
from aiflux.image.signing_keys import Signer, last_words, sign_with
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
