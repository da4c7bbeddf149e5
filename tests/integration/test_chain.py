"""`aiflux chain` with the real Slurm, Apptainer and Ollama."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests.integration.conftest import MODEL, Cluster, User, answers

STEPS = f"""
source: in.csv
output: out.csv
model: {MODEL}
temperature: 0
max_tokens: 12
mem: 2G
steps:
  capital:
    template: "What is the capital of {{country}}?"
  river:
    filter: country != "Peru"
    template: "Name a river in {{country}}. Its capital: {{capital}}"
  both:
    template: "Repeat: {{river}}"
"""


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check(place: Path) -> None:
    """Check the table against the results of the steps."""
    given = {
        step: answers(place / "out.csv.aiflux" / "steps" / f"{step}.json")
        for step in ("capital", "river", "both")
    }
    assert [*given["river"]] == [*given["both"]] == ["row-1", "row-3"]
    found = [
        [row["country"], row["capital"], row["river"], row["both"]]
        for row in rows_of(place / "out.csv")
    ]
    expected = [
        [country, *(given[step].get(f"row-{at}", "") for step in given)]
        for at, country in enumerate(("France", "Peru", "Spain"), start=1)
    ]
    assert found == expected
    assert "Paris" in found[0][1]


def test_a_chain_of_jobs(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    user.write(place / "in.csv", "country\nFrance\nPeru\nSpain\n")
    user.write(place / "steps.yaml", STEPS)
    printed = user.run(aiflux, "chain", "steps.yaml", "--no-wait", cwd=place, env=job_env)
    jobs = [line.split("job ")[1].split(":")[0].split(",")[0] for line in printed.splitlines()
            if "submitted job" in line or "  step " in line]  # fmt: skip
    assert len(jobs) == 3, printed
    status = user.run(aiflux, "status", "out.csv", "--json", cwd=place, env=job_env)
    assert [step["jobs"] for step in json.loads(status)["steps"]] == [[job] for job in jobs]
    shown = user.run(aiflux, "chain", "steps.yaml", cwd=place, env=job_env)
    for job in jobs:
        assert cluster.end(job).code == 0, cluster.log(job, place)
    assert "3 rows -> out.csv" in shown
    check(place)
    for step in ("river", "both"):
        run = place / "out.csv.aiflux" / "steps" / f"{step}.json.aiflux"
        status = json.loads((run / "status" / "shard-0000.json").read_text(encoding="utf-8"))
        assert status["aiflux"]["sealed"] is True
    assert "finished" in user.run(aiflux, "status", "out.csv", cwd=place, env=job_env)
    assert "wrote" in user.run(aiflux, "report", "out.csv", cwd=place, env=job_env)


def test_a_chain_on_this_machine(
    user: User, aiflux: Path, image: Path, place: Path, job_env: dict[str, str]
) -> None:
    user.write(place / "in.csv", "country\nFrance\nPeru\nSpain\n")
    user.write(place / "steps.yaml", STEPS)
    shown = user.run(aiflux, "chain", "steps.yaml", "--local", cwd=place, env=job_env)
    assert "3 rows -> out.csv" in shown
    check(place)
