"""The PGP keys of Apptainer's keyring: which there are, and whether one of them can sign.

They are Apptainer's own: gpg and its agent are not asked.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiflux.errors import ImageError
from aiflux.image.run_tool import apptainer

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
