#!/usr/bin/env bash
# Summarise a folder of texts: reports/* -> summaries.csv. Texts that are longer than a chunk are cut;
# "source_file" and "chunk" say which part of which file an answer is about.
# What is given to this script is given to aiflux run: see ../classify/run.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# PDF and DOCX need the extra documents. The chunks here are small so that some text is cut;
# with real models take a few thousand tokens, and leave room for the answer in the context.
[[ -e summaries.jsonl ]] || aiflux convert dir --input "$here/reports" --chunk-tokens 160 --overlap 20 \
    --system "You summarise texts in one plain sentence." \
    --template "Summarise part {chunk} of {chunks} of {source_file}: {text}" \
    --temperature 0 --max-tokens 40 --output summaries.jsonl

aiflux run --input summaries.jsonl --output summaries.json "$@"
aiflux watch summaries.json
[[ -e summaries.csv ]] || aiflux results to-csv summaries.json --output summaries.csv
