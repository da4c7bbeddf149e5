"""The container's command lines, and the search for image and runtime."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from aiflux.cli.main import main
from aiflux.core.config.config import Config
from aiflux.errors import ConfigError, ImageError
from aiflux.image.container import find_image, find_runtime, is_chosen
from tests.tools.make_sif import make_sif
from tests.unit.fake_commands import waiting_slurm
from tests.unit.helpers import request_line


@pytest.mark.parametrize("name", ["apptainer", "singularity"])
def test_the_runtime_is_found_under_both_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch(0o755)
    assert find_runtime(str(tmp_path)) == tmp_path / name


def test_a_missing_runtime_suggests_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="neither apptainer nor singularity") as caught:
        find_runtime(str(tmp_path))
    assert "module load" in str(caught.value.remedy)


def config(folder: Path, **environ: str) -> Config:
    return Config(environ={"HOME": str(folder / "home"), **environ}, directory=folder)


def test_a_configured_image_takes_precedence(awkward: Path) -> None:
    make_sif(awkward / "aiflux.sif", version="1")
    named = awkward / "n.sif"
    make_sif(named, version="1")
    assert find_image(config(awkward, AIFLUX_IMAGE=str(named)), awkward) == named


def test_a_missing_configured_image_is_an_error_with_its_origin(awkward: Path) -> None:
    make_sif(awkward / "aiflux.sif", version="1")
    with pytest.raises(ImageError, match="AIFLUX_IMAGE"):
        find_image(config(awkward, AIFLUX_IMAGE="/no/such.sif"), awkward)


def test_the_image_of_the_current_directory_comes_first(awkward: Path) -> None:
    image = awkward / "aiflux.sif"
    make_sif(image, version="1")
    assert find_image(config(awkward), awkward) == image


def test_the_image_of_a_checkout_is_found(awkward: Path) -> None:
    checkout = awkward / "checkout"
    checkout.mkdir()
    make_sif(checkout / "aiflux.sif", version="1")
    with pytest.raises(ImageError):
        find_image(config(awkward), awkward, checkout)
    (checkout / "Makefile").touch()
    assert find_image(config(awkward), awkward, checkout) == checkout / "aiflux.sif"


def test_the_image_of_the_containers_directory_is_found(awkward: Path) -> None:
    image = awkward / "c" / "aiflux.sif"
    image.parent.mkdir()
    make_sif(image, version="1")
    found = find_image(config(awkward, AIFLUX_CONTAINERS_DIR=str(image.parent)), awkward, awkward)
    assert found == image


@pytest.mark.parametrize("labels", [{}, {"engine": "Ollama 9"}, {"version": ""}])
def test_an_image_without_our_labels_is_rejected(awkward: Path, labels: dict[str, str]) -> None:
    image = make_sif(awkward / "aiflux.sif", **labels)
    with pytest.raises(ImageError, match="is not an AI-Flux image"):
        find_image(config(awkward), awkward)
    with pytest.raises(ImageError, match="is not an AI-Flux image"):
        find_image(config(awkward, AIFLUX_IMAGE=str(image)), awkward)


@pytest.mark.parametrize(
    "words",
    [
        ["doctor"],
        ["run", "--model", "m:1", "--input", "in.jsonl"],
        ["run", "--model", "m:1", "--input", "in.jsonl", "--no-preflight"],
        ["run", "--model", "m:1", "--input", "in.jsonl", "--local"],
        ["estimate", "--model", "m:1", "--input", "in.jsonl", "--no-preflight"],
        ["models", "pull", "m:1"],
        ["bundle", "create"],
        ["image", "info"],
        ["image", "info", "aiflux.sif"],
        ["image", "sign"],
    ],
    ids=" ".join,
)
def test_no_command_executes_a_foreign_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    slurm = waiting_slurm(tmp_path / "bin", monkeypatch)
    slurm.add("apptainer", "[[ $1 == verify || $1 == key ]] && exit 1\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("AIFLUX_OLLAMA", raising=False)
    monkeypatch.chdir(tmp_path)
    make_sif(tmp_path / "aiflux.sif", engine="theirs")
    (tmp_path / "in.jsonl").write_text(request_line("a") + "\n", encoding="utf-8")
    assert main(words) in (2, 4)
    called = {call.argv[0] for call in slurm.calls("apptainer")}
    assert not called & {"exec", "run", "shell", "test", "inspect", "instance", "-s"}
    assert slurm.calls("sbatch") == []


def test_an_image_in_the_current_directory_is_not_a_choice(tmp_path: Path) -> None:
    """Anyone may be able to write there. A checkout is trusted: its code already runs."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "c"
    for folder in (tmp_path, checkout, elsewhere):
        folder.mkdir(exist_ok=True)
        make_sif(folder / "aiflux.sif", version="1")
    (checkout / "Makefile").touch()
    here, there = tmp_path / "aiflux.sif", elsewhere / "aiflux.sif"

    def chosen(image: Path, **environ: str) -> bool:
        return is_chosen(config(tmp_path, **environ), image, checkout)

    assert not chosen(here)
    assert chosen(here, AIFLUX_IMAGE=str(here))
    assert chosen(checkout / "aiflux.sif")
    assert not chosen(there)
    assert chosen(there, AIFLUX_CONTAINERS_DIR=str(elsewhere))
    user = tmp_path / "home" / ".config" / "aiflux"
    user.mkdir(parents=True)
    for name, value in (("image", there), ("containers_dir", elsewhere)):
        text = f"paths: {{{name}: {json.dumps(str(value))}}}\n"
        (user / "config.yaml").write_text(text, encoding="utf-8")
        assert chosen(there)
        (user / "config.yaml").rename(tmp_path / "aiflux.yaml")
        assert not chosen(there), "named by a file in the directory itself"
        (tmp_path / "aiflux.yaml").rename(tmp_path / ".env")
        variable = "AIFLUX_IMAGE" if name == "image" else "AIFLUX_CONTAINERS_DIR"
        (tmp_path / ".env").write_text(f"{variable}={str(value)!r}\n")
        assert not chosen(there)
        (tmp_path / ".env").unlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can change file owners")
def test_an_image_of_another_user_is_not_run(tmp_path: Path) -> None:
    image = make_sif(tmp_path / "aiflux.sif", version="1")
    os.chown(image, 12345, 12345)
    with pytest.raises(ConfigError, match="is refused: it belongs to user 12345") as caught:
        find_image(config(tmp_path), tmp_path)
    assert f"--image {image}" in str(caught.value.remedy)
    assert find_image(config(tmp_path, AIFLUX_IMAGE=str(image)), tmp_path) == image


def test_a_missing_image_lists_the_searched_directories(awkward: Path) -> None:
    (awkward / "Makefile").touch()  # the current directory is also the checkout
    with pytest.raises(ImageError) as caught:
        find_image(config(awkward), awkward, awkward)
    assert str(awkward) in caught.value.message
    assert caught.value.message.count(f"{awkward},") == 1, "each place once"
    assert "make image" in str(caught.value.remedy)
