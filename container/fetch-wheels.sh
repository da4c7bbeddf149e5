#!/bin/sh
# Usage: fetch-wheels.sh LOCK [PIP-OPTION...]
# Downloads every wheel of LOCK (a pip requirements file, one --hash=sha256: each) to the wheel
# cache, and prints their paths, one per line, in the order of LOCK.
# Cache: ${AIFLUX_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/aiflux}/wheels. Nothing is installed.
# PYTHON is the interpreter that has pip (default: python3). The options are those of
# `pip download`, such as --python-version, for wheels of another Python.
set -eu

lock=$1
shift
cache=${AIFLUX_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/aiflux}/wheels
python=${PYTHON:-python3}

die() {
    printf 'fetch-wheels: %s\n' "$1" >&2
    exit 1
}

hashes() {
    sed -n 's/.*--hash=sha256:\([0-9a-f]*\).*/\1/p' "$lock"
}

# Prints the cached wheels that match the hashes in LOCK; fails if one is missing.
cached() {
    sums=$(sha256sum "$cache"/*.whl 2>/dev/null) || return 1
    for hash in $(hashes); do
        file=$(printf '%s\n' "$sums" | sed -n "s/^\\\\\{0,1\}$hash  //p" | head -n 1)
        [ -n "$file" ] || return 1
        printf '%s\n' "$file"
    done
}

download() {
    "$python" -m pip --version >/dev/null 2>&1 ||
        die "$python has no pip to download the wheels: install it (Debian: python3-pip)"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --require-hashes --dest "$@" --requirement "$lock" >&2 ||
        die "pip could not download the wheels of ${lock##*/}: see its message above"
}

mkdir -p "$cache"
if ! cached >/dev/null; then
    fresh=$(mktemp -d "$cache/.download.XXXXXX")
    trap 'rm -rf "$fresh"' EXIT
    download "$fresh" "$@"
    mv -f "$fresh"/*.whl "$cache/"
fi
cached
