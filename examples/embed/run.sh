#!/usr/bin/env bash
# Embed a corpus: corpus.csv -> embedded.json, and print the nearest neighbour of each text.
# Use an embedding model such as nomic-embed-text; vectors of other models are less useful.
# The arguments of this script are passed to aiflux run: see ../classify/run.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

[[ -e embedded.jsonl ]] || aiflux convert csv --input "$here/corpus.csv" --id-column id --endpoint embeddings \
    --template "{text}" --output embedded.jsonl

aiflux run --input embedded.jsonl --output embedded.json "$@"
aiflux watch embedded.json
python3 "$here/nearest.py" embedded.json
