"""``aiflux models``: what it lists and shows, and how models are carried, checked and removed."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiflux.cli.main import main
from aiflux.engines.ollama.staging import begin_staging, changing
from aiflux.engines.ollama.store import model_digest, parse_manifest
from aiflux.models.name import parse_model_name
from tests.tools import make_tiny_gguf
from tests.unit.helpers import words_of_python
from tests.unit.made_models import CONFIG, blob_files, changed_tar, put_model, tree
from tests.unit.terminals import on_terminal

WEIGHTS = make_tiny_gguf.tiny()
MIT = b"do as you like"
Aiflux = Callable[..., tuple[int, str, str]]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    put_model(folder, "lab/one:1", WEIGHTS, MIT)
    put_model(folder, "two", b"other weights", MIT)
    return folder


@pytest.fixture
def aiflux(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Aiflux:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AIFLUX_MODELS_DIR", str(models))

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["models", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_what_is_here_is_listed_with_what_is_known(aiflux: Aiflux) -> None:
    code, out, _ = aiflux("list", "--here")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines()[1:3]}
    assert rows["lab/one:1"].split()[-1] == "yes"
    assert "8192" in rows["lab/one:1"]
    assert rows["lab/one:1"].split()[1:4] == ["0.1", "M", "F32"], "from its own file"
    assert rows["two:latest"].split()[-1] == "yes"
    assert "llama3.1:8b" not in out
    assert "llama3.1:8b" in aiflux("list")[1]


@pytest.mark.parametrize("columns", [80, 120])
def test_the_lists_fit_the_terminal(aiflux: Aiflux, columns: int) -> None:
    program = "import sys; from aiflux.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "models", "list"]
    written = on_terminal(command, "stdout", "stderr", columns=columns, stdin=subprocess.DEVNULL)
    shown = written.splitlines()
    tables = shown[: next(at for at, line in enumerate(shown) if line.startswith("GPU memory"))]
    assert max(map(len, tables)) <= columns
    assert len([line for line in tables if line.endswith("HERE") and "GPU MEMORY" in line]) == 2
    piped = aiflux("list")[1].splitlines()
    assert [line.split(maxsplit=1)[:1] for line in tables] == [
        line.split(maxsplit=1)[:1] for line in piped[: len(tables)]
    ]
    assert piped[0].split()[-2:] == ["ENGINES", "HERE"]


def test_a_damaged_model_and_a_broken_pull_are_listed_as_such(aiflux: Aiflux, models: Path) -> None:
    blob_files(models)[0].unlink()
    name = parse_model_name("http://lab.example:5000/big/m:70b")
    with changing(models, "pulling", print):
        folder = begin_staging(models, name, "pull")
        (folder / "blobs" / "sha256-1-partial").write_bytes(b"x" * 5000)
        begin_staging(models, parse_model_name("taken"), "import")
        _, out, _ = aiflux("list", "--here")
    assert "damaged" in out
    assert f"pull in progress: {name.written} (" in out
    assert "import in progress: taken:latest (" in out
    _, out, _ = aiflux("list", "--here")
    assert f"pull interrupted: {name.written} (" in out
    assert f"; continue it: aiflux models pull {name.written}" in out
    assert "; import it again, or: aiflux models remove taken:latest" in out
    assert aiflux("remove", "taken")[0] == 0
    assert "taken" not in aiflux("list", "--here")[1]


def test_what_fits_a_gpu(aiflux: Aiflux) -> None:
    _, out, _ = aiflux("list", "--fits", "16GB", "--json", "--slots", "4")
    listed = {each["name"]: each for each in json.loads(out)}
    assert "llama3.1:8b" in listed
    assert "llama3.3:70b" not in listed
    assert all(each["memory"]["least"] <= 16 * 2**30 for each in listed.values())
    assert listed["lab/one:1"]["memory"]["measured"] is True
    same = [aiflux("list", "--fits", size)[1] for size in ("16GB", "16 gib", "16", "0.015625TB")]
    assert len({*same}) == 1
    assert aiflux("list", "--fits", "600MB")[1].splitlines()[1].startswith("all-minilm")
    for size in ("large", "0", "-1", "1e3", "40PB", ""):
        code, _, err = aiflux("list", "--fits", size)
        assert (code, "is not a size" in err) == (2, True)


def test_a_model_is_shown_with_its_memory(aiflux: Aiflux, models: Path) -> None:
    _, out, _ = aiflux("show", "qwen3:30b")
    assert "128 experts (8 used)" in out
    assert "GPU memory on one GPU, at least (from the catalog)" in out
    assert "Apache-2.0" in out
    assert "alias of      phi4:14b" in aiflux("show", "phi4")[1]
    assert " 1.0 B " in aiflux("list")[1].split("gemma3:1b")[1].splitlines()[0]
    _, out, _ = aiflux("show", "lab/one:1")
    digest = model_digest(models, parse_model_name("lab/one:1"))
    assert f"sha256:{digest}" in out
    assert "from its own file" in out
    _, out, _ = aiflux("show", "lab/one:1", "--json", "--slots", "2", "--context-length", "512")
    shown = json.loads(out)
    assert (shown["digest"], shown["here"], shown["memory"]["slots"]) == (digest, True, 2)
    code, _, err = aiflux("show", "nobody:1b")
    assert code == 4
    assert "nobody:1b is unknown" in err
    assert "did you mean llama3.2:3b? it may still work" in aiflux("show", "lama3.2:3b")[2]
    assert "did you mean hf:Qwen/Qwen3-8B?" in aiflux("show", "Qwen/Qwen3-8B")[2]


def test_ones_own_catalog_is_used(
    aiflux: Aiflux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "group.yaml"
    own.write_text("models: {'phi4:14b': {licence: ours}}", encoding="utf-8")
    assert "ours" in aiflux("show", "phi4:14b", "--models-file", own)[1]
    monkeypatch.setenv("AIFLUX_MODELS_FILE", str(own))
    assert "ours" in aiflux("show", "phi4:14b")[1]
    own.write_text("models: {'phi4:14b': {license: ours}}", encoding="utf-8")
    code, _, err = aiflux("list")
    assert code == 2
    assert "phi4:14b: unknown key 'license'" in err
    assert "licence" in err


def test_verify_reads_every_blob(aiflux: Aiflux, models: Path) -> None:
    code, out, _ = aiflux("verify", "lab/one:1")
    assert code == 0
    assert "lab/one:1 is complete: 3 blobs" in out
    blob = max(blob_files(models), key=lambda path: path.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    code, _, err = aiflux("verify", "lab/one:1")
    assert code == 4
    assert "is corrupted" in err
    assert "aiflux models pull --again lab/one:1" in err
    blob.write_bytes(b"short")
    assert "is wrong size" in aiflux("verify", "lab/one:1")[2]
    blob.unlink()
    assert "is missing" in aiflux("verify", "lab/one:1")[2]
    assert aiflux("verify", "two")[0] == 0
    assert "is not in" in aiflux("verify", "nobody")[2]


def test_a_model_travels_in_one_file(aiflux: Aiflux, models: Path, tmp_path: Path) -> None:
    before = tree(models)
    code, out, _ = aiflux("export", "lab/one:1", "one.tar")
    assert (code, "wrote lab/one:1 to one.tar" in out) == (0, True)
    assert tree(models) == before
    other = tmp_path / "elsewhere"
    code, out, _ = aiflux("import", "one.tar", "--models-dir", other)
    assert code == 0
    name = parse_model_name("lab/one:1")
    assert model_digest(other, name) == model_digest(models, name)
    assert f"sha256:{model_digest(models, name)}" in out
    assert aiflux("verify", "lab/one:1", "--models-dir", other)[0] == 0
    assert not [*(other / ".staging").iterdir()]
    assert aiflux("import", "one.tar", "--models-dir", other)[0] == 0, "again is no harm"


def test_an_archive_that_is_there_is_kept(aiflux: Aiflux, tmp_path: Path) -> None:
    (tmp_path / "one.tar").write_text("mine")
    code, _, err = aiflux("export", "lab/one:1", "one.tar")
    assert (code, "--force" in err) == (2, True)
    assert (tmp_path / "one.tar").read_text() == "mine"
    assert aiflux("export", "lab/one:1", "one.tar", "--force")[0] == 0


def test_a_damaged_model_is_not_exported(aiflux: Aiflux, models: Path, tmp_path: Path) -> None:
    blob = max(blob_files(models), key=lambda path: path.stat().st_size)
    whole = blob.read_bytes()
    for content in (whole[:-1] + b"?", whole[:-1], whole + b"?"):
        blob.write_bytes(content)
        code, _, err = aiflux("export", "lab/one:1", "one.tar")
        assert (code, "is missing or damaged; nothing was exported" in err) == (4, True), err
    blob.unlink()
    assert aiflux("export", "lab/one:1", "one.tar")[0] == 4
    assert not (tmp_path / "one.tar").exists()


def swap(index: int, name: str | None = None, content: bytes | None = None) -> Callable[..., None]:
    def change(parts: list[tuple[str, bytes]]) -> None:
        old = parts[index]
        parts[index] = (name or old[0], old[1] if content is None else content)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap(3, content=WEIGHTS[:-1] + b"?"), "was modified or truncated"),
        (swap(3, name="../../evil"), "is unexpected"),
        (swap(3, name="/etc/evil"), "is unexpected"),
        (lambda parts: parts.pop(), "is missing"),
        (lambda parts: parts.append(("more", b"x")), "is unexpected"),
        (swap(0, content=b""), "aiflux-model.json is not JSON"),
        (swap(0, content=b"\xff"), "aiflux-model.json is not UTF-8"),
        (swap(0, content=b"null"), "aiflux-model.json is not a JSON object"),
        (swap(0, content=b"{}"), "aiflux-model.json has no valid version"),
        (swap(0, content=b'{"version": true}'), "aiflux-model.json has no valid version"),
        (swap(0, content=b'{"version": 9}'), "has version 9 of the format of model archives"),
        (swap(0, content=b'{"version": 9}'), "-> update AI-Flux, or export the model again"),
        (swap(0, content=b'{"version": 1}'), "aiflux-model.json names no model"),
        (swap(0, content=b'{"version": 1, "name": "a b:c:d"}'), "is not a complete model archive"),
        (swap(0, content=b'{"version": 1, "name": null}'), "names no model"),
        (swap(0, content=b"[" * 100_000), "aiflux-model.json is nested too deeply"),
        (swap(1, content=b"[" * 100_000), "it is not a manifest: it is nested too deeply"),
        (swap(1, content=b"\xff"), "it is not a manifest: byte 0xff at offset 0"),
        (swap(1, content=b"[]"), "it is not a manifest: a value has the wrong type"),
        (swap(1, content=b"null"), "it is not a manifest: a value has the wrong type"),
        (swap(1, content=b"{}"), "it is not a manifest: 'config' is missing"),
        (swap(0, name="readme"), "aiflux-model.json is not at"),
    ],
)
def test_an_archive_that_was_changed_is_refused(
    aiflux: Aiflux, tmp_path: Path, change: Callable[..., None], words: str
) -> None:
    assert aiflux("export", "lab/one:1", "one.tar")[0] == 0
    changed_tar(tmp_path / "one.tar", change)
    other = tmp_path / "elsewhere"
    code, _, err = aiflux("import", "one.tar", "--models-dir", other)
    assert code == 4
    assert words in err
    assert not words_of_python(err), err
    assert [path for path in tree(other) if path.startswith(("blobs", "manifests"))] == []
    assert not [*tmp_path.parent.glob("evil")]


def test_an_archive_whose_manifest_lies_about_sizes_is_refused(
    aiflux: Aiflux, tmp_path: Path
) -> None:
    def lie(parts: list[tuple[str, bytes]]) -> None:
        manifest = json.loads(parts[1][1])
        manifest["layers"][0]["size"] -= 1
        raw = json.dumps(manifest).encode()
        label = {**json.loads(parts[0][1]), "digest": f"sha256:{sha256(raw).hexdigest()}"}
        parts[:2] = [(parts[0][0], json.dumps(label).encode()), (parts[1][0], raw)]

    assert aiflux("export", "lab/one:1", "one.tar")[0] == 0
    changed_tar(tmp_path / "one.tar", lie)
    code, _, err = aiflux("import", "one.tar", "--models-dir", tmp_path / "elsewhere")
    assert (code, "does not have the size" in err) == (4, True), err
    assert not [*(tmp_path / "elsewhere").glob("manifests/*")]


def forged_archive(target: Path, size: int, blob: tarfile.TarInfo, data: bytes) -> None:
    """Write an archive of one blob, whose manifest says ``size``."""
    digest = "sha256:" + "a" * 64
    layer = {"mediaType": "x", "digest": digest, "size": size}
    raw = json.dumps({"config": layer, "layers": []}).encode()
    label = {"version": 1, "name": "x:1", "digest": f"sha256:{sha256(raw).hexdigest()}"}
    with tarfile.open(target, "w") as tar:
        for name, content in (("aiflux-model.json", json.dumps(label).encode()), ("manifest", raw)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        blob.name, blob.size = f"blobs/sha256-{'a' * 64}", len(data)
        tar.addfile(blob, io.BytesIO(data))


def of_type(kind: bytes, **headers: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname, member.pax_headers = kind, "/etc/passwd", headers
    return member


GIGABYTES = str(8 << 30)
SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": GIGABYTES}


@pytest.mark.parametrize(
    ("blob", "data"),
    [
        (of_type(tarfile.REGTYPE, **SPARSE), f"1\n0\n{GIGABYTES}\n".encode().ljust(512, b"\0")),
        (of_type(tarfile.REGTYPE), bytes(1 << 20)),
        (of_type(tarfile.SYMTYPE), b""),
        (of_type(tarfile.LNKTYPE), b""),
        (of_type(tarfile.CHRTYPE), b""),
        (of_type(tarfile.FIFOTYPE), b""),
        (of_type(tarfile.DIRTYPE), b""),
    ],
    ids=["sparse", "larger", "symlink", "link", "device", "pipe", "folder"],
)
@pytest.mark.parametrize("size", [5, 8 << 30])
def test_an_archive_never_writes_more_than_it_holds(
    aiflux: Aiflux, tmp_path: Path, blob: tarfile.TarInfo, data: bytes, size: int
) -> None:
    forged_archive(tmp_path / "bomb.tar", size, blob, data)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    try:
        code, _, err = aiflux("import", "bomb.tar", "--models-dir", tmp_path / "elsewhere")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, "is not a complete model archive" in err) == (4, True), err
    assert not [*(tmp_path / "elsewhere").glob("blobs/*")]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(
            st.sampled_from(["config", "layers", "digest", "size", "mediaType"]), inner
        ),
    )
)  # fmt: skip
def test_any_json_is_a_manifest_or_a_value_error(content: object) -> None:
    try:
        manifest = parse_manifest(json.dumps(content).encode())
    except ValueError:
        return
    assert manifest.size >= 0


@pytest.mark.parametrize("size", [float("inf"), -1, "5", 5.0, True, None, 1 << 70])
def test_a_size_in_a_manifest_is_a_count_of_bytes(size: object) -> None:
    layer = {"digest": "sha256:" + "a" * 64, "size": size}
    with pytest.raises(ValueError, match="is not a size"):
        parse_manifest(json.dumps({"config": layer, "layers": []}).encode())


def test_an_archive_is_a_regular_file(aiflux: Aiflux, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in ("pipe", tmp_path, "/dev/null", "-"):
        code, _, err = aiflux("export", "lab/one:1", target, "--force")
        assert (code, "is not a regular file" in err) == (2, True), err
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()
    for source in ("pipe", tmp_path):
        code, _, err = aiflux("import", source)
        assert (code, "is not a regular file" in err) == (2, True), err


@pytest.mark.parametrize("action", ["show", "verify", "remove", "export"])
def test_a_digest_is_insisted_on(aiflux: Aiflux, models: Path, action: str) -> None:
    digest = model_digest(models, parse_model_name("lab/one:1"))
    file = ("one.tar",) if action == "export" else ()
    code, _, err = aiflux(action, "lab/one:1@sha256:000000000000", *file)
    assert (code, f"sha256:{digest}" in err) == (4, True), err
    assert model_digest(models, parse_model_name("lab/one:1")) == digest
    assert aiflux(action, f"lab/one:1@sha256:{digest}", *file)[0] == 0


def test_an_archive_that_was_cut_short_is_refused(aiflux: Aiflux, tmp_path: Path) -> None:
    assert aiflux("export", "lab/one:1", "one.tar")[0] == 0
    archive = tmp_path / "one.tar"
    for size in (archive.stat().st_size // 2, 700, 3):
        os.truncate(archive, size)
        code, _, err = aiflux("import", "one.tar", "--models-dir", tmp_path / "elsewhere")
        assert (code, "is not a complete model archive" in err) == (4, True), err
        assert not [*(tmp_path / "elsewhere").glob("blobs/*")]
    assert aiflux("import", "none.tar")[0] == 2


def test_removing_leaves_what_others_share(aiflux: Aiflux, models: Path) -> None:
    code, out, _ = aiflux("remove", "lab/one:1")
    assert (code, ", which freed " in out) == (0, True)
    kept = {path.read_bytes() for path in blob_files(models)}
    assert kept == {b"other weights", MIT, CONFIG}
    assert aiflux("verify", "two")[0] == 0
    assert not (models / "manifests/registry.ollama.ai/lab").exists()
    assert aiflux("remove", "lab/one:1")[0] == 4


def test_nothing_is_removed_if_it_is_unknown_what_is_shared(aiflux: Aiflux, models: Path) -> None:
    (models / parse_model_name("two").manifest_path).write_text("{")
    code, _, err = aiflux("remove", "lab/one:1")
    assert (code, "nothing was removed" in err) == (4, True)
    assert aiflux("verify", "lab/one:1")[0] == 0


def test_what_is_left_of_a_pull_can_be_removed(aiflux: Aiflux, models: Path) -> None:
    (models / ".staging" / "big_70b" / "blobs").mkdir(parents=True)
    code, out, _ = aiflux("remove", "big:70b")
    assert (code, "removed the partial pull of big:70b" in out) == (0, True)
    assert not (models / ".staging" / "big_70b").exists()
    nowhere = models.with_name("nowhere")
    assert aiflux("remove", "big:70b", "--models-dir", nowhere)[0] == 4
    assert not nowhere.exists()


def test_what_is_being_pulled_is_not_taken_away(aiflux: Aiflux, models: Path) -> None:
    name = parse_model_name("big:70b")
    outcomes: list[tuple[int, str, str]] = []
    remover = threading.Thread(target=lambda: outcomes.append(aiflux("remove", "big:70b")))
    with changing(models, "pulling big:70b", print):
        folder = begin_staging(models, name, "pull")
        remover.start()
        remover.join(1)
        assert folder.is_dir()
    remover.join()
    assert not folder.exists()
    ((code, out, err),) = outcomes
    assert (code, "removed " in out, "is in use" in err) == (0, True, True)


@pytest.mark.ordinary_user
def test_a_shared_directory_that_is_read_only_is_only_read(aiflux: Aiflux, models: Path) -> None:
    folders = [models, *(path for path in models.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        before = tree(models)
        for action in (("list",), ("show", "two"), ("verify", "two"), ("export", "two", "t.tar")):
            assert aiflux(*action)[0] == 0
        for action in (("remove", "two"), ("import", "t.tar"), ("pull", "three")):
            code, _, err = aiflux(*action)
            assert (code, "is read-only for you" in err) == (2, True)
        assert tree(models) == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def with_entry(key: str, kind: int, value: object) -> bytes:
    """The tiny model's file with one entry of metadata more."""
    (count,) = struct.unpack_from("<Q", WEIGHTS, 16)
    more = make_tiny_gguf.entry(key, kind, value)
    return WEIGHTS[:16] + struct.pack("<Q", count + 1) + more + WEIGHTS[24:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs a file"),
        (("a.tar", "--gguf", "b.gguf"), "FILE and --gguf cannot be combined"),
        (("--gguf", "b.gguf"), "needs a name"),
        (("a.tar", "--name", "n"), "need --gguf"),
        (("--gguf", "b.gguf", "--name", "n"), "cannot be read"),
        (("--gguf", "zip.gguf", "--name", "n"), "is not a (complete) GGUF"),
        (("--gguf", "cut.gguf", "--name", "n"), "is truncated"),
        (("--gguf", "part.gguf", "--name", "n"), "is one of 3 parts of a model"),
        (("--gguf", "adapter.gguf", "--name", "n"), "has the type 'adapter'"),
        (("--gguf", "odd.gguf", "--name", "n"), "has no layer count"),
        (("--gguf", ".", "--name", "n"), "is not a regular file"),
        (("--gguf", "b.gguf", "--name", "n" * 90), "is not a model name"),
        (("--gguf", "b.gguf", "--name", f"{'h' * 200}/lab/{'n' * 50}"), "is not a model name"),
    ],
)
def test_what_import_does_not_take(
    aiflux: Aiflux, tmp_path: Path, models: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "zip.gguf").write_bytes(b"PK zip")
    (tmp_path / "cut.gguf").write_bytes(WEIGHTS[:-100])
    (tmp_path / "part.gguf").write_bytes(with_entry("split.count", make_tiny_gguf.UINT32, 3))
    adapter = with_entry("general.type", make_tiny_gguf.STRING, "adapter")
    (tmp_path / "adapter.gguf").write_bytes(adapter)
    (tmp_path / "odd.gguf").write_bytes(WEIGHTS.replace(b"block_count", b"block_cound"))
    before = tree(models)
    code, _, err = aiflux("import", *arguments)
    assert code in (2, 4)
    assert words in err
    assert tree(models) == before
