"""A job's answers, asked again in another job, and the evidence of them."""

from __future__ import annotations

import json
from pathlib import Path

from aiflux.util.files import file_digest
from tests.integration.conftest import FRANCE, MODEL, PLANETS, Cluster, User, lines, request
from tests.integration.test_jobs import submitted


def test_a_job_is_verified_by_another(
    user: User, aiflux: Path, image: Path, cluster: Cluster, place: Path, job_env: dict[str, str]
) -> None:
    more = [request(f"r{number}", f"Name the number {number}.") for number in range(4)]
    user.write(place / "in.jsonl", lines(FRANCE, PLANETS, *more))
    arguments = ["run", "--model", MODEL, "--input", "in.jsonl", "--output", "out.json"]
    sampling = ["--temperature", "0", "--max-tokens", "20", "--concurrency", "1", "--mem", "2G"]
    job = submitted(user.run(aiflux, *arguments, *sampling, cwd=place, env=job_env))
    assert cluster.end(job).code == 0, cluster.log(job, place)
    verify = [aiflux, "verify-run", "out.json", "--sample", "4", "--wait", "--json"]
    printed = user.run(*verify, cwd=place, env=job_env)
    printed = printed[printed.index('{\n  "verification"') :]
    found = json.JSONDecoder().raw_decode(printed)[0]["verification"]
    assert (found["requests"], found["answers"], found["failed"]) == (4, 6, 0)
    assert found["fixed"]["compared"] == 4
    assert found["fixed"]["identical"] == 4, found["differences"]
    assert [each["same"] for each in found["models"]] == [True]
    assert found["engine"]["same"] is True
    assert_evidence(user, aiflux, place, job, found, image)


def assert_evidence(
    user: User, aiflux: Path, place: Path, job: str, verification: object, image: Path
) -> None:
    """Write the evidence of the run, and check it with ssh-keygen."""
    key = place / "key"
    user.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "x", "-f", key, cwd=place)
    words = ["report", "out.json", "--evidence", "e.json", "--key", key]
    user.run(aiflux, *words, cwd=place)
    content = json.loads((place / "e.json").read_text(encoding="utf-8"))
    assert content["seal"]["sealed"] is True, content["seal"]
    assert content["egress"]["possible"] is False
    assert content["run"]["jobs"] == [job]
    assert content["image"]["same_id"] is True
    assert content["image"]["sha256"] == file_digest(image)
    assert content["image"]["signature"] in ("unsigned", "verified")
    assert content["output"][0]["sha256"] == file_digest(place / "out.json")
    assert content["verification"] == verification
    public = (place / "key.pub").read_text(encoding="utf-8")
    user.write(place / "allowed", f"x@example.org {public}")
    verify = "ssh-keygen -Y verify -f allowed -I x@example.org -n aiflux-evidence -s e.json.sig"
    user.run("bash", "-c", f"{verify} <e.json", cwd=place)
