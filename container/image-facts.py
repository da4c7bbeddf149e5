"""Collect the facts of an image; runs inside the image during the build.

``image-facts.py FACTS IMAGE_JSON LABELS ENVIRONMENT``: reads the facts known on the host, adds
those known only inside, and writes image.json, Apptainer's label file and its environment file.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

LIBRARIES = (Path("/usr/lib/ollama"), Path("/lib/ollama"), Path("/usr/local/lib/ollama"))
GPU_LIBRARY = re.compile(r"^libggml-(cuda|hip|vulkan)\b.*\.so")


def ollama_version() -> str:
    """Return the version from ``ollama --version``, without a server."""
    done = subprocess.run(["ollama", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"\d+\.\d+\.\d+\S*", done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"image-facts: ollama printed no version: {done.stdout}{done.stderr}")
    return found[0]


def has_gpu_libraries() -> bool:
    """Return whether Ollama has a GPU back end."""
    files = (path for library in LIBRARIES for path in library.rglob("*.so*"))
    return any(GPU_LIBRARY.match(path.name) for path in files)


def label(value: object) -> str:
    """Return a label's value: one line, with yes and no for Booleans."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(str(value).split())


def main(facts_path: str, image_json: str, labels: str, environment: str) -> None:
    """Write all three files."""
    facts = json.loads(Path(facts_path).read_text(encoding="utf-8"))
    version = ollama_version()
    facts |= {
        "engine_version": version,
        "ollama": version,  # its label in earlier versions
        "python": platform.python_version(),
        "os": platform.freedesktop_os_release()["PRETTY_NAME"],
        "arch": platform.machine(),
        "cpu_only": not has_gpu_libraries(),
    }
    Path(image_json).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", "utf-8")
    with Path(labels).open("a", encoding="utf-8") as file:
        file.writelines(f"aiflux.{key} {label(facts[key])}\n" for key in sorted(facts))
    with Path(environment).open("a", encoding="utf-8") as file:
        file.write(f"export AIFLUX_IMAGE_CPU_ONLY={int(facts['cpu_only'])}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
