"""The software bill of materials of an image or a bundle, in CycloneDX's JSON format.

``python3 -m aiflux.image.sbom FACTS FILE`` runs inside the image at the end of its build, with the
standard library alone. Documents have no time and no serial number: the same content gives the same
file. Format: https://cyclonedx.org/docs/1.6/json/.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import quote

NAME = "sbom.cdx.json"
Component = dict[str, Any]
_COPYRIGHTS = Path("/usr/share/doc")
_ENGINES = {
    "ollama": ("Ollama", "MIT"),
    "llamacpp": ("llama.cpp", "MIT"),
    "vllm": ("vLLM", "Apache-2.0"),
}
_LONGEST = 200  # characters; some packages have their licence's whole text in this field


def document(version: str, components: Iterable[Component]) -> dict[str, Any]:
    """Return the document of what belongs to this version of AI-Flux."""
    by_ref = {each["bom-ref"]: each for each in components}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": component("application", "aiflux-slurm", version, ("MIT",))},
        "components": [by_ref[ref] for ref in sorted(by_ref)],
    }


def component(
    kind: str,
    name: str,
    version: str,
    licences: Iterable[str] = (),
    *,
    expression: str = "",
    purl: str = "",
    sha256: str = "",
) -> Component:
    """Return one component.

    Args:
        kind: a type of CycloneDX, such as ``library``.
        licences: names of licences; ``expression`` is one of SPDX instead.
        purl: its package URL.
        sha256: of its file, in hexadecimal.
    """
    content: Component = {
        "type": kind,
        "bom-ref": purl or f"{kind}:{name}@{version}",
        "name": name,
        "version": version,
    }
    named = [{"license": {"name": each}} for each in licences]
    if expression or named:
        content["licenses"] = [{"expression": expression}] if expression else named
    if purl:
        content["purl"] = purl
    if sha256:
        content["hashes"] = [{"alg": "SHA-256", "content": sha256}]
    return content


def engine(kind: str, version: str) -> Component:
    """Return the component of an engine."""
    name, licence = _ENGINES.get(kind, (kind, ""))
    return component("application", name, version, expression=licence)


def python_package(metadata: Message, sha256: str = "") -> Component:
    """Return the component of a distribution of Python, from its core metadata."""
    name, version = str(metadata["Name"]), str(metadata["Version"])
    normal = re.sub(r"[-_.]+", "-", name).lower()
    expression = str(metadata["License-Expression"] or "")
    text = str(metadata["License"] or "").strip()
    classifiers = [str(each) for each in metadata.get_all("Classifier") or ()]
    named = [each.rpartition(" :: ")[2] for each in classifiers if each.startswith("License ::")]
    if not named and text:
        named = [text.splitlines()[0][:_LONGEST]]
    return component(
        "library",
        name,
        version,
        named,
        expression=expression,
        purl=f"pkg:pypi/{normal}@{quote(version)}",
        sha256=sha256,
    )


def _installed_packages() -> Iterator[Component]:
    for each in distributions():
        yield python_package(each.metadata)  # type: ignore[arg-type]


def _debian_packages() -> Iterator[Component]:
    if which("dpkg-query") is None:
        return
    asked = ["dpkg-query", "-W", "-f=${db:Status-Status} ${Package} ${Version} ${Architecture}\n"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    system = platform.freedesktop_os_release()["ID"]  # debian or ubuntu
    for line in done.stdout.splitlines():
        status, name, version, arch = line.split(" ")
        if status == "installed":
            purl = f"pkg:deb/{system}/{quote(name)}@{quote(version)}?arch={arch}"
            yield component("library", name, version, _debian_licences(name), purl=purl)


def _debian_licences(name: str) -> list[str]:
    """Return the licences in a package's copyright file; none if it is not machine-readable."""
    file = _COPYRIGHTS / name / "copyright"
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r"^License: *(\S.*?) *$", text, re.MULTILINE) if "Format:" in text else []
    return sorted({each[:_LONGEST] for each in found})


def of_this_system(facts: Mapping[str, str]) -> dict[str, Any]:
    """Return the document of the image that this process runs in."""
    own = engine(facts["engine"], facts["engine_version"])
    return document(facts["version"], [own, *_installed_packages(), *_debian_packages()])


if __name__ == "__main__":
    known = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = json.dumps(of_this_system(known), indent=1, ensure_ascii=False)
    Path(sys.argv[2]).write_text(text + "\n", encoding="utf-8")
