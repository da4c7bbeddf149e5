#!/bin/sh
# Usage: cpu-build.sh DIR
# Assembles llama-server and llama-batched-bench of Debian sid in DIR/bin, and their libraries with
# a libc in DIR/lib (12 MB to download, 42 MB in DIR). DIR may be moved or copied. Needs no root.
# The packages come from the Debian mirror of this machine's apt, whose signature apt checks. Run
# again, it does nothing unless the scripts changed. For tests, demos and nodes without a GPU.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
container=$(dirname -- "$(dirname -- "$here")")
what="CPU build of llama.cpp"
mark=lib/aiflux-cpu-build
packages="llama.cpp-tools llama.cpp-tools-extra libllama0 libggml0 libc6 libstdc++6 libgcc-s1 libgomp1 libssl3t64"
# shellcheck source=container/assemble.sh
. "$container/assemble.sh"
# shellcheck source=container/debian-sid.sh
. "$container/debian-sid.sh"

# Identifies what DIR was made from.
stamp() {
    cat "$here/cpu-build.sh" "$here/cpu-launcher.sh" "$container/debian-sid.sh" | sha256sum
}

# Prints the first Debian mirror in this machine's apt sources.
mirror() {
    # shellcheck disable=SC2016 # the $(...) are apt's own
    apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
        awk '$2 == "main" && $1 ~ /^https?:/ && $1 ~ /debian\/$/ && !found { print $1; found = 1 }'
}

assemble() {
    from=$(mirror || :)
    [ -n "$from" ] ||
        die "it consists of Debian packages, and this machine has no apt with a Debian mirror: install llama.cpp, and name its llama-server in AIFLUX_ENGINE_PROGRAM"
    # shellcheck disable=SC2086 # one package a word
    download_from_sid "$1/sid" "$from" $packages ||
        die "the packages could not be downloaded from $from: see apt's message above"
    for deb in "$1"/sid/debs/*.deb; do
        dpkg-deb -x "$deb" "$1/unpacked"
    done
    # One flat directory: the program looks for its CPU back ends in the directory of the loader.
    mkdir "$1/lib" "$1/bin"
    libraries=$(echo "$1"/unpacked/usr/lib/*-linux-gnu)
    cp -a -t "$1/lib" "$libraries"/*.so* "$libraries"/llama/*.so "$libraries"/ggml/backends0/*.so
    for program in llama-server llama-batched-bench; do
        cp -t "$1/lib" "$1/unpacked/usr/bin/$program"
        install -m 755 "$here/cpu-launcher.sh" "$1/bin/$program"
    done
    rm -rf "$1/sid" "$1/unpacked"
    "$1/bin/llama-server" --version >/dev/null 2>&1 ||
        die "the $what does not run: $("$1/bin/llama-server" --version 2>&1 | tail -n 1)"
}

[ $# -eq 1 ] || die "usage: cpu-build.sh DIR" 2
assemble_once "$1"
