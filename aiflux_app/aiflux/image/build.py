"""Build the image with ``apptainer build``, as an ordinary user."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from aiflux.errors import ImageError
from aiflux.image import oci_registry
from aiflux.image.base import BaseChoice, BuildOptions, choose_base
from aiflux.image.container import find_runtime
from aiflux.image.payload import Checkout, find_sources, stage
from aiflux.image.run_tool import run
from aiflux.image.signing import Ask, Signer, find_signer, no_answer, sign

Say = Callable[[str], None]

ROOM_NEEDED = {"docker": 20, "debian": 3}
"""Free space in APPTAINER_TMPDIR that a build needs, in GiB."""

_REMEDY = (
    "see the last lines above; frequent causes: TMPDIR or APPTAINER_TMPDIR is full or on a network "
    "file system, unprivileged user namespaces are disabled, or root lacks capabilities (inside a "
    "container): build as an ordinary user"
)


def _silent(_: str) -> None:
    return None


def build(options: BuildOptions, say: Say = _silent, ask: Ask = no_answer) -> Path:
    """Build the image and return its path; an existing image is only replaced by a complete one.

    Args:
        options: what to build.
        say: called with one line of output for the user.
        ask: returns the passphrase of the signing key; called before the build starts.

    Raises:
        ImageError: the image could not be built or signed.
    """
    output = options.output.absolute()
    _check_output(output, options.force)
    apptainer = str(find_runtime())
    sources = find_sources()
    signer = find_signer(options.key, ask) if options.sign else None
    choice = choose_base(options)
    say(choice.description)
    scratch = scratch_dir(os.environ)
    _warn_of_little_room(scratch, choice, say)
    unsigned: ImageError | None = None
    with tempfile.TemporaryDirectory(prefix="aiflux-image.", dir=scratch) as name:
        work = Path(name)
        stage(work / "payload", sources, options, choice)
        new = output.with_name(f".{output.name}.{os.getpid()}.new")
        command = render_command(apptainer, new, sources.definition, options, choice)
        environment = build_environment(os.environ, scratch, sources)
        try:
            run(command, "the image could not be built", _REMEDY, cwd=work, env=environment)
            unsigned = _sign(new, signer)
            new.replace(output)
        finally:
            new.unlink(missing_ok=True)
    if unsigned is not None:
        raise ImageError(
            f"{output} was built but not signed: {unsigned.message}",
            f"aiflux image sign {shlex.quote(str(output))} --key {signer.key if signer else 0}",
        ) from unsigned
    return output


def _sign(image: Path, signer: Signer | None) -> ImageError | None:
    """Sign the image if requested; return the error, as a failure does not undo the build."""
    try:
        if signer is not None:
            sign(image, signer)
    except ImageError as error:
        return error
    return None


def render_command(
    apptainer: str, output: Path, definition: Path, options: BuildOptions, choice: BaseChoice
) -> list[str]:
    """Return the ``apptainer build`` command; it runs next to the staged payload."""
    command = [apptainer, "build"]
    if not options.run_tests:
        command.append("--notest")
    if choice.image and oci_registry.parse(choice.image).insecure:
        command.append("--no-https")
    for name, value in build_arguments(choice).items():
        command += ["--build-arg", f"{name}={value}"]
    return [*command, str(output), str(definition)]


def build_arguments(choice: BaseChoice) -> dict[str, str]:
    """Return the values of the definition's variables."""
    if choice.source:
        return {
            "bootstrap": "debootstrap",
            "from": "none",
            "suite": choice.source.suite,
            "mirror": choice.source.mirror,
            "engine": choice.engine,
        }
    return {"bootstrap": "docker", "from": choice.pinned_image, "engine": choice.engine}


def build_environment(
    environ: Mapping[str, str], scratch: Path, sources: Checkout
) -> dict[str, str]:
    """Return the environment of ``apptainer build``: commit time and temporary directory."""
    environment = {**environ, "APPTAINER_TMPDIR": str(scratch)}
    commit_time = sources.commit_time
    if commit_time:
        environment.setdefault("SOURCE_DATE_EPOCH", commit_time)
    return environment


def scratch_dir(environ: Mapping[str, str]) -> Path:
    """Return the build's temporary directory: APPTAINER_TMPDIR, else the system's."""
    return Path(environ.get("APPTAINER_TMPDIR") or tempfile.gettempdir())


def _check_output(output: Path, force: bool) -> None:
    if not output.parent.is_dir():
        raise ImageError(
            f"the output directory {output.parent} does not exist", "create it and build again"
        )
    if output.exists() and not force:
        raise ImageError(f"output file already exists: {output}", "use --force to replace it")


def _warn_of_little_room(scratch: Path, choice: BaseChoice, say: Say) -> None:
    try:
        free = shutil.disk_usage(scratch).free >> 30
    except OSError as error:
        raise ImageError(
            f"the temporary directory {scratch} cannot be used: {error.strerror}",
            "set APPTAINER_TMPDIR to a directory on a local disk",
        ) from error
    needed = ROOM_NEEDED[choice.base]
    if free < needed:
        say(
            f"warning: {scratch} has {free} GiB free, but the build may need {needed}; set "
            "APPTAINER_TMPDIR to use another directory"
        )
