#!/bin/sh
# Usage: fetch-wheels.sh LOCK
# Makes sure that every wheel of LOCK (a pip requirements file, one --hash=sha256: each) is
# in the wheel cache, and prints their paths, one a line, in the order of LOCK.
# Cache: ${AIFLUX_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/aiflux}/wheels. Nothing is installed.
# PYTHON names the python that has pip (python3).
set -eu

lock=$1
cache=${AIFLUX_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/aiflux}/wheels
python=${PYTHON:-python3}

die() {
    printf 'fetch-wheels: %s\n' "$1" >&2
    exit 1
}

wanted() {
    sed -n 's/.*--hash=sha256:\([0-9a-f]*\).*/\1/p' "$lock"
}

# Prints the cached wheels whose content LOCK asks for; fails when one is missing.
cached() {
    sums=$(sha256sum "$cache"/*.whl 2>/dev/null) || return 1
    for hash in $(wanted); do
        file=$(printf '%s\n' "$sums" | sed -n "s/^\\\\\{0,1\}$hash  //p" | head -n 1)
        [ -n "$file" ] || return 1
        printf '%s\n' "$file"
    done
}

download() {
    "$python" -m pip --version >/dev/null 2>&1 ||
        die "$python has no pip, which downloads the wheels: install it (Debian: python3-pip)"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --require-hashes --dest "$1" --requirement "$lock" >&2 ||
        die "pip could not download what ${lock##*/} pins: see its message above"
}

mkdir -p "$cache"
if ! cached >/dev/null; then
    fresh=$(mktemp -d "$cache/.download.XXXXXX")
    trap 'rm -rf "$fresh"' EXIT
    download "$fresh"
    mv -f "$fresh"/*.whl "$cache/"
fi
cached
