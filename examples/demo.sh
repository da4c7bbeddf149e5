#!/usr/bin/env bash
# The demonstration of `make demo`: real prompts, a real Ollama and a real instruct model on this
# machine's CPU. OLLAMA=/path/to/ollama uses another Ollama, MODEL=name:tag another model, and
# EXAMPLE=classify (summarise, extract, caption, embed) runs that example instead.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=${here%/*}
cache=${AIFLUX_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/aiflux}
demo_model=smollm2:135m
demo_eye=smollm2-untrained-eye:135m
model=${MODEL:-$demo_model}
input=$here/prompts.jsonl
# Use an unused name, so that neither results nor a run are overwritten.
output=$PWD/demo-results.json
for ((number = 2; ; number++)); do
    [[ -e $output || -e $output.aiflux ]] || break
    output=$PWD/demo-results-$number.json
done

if [[ -n ${OLLAMA:-} ]]; then
    ollama=$OLLAMA
else
    ollama=$cache/ollama-cpu/bin/ollama
    echo "setting up a CPU build of Ollama in $cache (about 160 MB to download, once)"
    "$root/container/engines/ollama/cpu-build.sh" "$cache/ollama-cpu"
fi
export AIFLUX_OLLAMA=$ollama
# The default of `aiflux run --local`, so that the downloaded model can be used again.
data=${AIFLUX_DATA_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/aiflux}
export AIFLUX_MODELS_DIR=${AIFLUX_MODELS_DIR:-$data/models}

if [[ $model == "$demo_model" && ${EXAMPLE:-} == caption ]]; then
    model=$demo_eye
    echo "setting up the model $model in $AIFLUX_MODELS_DIR (93 MB to download, once)"
    echo "its vision part is untrained: captions show that images arrive, not what is in them"
    "$root/container/demo-model.sh" --eye "$ollama" "$AIFLUX_MODELS_DIR" "$model"
elif [[ $model == "$demo_model" ]]; then
    echo "setting up the model $demo_model in $AIFLUX_MODELS_DIR (93 MB to download, once)"
    "$root/container/demo-model.sh" "$ollama" "$AIFLUX_MODELS_DIR"
else
    input=$cache/demo-prompts.jsonl
    mkdir -p "$cache"
    sed "s|\"model\":\"$demo_model\"|\"model\":\"$model\"|" "$here/prompts.jsonl" > "$input"
fi

if [[ -n ${EXAMPLE:-} ]]; then
    exec "$here/$EXAMPLE/run.sh" --local --model "$model" --allow-cpu
fi

aiflux run --local --model "$model" --input "$input" --output "$output" --allow-cpu
aiflux results show "$output"
echo "results: $output"
echo "your own prompts: aiflux run --local --model $model --input prompts.jsonl"
