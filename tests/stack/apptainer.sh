#!/usr/bin/env bash
# Apptainer for the ordinary user: the installed one, else Debian sid's, with its own libc if needed.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

work=$stack_dir/apptainer # downloads and what is unpacked from them
libc_dir=$work/libc       # sid's libraries, for sid's binaries alone
helpers=(ca-certificates squashfs-tools squashfuse fuse-overlayfs uidmap fakeroot debootstrap)

# --- installation ----------------------------------------------------------------------------

# Debian 13 and later have the libc that sid's Apptainer requires.
libc_is_new_enough() {
    local have
    have=$(getconf GNU_LIBC_VERSION)
    dpkg --compare-versions "${have#* }" ge 2.38
}

install_package() {
    from_sid apptainer
    apt_get install "$work"/debs/apptainer_*.deb
}

# The libraries go to a private directory, the program to its compiled-in path.
install_with_private_libc() {
    apt_install patchelf
    from_sid apptainer libc6 libseccomp2 libsqlite3-0
    unpack_libraries libc6 libseccomp2 libsqlite3-0
    unpack apptainer "$work/root"
    link_against_private_libc "$work/root/usr/bin/apptainer" "$work"/root/usr/lib/*/apptainer/bin/starter
    copy_program
    name_singularity
}

unpack_libraries() {
    local package
    mkdir -p "$libc_dir"
    for package in "$@"; do
        unpack "$package" "$work/unpacked/$package"
        cp -a -t "$libc_dir" "$work/unpacked/$package"/usr/lib/*-linux-gnu/*.so*
    done
}

# RPATH rather than RUNPATH, so that dependencies of libsqlite3 are found there too.
link_against_private_libc() {
    local binary interpreter
    for binary in "$@"; do
        interpreter=$(patchelf --print-interpreter "$binary")
        patchelf --set-interpreter "$libc_dir/${interpreter##*/}" "$binary"
        patchelf --force-rpath --set-rpath "$libc_dir" "$binary"
    done
}

copy_program() {
    local tree
    for tree in usr etc/apptainer var/lib/apptainer; do
        mkdir -p "/$tree"
        cp -a -t "/$tree" "$work/root/$tree"/.
    done
}

# Like the package's own postinst.
name_singularity() {
    update-alternatives --install /usr/bin/singularity singularity /usr/bin/singularity.apptainer 50 >&2
}

# Apptainer no longer runs if the stack's directory with its libraries was removed.
apptainer_runs() {
    apptainer version >/dev/null 2>&1
}

open_fuse() {
    [[ -e /dev/fuse ]] || mknod /dev/fuse c 10 229
    [[ $(stat -c %a /dev/fuse) == 666 ]] || chmod 0666 /dev/fuse
}

up() {
    apt_install "${helpers[@]}"
    if ! apptainer_runs; then
        if libc_is_new_enough; then install_package; else install_with_private_libc; fi
    fi
    open_fuse
    status
}

status() {
    apptainer_runs || fail "apptainer does not run: $(apptainer version 2>&1 || true)"
    [[ $(stat -c %a /dev/fuse) == 666 ]] || fail "/dev/fuse is not accessible for $stack_user"
    say "$(apptainer version), $(command -v apptainer)"
}

down() { :; }

"$1"
