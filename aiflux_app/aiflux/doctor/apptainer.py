"""Check Apptainer on this machine: version, mode, sealing and building; and the registries."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aiflux.core.config.config import Config
from aiflux.core.config.engine_kinds import KINDS
from aiflux.core.config.settings import AMD, VENDOR_TITLES
from aiflux.doctor import host
from aiflux.engines.gpu_readings import amd_readings, nvidia_devices, nvidia_readings
from aiflux.engines.gpus import TOPOLOGY, gpu_vendor, kfd_devices
from aiflux.engines.kinds import kind_named
from aiflux.errors import ImageError
from aiflux.image import base
from aiflux.image.base import ENGINES
from aiflux.image.container import find_image, find_runtime, is_chosen, probe_command
from aiflux.image.run_tool import apptainer, ask, is_singularity_ce
from aiflux.image.sif import (
    how_to_build,
    machine_arch,
    older_version,
    read_image,
    refuse_other_version,
)
from aiflux.image.signing import diagnose
from aiflux.models.name import DEFAULT_HOST
from aiflux.util.diagnosis import Diagnosis, fail, ok, warn
from aiflux.util.process_limits import require_thread_memory

_TIMEOUT = 60.0
_HERE = "compute nodes may differ"


def containers(config: Config, cwd: Path) -> Iterator[Diagnosis]:
    """Check the container runtime, the image that runs would use, and sealing."""
    runtime: Path | None = None
    try:
        runtime = find_runtime()
    except ImageError as error:
        # Compute nodes may have a runtime even if the login node lacks one.
        yield warn("apptainer", f"{error.message} (on this machine)", error.remedy or "")
    if runtime is not None:
        yield from _runtime(runtime)
    if not kind_named(config.engine).worker_in_image:
        yield ok("image", "not needed: runs use the server of engine_command")
        return
    try:
        image = find_image(config, cwd)
        yield from _image(image)
    except ImageError as error:
        yield fail("image", error.message, error.remedy or "")
        return
    if runtime is not None:
        yield diagnose(image)
        yield seal(runtime, image) if is_chosen(config, image) else _untried(image)


def _runtime(runtime: Path) -> Iterator[Diagnosis]:
    text = _answer("--version")
    if text is None:
        yield fail(runtime.name, f"{runtime} --version fails", "ask the site to fix it")
        return
    yield _version(runtime.name, text)
    settings = dict(re.findall(r"^(\w+)=(.*)$", _answer("buildcfg") or "", re.MULTILINE))
    setuid = is_setuid(runtime, settings)
    yield _mode(setuid)
    yield _mounting(setuid, settings)
    yield _building(setuid, fakeroot_command=not is_singularity_ce(runtime))
    yield from gpus(os.environ, settings)


def _answer(word: str) -> str | None:
    """Return Apptainer's output for a one-word command, or None if it fails."""
    try:
        done = apptainer([word])
    except ImageError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str, text: str) -> Diagnosis:
    """Check the version: ``--mount`` requires Apptainer 1.0 or SingularityCE 3.10."""
    match = re.search(r"(\d+)\.(\d+)", text)
    number = (int(match[1]), int(match[2])) if match else (0, 0)
    old = number < ((1, 0) if "apptainer" in text.lower() else (3, 10))
    if old:
        return fail(
            name,
            f"{text} is too old: jobs require its --mount option",
            "load a newer version (module avail apptainer), or ask for Apptainer 1.0 or later",
        )
    return ok(name, text)


def is_setuid(runtime: Path, settings: dict[str, str]) -> bool:
    """Return whether Apptainer's starter is installed setuid root."""
    library = settings.get("LIBEXECDIR") or str(runtime.resolve().parents[1] / "libexec")
    for name in ("apptainer", "singularity"):
        starter = Path(library) / name / "bin" / "starter-suid"
        try:
            status = starter.stat()
        except OSError:
            continue
        if status.st_uid == 0 and status.st_mode & stat.S_ISUID:
            return True
    return False


def _mode(setuid: bool) -> Diagnosis:
    why = host.user_namespaces()
    if why is None:
        extra = "; a setuid starter is installed too" if setuid else ""
        return ok("namespaces", f"unprivileged user namespaces are enabled{extra}")
    if setuid:
        return warn(
            "namespaces",
            f"{why}: containers use the setuid starter; building and sealing may not work",
            "ask the site to allow unprivileged user namespaces",
        )
    return fail(
        "namespaces",
        f"{why}, and Apptainer is not installed setuid: containers cannot start here",
        "ask the site to allow unprivileged user namespaces, or for apptainer-suid",
    )


def _mounting(setuid: bool, settings: dict[str, str]) -> Diagnosis:
    if setuid:
        return ok("mounting", "the kernel mounts images")
    library = Path(settings.get("LIBEXECDIR", "/nonexistent"))
    helper = any(
        shutil.which(name) or [*library.glob(f"*/bin/{name}")]  # its own: apptainer, singularity
        for name in ("squashfuse_ll", "squashfuse")
    )
    if helper and host.fuse_usable():
        return ok("mounting", "squashfuse mounts images")
    lacking = "/dev/fuse cannot be used" if helper else "squashfuse is not installed"
    return warn(
        "mounting",
        f"{lacking}: each start unpacks the whole image into a temporary directory",
        "ask the site for squashfuse and access to /dev/fuse (mode 0666)",
    )


def _building(setuid: bool, *, fakeroot_command: bool) -> Diagnosis:
    user = pwd.getpwuid(os.getuid())
    elsewhere = "build it elsewhere and copy aiflux.sif here"
    if host.user_namespaces() is not None and not setuid:
        return warn("building", "images cannot be built here without user namespaces", elsewhere)
    lacking = host.subordinate_ids(user.pw_name, user.pw_uid)
    if lacking and (ask(["getsubids", user.pw_name]) or "").strip():
        lacking = []  # a directory service provides them
    if not lacking and shutil.which("newuidmap"):
        return ok("building", f"images can be built here (subordinate ids of {user.pw_name})")
    what = (
        f"no subordinate ids for you in {' and '.join(lacking)}"
        if lacking
        else "newuidmap is missing"
    )
    if fakeroot_command and shutil.which("fakeroot"):
        return warn(
            "building",
            f"{what}: builds use the fakeroot command, which may not suffice",
            f"if a build fails, ask for subordinate ids (usermod --add-subuids), or {elsewhere}",
        )
    return warn(
        "building",
        f"images cannot be built here: {what}",
        f"ask for subordinate ids (usermod --add-subuids, --add-subgids), or {elsewhere}",
    )


def gpus(
    environ: Mapping[str, str],
    settings: Mapping[str, str],
    dev: Path = Path("/dev"),
    topology: Path = TOPOLOGY,
) -> Iterator[Diagnosis]:
    """Report this machine's GPUs, and whether containers can use them.

    Args:
        settings: of Apptainer (``apptainer buildcfg``).
        dev, topology: where the kernel lists them.
    """
    vendor = gpu_vendor(environ, dev)
    devices = kfd_devices(topology) if vendor == AMD else nvidia_devices()
    if not devices:
        return
    read = amd_readings if vendor == AMD else nvidia_readings
    names = Counter(reading.name or "unknown model" for reading in read(devices))
    listed = ", ".join(f"{count} x {name}" for name, count in names.items())
    yield ok("gpus", f"GPUs of {VENDOR_TITLES[vendor]} on this machine: {listed}")
    kfd = dev / "kfd"
    if vendor == AMD and not os.access(kfd, os.R_OK | os.W_OK):
        yield warn(
            "gpus",
            f"you cannot use {kfd}, through which programs reach the GPUs",
            "ask the site to add you to the group of that file, usually render",
        )
    folder = settings.get("APPTAINER_CONFDIR") or settings.get("SINGULARITY_CONFDIR")
    libraries = "rocmliblist.conf" if vendor == AMD else "nvliblist.conf"
    if folder and not (Path(folder) / libraries).is_file():
        flag = "--rocm" if vendor == AMD else "--nv"
        yield warn(
            "gpus",
            f"{flag} does not work: {folder} has no {libraries}",
            "ask the site to restore this file of Apptainer's configuration",
        )


def _image(path: Path) -> Iterator[Diagnosis]:
    image = read_image(path)
    refuse_other_version(image)
    title = kind_named(image.engine).title if image.engine in KINDS else image.engine or "engine"
    engine = f"{title} {image.engine_version or '?'}"
    found = f"{path}: aiflux {image.fact('version')}, {engine}"
    yield ok("image", f"{found}, {image.arch or 'unknown architecture'}")
    older = older_version(image)
    if older is not None:
        yield warn("image", *older)
    if image.arch not in (None, machine_arch(os.uname().machine)):
        yield warn(
            "image",
            f"the image is for {image.arch}, but this machine is {os.uname().machine}",
            f"check that the compute nodes are {image.arch}, or build it on a machine like them",
        )
    if image.cpu_only:
        yield warn(
            "image",
            "CPU-only image: jobs with GPUs are rejected",
            f"{how_to_build('BASE=docker')}, where the registry is reachable; or use --allow-cpu",
        )


def seal(runtime: Path, image: Path) -> Diagnosis:
    """Start a container without network, as jobs do."""
    try:
        done = subprocess.run(
            probe_command(runtime, image), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=_TIMEOUT, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return _unsealed(f"{error}")
    if done.returncode == 0:
        return ok("sealing", "containers without network start here")
    return _unsealed(_last_words(done.stderr) or f"exit status {done.returncode}")


def _untried(image: Path) -> Diagnosis:
    """Report that sealing was not tried: an image that was only found may be anybody's."""
    return warn(
        "sealing",
        f"not tried: {image} was found in the current directory, and doctor only runs an image "
        "that you or the site configured",
        f"AIFLUX_IMAGE={shlex.quote(str(image))} aiflux doctor",
    )


def _last_words(stderr: str) -> str:
    """Return Apptainer's last line of output, without colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", stderr).splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _unsealed(why: str) -> Diagnosis:
    return warn(
        "sealing",
        f"containers without network cannot be started here: {why}",
        "on such compute nodes, jobs run unsealed, on 127.0.0.1 and a free port; ask the site "
        "for user namespaces",
    )


def registries() -> list[Diagnosis]:
    """Check whether this machine reaches the registries of models and images."""
    require_thread_memory()
    with ThreadPoolExecutor(2) as pool:
        model = pool.submit(base.why_silent, DEFAULT_HOST)
        image = pool.submit(base.why_silent, base.parse(ENGINES["ollama"].image).api_host)
        no_models, no_images = model.result(), image.result()
    return [
        ok("model registry", f"{DEFAULT_HOST} is reachable from here; {_HERE}")
        if no_models is None
        else warn(
            "model registry",
            f"{no_models}: models cannot be pulled on this machine; {_HERE}",
            "set https_proxy, or pull on a machine with internet and copy the models directory",
        ),
        ok(
            "image registry",
            f"{base.parse(ENGINES['ollama'].image).host} is reachable from here",
        )
        if no_images is None
        else warn(
            "image registry",
            f"{no_images}: the image with GPU support cannot be built here",
            "use a mirror (make image BASE_IMAGE=...), or build elsewhere and copy the image",
        ),
    ]
