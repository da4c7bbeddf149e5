"""Bundles: their content, rejected input, and what an installation leaves behind."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiflux.bundle import installer, writer
from aiflux.bundle.installer import (
    CONTENTS,
    SUMS,
    TOP,
    InstallError,
    InstallPaths,
    install,
    places,
    verify,
)
from aiflux.bundle.model_archive import pack_model
from aiflux.bundle.writer import Ingredients, write_bundle
from aiflux.cli.main import main
from aiflux.engines.ollama.store import missing_parts
from aiflux.engines.vllm.hub import parse_hub_model, stored_snapshot
from aiflux.errors import BundleError, ModelError
from aiflux.image.sif import read_image
from aiflux.models.name import ModelName, parse_model_name
from aiflux.util.extras import EXTRAS, LIBRARIES, remedy
from tests.tools.make_sif import make_sif
from tests.unit.helpers import words_of_python
from tests.unit.made_snapshots import COMMIT, LLAMA, WEIGHTS, put_pulled

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
MACHINE = os.uname().machine
NAME = parse_model_name("tiny:1b")
HUB_NAME = "hf:org/name"
HUB_FILES = {
    "config.json": json.dumps(LLAMA).encode(),
    "model.safetensors": WEIGHTS,
    "more/notes.txt": b"notes",
}


def make_model(models: Path, name: ModelName, weights: bytes) -> None:
    """Add a model of two blobs to a models directory."""
    layers = []
    for content in (b"{}", weights):
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        layers.append({"mediaType": "x", "digest": digest, "size": len(content)})
        blob = models / "blobs" / digest.replace(":", "-")
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
    manifest = models / name.manifest_path
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"config": layers[0], "layers": layers[1:]}))


def make_wheel(folder: Path, version: str) -> Path:
    """Build a wheel of a package that replaces AI-Flux: it prints how it is called."""
    facts = (
        f"Metadata-Version: 2.1\nName: aiflux-slurm\nVersion: {version}\nProvides-Extra: report\n"
    )
    tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    code = (
        "import os, sys\nprint(sys.argv[1:], os.environ['AIFLUX_SITE_CONFIG'])\n"
        "sys.argv[1:2] == ['wait'] and input()\nfrom aiflux.late import VERSION\nprint(VERSION)\n"
    )
    wheel = folder / f"aiflux_slurm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("aiflux/__init__.py", f"VERSION = {version!r}\n")
        archive.writestr("aiflux/late.py", f"VERSION = {version!r}\n")
        archive.writestr("aiflux/cli/__init__.py", "")
        archive.writestr("aiflux/cli/__main__.py", code)
        archive.writestr(f"aiflux_slurm-{version}.data/purelib/aiflux/more.py", "MORE = 1\n")
        archive.writestr(f"aiflux_slurm-{version}.dist-info/METADATA", facts)
        archive.writestr(f"aiflux_slurm-{version}.dist-info/WHEEL", tag)
    return wheel


@pytest.fixture
def parts(tmp_path: Path) -> Ingredients:
    models = tmp_path / "here" / "models"
    make_model(models, NAME, b"weights " * 1000)
    put_pulled(models / "hub", "org/name", HUB_FILES)
    image = make_sif(
        tmp_path / "here" / "some.sif", version="1", engine="ollama", engine_version="9"
    )
    other = make_sif(tmp_path / "here" / "v.sif", version="1", engine="vllm", engine_version="0.32")
    wheel = make_wheel(tmp_path / "here", "1.0")
    packed = tuple(pack_model(models, name) for name in (NAME.served, HUB_NAME))
    return Ingredients((image, other), packed, {PYTHON: [wheel], "3.99": [wheel]}, MACHINE)


@pytest.fixture
def bundle(tmp_path: Path, parts: Ingredients) -> Path:
    return write_bundle(tmp_path / "b.tar", parts).path


@pytest.fixture
def to(tmp_path: Path, awkward: Path) -> InstallPaths:
    prefix = tmp_path / awkward.name.replace(":", "") / "soft ware"
    return places(str(prefix), str(awkward / "models"))


def ignore(_: str) -> None:
    return None


def files(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if not path.is_dir()]


def members(bundle: Path) -> list[str]:
    with tarfile.open(bundle) as tar:
        return tar.getnames()


def rewritten(bundle: Path, change: Callable[[tarfile.TarInfo], bool]) -> Path:
    """Return a copy with only the members that ``change`` keeps, as modified by it."""
    copy = bundle.with_name("changed.tar")
    with tarfile.open(bundle) as old, tarfile.open(copy, "w") as new:
        for info in old.getmembers():
            content = old.extractfile(info)
            if change(info):
                new.addfile(info, content)
    return copy


def test_the_installer_needs_only_python() -> None:
    source = Path(installer.__file__).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            assert name.partition(".")[0] in sys.stdlib_module_names


def test_an_old_python_is_reported() -> None:
    source = Path(installer.__file__).read_text(encoding="utf-8")
    first, second, check = ast.parse(source, feature_version=(3, 6)).body[1:4]
    assert [ast.unparse(each) for each in (first, second)] == ["import shutil", "import sys"]
    assert ast.unparse(check).startswith("if sys.version_info < (3, 10):")
    for name in ("python3.6", "python3.8", "python3.9"):
        there = subprocess.run(["sh", "-c", f"{name} -V"], capture_output=True, check=False)
        if there.returncode:
            continue
        done = subprocess.run(
            [name, installer.__file__, "x"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: this is Python 3.")
        assert "requires 3.10 or later\n  -> " in done.stderr


def test_a_bundle_can_be_read_with_standard_tools(bundle: Path, tmp_path: Path) -> None:
    assert members(bundle)[:5] == [
        f"aiflux-bundle/{name}"
        for name in ("SHA256SUMS", "bundle.json", "sbom.cdx.json", "README.txt", "install.py")
    ]
    subprocess.run(["tar", "-xf", bundle], cwd=tmp_path, check=True)
    folder = tmp_path / "aiflux-bundle"
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)
    assert missing_parts(folder / "models", NAME) == [], "it is a models directory"
    assert "tiny:1b" in (folder / "README.txt").read_text()


def test_the_reported_checksum_is_that_of_the_file(tmp_path: Path, parts: Ingredients) -> None:
    written = write_bundle(tmp_path / "b.tar", parts)
    content = written.path.read_bytes()
    assert written.digest == hashlib.sha256(content).hexdigest()
    assert written.size == len(content)


def test_an_installation_with_plain_python(bundle: Path, to: InstallPaths, tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", bundle, "aiflux-bundle/install.py"], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "aiflux-bundle/install.py", bundle, "--prefix", to.prefix,
         "--models-dir", to.models],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert str(to.command) in done.stdout
    assert missing_parts(to.models, NAME) == []
    assert os.access((to.containers / "aiflux.sif"), os.X_OK)
    called = subprocess.run(
        [to.command, "run", "a b", "$(c)"], capture_output=True, text=True, check=True,
        env={"PATH": "/bin:/usr/bin"},
    )  # fmt: skip
    assert called.stdout == f"['run', 'a b', '$(c)'] {to.site}\n1.0\n"
    assert not [path for path in files(to.prefix, to.models) if ".staging" in path.parts]


def test_installed_files_are_found(bundle: Path, to: InstallPaths) -> None:
    from aiflux.core.config.config import Config
    from aiflux.core.config.sources import INSTALLED

    install(bundle, to, ignore)
    config = Config(environ={"AIFLUX_SITE_CONFIG": str(to.site)}, directory=Path("/nonexistent"))
    assert config.models_dir == to.models
    assert config.containers_dir / "aiflux.sif" == (to.containers / "aiflux.sif")
    assert (to.prefix / "python" / INSTALLED).samefile(to.site), "its limits apply without that"


def test_an_installed_snapshot_is_found_with_its_hashes(
    bundle: Path, to: InstallPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []
    install(bundle, to, printed.append)
    assert f"image: {to.containers / 'aiflux-vllm.sif'}" in printed
    assert f"model: {HUB_NAME} in {to.models}" in printed
    snapshot = stored_snapshot(to.models, parse_hub_model(HUB_NAME))
    assert snapshot.name == COMMIT
    assert {name: (snapshot / name).read_bytes() for name in HUB_FILES} == HUB_FILES
    assert main(["models", "verify", HUB_NAME, "--models-dir", str(to.models)]) == 0
    assert f"commit {COMMIT}" in capsys.readouterr().out
    link = snapshot / "more" / "notes.txt"
    inode = link.lstat().st_ino
    (snapshot / "config.json").unlink()
    install(bundle, to, ignore)
    assert link.lstat().st_ino == inode
    assert main(["models", "verify", HUB_NAME, "--models-dir", str(to.models)]) == 0


def test_reinstalling_writes_nothing_and_a_newer_bundle_replaces(
    bundle: Path, to: InstallPaths, parts: Ingredients, tmp_path: Path
) -> None:
    install(bundle, to, ignore)
    before = {path: path.stat().st_ino for path in files(to.models, to.prefix / "containers")}
    environment = (to.prefix / "python").resolve()
    install(bundle, to, ignore)
    assert {path: path.stat().st_ino for path in before} == before
    assert (to.prefix / "python").resolve() == environment
    wheels = {PYTHON: [make_wheel(tmp_path, "2.0")]}
    newer = Ingredients((), (), wheels, MACHINE)
    install(write_bundle(tmp_path / "n.tar", newer).path, to, ignore)
    site = (to.prefix / "python" / "lib" / f"python{PYTHON}" / "site-packages").resolve()
    assert "2.0" in (site / "aiflux" / "__init__.py").read_text()
    assert (site / "aiflux" / "more.py").exists()
    assert environment.exists(), "running commands still need it"
    assert "containers_dir" in to.site.read_text(), "settings are kept"


def test_files_of_a_killed_installation_are_reused(bundle: Path, to: InstallPaths) -> None:
    install(bundle, to, ignore)
    (blob, *_) = sorted((to.models / "blobs").iterdir(), key=lambda path: -path.stat().st_size)
    staged = to.staged(f"models/blobs/{blob.name}")
    staged.parent.mkdir(parents=True)
    blob.rename(staged)
    inode = staged.stat().st_ino
    install(bundle, to, ignore)
    assert blob.stat().st_ino == inode
    staged.parent.mkdir(parents=True)
    blob.rename(staged)
    staged.write_bytes(b"half")
    install(bundle, to, ignore)
    assert missing_parts(to.models, NAME) == []


def test_running_commands_keep_their_packages(
    bundle: Path, to: InstallPaths, parts: Ingredients, tmp_path: Path
) -> None:
    install(bundle, to, ignore)
    running = subprocess.Popen(
        [to.command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    running.stdout.readline()
    newer = Ingredients((), (), {PYTHON: [make_wheel(tmp_path, "2.0")]}, MACHINE)
    install(write_bundle(tmp_path / "n.tar", newer).path, to, ignore)
    assert running.communicate("\n")[0] == "1.0\n"
    called = subprocess.run([to.command], capture_output=True, text=True, check=True)
    assert called.stdout.splitlines()[-1] == "2.0"


def test_staged_files_of_a_stopped_installation_are_reused(bundle: Path, to: InstallPaths) -> None:
    staged = to.staged("image/aiflux.sif")

    def stop(_: int) -> None:
        if (to.models / ".staging" / "bundle" / "models").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(bundle, to, ignore, stop)
    inode = staged.stat().st_ino
    assert not to.command.exists()
    install(bundle, to, ignore)
    assert (to.containers / "aiflux.sif").stat().st_ino == inode
    assert not staged.parent.exists()


@pytest.mark.parametrize("words", [[installer.__file__], ["-m", "aiflux.cli", "bundle", "install"]])
def test_a_signal_stops_an_installation_with_a_message(
    bundle: Path, to: InstallPaths, words: list[str]
) -> None:
    # The process blocks at writing the image, because nobody reads this pipe.
    pipe = to.staged("image/aiflux.sif")
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    where = ["--prefix", str(to.prefix), "--models-dir", str(to.models)]
    process = subprocess.Popen(
        [sys.executable, *words, str(bundle), *where],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (to.models / ".staging" / "bundle.lock").exists():
        assert process.poll() is None
        time.sleep(0.02)
    # A signal right before the system call would only be noticed after it: a race of Python.
    sleeping = 0
    while sleeping < 10:
        time.sleep(0.02)
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        sleeping = sleeping + 1 if state == "S" else 0
    process.send_signal(signal.SIGTERM)
    out, printed = process.communicate(timeout=30)
    assert (process.returncode, out) == (5, "")
    assert printed.splitlines() == [
        "error: the installation was stopped",
        "  -> run the same command again to resume it",
    ]


def test_a_blob_damaged_on_disk_is_replaced(bundle: Path, to: InstallPaths) -> None:
    install(bundle, to, ignore)
    blob = max((to.models / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    whole = blob.read_bytes()
    blob.write_bytes(b"x" * len(whole))
    install(bundle, to, ignore)
    assert blob.read_bytes() == whole


# --- rejected bundles -------------------------------------------------------------------------


def test_every_damaged_byte_is_detected(bundle: Path, to: InstallPaths) -> None:
    with tarfile.open(bundle) as tar:
        spots = [info.offset_data + info.size // 2 for info in tar.getmembers() if info.size]
    whole = bundle.read_bytes()
    for spot in spots:
        damaged = bundle.with_name("damaged.tar")
        damaged.write_bytes(whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :])
        with pytest.raises(InstallError, match="is not a complete bundle"):
            verify(damaged)
    with pytest.raises(InstallError):
        install(damaged, to, ignore)
    assert files(to.prefix, to.models) == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9999])
def test_every_truncation_is_detected(bundle: Path, to: InstallPaths, share: float) -> None:
    cut = bundle.with_name("cut.tar")
    with tarfile.open(bundle) as tar:
        end = max(info.offset_data + info.size for info in tar.getmembers())
    cut.write_bytes(bundle.read_bytes()[: int(end * share)])
    with pytest.raises(InstallError, match="is not a complete bundle") as error:
        install(cut, to, ignore)
    assert not error.value.storage
    assert files(to.prefix, to.models) == []


def escape(info: tarfile.TarInfo) -> bool:
    info.name = info.name.replace("README.txt", "../../README.txt")
    return True


def link(info: tarfile.TarInfo) -> bool:
    if info.name.endswith(".sif"):
        info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
    return True


def sparse(info: tarfile.TarInfo) -> bool:
    if info.name.endswith(".sif"):
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                            "GNU.sparse.realsize": str(1 << 40)}  # fmt: skip
    return True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda info: not info.name.endswith(".sif"), "image/aiflux-vllm.sif is missing"),
        (lambda info: "SUMS" not in info.name, "SHA256SUMS is not at the expected position"),
        (escape, "is unexpected"),
        (link, "is unexpected"),
        (sparse, "it has a sparse member"),
    ],
    ids=["missing", "no sums", "escape", "link", "sparse"],
)
def test_missing_or_unexpected_members_are_rejected(
    bundle: Path, change: Callable[[tarfile.TarInfo], bool], words: str
) -> None:
    with pytest.raises(InstallError, match=words):
        verify(rewritten(bundle, change))


def of_contents(bundle: Path, raw: bytes, name: str = CONTENTS) -> Path:
    """Return a bundle with these bytes as bundle.json or another member, with its checksum."""
    copy = bundle.with_name("contents.tar")
    with tarfile.open(bundle) as old, tarfile.open(copy, "w") as new:
        for info in old.getmembers():
            file = old.extractfile(info)
            assert file is not None
            content = file.read()
            if info.name == TOP + SUMS:
                digest = hashlib.sha256(raw).hexdigest()
                line = re.escape(f"  {name}\n".encode())
                content = re.sub(rb"[0-9a-f]{64}(?=" + line + b")", digest.encode(), content)
            if info.name == TOP + name:
                content = raw
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    return copy


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("folder", "hub/../../evil", "has an invalid folder"),
        ("folder", "hub/models--org--name/..", "has an invalid folder"),
        (
            "folder",
            "hub/models--other--name",
            "does not list models/hub/models--other--name/blobs/",
        ),
        ("commit", "../evil", "has an invalid commit"),
        ("ref", "../evil", "has an invalid ref"),
        ("ref", "/evil", "has an invalid ref"),
        ("files", {"../../../../evil": "a" * 40}, "names the invalid path '../../../../evil'"),
        ("files", {"/evil": "a" * 40}, "names the invalid path '/evil'"),
        ("files", {"a": "a" * 40, "a/b": "a" * 40}, "names the invalid path 'a/b'"),
        ("files", {"a": "../evil"}, "has an invalid blob of 'a'"),
        ("files", {"a": "a" * 40}, f"/blobs/{'a' * 40}"),
    ],
)
def test_a_snapshot_that_leaves_its_directory_is_rejected(
    bundle: Path, to: InstallPaths, key: str, value: object, words: str
) -> None:
    contents = verify(bundle).contents
    contents["models"][1]["snapshot"][key] = value
    with pytest.raises(InstallError, match=re.escape(words)):
        install(of_contents(bundle, json.dumps(contents).encode()), to, ignore)
    assert files(to.prefix, to.models) == []


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def changed(value: Any, path: list[Any], new: Any) -> Any:
    """Return a copy of a value, changed at one path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def places_in(value: Any) -> Iterator[list[Any]]:
    yield []
    items: Iterable[Any] = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield from ([key, *rest] for rest in places_in(inner))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(st.data())
def test_any_value_in_bundle_json_is_an_error_or_harmless(
    bundle: Path, to: InstallPaths, data: st.DataObject
) -> None:
    contents = verify(bundle).contents
    place = data.draw(st.sampled_from([*places_in(contents)]))
    paths = st.sampled_from(["../../x", "/etc/x", "..", "a/b", "x\0y", "x\ny", "models/../../x"])
    raw = json.dumps(changed(contents, place, data.draw(ANY_JSON | paths))).encode()
    forged = of_contents(bundle, raw)
    around = to.prefix.parent.parent
    before = set(around.rglob("*"))
    refused = ""
    try:
        install(forged, to, ignore)
    except InstallError as error:
        refused = str(error)
    assert not words_of_python(refused)
    assert main(["bundle", "verify", str(forged)]) in (0, 2)
    strangers = {*around.rglob("*")} - before
    inside = (to.prefix, to.models, *to.prefix.parents)
    assert not [path for path in strangers if not any(map(path.is_relative_to, inside[:2]))
                and path not in inside]  # fmt: skip


KINDS = [tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.LNKTYPE, tarfile.XGLTYPE, tarfile.XHDTYPE,
         tarfile.GNUTYPE_LONGNAME, tarfile.CONTTYPE, b"V"]  # fmt: skip
HEADERS = ["size", "path", "linkpath", "mtime", "hdrcharset", "GNU.sparse.size", "GNU.sparse.map",
           "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.numblocks", "GNU.sparse.name",
           "GNU.sparse.realsize", "GNU.sparse.offset"]  # fmt: skip


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(
    st.sampled_from(KINDS),
    st.dictionaries(
        st.sampled_from(HEADERS),
        st.sampled_from(["0", "1", "-1", "9" * 30, "x", "1,2", "../x"]) | st.text(max_size=5),
    ),
    st.binary(max_size=600),
)
def test_any_first_member_is_an_error(
    tmp_path: Path, kind: bytes, headers: dict[str, str], data: bytes
) -> None:
    info = tarfile.TarInfo(TOP + SUMS)
    info.type, info.size, info.pax_headers = kind, len(data), headers
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(InstallError, match="is not a complete bundle") as error:
        verify(tmp_path / "x.tar")
    assert not words_of_python(str(error.value))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30
)
@given(st.binary(max_size=200) | ANY_JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_bundle_json_are_an_error(bundle: Path, raw: bytes) -> None:
    with pytest.raises(InstallError, match="is not a complete bundle") as error:
        verify(of_contents(bundle, raw))
    assert not words_of_python(str(error.value))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "bundle.json is not JSON: Expecting value at line 1, column 1"),
        (b"\xff", "bundle.json is not UTF-8 at offset 0"),
        (b"[]", "bundle.json is not a JSON object"),
        (b"{}", "bundle.json has an invalid version (it is missing)"),
        (b'{"version": null}', "bundle.json has an invalid version: null"),
        (b'{"version": true}', "bundle.json has an invalid version: true"),
        (b'{"version": "1"}', 'bundle.json has an invalid version: "1"'),
        (b'{"version": %s}' % (b"1" * 5000), "bundle.json has a number with too many digits"),
    ],
)
def test_an_error_in_bundle_json_is_named(bundle: Path, raw: bytes, words: str) -> None:
    with pytest.raises(InstallError, match=re.escape(words)):
        verify(of_contents(bundle, raw))


def test_a_newer_bundle_names_its_own_installer(
    bundle: Path, to: InstallPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = of_contents(bundle, b'{"version": 2, "new": []}')
    for words in (["verify", newer], ["install", newer, "--prefix", to.prefix]):
        assert main(["bundle", *map(str, words)]) == 2
        printed = capsys.readouterr().err
        assert f"{newer} has version 2 of the bundle format (bundle.json)" in printed
        assert "this installer reads version 1" in printed
        assert "aiflux-bundle/install.py" in printed.partition("->")[2]
    assert files(to.prefix, to.models) == []


def test_a_wheel_that_is_no_zip_file_is_an_error(
    bundle: Path, parts: Ingredients, to: InstallPaths
) -> None:
    wheel = parts.wheels[PYTHON][0]
    whole = wheel.read_bytes()
    for content in (b"", whole[:50], whole[:40] + b"\xff" * 20 + whole[60:]):
        bad = of_contents(bundle, content, f"wheels/{wheel.name}")
        with pytest.raises(InstallError, match=f"wheels/{wheel.name} cannot be unpacked"):
            install(bad, to, ignore)
    wheel.write_bytes(whole[:50])
    with pytest.raises(BundleError, match=f"{wheel.name} cannot be read"):
        write_bundle(bundle.with_name("w.tar"), parts)
    assert not to.command.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("aiflux", "../../../x"), ("aiflux", "/x"), ("aiflux", ""), ("extras", ["a/b"]),
     ("pythons", {"../x": []}), ("pythons", []), ("models", {}), ("arch", "a\nb")],
)  # fmt: skip
def test_a_field_with_a_path_outside_is_rejected(
    bundle: Path, to: InstallPaths, name: str, value: object
) -> None:
    raw = json.dumps({**verify(bundle).contents, name: value}).encode()
    with pytest.raises(InstallError, match=f"invalid {name}"):
        install(of_contents(bundle, raw), to, ignore)
    assert files(to.prefix, to.models) == []


@pytest.mark.parametrize("depth", [100_000])
def test_deeply_nested_bundle_json_is_an_error(bundle: Path, depth: int) -> None:
    with pytest.raises(InstallError, match=r"bundle\.json is nested too deeply"):
        verify(of_contents(bundle, b"[" * depth + b"]" * depth))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_needs_much_memory_is_rejected(bundle: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 1 << 40
    bundle.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(bundle, 1 << 40)  # a sparse file of the size in the header
    with pytest.raises(InstallError, match="a header is too large"):
        verify(bundle)


def test_the_supported_python_versions_are_reported(
    bundle: Path, parts: Ingredients, to: InstallPaths
) -> None:
    other = Ingredients((), (), {"3.9": [*parts.wheels[PYTHON]]}, MACHINE)
    path = write_bundle(bundle.with_name("o.tar"), other).path
    with pytest.raises(InstallError, match=rf"this is Python {PYTHON}, .* packages for 3\.9"):
        install(path, to, ignore)
    foreign = Ingredients((), (), parts.wheels, "riscv64")
    with pytest.raises(InstallError, match="is for riscv64"):
        install(write_bundle(bundle.with_name("f.tar"), foreign).path, to, ignore)
    assert files(to.prefix, to.models) == []


@pytest.mark.parametrize(
    ("change", "kind"),
    [("sys.implementation.name = 'pypy'", "pypy"), ("sys.abiflags = 't'", "a free-threaded build")],
)
def test_a_python_of_another_kind_is_rejected(
    bundle: Path, to: InstallPaths, change: str, kind: str
) -> None:
    """Its version is in the bundle, but it cannot load these packages."""
    run = "runpy.run_path(sys.argv[0], None, '__main__')"
    code = f"import runpy, sys; {change}; del sys.argv[0]; {run}"
    done = subprocess.run(
        [sys.executable, "-c", code, installer.__file__, bundle, "--prefix", to.prefix],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert f"this Python {PYTHON} is {kind}, but the bundle" in done.stderr
    assert f"-> run install.py with CPython {PYTHON}, 3.99 (" in done.stderr
    assert files(to.prefix, to.models) == []


def test_a_prefix_with_a_colon_is_rejected() -> None:
    with pytest.raises(InstallError, match="contains a colon"):
        places("/a:b", None)


def test_a_read_only_prefix_is_reported(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InstallError, match="cannot write") as error:
        install(bundle, places(str(tmp_path / "file" / "x"), None), ignore)
    assert error.value.storage


def test_two_installations_at_once(bundle: Path, to: InstallPaths) -> None:
    lock = to.models / ".staging" / "bundle.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InstallError, match="another installation"):
            install(bundle, to, ignore)
    install(bundle, to, ignore)


def test_edited_settings_are_kept(bundle: Path, to: InstallPaths) -> None:
    to.prefix.mkdir(parents=True)
    to.site.write_text("slurm: {partition: gpu}\n")
    printed: list[str] = []
    install(bundle, to, printed.append)
    assert to.site.read_text() == "slurm: {partition: gpu}\n"
    assert any("site.yaml.new" in line for line in printed)


def test_missing_or_damaged_models_are_rejected(tmp_path: Path, parts: Ingredients) -> None:
    models = tmp_path / "here" / "models"
    with pytest.raises(ModelError, match="is not in"):
        pack_model(models, "other")
    with pytest.raises(ModelError, match="is not stored in"):
        pack_model(models, "hf:org/other")
    for folder in (models / "blobs", models / "hub" / "models--org--name" / "blobs"):
        blob = max(folder.iterdir(), key=lambda path: path.stat().st_size)
        content = blob.read_bytes()
        blob.write_bytes(content[:-1] + b"!")
        with pytest.raises(BundleError, match="does not match its digest"):
            write_bundle(tmp_path / "b.tar", parts)
        blob.unlink()
        with pytest.raises(BundleError, match="is incomplete"):
            write_bundle(tmp_path / "b.tar", parts)
        blob.write_bytes(content)
    assert not (tmp_path / "b.tar").exists()


def test_an_installation_has_the_extras_of_its_bundle(
    tmp_path: Path, parts: Ingredients, to: InstallPaths
) -> None:
    def installed(*extras: str) -> list[str]:
        printed: list[str] = []
        path = write_bundle(tmp_path / "e.tar", replace(parts, extras=extras)).path
        assert install(path, to, printed.append).extras == extras
        return printed

    assert "extras: images, report" in installed("images", "report")
    fewer = installed("report")
    assert "extras: report" in fewer
    assert any("also had images" in line and "--extra images" in line for line in fewer)
    assert not any("had " in line for line in installed("report"))
    with tarfile.open(tmp_path / "e.tar") as tar:
        readme = tar.extractfile("aiflux-bundle/README.txt")
        assert readme is not None
        assert "extras: report" in readme.read().decode()


def test_the_extras_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert {
        name: tuple(extras[name]) for name in extras if name not in ("test", "lint", "docs")
    } == {**LIBRARIES}
    assert EXTRAS.keys() == LIBRARIES.keys()


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_suggests_another_bundle(extra: str) -> None:
    assert f"aiflux bundle create --extra {extra}" in remedy(extra, has_pip=False)


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_library_is_suggested_as_a_pip_requirement(extra: str) -> None:
    """The command works in a checkout, in a virtual environment and with any Python."""
    words = shlex.split(remedy(extra, has_pip=True))
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    done = subprocess.run(
        [*words, "--dry-run", "--no-index", "--quiet"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, "pip finds the requirements already installed"


# --- the command ------------------------------------------------------------------------------


def test_verify_and_install_as_commands(
    bundle: Path, to: InstallPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", "verify", str(bundle)]) == 0
    printed = capsys.readouterr().out
    assert "model: tiny:1b" in printed
    assert f"model: {HUB_NAME}, 21 KB, commit {COMMIT}" in printed
    assert "extras: none" in printed
    assert "is complete: all 13 files" in printed
    where = ["--prefix", str(to.prefix), "--models-dir", str(to.models)]
    assert main(["bundle", "install", str(bundle), *where]) == 0
    assert str(to.command) in capsys.readouterr().out
    with bundle.open("r+b") as file:
        file.truncate(40_000)
    assert main(["bundle", "verify", str(bundle)]) == 2
    assert "is not a complete bundle" in capsys.readouterr().err
    assert main(["bundle", "verify", str(bundle.with_name("none.tar"))]) == 2
    assert main(["bundle", "install", str(bundle), "--prefix", "/proc/none"]) == 5


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model", "absent:1b"], "absent:1b is not in"),
        (["--model", f"tiny:1b@sha256:{'0' * 12}"], "has the digest"),
        (["--arch", "aarch64"], "is for amd64, and the bundle for aarch64"),
        (["-o", "here/some.sif"], "already exists"),
        (["-o", "nowhere/b.tar"], "no such directory"),
        (["-o", "here/models", "--force"], "is a directory"),
        (["--model", "incomplete:1b"], "incomplete:1b is incomplete: "),
        (["--model", "huge:1b"], "the bundle needs more than"),
    ],
)
def test_invalid_input_is_reported_before_any_download(
    tmp_path: Path,
    parts: Ingredients,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "here" / "models"
    make_model(models, parse_model_name("incomplete:1b"), b"incomplete")
    incomplete = hashlib.sha256(b"incomplete").hexdigest()
    (models / "blobs" / f"sha256-{incomplete}").write_bytes(b"to")
    huge = parse_model_name("huge:1b")
    make_model(models, huge, b"huge")
    manifest = json.loads((models / huge.manifest_path).read_text())
    manifest["layers"][0]["size"] = shutil.disk_usage(tmp_path).total + 1
    (models / huge.manifest_path).write_text(json.dumps(manifest))
    blob = models / "blobs" / manifest["layers"][0]["digest"].replace(":", "-")
    os.truncate(blob, manifest["layers"][0]["size"])
    where = ["--image", str(parts.images[0]), "--models-dir", str(models)]
    assert main(["bundle", "create", *where, *more]) != 0
    printed = capsys.readouterr().err
    assert words in printed
    assert "downloading" not in printed


def test_each_model_brings_the_image_of_its_engine(
    tmp_path: Path,
    parts: Ingredients,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    models = ["--models-dir", str(tmp_path / "here" / "models"), "--containers-dir", str(tmp_path)]
    (tmp_path / "here" / "some.sif").rename(tmp_path / "aiflux.sif")
    command = ["bundle", "create", *models, "--arch", "aarch64", "--model"]
    assert main([*command, "tiny:1b"]) == 2
    assert "aiflux.sif is for amd64" in capsys.readouterr().err
    assert main([*command, "tiny:1b", "--model", HUB_NAME]) == 2
    printed = capsys.readouterr().err
    assert "the models need an image with vLLM, and " in printed
    assert "aiflux.sif has the engine ollama" in printed
    assert "image ENGINE=vllm" in printed
    (tmp_path / "here" / "v.sif").rename(tmp_path / "aiflux-vllm.sif")
    assert main([*command, HUB_NAME]) == 2
    assert "aiflux-vllm.sif is for amd64" in capsys.readouterr().err
    assert main([*command, HUB_NAME, "--image", "aiflux.sif"]) == 2
    assert "aiflux.sif is for amd64" in capsys.readouterr().err


def test_an_unknown_extra_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", "create", "--extra", "plots"]) == 2
    printed = capsys.readouterr().err
    assert "plots" in printed
    assert all(name in printed for name in EXTRAS)


@pytest.mark.parametrize("version", ["3.9", "3", "4.0", "3.11.2", "x"])
def test_an_invalid_python_version_is_rejected(version: str) -> None:
    assert main(["bundle", "create", "--python", version]) == 2


def test_an_image_for_a_machine_without_wheels_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = make_sif(tmp_path / "power.sif", arch="ppc64le", version="1")
    assert main(["bundle", "create", "--image", str(image)]) == 2
    assert f"is for ppc64le, and the bundle for {MACHINE}" in capsys.readouterr().err


def test_an_image_that_does_not_suit_the_packages_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = make_sif(tmp_path / "old.sif", version="0.1.0")
    assert main(["bundle", "create", "--image", str(image)]) == 2
    assert "has AI-Flux 0.1.0, which cannot read" in capsys.readouterr().err


def test_an_image_for_amd_gpus_keeps_its_name_in_a_bundle(tmp_path: Path) -> None:
    engine = {"version": "1", "engine": "vllm", "engine_version": "0.32.0"}
    amd = make_sif(tmp_path / "a.sif", gpu_vendors="amd", **engine)
    nvidia = make_sif(tmp_path / "n.sif", gpu_vendors="nvidia", **engine)
    assert writer._image_member(read_image(amd)) == "image/aiflux-vllm-amd.sif"
    assert writer._image_member(read_image(nvidia)) == "image/aiflux-vllm.sif"
    for name in ("aiflux-amd.sif", "aiflux-vllm-amd.sif", "aiflux.sif"):
        assert re.fullmatch(installer._IMAGE, f"image/{name}")
