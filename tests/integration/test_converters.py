"""From a table to answers that fit a schema, in the sealed image with the real Ollama."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tests.integration.conftest import MODEL, User, shard_status

SCHEMA = {
    "type": "object",
    "properties": {"capital": {"type": "string", "maxLength": 40}},
    "required": ["capital"],
    "additionalProperties": False,
}


def test_a_table_becomes_answers_that_fit_a_schema(
    user: User, aiflux: Path, image: Path, place: Path, job_env: dict[str, str]
) -> None:
    user.write(place / "in.csv", 'id,country\nfr,France\nxx,"no ""such"",\ncountry"\n')
    user.write(place / "schema.json", json.dumps(SCHEMA))
    user.run(
        aiflux, "convert", "csv", "--input", "in.csv", "--id-column", "id", "--model", MODEL,
        "--template", "What is the capital of {country}? Answer as JSON: {{\"capital\": ...}}",
        "--schema", "schema.json", "--temperature", "0", "--max-tokens", "30",
        "--output", "q.jsonl", cwd=place,
    )  # fmt: skip
    impossible = json.loads((place / "q.jsonl").read_text(encoding="utf-8").splitlines()[1])
    impossible["body"]["max_tokens"] = 2  # cut off inside the object
    first = (place / "q.jsonl").read_text(encoding="utf-8").splitlines()[0]
    user.write(place / "q.jsonl", f"{first}\n{json.dumps(impossible)}\n")
    user.run(
        aiflux, "run", "--local", "--input", "q.jsonl", "--output", "out.json", "--validate",
        "--revalidate-attempts", "1", "--slots", "1", cwd=place, env=job_env, code=3,
    )  # fmt: skip
    user.run(
        aiflux, "results", "to-csv", "out.json", "--source", "in.csv", "--id-column", "id",
        "--json-fields", cwd=place,
    )  # fmt: skip
    with open(place / "out.csv", encoding="utf-8", newline="") as file:
        good, bad = csv.DictReader(file)
    assert good["country"] == "France"
    assert json.loads(good["answer"])["capital"] == good["capital"]
    assert bad["country"] == 'no "such",\ncountry'
    assert bad["error"].startswith("schema: the answer is not JSON")
    assert "cut at the token limit" in bad["error"]
    assert shard_status(place)["aiflux"]["progress"]["unfit_answers"] == 2
