#!/usr/bin/env bash
# Classify the rows of a table: reviews.csv -> classified.csv, with a column "label" beside the others.
# What is given to this script is given to aiflux run:
#
#   ./run.sh --model llama3.2:3b                        a Slurm job
#   ./run.sh --model llama3.2:3b --local                here
#   ./run.sh --model MODEL --engine-url URL             a server that is up
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# A request for each row. The schema leaves the model the choice among the labels and nothing else.
[[ -e classified.jsonl ]] || aiflux convert csv --input "$here/reviews.csv" --id-column id --template-file "$here/prompt.txt" \
    --schema "$here/schema.json" --temperature 0 --max-tokens 20 --output classified.jsonl

aiflux run --input classified.jsonl --output classified.json "$@"

# Waits for a job; says the same at once where the run has ended.
aiflux watch classified.json

# The answers beside the columns that they were asked from.
[[ -e classified.csv ]] || aiflux results to-csv classified.json --source "$here/reviews.csv" --id-column id \
    --json-fields label --output classified.csv
