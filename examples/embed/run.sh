#!/usr/bin/env bash
# Embed a corpus: corpus.csv -> embedded.json, and for each text the one that is nearest to it.
# Take a model made for this, such as nomic-embed-text; others give vectors that mean less.
# What is given to this script is given to aiflux run: see ../classify/run.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

[[ -e embedded.jsonl ]] || aiflux convert csv --input "$here/corpus.csv" --id-column id --endpoint embeddings \
    --template "{text}" --output embedded.jsonl

aiflux run --input embedded.jsonl --output embedded.json "$@"
aiflux watch embedded.json
python3 "$here/nearest.py" embedded.json
