"""Bills of materials are valid CycloneDX and name what is there."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from email.parser import HeaderParser
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from aiflux import __version__
from aiflux.bundle.writer import Ingredients, write_bundle
from aiflux.image import sbom
from tests.tools.make_sif import make_sif
from tests.unit.bundle.test_bundle import make_wheel


def check(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Validate a document against CycloneDX's own schema; return its components by name."""
    folder = files("cyclonedx.schema._res")

    def read(name: str) -> Any:
        return json.loads(folder.joinpath(name).read_text(encoding="utf-8"))

    schema = read("bom-1.6.SNAPSHOT.schema.json")
    # jsonschema 4.17.3 fails where it reports further items of a list whose items are numbered.
    expression = schema["definitions"]["licenseChoice"]["oneOf"][1]
    assert expression.pop("additionalItems") is False
    expression["maxItems"] = 1
    parts = ("spdx.SNAPSHOT", "jsf-0.82.SNAPSHOT", "cryptography-defs.SNAPSHOT")
    store = {f"http://cyclonedx.org/schema/{part}.schema.json": read(f"{part}.schema.json")
             for part in parts}  # fmt: skip
    resolver = jsonschema.RefResolver(schema["$id"], schema, store=store)
    jsonschema.Draft7Validator(schema, resolver=resolver).validate(content)
    return {each["name"]: each for each in content["components"]}


def test_the_schema_refuses_what_is_wrong() -> None:
    wrong = sbom.document("1", [sbom.component("no type", "a", "1")])
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


def test_a_system_is_described_and_always_the_same(tmp_path: Path) -> None:
    facts = {"engine": "vllm", "engine_version": "0.32.0", "version": __version__}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    texts = []
    for name in ("a.json", "b.json"):
        command = [sys.executable, "-m", "aiflux.image.sbom", tmp_path / "facts.json"]
        subprocess.run([*command, tmp_path / name], check=True)
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    found = check(json.loads(texts[0]))
    assert found["vLLM"]["licenses"] == [{"expression": "Apache-2.0"}]
    assert found["requests"]["version"] == version("requests")
    assert found["requests"]["purl"] == f"pkg:pypi/requests@{version('requests')}"
    assert "Apache" in json.dumps(found["requests"]["licenses"])


@pytest.mark.parametrize(
    ("metadata", "licences"),
    [
        ("License-Expression: MIT OR Apache-2.0", [{"expression": "MIT OR Apache-2.0"}]),
        ("License: BSD", [{"license": {"name": "BSD"}}]),
        ("License: MIT\nClassifier: License :: OSI Approved :: MIT License",
         [{"license": {"name": "MIT License"}}]),
        ("License: The whole\n        text", [{"license": {"name": "The whole"}}]),
        ("Classifier: Typing :: Typed", None),
    ],
)  # fmt: skip
def test_the_licence_of_a_package(metadata: str, licences: list[dict[str, Any]] | None) -> None:
    message = HeaderParser().parsestr(f"Name: Some.Name\nVersion: 1+x\n{metadata}\n")
    content = sbom.python_package(message)
    assert content.get("licenses") == licences
    assert content["purl"] == "pkg:pypi/some-name@1%2Bx"
    check(sbom.document("1", [content]))


def test_a_bundle_has_its_own(tmp_path: Path) -> None:
    image = make_sif(tmp_path / "some.sif", version="1", engine="ollama", engine_version="9")
    wheel = make_wheel(tmp_path, "1.0")
    parts = Ingredients((image,), (), {"3.12": [wheel]}, "x86_64")
    bundle = write_bundle(tmp_path / "b.tar", parts).path
    with tarfile.open(bundle) as tar:
        member = tar.extractfile("aiflux-bundle/sbom.cdx.json")
        assert member is not None
        found = check(json.loads(member.read()))
        listed = tar.extractfile("aiflux-bundle/SHA256SUMS")
        assert listed is not None
        sums = dict(reversed(line.split("  ")) for line in listed.read().decode().splitlines())
    assert found["Ollama"]["version"] == "9"
    assert found["image/aiflux.sif"]["hashes"][0]["content"] == sums["image/aiflux.sif"]
    assert found["aiflux-slurm"]["hashes"][0]["content"] == sums[f"wheels/{wheel.name}"]
