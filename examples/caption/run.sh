#!/usr/bin/env bash
# Caption images: images/* -> captions.csv. It needs the extra images, and a model that sees
# (`aiflux models list` shows which do), such as gemma3:4b.
# What is given to this script is given to aiflux run: see ../classify/run.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# Larger images are reduced to --max-pixels: an image costs tokens by its size.
[[ -e captions.jsonl ]] || aiflux convert images --input "$here/images" --max-pixels 250000 \
    --template "Describe this image in one sentence." \
    --temperature 0 --max-tokens 60 --output captions.jsonl

aiflux run --input captions.jsonl --output captions.json "$@"
aiflux watch captions.json
[[ -e captions.csv ]] || aiflux results to-csv captions.json --output captions.csv
