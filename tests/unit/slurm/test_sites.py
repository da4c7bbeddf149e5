"""The example settings for sites have the effects that they describe."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiflux.core.config.config import Config
from aiflux.slurm.script import JobScript, render

SITES = Path(__file__).parents[3] / "slurm" / "sites"
COMMON = [
    "--output=/o/logs/slurm-%j.out",
    "--open-mode=append",
    "--requeue",
    "--signal=B:USR1@90",
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
}


def script(config: Config) -> str:
    places = {
        name: Path("/o") for name in ("image", "input", "output_dir", "models_dir", "run_dir")
    }
    slurm = config.get_slurm_config()
    return render(JobScript(name="aiflux", slurm=slurm, log=Path("/o/logs"), **places))


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH " in line]


def test_every_example_is_tested() -> None:
    assert {path.stem for path in SITES.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("site", EXPECTED)
def test_an_example_works_as_the_site_s_file(site: str, tmp_path: Path) -> None:
    environ = {"AIFLUX_SITE_CONFIG": str(SITES / f"{site}.yaml"), "HOME": str(tmp_path)}
    text = script(Config(environ=environ, directory=tmp_path))
    assert directives(text) == EXPECTED[site]
    assert "\ngpu_flags=(--nv)\n" in text


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
