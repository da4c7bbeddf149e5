"""Choose the base of an image (Docker Hub or Debian), and define the build options.

The protocol of registries: https://github.com/opencontainers/distribution-spec/blob/main/spec.md
"""

from __future__ import annotations

import json
import platform
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from pathlib import Path

from aiflux.core.config.settings import AMD, NVIDIA, VENDOR_TITLES
from aiflux.errors import ImageError

_TIMEOUT = 8.0
_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_API_HOSTS = {"docker.io": "registry-1.docker.io"}
"""Registries whose API host differs from the host in references."""


@dataclass(frozen=True)
class EngineBase:
    """What images with one engine are built on.

    Attributes:
        title: the engine's name.
        image: its official image, for the docker base.
        official: description of the engine in that image.
        amd_image: the same for AMD GPUs.
        amd: description of the engine in that image.
        cpu: description of the engine on the Debian base.
        suite: Debian suite that the Debian base needs; empty for any.
        assembler: script below ``container/`` that assembles the CPU build on this machine; empty
            where Debian has the engine as a package.
        machines: architectures that the Debian base supports.
    """

    title: str
    image: str
    official: str
    amd_image: str
    amd: str
    cpu: str
    suite: str = ""
    assembler: str = ""
    machines: tuple[str, ...] = ("x86_64",)


ENGINES = {
    "ollama": EngineBase(
        "Ollama",
        # By digest: Apptainer accepts a tag or a digest, not both.
        "docker://docker.io/ollama/ollama"
        "@sha256:32931b46719f673c05fdbaa81ccb26da18ea4a1c57590a754874ab28ba269eb2",
        "official Ollama 0.33.3 with GPU support",
        # https://hub.docker.com/r/ollama/ollama: the tags with -rocm.
        "docker://docker.io/ollama/ollama:0.33.3-rocm",
        "official Ollama 0.33.3 for AMD GPUs",
        "CPU build of Ollama 0.9.3, without GPU support",
        assembler="engines/ollama/cpu-build.sh",
    ),
    "llamacpp": EngineBase(
        "llama.cpp",
        # The tag server-cuda-b11382. Other tags without a build's number move daily.
        "docker://ghcr.io/ggml-org/llama.cpp"
        "@sha256:ef08b5a98b1170f2b62177be0a4027c88a84043c55afbf190dd18b9e7cdcfebf",
        "official llama.cpp b11382 with GPU support",
        # docs/docker.md in ggml-org/llama.cpp.
        "docker://ghcr.io/ggml-org/llama.cpp:server-rocm-b11277",
        "official llama.cpp b11277 for AMD GPUs",
        "llama.cpp of Debian, without GPU support",
        suite="sid",
        machines=("x86_64", "aarch64"),
    ),
    "vllm": EngineBase(
        "vLLM",
        "docker://docker.io/vllm/vllm-openai:v0.32.0",
        "official vLLM 0.32.0 with GPU support",
        # docs/getting_started/installation/gpu.rocm.inc.md in vllm-project/vllm.
        "docker://docker.io/vllm/vllm-openai-rocm:v0.32.0",
        "official vLLM 0.32.0 for AMD GPUs",
        "CPU build of vLLM 0.32.0, without GPU support",
        suite="bookworm",  # the CPU build is for its Python, 3.11
        assembler="engines/vllm/cpu-build.sh",
    ),
}
"""By engine kind. What the build does inside the image is in ``container/engines/KIND/``."""


@dataclass(frozen=True)
class BaseChoice:
    """The base of an image, and the reason for it.

    Attributes:
        base: ``docker`` or ``debian``.
        why: the reason, as half a sentence for the user.
        image: docker reference; for docker.
        digest: its digest, if known; for docker.
        source: mirror and suite; for debian.
        cpu_build: whether the engine is the CPU build; for debian.
        engine: description of the engine for the image's help.
    """

    base: str
    why: str
    engine: str
    image: str = ""
    digest: str = ""
    source: AptSource | None = None
    cpu_build: bool = False

    @property
    def pinned_image(self) -> str:
        """The image for Apptainer's ``From``, by digest if it is known."""
        reference = parse(self.image)
        if not self.digest:
            return self.image.removeprefix("docker://")
        return f"{reference.host}/{reference.name}@{self.digest}"

    @property
    def description(self) -> str:
        """One line for the user."""
        return f"base: {self.base} ({self.why}); engine: {self.engine}"


def choose_base(options: BuildOptions) -> BaseChoice:
    """Choose the base; ``auto`` uses docker if its registry is reachable and no tarball is given.

    Raises:
        ImageError: the requested base cannot be used on this machine.
    """
    if options.base == "debian":
        return _debian(options, "as requested")
    if options.ollama_tarball:
        return _debian(options, "an Ollama archive was given")
    image = options.base_image or options.official_image
    reference = parse(image)
    problem = why_unreachable(reference)
    if problem is None:
        why = "as requested" if options.base == "docker" else f"{reference.host} is reachable"
        return _docker(options, image, reference, why)
    if options.base == "docker" or options.gpu == AMD:
        debian = "" if options.gpu == AMD else ", or use --base debian"
        raise ImageError(
            f"the docker base cannot be downloaded: {problem}",
            f"build where the registry is reachable, or name a mirror with --base-image{debian}",
        )
    return _debian(options, problem)


def _docker(options: BuildOptions, image: str, reference: Reference, why: str) -> BaseChoice:
    engine = options.engine_base.amd if options.gpu == AMD else options.engine_base.official
    if options.base_image:
        engine = f"{options.engine_base.title} from {image.removeprefix('docker://')}"
    return BaseChoice("docker", why, engine, image=image, digest=digest(reference) or "")


def _debian(options: BuildOptions, why: str) -> BaseChoice:
    source = _source(options)
    if options.ollama_tarball:
        engine = f"Ollama from {options.ollama_tarball.name}"
        return BaseChoice("debian", why, engine, source=source)
    base, machine = options.engine_base, platform.machine()
    if machine not in base.machines:
        supported = " and ".join(base.machines)
        archive = " or --ollama-tarball" if options.engine == "ollama" else ""
        raise ImageError(
            f"the Debian base has {base.title} for {supported} only, not {machine}",
            f"use --base docker, or --base-image{archive} with {base.title} for {machine}",
        )
    return BaseChoice("debian", why, base.cpu, source=source, cpu_build=True)


def _source(options: BuildOptions) -> AptSource:
    found = find_source()
    mirror = options.mirror or (found and found.mirror)
    suite = options.suite or options.engine_base.suite or (found and found.suite)
    if not mirror or not suite:
        raise ImageError(
            "the Debian base requires a mirror and suite, and apt has none configured here",
            "use --mirror URL --suite NAME",
        )
    return AptSource(mirror, suite)


APT = Path("/etc/apt")


@dataclass(frozen=True)
class AptSource:
    """A Debian mirror and suite."""

    mirror: str
    suite: str


def find_source(apt: Path = APT) -> AptSource | None:
    """Return the first source of a full release (not updates), or None without apt."""
    for source in _all_sources(apt):
        if source.mirror.startswith(("http://", "https://")) and _is_release(source.suite):
            return source
    return None


def _is_release(suite: str) -> bool:
    return "-" not in suite and "/" not in suite


def _all_sources(apt: Path) -> Iterator[AptSource]:
    for path in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]:
        if path.is_file():
            yield from _one_line_sources(path.read_text(encoding="utf-8", errors="replace"))
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        yield from _deb822_sources(path.read_text(encoding="utf-8", errors="replace"))


def _one_line_sources(text: str) -> Iterator[AptSource]:
    """Parse ``deb [options] URI SUITE main ...``; see sources.list(5)."""
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        if kind != "deb":
            continue
        if rest.lstrip().startswith("["):
            rest = rest.partition("]")[2]
        words = rest.split()
        if len(words) >= 3 and "main" in words[2:]:
            yield AptSource(words[0], words[1])


def _deb822_sources(text: str) -> Iterator[AptSource]:
    """Parse stanzas of ``Types``, ``URIs``, ``Suites`` and ``Components``; see sources.list(5)."""
    for stanza in text.split("\n\n"):
        fields = dict(_fields(stanza))
        if "deb" not in fields.get("types", []) or "main" not in fields.get("components", []):
            continue
        if fields.get("enabled", ["yes"]) == ["no"]:
            continue
        for mirror in fields.get("uris", []):
            for suite in fields.get("suites", []):
                yield AptSource(mirror, suite)


def _fields(stanza: str) -> Iterator[tuple[str, list[str]]]:
    for line in stanza.splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith(("#", " ", "\t")):
            yield name.strip().lower(), value.split()


BASES = ("auto", "docker", "debian")


@dataclass(frozen=True)
class BuildOptions:
    """Options of an image build.

    Attributes:
        output: the image file to write.
        engine: kind of the engine in it.
        gpu: vendor of the GPUs that the engine in the docker base is for.
        base: ``docker`` (the engine's official image), ``debian`` (debootstrap), or ``auto``:
            docker if its registry is reachable.
        base_image: docker base as ``docker://HOST/NAME:TAG``; plain http on loopback.
        ollama_tarball: Ollama's official archive for Linux; for the Debian base.
        mirror: Debian mirror; by default that of this machine's apt.
        suite: Debian suite; by default this machine's.
        force: replace an existing output.
        run_tests: run the image's own test at the end of the build.
        sign: sign the image with one of the user's PGP keys.
        key: number of the key in ``apptainer key list --secret``; required if there are several.
    """

    output: Path = Path("aiflux.sif")
    engine: str = "ollama"
    gpu: str = NVIDIA
    base: str = "auto"
    base_image: str | None = None
    ollama_tarball: Path | None = None
    mirror: str | None = None
    suite: str | None = None
    force: bool = False
    run_tests: bool = True
    sign: bool = False
    key: int | None = None

    def __post_init__(self) -> None:
        """Raise ImageError for options that cannot be combined."""
        if self.base not in BASES:
            raise ImageError(f"unknown base {self.base!r}", f"use one of {', '.join(BASES)}")
        if self.engine not in ENGINES:
            raise ImageError(
                f"there are no images with the engine {self.engine!r}",
                f"use one of {', '.join(ENGINES)}",
            )
        if self.gpu not in VENDOR_TITLES:
            raise ImageError(
                f"unknown vendor of GPUs {self.gpu!r}", f"use one of {', '.join(VENDOR_TITLES)}"
            )
        if self.gpu == AMD and (self.base == "debian" or self.ollama_tarball):
            raise ImageError(
                "the Debian base has no engine for AMD GPUs",
                f"use --base docker, or leave out --gpu {AMD}",
            )
        if self.ollama_tarball and self.engine != "ollama":
            raise ImageError(
                f"--ollama-tarball cannot be combined with --engine {self.engine}",
                "remove one of the two",
            )
        if self.base == "docker" and self.ollama_tarball:
            raise ImageError(
                "--ollama-tarball cannot be combined with the docker base, which contains Ollama",
                "use --base debian, or remove --ollama-tarball",
            )
        if self.base_image and not self.base_image.startswith("docker://"):
            raise ImageError(
                f"--base-image {self.base_image!r} is not a docker reference",
                "write it as docker://HOST/NAME:TAG, e.g. docker://docker.io/ollama/ollama:latest",
            )
        if self.key is not None and not self.sign:
            raise ImageError("--key has no effect without --sign", "add --sign")
        if self.ollama_tarball and not self.ollama_tarball.is_file():
            raise ImageError(
                f"Ollama archive not found: {self.ollama_tarball}",
                "download ollama-linux-amd64.tgz (or arm64, or .tar.zst) from an Ollama release",
            )

    @property
    def engine_base(self) -> EngineBase:
        """What images with this engine are built on."""
        return ENGINES[self.engine]

    @property
    def official_image(self) -> str:
        """The engine's own image for the GPUs."""
        return self.engine_base.amd_image if self.gpu == AMD else self.engine_base.image


@dataclass(frozen=True)
class Reference:
    """A parsed ``docker://`` reference; ``version`` is a tag or a digest with its algorithm."""

    host: str
    name: str
    version: str

    @property
    def insecure(self) -> bool:
        """Whether to use plain http: only on loopback."""
        host = self.host.rpartition(":")[0] or self.host
        return host == "localhost" or host.startswith("127.")

    @property
    def api_host(self) -> str:
        """Host of the registry's API."""
        return _API_HOSTS.get(self.host, self.host)

    @property
    def url(self) -> str:
        """Base URL of the registry's API, with a trailing slash."""
        return f"{'http' if self.insecure else 'https'}://{self.api_host}/v2/"


def parse(reference: str) -> Reference:
    """Parse ``docker://[HOST/]NAME[:TAG|@DIGEST]`` the way docker does."""
    rest = reference.removeprefix("docker://")
    first, slash, others = rest.partition("/")
    is_host = slash and ("." in first or ":" in first or first == "localhost")
    host, path = (first, others) if is_host else ("docker.io", rest)
    tagged, _, pinned = path.partition("@")
    name, _, tag = tagged.partition(":")
    if host == "docker.io" and "/" not in name:
        name = f"library/{name}"
    return Reference(host, name, pinned or tag or "latest")


def why_unreachable(reference: Reference) -> str | None:
    """Return why the registry is unreachable, or None. A login request counts as reachable."""
    try:
        status, _ = _request("GET", reference.url)
    except OSError as error:
        return f"{reference.host} does not respond: {_reason(error)}"
    if status in (HTTPStatus.OK, HTTPStatus.UNAUTHORIZED):
        return None
    return f"{reference.host} returned status {status}"


def why_silent(host: str) -> str | None:
    """Return why a host does not respond over https, or None. Any status counts as a response."""
    try:
        _request("GET", f"https://{host}/v2/")
    except OSError as error:
        return f"{host} does not respond: {_reason(error)}"
    return None


def digest(reference: Reference) -> str | None:
    """Return the digest that a reference resolves to, or None if unknown."""
    if ":" in reference.version:
        return reference.version
    url = f"{reference.url}{reference.name}/manifests/{reference.version}"
    headers = {"Accept": _MANIFESTS}
    try:
        status, answer = _request("HEAD", url, headers)
        if status == HTTPStatus.UNAUTHORIZED:
            headers |= _authorization(answer.get("WWW-Authenticate", ""))
            status, answer = _request("HEAD", url, headers)
    except (OSError, ValueError):
        return None
    return answer.get("Docker-Content-Digest") if status == HTTPStatus.OK else None


def _authorization(challenge: str) -> dict[str, str]:
    """Return an anonymous token for the scope in the registry's challenge."""
    values = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = values.pop("realm", "")
    if not realm.startswith("https://"):
        return {}
    with urllib.request.urlopen(  # noqa: S310 - https only, see above
        f"{realm}?{urllib.parse.urlencode(values)}", timeout=_TIMEOUT
    ) as response:
        answer = json.load(response)
    return {"Authorization": f"Bearer {answer.get('token') or answer.get('access_token')}"}


def _request(method: str, url: str, headers: dict[str, str] | None = None) -> tuple[int, Message]:
    """Send a request; return status and headers, whatever the status."""
    request = urllib.request.Request(url, method=method, headers=headers or {})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:  # noqa: S310
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            return error.code, error.headers


def _reason(error: OSError) -> str:
    reason = getattr(error, "reason", error)
    return str(getattr(reason, "strerror", None) or reason)
