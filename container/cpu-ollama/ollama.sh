#!/bin/sh
# Starts the CPU build of Ollama that lies beside this file, in ../lib/ollama.
# The process keeps its pid; runners are started by the real binary and inherit the environment.
set -eu

self=$(readlink -f -- "$0")
lib=$(dirname -- "$(dirname -- "$self")")/lib/ollama

# LD_PRELOAD splits at spaces and colons, so it names the shim without a directory
# and LD_LIBRARY_PATH finds it, wherever this tree lies.
export LD_LIBRARY_PATH="$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export LD_PRELOAD="libaiflux-sdp.so${LD_PRELOAD:+:$LD_PRELOAD}"
# Symbols of the GPU runtime stay unbound: they are never called.
unset LD_BIND_NOW
# This build takes the context of all slots together from OLLAMA_NUM_CTX (unset: 2048 each),
# where Ollama takes that of one slot from OLLAMA_CONTEXT_LENGTH.
if [ -n "${OLLAMA_CONTEXT_LENGTH:-}" ] && [ -z "${OLLAMA_NUM_CTX:-}" ]; then
    export OLLAMA_NUM_CTX=$((OLLAMA_CONTEXT_LENGTH * ${OLLAMA_NUM_PARALLEL:-1}))
fi

exec "$lib/ollama-lib" "$@"
