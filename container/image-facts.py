"""Collect the facts of an image; runs inside the image during the build.

``image-facts.py FACTS IMAGE_JSON LABELS ENVIRONMENT``: reads the facts known on the host, adds
those known only inside, and writes image.json, Apptainer's label file and its environment file.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

PROGRAMS = {"ollama": "ollama", "llamacpp": "llama-server", "vllm": "vllm"}
LIBRARIES = tuple(
    map(Path, ("/usr/lib/ollama", "/lib/ollama", "/usr/local/lib/ollama", "/app", "/usr/lib"))
)
GPU_LIBRARY = re.compile(r"^libggml-(cuda|hip|vulkan)\b.*\.so")
VENDORS = {"cuda": "nvidia", "hip": "amd"}
ROCM = Path("/opt/rocm")
VERSION = re.compile(r"\d+\.\d+\.\d+\S*|(?<=version: )\d+")


def engine_version(engine: str) -> str:
    """Return the version that the engine's program prints, without a server."""
    path = f"{os.environ['PATH']}:/app"
    # The engine's Python must not see the worker's packages.
    environ = {**os.environ, "PATH": path, "PYTHONPATH": "", "HOME": "/tmp"}  # noqa: S108
    done = subprocess.run(
        [PROGRAMS[engine], "--version"], capture_output=True, text=True, check=True, env=environ
    )
    found = VERSION.search(done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"image-facts: no version was printed: {done.stdout}{done.stderr}")
    return found[0]


def gpu_back_ends(engine: str, version: str) -> set[str]:
    """Return the engine's GPU back ends: cuda, hip or vulkan."""
    if engine == "vllm":
        # Its version ends with +rocm and a number in a build for AMD's GPUs.
        built_for_amd = "+rocm" in version or ROCM.exists()
        return set() if version.endswith("+cpu") else {"hip" if built_for_amd else "cuda"}
    files = (path for library in LIBRARIES for path in library.rglob("libggml-*.so*"))
    return {found[1] for found in (GPU_LIBRARY.match(path.name) for path in files) if found}


def label(value: object) -> str:
    """Return a label's value: one line, with yes and no for Booleans."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(str(value).split())


def main(facts_path: str, image_json: str, labels: str, environment: str) -> None:
    """Write all three files."""
    facts = json.loads(Path(facts_path).read_text(encoding="utf-8"))
    engine = facts["engine"]
    version = engine_version(engine)
    back_ends = gpu_back_ends(engine, version)
    vendors = sorted(VENDORS[name] for name in back_ends & VENDORS.keys())
    facts |= {
        "engine_version": version,
        "python": platform.python_version(),
        "os": platform.freedesktop_os_release()["PRETTY_NAME"],
        "arch": platform.machine(),
        "cpu_only": not back_ends,
        "gpu_vendors": " ".join(vendors) or "none",
    }
    if engine == "ollama":
        facts["ollama"] = version  # its label in earlier versions
    Path(image_json).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
    with Path(labels).open("a", encoding="utf-8") as file:
        file.writelines(f"aiflux.{key} {label(facts[key])}\n" for key in sorted(facts))
    with Path(environment).open("a", encoding="utf-8") as file:
        file.write(f"export AIFLUX_IMAGE_CPU_ONLY={int(facts['cpu_only'])}\n")
        file.write(f"export AIFLUX_IMAGE_GPU_VENDORS='{' '.join(vendors)}'\n")
        file.write(f'export AIFLUX_ENGINE="${{AIFLUX_ENGINE:-{engine}}}"\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
