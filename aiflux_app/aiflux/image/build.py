"""Stage the content of the image and build it with ``apptainer build``, as an ordinary user."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiflux
from aiflux.errors import ImageError
from aiflux.image import base
from aiflux.image.base import BaseChoice, BuildOptions, choose_base
from aiflux.image.container import find_runtime
from aiflux.image.run_tool import ask, capture, is_singularity_ce, run
from aiflux.image.signing import Ask, Signer, find_signer, no_answer, sign
from aiflux.util.files import temporary_folder

_NETWORK_REMEDY = "see the message above; pip downloads the wheels from PyPI"


@dataclass(frozen=True)
class Checkout:
    """The checkout from which an image is built."""

    root: Path

    @property
    def container(self) -> Path:
        """Directory with definition, lock files and scripts."""
        return self.root / "container"

    @property
    def definition(self) -> Path:
        """The Apptainer definition."""
        return self.container / "aiflux.def"

    @property
    def entrypoint(self) -> Path:
        """Directory with the image's entry point."""
        return self.root / "entrypoint"

    def git(self, *words: str) -> str | None:
        """Return git's output for the checkout, or None if it is not a repository."""
        return ask(["git", "-c", f"safe.directory={self.root}", "-C", self.root, *words])

    @property
    def commit(self) -> str:
        """The commit, marked if tracked files were modified."""
        commit = self.git("rev-parse", "HEAD")
        if commit is None:
            return "unknown"
        return commit + ("-modified" if self.git("status", "--porcelain", "-uno") else "")

    @property
    def commit_time(self) -> str | None:
        """Unix time of the commit, for SOURCE_DATE_EPOCH."""
        return self.git("log", "-1", "--format=%ct")


def find_sources() -> Checkout:
    """Return the checkout that contains this package.

    Raises:
        ImageError: the package was installed without a checkout.
    """
    sources = Checkout(Path(aiflux.__file__).resolve().parents[2])
    if not sources.definition.is_file():
        raise ImageError(
            "images can only be built from a checkout of AI-Flux",
            "clone the repository, and run `make image` there",
        )
    return sources


def cache_dir() -> Path:
    """Return the download cache: AIFLUX_CACHE_DIR, else below XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("AIFLUX_CACHE_DIR")
    if given:
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "aiflux"


def stage(target: Path, sources: Checkout, options: BuildOptions, choice: BaseChoice) -> None:
    """Fill ``target``, which becomes /opt/aiflux (see container/aiflux.def)."""
    build = target / "build"
    build.mkdir(parents=True)
    shutil.copytree(
        Path(aiflux.__file__).parent,
        target / "app" / "aiflux",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copytree(sources.entrypoint, target / "entrypoint")
    shutil.copy2(sources.container / "image-facts.py", build)
    (build / "facts.json").write_text(
        json.dumps(known_facts(sources, options, choice), indent=2) + "\n", encoding="utf-8"
    )
    (build / "apt.conf").write_text(_apt_configuration(), encoding="utf-8")
    own = sources.container / "engines" / options.engine
    shutil.copytree(own, build / "engine")
    _stage_wheels(target / "site", sources, [sources.container, own])
    _stage_engine(target / "engine.tar", sources, options, choice)


def _apt_configuration() -> str:
    """Return what apt needs inside as on this machine: a mirror may keep expired releases."""
    name = "Acquire::Check-Valid-Until"
    value = (
        ask(["apt-config", "dump", "--format", "%v", name]) if shutil.which("apt-config") else ""
    )
    return f'{name} "{value}";\n' if value else ""


def known_facts(sources: Checkout, options: BuildOptions, choice: BaseChoice) -> dict[str, str]:
    """Return the labels known on the host; the build adds the others."""
    image, digest = choice.image.removeprefix("docker://"), choice.digest or "unknown"
    if choice.source:
        image, digest = f"debootstrap {choice.source.suite}", "none"
    return {
        "version": aiflux.__version__,
        "commit": sources.commit,
        "base": choice.base,
        "base_image": image,
        "base_digest": digest,
        "engine": options.engine,
        "engine_description": choice.engine,
    }


def _stage_wheels(site: Path, sources: Checkout, folders: Sequence[Path]) -> None:
    """Unpack the worker's dependencies; each folder may have a lock file of its own."""
    fetch = sources.container / "fetch-wheels.sh"
    for lock in filter(Path.is_file, (folder / "requirements.txt" for folder in folders)):
        wheels = capture(
            [fetch, lock], "the worker's dependencies could not be downloaded", _NETWORK_REMEDY
        )
        for wheel in wheels.splitlines():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)


def _stage_engine(
    archive: Path, sources: Checkout, options: BuildOptions, choice: BaseChoice
) -> None:
    """Put the engine into an archive; the docker base has it already."""
    title, assembler = options.engine_base.title, options.engine_base.assembler
    if options.ollama_tarball:
        shutil.copyfile(options.ollama_tarball, archive)
    elif choice.cpu_build and assembler:
        assembled = cache_dir() / f"{options.engine}-cpu"
        script, what = sources.container / assembler, f"the CPU build of {title}"
        run([script, assembled], f"{what} could not be assembled", _NETWORK_REMEDY)
        run(
            ["tar", "-C", assembled, "-cf", archive, "bin", "lib"],
            f"{what} could not be packed",
            "free some space in the temporary directory (TMPDIR)",
        )


Say = Callable[[str], None]

ROOM_NEEDED = {"docker": 20, "debian": 3}
"""Free space in APPTAINER_TMPDIR that a build needs, in GiB; more where the engine is larger."""

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
    runtime = find_runtime()
    sources = find_sources()
    signer = find_signer(options.key, ask) if options.sign else None
    choice = choose_base(options)
    say(choice.description)
    scratch = scratch_dir(os.environ)
    _warn_of_little_room(scratch, choice, say)
    unsigned: ImageError | None = None
    with temporary_folder(scratch) as work:
        stage(work / "payload", sources, options, choice)
        new = output.with_name(f".{output.name}.{os.getpid()}.new")
        fakeroot = os.geteuid() != 0 and is_singularity_ce(runtime)  # Apptainer needs no option
        command = render_command(
            str(runtime), new, sources.definition, options, choice, fakeroot=fakeroot
        )
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
    apptainer: str,
    output: Path,
    definition: Path,
    options: BuildOptions,
    choice: BaseChoice,
    *,
    fakeroot: bool = False,
) -> list[str]:
    """Return the ``apptainer build`` command; it runs next to the staged payload."""
    command = [apptainer, "build"]
    if fakeroot:
        command.append("--fakeroot")
    if not options.run_tests:
        command.append("--notest")
    if choice.image and base.parse(choice.image).insecure:
        command.append("--no-https")
    for name, value in build_arguments(choice).items():
        command += ["--build-arg", _csv(f"{name}={value}")]
    return [*command, str(output), str(definition)]


def _csv(text: str) -> str:
    """Quote one value of an option that Apptainer splits at commas, as CSV (pflag, StringSlice)."""
    if "," not in text and '"' not in text:
        return text
    return '"' + text.replace('"', '""') + '"'


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
    environment = {**environ, "APPTAINER_TMPDIR": str(scratch), "SINGULARITY_TMPDIR": str(scratch)}
    commit_time = sources.commit_time
    if commit_time:
        environment.setdefault("SOURCE_DATE_EPOCH", commit_time)
    return environment


def scratch_dir(environ: Mapping[str, str]) -> Path:
    """Return the build's temporary directory: that set for Apptainer, else the system's."""
    chosen = environ.get("APPTAINER_TMPDIR") or environ.get("SINGULARITY_TMPDIR")
    return Path(chosen or tempfile.gettempdir())


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
