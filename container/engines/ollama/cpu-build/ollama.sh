#!/bin/sh
# Starts the CPU build of Ollama in ../lib/ollama.
# The process keeps its pid. The real binary starts the runners, which inherit the environment.
set -eu

self=$(readlink -f -- "$0")
lib=$(dirname -- "$(dirname -- "$self")")/lib/ollama

# LD_PRELOAD is split at spaces and colons, so it has only the shim's name;
# LD_LIBRARY_PATH finds it, wherever this tree is.
export LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export LD_PRELOAD="libaiflux-sdp.so${LD_PRELOAD:+:$LD_PRELOAD}"
# Symbols of the GPU runtime stay unbound, as they are never called.
unset LD_BIND_NOW
# This build reads the total context of all slots from OLLAMA_NUM_CTX (unset: 2048 each). Ollama
# reads the context of one slot from OLLAMA_CONTEXT_LENGTH.
if [ -n "${OLLAMA_CONTEXT_LENGTH:-}" ] && [ -z "${OLLAMA_NUM_CTX:-}" ]; then
    export OLLAMA_NUM_CTX=$((OLLAMA_CONTEXT_LENGTH * ${OLLAMA_NUM_PARALLEL:-1}))
fi

exec "$lib/ollama-lib" "$@"
