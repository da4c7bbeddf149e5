#!/bin/sh
# Starts the program of its own name in ../lib with the libc that is next to it. The process keeps
# its pid.
set -eu

self=$(readlink -f -- "$0")
name=$(basename -- "$self")
lib=$(dirname -- "$(dirname -- "$self")")/lib
loader=$(echo "$lib"/ld-linux*)
exec "$loader" --library-path "$lib" --argv0 "$name" "$lib/$name" "$@"
