#!/bin/sh
# Usage: cpu-build.sh DIR
# Assembles a CPU build of Ollama 0.9.3 (x86-64) in DIR: DIR/bin/ollama and DIR/lib/ollama, as in
# the official archive. DIR can be moved or copied afterwards.
# Everything comes from PyPI, pinned in cpu-build.lock. Two small C files are compiled with cc, or
# with PyPI's ziglang if there is no cc. No root is needed.
# Repeated runs do nothing unless the lock or the sources changed. The build serves models of the
# Llama architecture. It is slow, and meant for tests, demos and nodes without a GPU.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
container=$(dirname -- "$(dirname -- "$here")")
cache=${AIFLUX_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/aiflux}
python=${PYTHON:-python3}
what="CPU Ollama"
mark=lib/ollama/aiflux-cpu-build
# shellcheck source=container/assemble.sh
. "$container/assemble.sh"

# Identifies the sources of DIR.
stamp() {
    (cd "$here" && cat cpu-build.lock cpu-build/* | sha256sum)
}

install_zig() {
    zig=$cache/ziglang-$(sha256sum "$here/ziglang.lock" | cut -c1-16)
    [ -d "$zig" ] && return
    fresh=$(mktemp -d "$cache/.ziglang.XXXXXX")
    wheel=$("$container/fetch-wheels.sh" "$here/ziglang.lock")
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index \
        --target "$fresh" "$wheel" >&2
    mv -T "$fresh" "$zig" 2>/dev/null || rm -rf "$fresh"
}

compiler() {
    if command -v cc >/dev/null 2>&1; then
        cc "$@"
    else
        install_zig
        ZIG_GLOBAL_CACHE_DIR=$cache/zig ZIG_LOCAL_CACHE_DIR=$cache/zig PYTHONPATH=$zig \
            "$python" -m ziglang cc -target x86_64-linux-gnu.2.28 "$@"
    fi
}

# Usage: shared SOURCE OUTPUT
shared() {
    compiler -shared -fPIC -O2 -nostdlib -o "$2" "$1" || die "could not compile ${1##*/}"
}

assemble() {
    mkdir -p "$1/bin" "$1/lib/ollama"
    wheels=$("$container/fetch-wheels.sh" "$here/cpu-build.lock")
    oldifs=$IFS
    IFS='
'
    # shellcheck disable=SC2086 # one path per line
    "$python" "$container/unpack-wheels.py" "$1/lib/ollama" "$here/cpu-build/files.txt" $wheels
    IFS=$oldifs
    shared "$here/cpu-build/sycl_shim.c" "$1/lib/ollama/libggml-sycl.so"
    shared "$here/cpu-build/sdp_shim.c" "$1/lib/ollama/libaiflux-sdp.so"
    ln -s libggml-sycl.so "$1/lib/ollama/libsycl.so.8"
    install -m 755 "$here/cpu-build/ollama.sh" "$1/bin/ollama"
}

[ $# -eq 1 ] || die "usage: cpu-build.sh DIR" 2
[ "$(uname -m)" = x86_64 ] ||
    die "the CPU build requires x86-64, not $(uname -m): use the official Ollama for Linux" 2
mkdir -p "$cache"
assemble_once "$1"
