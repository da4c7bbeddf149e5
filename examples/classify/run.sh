#!/usr/bin/env bash
# Classify the rows of a table: reviews.csv -> classified.csv, with the additional column "label".
# The arguments of this script are passed to aiflux run:
#
#   ./run.sh --model llama3.2:3b                        a Slurm job
#   ./run.sh --model llama3.2:3b --local                on this machine
#   ./run.sh --model MODEL --engine-url URL             a running server
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# One request per row. The schema restricts the answer to one of the labels.
[[ -e classified.jsonl ]] || aiflux convert csv --input "$here/reviews.csv" --id-column id --template-file "$here/prompt.txt" \
    --schema "$here/schema.json" --temperature 0 --max-tokens 20 --output classified.jsonl

aiflux run --input classified.jsonl --output classified.json "$@"

# Wait for the job; if the run has ended, print its result at once.
aiflux watch classified.json

# Join the answers with the columns of the source.
[[ -e classified.csv ]] || aiflux results to-csv classified.json --source "$here/reviews.csv" --id-column id \
    --json-fields label --output classified.csv
