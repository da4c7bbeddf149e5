#!/usr/bin/env bash
# Caption images: images/* -> captions.csv. Requires the extra images and a vision model such as
# gemma3:4b (`aiflux models list` shows which models accept images).
# The arguments of this script are passed to aiflux run: see ../classify/run.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# Larger images are scaled down to --max-pixels: the tokens of an image depend on its size.
[[ -e captions.jsonl ]] || aiflux convert images --input "$here/images" --max-pixels 250000 \
    --template "Describe this image in one sentence." \
    --temperature 0 --max-tokens 60 --output captions.jsonl

aiflux run --input captions.jsonl --output captions.json "$@"
aiflux watch captions.json
[[ -e captions.csv ]] || aiflux results to-csv captions.json --output captions.csv
