"""One installation for everybody: owned by the site, used by an ordinary user who cannot write."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from aiflux.engines.llamacpp.model_file import find_files
from tests.integration.conftest import MODEL, REPOSITORY, STACK_DIR, Cluster, User, answers
from tests.integration.test_command import SERVER, SMALL, questions

TEMPLATES = REPOSITORY / "slurm" / "sites" / "modules"


@pytest.fixture
def prefix(stack: dict[str, str]) -> Iterator[Path]:
    """An installation of a bundle that only its owner can write, with limits."""
    folder = STACK_DIR / "run" / "shared aiflux"
    shared = "/usr/bin/python3"  # one that every user can execute
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    python = subprocess.run([shared, "-c", code], check=True, capture_output=True, text=True)
    bundle = folder / "b.tar"
    folder.mkdir(mode=0o755)
    try:
        create = ["bundle", "create", "--no-image", "--no-extras", "-o", bundle]
        create += ["--python", python.stdout.strip()]
        subprocess.run([sys.executable, "-m", "aiflux.cli", *create], check=True, cwd=REPOSITORY)
        subprocess.run(["tar", "-xf", bundle, "aiflux-bundle/install.py"], check=True, cwd=folder)
        install = [shared, "aiflux-bundle/install.py", bundle, "--prefix", folder / "1"]
        subprocess.run(install, check=True, cwd=folder)
        with open(folder / "1" / "site.yaml", "a", encoding="utf-8") as file:
            file.write("slurm:\n  time: 0:10:00\nlimits:\n  shards: 2\n  time: 0:10:00\n")
        subprocess.run(["chmod", "-R", "a+rX,go-w", folder], check=True)
        yield folder / "1"
    finally:
        shutil.rmtree(folder)


def loaded(user: User, kind: str, prefix: Path, then: str, cwd: Path) -> str:
    """Load the modulefile with the real program, and run a command line in that environment."""
    folder = user.folder(f"modules-{kind}")
    target = folder / "aiflux" / f"1.0.0{'.lua' if kind == 'lmod' else ''}"
    user.run("mkdir", "-p", target.parent)
    template = TEMPLATES / f"aiflux.{'lua' if kind == 'lmod' else 'tcl'}"
    quoted = f'"{prefix}"' if kind == "lmod" else f"{{{prefix}}}"
    text = template.read_text(encoding="utf-8")
    assert "/sw/aiflux" in text
    lines = text.replace('"/sw/aiflux"', quoted).replace("prefix /sw/aiflux", f"prefix {quoted}")
    user.write(target, lines)
    command = shlex.quote(str(STACK_DIR / "modules" / kind))
    script = f'eval "$({command} bash load aiflux)"; {then}'
    return user.run("bash", "-c", script, env={"MODULEPATH": str(folder)}, cwd=cwd)


def run_by_website(
    user: User, prefix: Path, place: Path, cluster: Cluster, server: str, model: Path
) -> None:
    """Submit the template of Open OnDemand's Job Composer as that does: copied, with sbatch."""
    website = place / "website"
    user.run("cp", "-r", TEMPLATES.parent / "ondemand", website)
    manifest = yaml.safe_load((website / "manifest.yml").read_text(encoding="utf-8"))
    user.write(website / "aiflux.yaml", json.dumps({"run": {"engine_command": server}}))
    small = "--gpus-per-node=0 --mem=2G --cpus-per-task=1 --time=0:10:00"
    submit = f"export MODEL_NAME={shlex.quote(str(model))}; sbatch --parsable {small}"
    printed = loaded(user, "lmod", prefix, f"{submit} {manifest['script']}", website)
    job = printed.split()[-1]
    assert cluster.end(job).code == 0, cluster.log(job, website)
    assert set(answers(website / "results.json")) == {"france", "italy"}


def test_a_module_gives_an_ordinary_user_the_shared_installation(
    user: User, prefix: Path, place: Path, cluster: Cluster, llama_server: Path, models: Path
) -> None:
    for kind in ("lmod", "tcl"):
        found = loaded(user, kind, prefix, 'type -P aiflux; echo "$AIFLUX_SITE_CONFIG"', place)
        assert found.splitlines() == [f"{prefix}/bin/aiflux", f"{prefix}/site.yaml"], kind
        without = 'module() { eval "$("$tool" bash "$@")"; }; '
        tool = f"tool={shlex.quote(str(STACK_DIR / 'modules' / kind))}; {without}"
        gone = loaded(user, kind, prefix, f"{tool}module unload aiflux; env", place)
        assert "AIFLUX_SITE_CONFIG=" not in gone
        assert str(prefix) not in gone.replace(f"PWD={place}", "")
    before = sorted(prefix.rglob("*"))
    user.write(place / "in.jsonl", questions(4, 4))
    server = SERVER.replace("llama-server", str(llama_server), 1)
    run = ["aiflux", "run", "in.jsonl", "-o", "out.json", "--model",
           str(find_files(models, MODEL).model), "--engine-command", server, *SMALL]  # fmt: skip
    both = shlex.join([*run, "--shards", "2"])
    loaded(user, "lmod", prefix, f"{both} && aiflux watch out.json", place)
    assert len(answers(place / "out.json")) == 4
    assert sorted(prefix.rglob("*")) == before, "a run writes nothing there"
    run_by_website(user, prefix, place, cluster, server, find_files(models, MODEL).model)
    other = user.write(place / "other.yaml", "limits: {shards: 99}\n")
    for words in ("", f"AIFLUX_SITE_CONFIG={shlex.quote(str(other))} "):
        more = shlex.join([*run, "--shards", "3", "-o", "b.json"])
        refused = loaded(user, "lmod", prefix, f"{words}{more} || true", place)
        assert "shards is 3, but this site permits at most 2" in refused
        assert f"({prefix}" in refused
    if os.geteuid() == 0:
        assert "ermission denied" in user.run("touch", prefix / "x", code=1)
