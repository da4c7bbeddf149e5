#!/usr/bin/env bash
# Extract JSON that fits a schema: notices.jsonl -> extracted.csv with the columns person, place, date.
# The engine enforces schema.json. --validate checks each answer and repeats requests whose answer does
# not fit (outside the image, it requires the extra schema).
# The arguments of this script are passed to aiflux run: see ../classify/run.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# {{ and }} are literal braces. --keep adds the notice's number to the result.
[[ -e extracted.jsonl ]] || aiflux convert json --input "$here/notices.jsonl" --keep notice --schema "$here/schema.json" \
    --template 'Who is to be asked, where, and when? Answer as {{"person": ..., "place": ..., "date": ...}}.
Notice: {text}' \
    --temperature 0 --max-tokens 120 --output extracted.jsonl

aiflux run --input extracted.jsonl --output extracted.json --validate "$@"
aiflux watch extracted.json
[[ -e extracted.csv ]] || aiflux results to-csv extracted.json --json-fields --output extracted.csv
