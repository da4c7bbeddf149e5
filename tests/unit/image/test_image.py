"""Image builds: references, apt sources, the choice of a base, and the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.errors import ImageError
from aiflux.image import base
from aiflux.image.base import (
    ENGINES,
    AptSource,
    BaseChoice,
    BuildOptions,
    choose_base,
    find_source,
)
from aiflux.image.build import (
    Checkout,
    build,
    build_environment,
    find_sources,
    known_facts,
    render_command,
    scratch_dir,
)
from aiflux.image.container import image_names
from aiflux.image.run_tool import is_singularity_ce
from aiflux.image.sif import read_image
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import FakeCommands

DIGEST = "sha256:" + "5" * 64
DEBIAN = BaseChoice("debian", "as requested", "CPU", source=AptSource("http://mirror", "trixie"))


class Registry(BaseHTTPRequestHandler):
    """A registry with one public image."""

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/v2/" else 404)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path == "/v2/ollama/ollama/manifests/9.9" else 404)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        if self.command == "HEAD" and status == 200:
            self.send_header("Docker-Content-Digest", DIGEST)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("docker://ollama/ollama:1.2", ("docker.io", "ollama/ollama", "1.2")),
        ("docker://ubuntu", ("docker.io", "library/ubuntu", "latest")),
        ("docker://localhost/a/b", ("localhost", "a/b", "latest")),
        ("docker://127.0.0.1:5000/a/b:c", ("127.0.0.1:5000", "a/b", "c")),
        (f"docker://reg.example.org/a@{DIGEST}", ("reg.example.org", "a", DIGEST)),
        (f"docker://reg.example.org/a:1@{DIGEST}", ("reg.example.org", "a", DIGEST)),
    ],
)
def test_references_are_parsed_as_docker_does(
    reference: str, expected: tuple[str, str, str]
) -> None:
    assert base.parse(reference) == base.Reference(*expected)


def test_only_loopback_uses_plain_http() -> None:
    assert base.parse("docker://127.0.0.1:5000/a").url == "http://127.0.0.1:5000/v2/"
    assert base.parse("docker://reg.example.org/a").url == "https://reg.example.org/v2/"


def test_a_tag_is_resolved_to_a_digest(address: str) -> None:
    choice = choose_base(BuildOptions(base_image=f"docker://{address}/ollama/ollama:9.9"))
    assert choice.base == "docker"
    assert choice.digest == DIGEST
    assert choice.pinned_image == f"{address}/ollama/ollama@{DIGEST}"
    assert f"{address} is reachable" in choice.description


def test_an_unknown_tag_is_passed_to_apptainer(address: str) -> None:
    choice = choose_base(BuildOptions(base_image=f"docker://{address}/ollama/ollama:0.0"))
    assert choice.pinned_image == f"{address}/ollama/ollama:0.0"


def test_the_default_is_pinned() -> None:
    choice = BaseChoice(
        "docker",
        "",
        "",
        image=ENGINES["ollama"].image,
        digest=base.parse(ENGINES["ollama"].image).version,
    )
    assert choice.pinned_image == ENGINES["ollama"].image.removeprefix("docker://")


def test_auto_uses_debian_if_the_registry_does_not_respond() -> None:
    options = BuildOptions(
        base_image="docker://127.0.0.1:9/ollama/ollama", mirror="http://m", suite="trixie"
    )
    choice = choose_base(options)
    assert choice.base == "debian"
    assert "127.0.0.1:9 does not respond" in choice.why
    with pytest.raises(ImageError, match="cannot be downloaded"):
        choose_base(replace(options, base="docker"))


def test_an_image_for_amd_gpus_has_another_base_and_never_the_cpu_build(address: str) -> None:
    for engine, base_ in ENGINES.items():
        options = BuildOptions(engine=engine, gpu="amd")
        assert options.official_image == base_.amd_image != base_.image
        assert "rocm" in base.parse(base_.amd_image).name + base.parse(base_.amd_image).version
        assert "AMD" in base_.amd
    mirror = f"docker://{address}/ollama/ollama:9.9"
    assert choose_base(BuildOptions(gpu="amd", base_image=mirror)).digest == DIGEST
    with pytest.raises(ImageError, match="does not respond") as caught:
        choose_base(BuildOptions(gpu="amd", base_image="docker://127.0.0.1:9/ollama/ollama"))
    assert "debian" not in str(caught.value.remedy)


def test_an_image_is_named_by_engine_and_gpus() -> None:
    assert image_names("ollama") == image_names("ollama", "nvidia") == ("aiflux.sif",)
    assert image_names("ollama", "amd") == ("aiflux-amd.sif", "aiflux.sif")
    assert image_names("vllm", "amd") == ("aiflux-vllm-amd.sif", "aiflux-vllm.sif", "aiflux.sif")
    makefile = (find_sources().root / "Makefile").read_text(encoding="utf-8")
    assert "$(if $(filter amd,$(GPU)),-amd).sif" in makefile


@pytest.mark.parametrize(
    ("version", "vendors", "cpu_only"),
    [("0.32.0", "nvidia", "no"), ("0.32.0+rocm721", "amd", "no"), ("0.32.0+cpu", "none", "yes")],
)
def test_the_labels_name_the_vendor_of_the_gpus(
    tmp_path: Path, version: str, vendors: str, cpu_only: str
) -> None:
    """The script of the build, with a stand-in of vLLM."""
    fakes = FakeCommands(tmp_path / "fakes")
    fakes.say("vllm", f"{version}\n")
    facts, labels = tmp_path / "facts.json", tmp_path / "labels"
    facts.write_text('{"engine": "vllm"}', encoding="utf-8")
    script = find_sources().container / "image-facts.py"
    words = [facts, tmp_path / "image.json", labels, tmp_path / "environment"]
    subprocess.run([sys.executable, script, *words], check=True, env={"PATH": fakes.path})
    found = dict(line.split(" ", 1) for line in labels.read_text().splitlines())
    assert (found["aiflux.gpu_vendors"], found["aiflux.cpu_only"]) == (vendors, cpu_only)
    image = read_image(make_sif(tmp_path / "a.sif", gpu_vendors=vendors))
    assert image.gpu_vendors == (() if vendors == "none" else (vendors,))
    exported = "" if vendors == "none" else vendors
    environment = (tmp_path / "environment").read_text()
    assert f"export AIFLUX_IMAGE_GPU_VENDORS='{exported}'\n" in environment


def test_an_archive_implies_the_debian_base(tmp_path: Path) -> None:
    archive = tmp_path / "ollama-linux-amd64.tgz"
    archive.touch()
    choice = choose_base(BuildOptions(ollama_tarball=archive, mirror="http://m", suite="trixie"))
    assert (choice.base, choice.cpu_build) == ("debian", False)
    assert archive.name in choice.engine


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base": "alpine"}, "unknown base"),
        ({"base_image": "ollama/ollama"}, "not a docker reference"),
        ({"ollama_tarball": Path("/nowhere.tgz")}, "archive not found"),
        ({"base": "docker", "ollama_tarball": Path("/x")}, "which contains Ollama"),
        ({"gpu": "intel"}, "unknown vendor of GPUs"),
        ({"gpu": "amd", "base": "debian"}, "no engine for AMD GPUs"),
        ({"gpu": "amd", "ollama_tarball": Path("/x")}, "no engine for AMD GPUs"),
    ],
)
def test_conflicting_options_are_rejected(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        BuildOptions(**wrong)  # type: ignore[arg-type]
    assert caught.value.remedy


ONE_LINE = """\
# deb http://commented/debian trixie main
deb-src http://source/debian trixie main
deb cdrom:[Debian]/ trixie main
deb [signed-by=/a.gpg arch=amd64] http://security/debian trixie-security main
deb [arch=amd64] http://first/debian trixie main contrib
"""
DEB822 = """\
Types: deb
URIs: http://security/debian
Suites: trixie-security
Components: main

# the release
Types: deb deb-src
URIs: http://first/debian
Suites: trixie-updates trixie
Components: main
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sources.list", ONE_LINE),
        ("sources.list.d/a.list", ONE_LINE),
        ("sources.list.d/debian.sources", DEB822),
    ],
)
def test_the_mirror_comes_from_apt(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert find_source(tmp_path) == AptSource("http://first/debian", "trixie")


def test_there_is_no_source_without_apt(tmp_path: Path) -> None:
    assert find_source(tmp_path) is None


def test_the_command_line_for_debian() -> None:
    command = render_command("/a b/apptainer", Path("/o"), Path("/d"), BuildOptions(), DEBIAN)
    assert command[:2] == ["/a b/apptainer", "build"]
    assert command[-2:] == ["/o", "/d"]
    assert "bootstrap=debootstrap" in command
    assert "mirror=http://mirror" in command
    assert "--no-https" not in command


def test_a_comma_does_not_split_a_build_argument() -> None:
    choice = replace(DEBIAN, engine='Ollama from a "b", c.tgz')
    command = render_command("apptainer", Path("/o"), Path("/d"), BuildOptions(), choice)
    assert command[command.index("--build-arg") :].count("--build-arg") == 5
    assert '"engine=Ollama from a ""b"", c.tgz"' in command


def test_the_command_line_for_a_registry_on_loopback() -> None:
    choice = BaseChoice("docker", "", "", image="docker://127.0.0.1:5000/o/o:1")
    options = BuildOptions(run_tests=False)
    command = render_command("apptainer", Path("/o"), Path("/d"), options, choice)
    assert "--no-https" in command
    assert "--notest" in command
    assert "from=127.0.0.1:5000/o/o:1" in command


def test_singularity_ce_builds_without_root_with_an_option(tmp_path: Path) -> None:
    def command(**more: bool) -> list[str]:
        return render_command("s", Path("/o"), Path("/d"), BuildOptions(), DEBIAN, **more)

    assert command(fakeroot=True) == ["s", "build", "--fakeroot", *command()[2:]]
    fakes = FakeCommands(tmp_path)
    for printed, ce in (("singularity-ce version 4.5.1", True), ("apptainer version 1.4.5", False)):
        assert is_singularity_ce(fakes.say("singularity", f"{printed}\n")) is ce
    assert not is_singularity_ce(tmp_path / "apptainer")


def test_the_temporary_directory_is_that_of_either_runtime(tmp_path: Path) -> None:
    assert scratch_dir({"SINGULARITY_TMPDIR": "/s"}) == Path("/s")
    assert scratch_dir({"SINGULARITY_TMPDIR": "/s", "APPTAINER_TMPDIR": "/a"}) == Path("/a")


def test_the_definition_writes_labels_with_either_runtime() -> None:
    """Its command in %post, with the variables of SingularityCE or of Apptainer (set -u)."""
    text = find_sources().definition.read_text(encoding="utf-8")
    (words,) = re.findall(r'"\$\{APPTAINER_LABELS.*', text)
    for name in ("SINGULARITY", "APPTAINER"):
        environ = {f"{name}_LABELS": "/l a", f"{name}_ENVIRONMENT": "/e"}
        script = f"set -eu; printf '%s\n' {words}"
        done = subprocess.run(
            ["sh", "-c", script], env=environ, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == ["/l a", "/e"]


def test_the_build_time_is_that_of_the_commit(tmp_path: Path) -> None:
    environment = build_environment({"A": "b"}, tmp_path, find_sources())
    assert environment["APPTAINER_TMPDIR"] == str(tmp_path)
    assert environment["SINGULARITY_TMPDIR"] == str(tmp_path)
    assert environment["A"] == "b"
    if find_sources().commit != "unknown":
        assert environment["SOURCE_DATE_EPOCH"].isdigit()


def test_there_is_no_commit_without_a_checkout(tmp_path: Path) -> None:
    facts = known_facts(Checkout(tmp_path), BuildOptions(), DEBIAN)
    assert facts["commit"] == "unknown"
    assert facts["base_image"] == "debootstrap trixie"
    assert "SOURCE_DATE_EPOCH" not in build_environment({}, tmp_path, Checkout(tmp_path))


def test_an_existing_image_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "aiflux.sif"
    output.touch()
    with pytest.raises(ImageError, match="already exists"):
        build(BuildOptions(output=output))
    with pytest.raises(ImageError, match="the output directory"):
        build(BuildOptions(output=tmp_path / "none" / "aiflux.sif"))


def test_info_reads_the_labels_without_executing_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = FakeCommands(tmp_path / "bin")
    fakes.say("apptainer", status=1)
    monkeypatch.setenv("PATH", fakes.path)
    image = make_sif(tmp_path / "an image.sif", version="0.2", cpu_only="yes")
    assert main(["image", "info", str(image), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["version"], facts["cpu_only"]) == ("0.2", "yes")
    assert {call.argv[0] for call in fakes.calls("apptainer")} <= {"verify"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"SIF?"), "is not an Apptainer image"),
        (lambda path: make_sif(path, engine="x"), "is not an AI-Flux image"),
        (lambda path: path.mkdir(), "is not an AI-Flux image"),
        (lambda path: None, "image not found"),
    ],
)
def test_info_rejects_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[..., object], message: str
) -> None:
    make(tmp_path / "x.sif")
    assert main(["image", "info", str(tmp_path / "x.sif")]) == 2
    assert message in capsys.readouterr().err


def test_packages_for_a_cpu_build_may_go_to_a_relative_directory(tmp_path: Path) -> None:
    fakes = FakeCommands(tmp_path / "bin")
    fakes.say("apt-get")
    script = Path(__file__).parents[3] / "container" / "debian-sid.sh"
    subprocess.run(
        ["sh", "-euc", '. "$1"; download_from_sid "$2" http://mirror/ libx', "sh", script, "a b"],
        cwd=tmp_path, env={"PATH": fakes.path}, check=True,
    )  # fmt: skip
    update, download = (call.argv for call in fakes.calls("apt-get"))
    assert (update[-1], download[-2:]) == ("update", ["download", "libx"])
    folders = {word.partition("=")[2] for word in [*update, *download] if word.startswith("Dir::")}
    assert folders
    assert all(Path(folder).is_relative_to(tmp_path / "a b") for folder in folders)
