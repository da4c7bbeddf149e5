#!/bin/sh
# Starts the CPU build of vLLM in ../lib with the system's Python 3.11. The process keeps its pid.
set -eu

self=$(readlink -f -- "$0")
# Replaced, not extended: the engine must not import what another program put on the path.
PYTHONPATH=$(dirname -- "$(dirname -- "$self")")/lib
export PYTHONPATH PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1
# One key-value cache of 1 GiB, and no pinning of threads: a job may own any subset of the cores.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
# On a CPU, compiling the model takes longer than it saves, and needs a C++ compiler.
if [ "${1:-}" = serve ]; then
    set -- "$@" --enforce-eager
fi
exec python3.11 -m vllm.entrypoints.cli.main "$@"
