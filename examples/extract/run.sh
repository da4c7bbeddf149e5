#!/usr/bin/env bash
# Extract JSON that fits a schema: notices.jsonl -> extracted.csv with the columns person, place, date.
# The engine is held to schema.json; --validate checks each answer, and asks again for those that do not
# fit (it needs the extra schema where the run is not in the image).
# What is given to this script is given to aiflux run: see ../classify/run.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# {{ and }} stand for braces. --keep has the notice's number come back with the answer.
[[ -e extracted.jsonl ]] || aiflux convert json --input "$here/notices.jsonl" --keep notice --schema "$here/schema.json" \
    --template 'Who is to be asked, where, and when? Answer as {{"person": ..., "place": ..., "date": ...}}.
Notice: {text}' \
    --temperature 0 --max-tokens 120 --output extracted.jsonl

aiflux run --input extracted.jsonl --output extracted.json --validate "$@"
aiflux watch extracted.json
[[ -e extracted.csv ]] || aiflux results to-csv extracted.json --json-fields --output extracted.csv
