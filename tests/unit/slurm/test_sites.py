"""The example settings for sites have the effects that they describe."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from aiflux import __version__
from aiflux.bundle.packages import PYTHONS
from aiflux.core.config.config import Config
from aiflux.core.config.engine_command import filled_words
from aiflux.slurm.script import JobScript, render
from aiflux.slurm.submit import plan_job
from tests.unit.command_line import parse
from tests.unit.helpers import write_input, write_program

SITES = Path(__file__).parents[3] / "slurm" / "sites"
RECIPES = SITES / "modules"
RENDERED = """
typed = JSON.parse($stdin.read)
template = ERB.new(File.read(ARGV[0]), trim_mode: "-")
puts template.result_with_hash(typed.transform_keys(&:to_sym).merge(context: OpenStruct.new(typed)))
"""
"""A Ruby program that fills in a template as Open OnDemand does, with the fields as JSON."""
COMMON = [
    "--output=/o/logs/slurm-%j.out",
    "--open-mode=append",
    "--requeue",
    "--signal=B:USR1@80",
]
EXPECTED = {
    "gpus": [
        *("--job-name=aiflux", "--account=proj-123", "--partition=gpu", "--qos=normal"),
        *("--nodes=1", "--ntasks=1", "--cpus-per-task=8", "--mem=64G", "--gpus-per-node=a100:1"),
        *("--time=08:00:00", "--mail-type=END,FAIL", *COMMON),
    ],
    "gres": [
        *("--job-name=aiflux", "--account=proj-123", "--partition=gpu", "--nodes=1", "--ntasks=1"),
        *("--cpus-per-task=4", "--mem=32G", "--gres=gpu:1", '--constraint="v100|a100"'),
        *('--exclude="gpu[13-14]"', "--time=04:00:00", *COMMON, "--comment=aiflux"),
    ],
    "no-accounts": [
        *("--job-name=aiflux", "--nodes=1", "--ntasks=1", "--cpus-per-task=4", "--mem=16G"),
        *("--gpus-per-node=1", "--time=1-00:00:00", *COMMON),
    ],
    "lumi": [
        *("--job-name=aiflux", "--account=project_465000000", "--partition=small-g", "--nodes=1"),
        *("--ntasks=1", "--cpus-per-task=7", "--mem=60G", "--gpus-per-node=1", "--time=08:00:00"),
        *COMMON,
    ],
    "csc": [
        *("--job-name=aiflux", "--account=project_2000000", "--partition=gpu", "--nodes=1"),
        *("--ntasks=1", "--cpus-per-task=10", "--mem=80G", "--gres=gpu:v100:1"),
        *("--time=08:00:00", *COMMON),
    ],
    "osc": [
        *("--job-name=aiflux", "--account=PAS0000", "--nodes=1", "--ntasks=1"),
        *("--cpus-per-task=8", "--mem=64G", "--gpus-per-node=1", "--time=08:00:00", *COMMON),
    ],
}
WITH_COMMAND = ("lumi", "csc", "osc")
"""Examples of sites with servers of their own."""


def script(config: Config) -> str:
    places = {
        name: Path("/o") for name in ("image", "input", "output_dir", "models_dir", "run_dir")
    }
    slurm = config.get_slurm_config()
    return render(JobScript(name="aiflux", slurm=slurm, log=Path("/o/logs"), **places))


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH " in line]


def test_every_example_is_tested() -> None:
    assert {path.stem for path in SITES.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("site", EXPECTED)
def test_an_example_works_as_the_site_s_file(site: str, tmp_path: Path) -> None:
    environ = {"AIFLUX_SITE_CONFIG": str(SITES / f"{site}.yaml"), "HOME": str(tmp_path)}
    text = script(Config(environ=environ, directory=tmp_path))
    assert directives(text) == EXPECTED[site]
    assert "\nwant_gpus=1\n" in text


@pytest.mark.parametrize("site", EXPECTED)
def test_an_example_works_as_the_user_s_file(site: str, tmp_path: Path) -> None:
    (tmp_path / "aiflux.yaml").write_text((SITES / f"{site}.yaml").read_text(encoding="utf-8"))
    text = script(Config(environ={"HOME": str(tmp_path)}, directory=tmp_path))
    assert directives(text) == EXPECTED[site]


def test_modules_and_setup_lines_are_in_the_job(tmp_path: Path) -> None:
    environ = {"AIFLUX_SITE_CONFIG": str(SITES / "gres.yaml")}
    text = script(Config(environ=environ, directory=tmp_path))
    assert "\nmodules=(apptainer/1.4)\n" in text
    assert '\n    export TMPDIR=/local/$SLURM_JOB_ID\n    mkdir -p "$TMPDIR"\n}\n' in text


def test_users_override_the_site(tmp_path: Path) -> None:
    environ = {"AIFLUX_SITE_CONFIG": str(SITES / "gpus.yaml"), "SLURM_ACCOUNT": "mine"}
    config = Config(environ=environ, directory=tmp_path, arguments={"partition": "debug"})
    assert {"--account=mine", "--partition=debug"} <= set(directives(script(config)))


@pytest.mark.parametrize("site", WITH_COMMAND)
def test_a_site_s_own_server_needs_no_image(site: str, tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 2, body={"messages": [{"role": "user", "content": "hi"}]})
    environ = {"AIFLUX_SITE_CONFIG": str(SITES / f"{site}.yaml"), "HOME": str(tmp_path)}
    config = Config(environ=environ, directory=tmp_path, arguments={"model": "Qwen/Qwen3-8B"})
    planned = plan_job(
        config,
        config.get_slurm_config(),
        tmp_path / "in.jsonl",
        tmp_path / "out.json",
        config.run_options(),
        check=False,
        write=False,
        environ={"PATH": str(tmp_path)},
    )
    assert planned.image is None
    assert "\nimage=''\n" in planned.script
    assert f"{shlex.quote(sys.executable)} -m aiflux.worker)\n" in planned.script
    assert ("pytorch/2.5" in planned.script) is (site != "osc")
    values = {"model": "Qwen/Qwen3-8B", "host": "127.0.0.1", "port": 8000, "socket": "/s",
              "slots": 64, "context": 4096, "gpus": 1}  # fmt: skip
    words = filled_words(str(config.get("engine_command")), values)
    assert "Qwen/Qwen3-8B" in words
    assert words[words.index("--max-num-seqs") + 1] == "64"


def test_the_recipe_for_easybuild_is_of_this_version() -> None:
    (recipe,) = RECIPES.glob("*.eb")
    found: dict[str, Any] = {"SYSTEM": None}
    exec(recipe.read_text(encoding="utf-8"), found)  # noqa: S102
    assert recipe.name == f"{found['name']}-{found['version']}.eb" == f"AI-Flux-{__version__}.eb"


def test_the_recipe_for_spack_agrees_with_the_package() -> None:
    (recipe,) = RECIPES.glob("spack_repo/aiflux/packages/*/package.py")
    tree = ast.parse(recipe.read_text(encoding="utf-8"))
    (made,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    calls = [node.value for node in made.body if isinstance(node, ast.Expr)]
    found = {
        ast.unparse(call.func): ast.literal_eval(call.args[0])
        for call in calls
        if isinstance(call, ast.Call)
    }
    project = (SITES.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert found == {
        "version": __version__,
        "depends_on": f"python@{PYTHONS[0]}:{PYTHONS[-1]}",  # the bundle has the other packages
        "license": "MIT",
    }
    assert f'requires-python = ">={PYTHONS[0]}"' in project
    assert f'license = "{found["license"]}"' in project
    assert f"\n{recipe.parent.name} = " in project.partition("[project.scripts]")[2]
    assert made.name == recipe.parent.name.capitalize()
    assert f"/aiflux-{__version__}.tar" in ast.unparse(made)


@pytest.mark.skipif(shutil.which("ruby") is None, reason="the templates are Ruby's")
def test_the_form_of_open_ondemand_runs_what_was_typed(tmp_path: Path) -> None:
    form = SITES / "ondemand-form"
    asked = yaml.safe_load((form / "form.yml").read_text(encoding="utf-8"))["form"]
    typed = dict.fromkeys(asked, "3") | {
        "input_file": "/a b/$(touch x)'`\".jsonl",
        "output_file": " /o ü.json ",
        "model": "m:1; exit",
    }
    script, submit = [
        subprocess.run(
            ["ruby", "-rjson", "-rerb", "-rostruct", "-e", RENDERED, form / name],
            input=json.dumps(typed), capture_output=True, text=True, check=True,
        ).stdout
        for name in ("template/script.sh.erb", "submit.yml.erb")
    ]  # fmt: skip
    job = yaml.safe_load(submit)
    assert job["batch_connect"] == {"template": "basic", "timeout": 3 * 3600 - 120}
    assert "--gpus-per-node=3" in job["script"]["native"]
    write_program(tmp_path / "aiflux", f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/typed\n')
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", script], env=environ, cwd=tmp_path, check=True)
    words = (tmp_path / "typed").read_text(encoding="utf-8").splitlines()
    names = ("input_file", "output_file", "model")
    assert words[:2] == ["run", "--local"]
    assert words[3::2] == [typed[name].strip() for name in names]
    assert parse(words).params["model"] == "m:1; exit"
    assert not (tmp_path / "x").exists()


def test_the_page_about_the_installation_names_this_version_only() -> None:
    page = (SITES.parents[1] / "docs" / "installation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?i)flux[/-](\d+\.\d+\.\d+)", page)) == {__version__}
