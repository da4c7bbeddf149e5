#!/usr/bin/env bash
# Debian's Lmod and Environment Modules, unpacked for the tests: nothing is installed.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

target=$stack_dir/modules
packages=(environment-modules tcl8.6 libtcl8.6 lmod lua5.3 lua-posix lua-filesystem lua-json
    lua-term lua-lpeg lua-bit32)

up() {
    local package
    if ! (status) >/dev/null 2>&1; then
        rm -rf "$target"
        mkdir -p "$target/debs"
        debian_source >/dev/null # fetches apt's lists if there are none
        (cd "$target/debs" && apt-get -q -o APT::Sandbox::User=root download "${packages[@]}" >&2)
        for package in "$target"/debs/*.deb; do
            dpkg-deb -x "$package" "$target/root"
        done
        write_commands
    fi
    status
}

# Lmod looks for its libraries where Debian installs them.
write_commands() {
    local root=$target/root lib lmod
    lib=$(echo "$root"/usr/lib/*-linux-gnu)
    lmod=$(echo "$root"/usr/share/lmod/[0-9]*/libexec/lmod)
    sed -i -E "/^local sys_lua_c?path/s#([\";])/usr/#\1$root/usr/#g" "$lmod"
    printf '#!/bin/sh\nexec env LD_LIBRARY_PATH=%s %s %s "$@"\n' \
        "$lib" "$root/usr/bin/lua5.3" "$lmod" >"$target/lmod"
    printf '#!/bin/sh\nexec env LD_LIBRARY_PATH=%s TCL_LIBRARY=%s %s %s "$@"\n' \
        "$lib" "$root/usr/share/tcltk/tcl8.6" "$root/usr/bin/tclsh8.6" "$lib/modulecmd.tcl" >"$target/tcl"
    chmod +x "$target/lmod" "$target/tcl"
}

status() {
    local command
    for command in lmod tcl; do
        MODULEPATH=/nonexistent "$target/$command" bash --version >/dev/null 2>&1 || fail "$command does not run"
    done
    say "$target"
}

down() { :; }

"$1"
