#!/usr/bin/env bash
# llama-server from Debian sid with its own libc: the second engine of the tests.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

work=$stack_dir/llamacpp # downloads, what is unpacked from them, and the program
program=$work/bin/llama-server
packages=(llama.cpp-tools libllama0 libggml0 libc6 libstdc++6 libgcc-s1 libgomp1 libssl3t64)

# One flat directory, because the program searches its own directory for CPU back ends.
assemble() {
    local new=$work/bin.new package
    apt_install patchelf
    download_from_sid "${packages[@]}"
    rm -rf "$new"
    mkdir -p "$new"
    for package in "${packages[@]}"; do
        unpack "$package" "$work/unpacked/$package"
    done
    cp -a -t "$new" "$work"/unpacked/*/usr/lib/*-linux-gnu/*.so* \
        "$work"/unpacked/*/usr/lib/*-linux-gnu/llama/*.so "$work"/unpacked/*/usr/lib/*-linux-gnu/ggml/backends0/*.so
    cp -t "$new" "$work/unpacked/llama.cpp-tools/usr/bin/llama-server"
    link "$new"
    rm -rf "${work:?}/bin" "${work:?}/unpacked" "${work:?}/debs"
    mv "$new" "$work/bin"
}

# RPATH also applies to the dependencies of libraries.
link() {
    local interpreter library
    interpreter=$(patchelf --print-interpreter "$1/llama-server")
    patchelf --set-interpreter "$work/bin/${interpreter##*/}" "$1/llama-server"
    patchelf --force-rpath --set-rpath "$work/bin" "$1/llama-server"
    for library in "$1"/lib{llama,mtmd,ggml}*.so*; do
        [[ -L $library ]] || patchelf --force-rpath --set-rpath "\$ORIGIN" "$library"
    done
}

runs() {
    "$program" --version >/dev/null 2>&1
}

up() {
    runs || assemble
    status
}

status() {
    [[ -x $program ]] || fail "not assembled yet"
    runs || fail "$program does not run: $("$program" --version 2>&1 | tail -n 1 || true)"
    say "$program"
}

down() { :; }

"$1"
