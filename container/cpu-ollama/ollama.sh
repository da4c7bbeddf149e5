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

exec "$lib/ollama-lib" "$@"
