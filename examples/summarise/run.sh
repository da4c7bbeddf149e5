#!/usr/bin/env bash
# Summarise a directory of texts: reports/* -> summaries.csv. Texts longer than a chunk are split;
# "source_file" and "chunk" name the part of the file that an answer is about.
# The arguments of this script are passed to aiflux run: see ../classify/run.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# PDF requires the extra documents. The chunks are small here so that some text is split.
# For real models, use a few thousand tokens, and leave space for the answer in the context.
[[ -e summaries.jsonl ]] || aiflux convert dir --input "$here/reports" --chunk-tokens 160 --overlap 20 \
    --system "You summarise texts in one plain sentence." \
    --template "Summarise part {chunk} of {chunks} of {source_file}: {text}" \
    --temperature 0 --max-tokens 40 --output summaries.jsonl

aiflux run --input summaries.jsonl --output summaries.json "$@"
aiflux watch summaries.json
[[ -e summaries.csv ]] || aiflux results to-csv summaries.json --output summaries.csv
