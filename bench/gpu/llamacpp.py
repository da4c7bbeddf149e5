"""Find llama.cpp, or build it from the source in the sdist of llama-cpp-python."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.children import tool_output

SDIST = "llama-cpp-python==0.3.36"
_TARGETS = ("llama-server", "llama-batched-bench")
_UNUSED = (
    ".git",
    "benches",
    "docs",
    "media",
    "models",
    "tests",
    "tools/ui/src",
    "tools/ui/static",
    "tools/ui/tests",
)
"""Parts of the source that the build does not need: 115 of 176 MB."""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp with one model."""

    programs: Path
    model: Path
    slots: int
    context: int
    options: tuple[str, ...] = ()
    name: str = "llama.cpp"

    @property
    def environ(self) -> Mapping[str, str]:
        """The environment, with CUDA's libraries from Python packages if there are no others."""
        folders = [str(path.parent) for path in [wheel_library("cublas")] if path]
        given = os.environ.get("LD_LIBRARY_PATH")
        return {"LD_LIBRARY_PATH": os.pathsep.join([*folders, *([given] if given else [])])}

    def command(self, port: int) -> list[str]:
        """Return the server's command.

        The cache of old prompts is off, as no prompt is repeated. Requests use temperature 0, so a
        single sampler is enough: the others cost time for each token and change nothing.
        """
        return [
            str(self.programs / "llama-server"),
            *("--model", str(self.model), "--alias", self.served_name),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--parallel", str(self.slots), "--ctx-size", str(self.slots * self.context)),
            *("--gpu-layers", "999", "--no-webui", "--cache-ram", "0"),
            *("--samplers", "temperature"),
            *self.options,
        ]

    @property
    def served_name(self) -> str:
        """The model name in requests."""
        return "random"

    def own_tool(
        self, levels: Sequence[int], prompt: int, answer: int, seconds: float
    ) -> tuple[list[str], Mapping[int, float]]:
        """Run llama-batched-bench; return its command and tokens per second by level."""
        command = [
            str(self.programs / "llama-batched-bench"),
            *("--model", str(self.model), "--gpu-layers", "999"),
            *("--ctx-size", str(max(levels) * (prompt + answer))),
            *("-npp", str(prompt), "-ntg", str(answer)),
            *("-npl", ",".join(map(str, levels)), "--output-format", "jsonl"),
        ]
        output, _ = tool_output(command, self.environ)
        return command, batched_bench_rates(output.splitlines())

    def version(self) -> str:
        """Return the version that the server reports."""
        command = [str(self.programs / "llama-server"), "--version"]
        lines = "".join(tool_output(command, self.environ, 60)).splitlines()
        return next((line for line in lines if "version" in line), "unknown version")


def batched_bench_rates(lines: Iterable[str]) -> dict[int, float]:
    """Return output tokens per second by batch size, prompts included in the time."""
    rates = {}
    for line in lines:
        if line.startswith("{"):
            row = json.loads(line)
            rates[int(row["pl"])] = row["pl"] * row["tg"] / row["t"]
    return rates


def programs(given: Path | None, folder: Path) -> Path:
    """Return the directory with llama.cpp's programs; build them if needed.

    Args:
        given: programs, source, or an archive with the source; by default the PATH is searched,
            then the sdist is downloaded.
        folder: where to build.
    """
    found = shutil.which(_TARGETS[0])
    if given is None and found and shutil.which(_TARGETS[1]):
        return Path(found).resolve().parent
    if given is not None and (given / _TARGETS[0]).exists():
        return given
    built = folder / "llama.cpp-build" / "bin"
    if not all((built / target).exists() for target in _TARGETS):
        _build(_source(given, folder), built.parent)
    return built


def _source(given: Path | None, folder: Path) -> Path:
    if given is not None and (given / "CMakeLists.txt").exists():
        return given
    target = folder / "llama.cpp-source"
    if not target.exists():
        partial = folder / "llama.cpp-source.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(given or download(folder)) as archive:
            archive.extractall(partial, members=required_members(archive), filter="data")
        partial.rename(target)
    return next(target.rglob("vendor/llama.cpp"), target)


def download(folder: Path) -> Path:
    """Download the sdist; pip builds its metadata, which needs no compiler."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-binary", ":all:", "-d", str(folder), SDIST], check=True)
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def pack(folder: Path) -> Path:
    """Pack the source files that the build needs, for a machine without network."""
    target = folder / "llama.cpp.tar.gz"
    with (
        tempfile.TemporaryDirectory() as scratch,
        tarfile.open(download(Path(scratch))) as archive,
        tarfile.open(target, "w:gz") as packed,
    ):
        for member in required_members(archive):
            packed.addfile(member, archive.extractfile(member) if member.isfile() else None)
    return target


def required_members(archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Return the members under vendor/llama.cpp that the build needs."""
    found = []
    for member in archive:
        parts = member.name.split("/", 3)
        if len(parts) == 4 and parts[1:3] == ["vendor", "llama.cpp"]:
            place = parts[3]
            if not any(place == part or place.startswith(part + "/") for part in _UNUSED):
                found.append(member)
    return found


def _build(source: Path, build: Path) -> None:
    nvcc = find_nvcc()
    environ = {**os.environ, **({"CUDACXX": str(nvcc)} if nvcc else {})}
    build.mkdir(parents=True, exist_ok=True)
    log = build / "build.log"
    for command in build_commands(source, build, nvcc is not None):
        print("+", *command, flush=True)
        with open(log, "ab") as output:
            done = subprocess.run(command, env=environ, stdout=output, stderr=output, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the build failed: {log.read_text(errors='replace')[-3000:]}")


def find_nvcc() -> Path | None:
    """Return CUDA's compiler."""
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return Path(found) if found else None


def build_commands(source: Path, build: Path, cuda: bool) -> list[list[str]]:
    """Return the commands that build the programs for this machine's GPU."""
    configure = [
        *("cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
        *(f"-DLLAMA_{name}=OFF" for name in ("CURL", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES")),
        *(f"-DLLAMA_{name}=OFF" for name in ("BUILD_UI", "USE_PREBUILT_UI")),
    ]
    if cuda:
        configure += ["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native", *_for_wheels()]
    jobs = str(len(os.sched_getaffinity(0)))
    return [configure, ["cmake", "--build", str(build), "-j", jobs, "--target", *_TARGETS]]


def _for_wheels() -> list[str]:
    """Return options for a CUDA toolkit without cuBLAS if a Python package contains it.

    NO_VMM avoids the stub of the driver's library if the toolkit has none.
    """
    options = [] if _in_toolkit("libcuda.so") else ["-DGGML_CUDA_NO_VMM=ON"]
    found = {name: wheel_library(name) for name in ("cublas", "cublasLt")}
    if _in_toolkit("cublas_v2.h") or not all(found.values()):
        return options
    headers = next(path for path in found.values() if path).parents[1] / "include"
    options += [f"-DCUDA_{name}_LIBRARY={path}" for name, path in found.items()]
    return [*options, f"-DCMAKE_CUDA_FLAGS=-I{headers}"]


def _in_toolkit(name: str) -> bool:
    nvcc = find_nvcc()
    roots = [Path("/usr/local/cuda"), *([nvcc.resolve().parents[1]] if nvcc else [])]
    folders = ("include", "lib64", "lib64/stubs")
    return any((root / folder / name).exists() for root in roots for folder in folders)


def wheel_library(name: str) -> Path | None:
    """Return a library of NVIDIA's Python packages."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations or [] if spec else []
    found = [path for folder in folders for path in Path(folder).glob(f"*/lib/lib{name}.so.*")]
    return found[0] if found else None
