#!/bin/sh
# Starts the llama-server in ../lib with the libc that is next to it. The process keeps its pid.
set -eu

lib=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")/lib
loader=$(echo "$lib"/ld-linux*)
exec "$loader" --library-path "$lib" --argv0 llama-server "$lib/llama-server" "$@"
