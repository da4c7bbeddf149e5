#!/usr/bin/env bash
# The stack on Debian's next release, with its Slurm and Python: in a root directory with mounts and
# processes of its own. Not a part of `up`: a slow test starts and removes it, and runs tests in it
# with `run COMMAND...`. AIFLUX_STACK_NEWER selects another release, such as sid.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

root=$stack_dir/root
copy=/srv/aiflux # inside
certificates=/etc/ssl/certs/ca-certificates.crt

suite_after() {
    case $1 in
        bookworm) printf 'trixie\n' ;;
        *) printf 'sid\n' ;;
    esac
}

make_root() {
    local archive suite new=$root.new
    [[ ! -d $root ]] || return 0
    apt_install debootstrap ca-certificates procps
    archive=$(debian_source)
    suite=${AIFLUX_STACK_NEWER:-$(suite_after "${archive#* }")}
    rm -rf --one-file-system "$new"
    debootstrap --variant=minbase --include=ca-certificates "$suite" "$new" "${archive% *}" \
        >"$log_dir/debootstrap.log" || fail "$(tail -n 5 "$log_dir/debootstrap.log")"
    cp "$certificates" "$new$certificates" # perhaps with some of this site
    apt-config dump Acquire | grep -v IndexTargets >"$new/etc/apt/apt.conf.d/machine"
    mkdir -p "$new$copy"
    git -C "$repo" ls-files -z --cached --others --exclude-standard |
        tar -C "$repo" --null -T - --owner=0 --group=0 -c | tar -C "$new$copy" -x
    mv "$new" "$root"
}

# The first process of the namespaces: only its descendants see the mounts. The root is moved, as
# user namespaces are refused after a chroot. bash collects the processes whose parents have ended.
hold() {
    mount --bind "$root" "$root"
    cd "$root"
    mount -t proc proc proc
    mount -t sysfs -o ro sysfs sys
    mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
    mount -t tmpfs -o mode=1777 shm dev/shm
    pivot_root . .
    umount -l .
    sleep infinity &
    wait
}

# Prints the pid of that process. unshare, which started it, stays outside.
held() {
    local parent
    parent=$(daemon_pid newer) && pgrep -P "$parent"
}

run() {
    nsenter --target "$(held)" --mount --pid --wdns="$copy" -- env SLURM_CONF="$slurm_conf" "$@"
}

is_inside() {
    held >/dev/null && run test -d /proc/self
}

install_tests() {
    run git init -q
    run python3 -m venv .venv
    run .venv/bin/python -m pip install -q --editable '.[test]' >&2
}

up() {
    require_root
    require_plain_stack_dir
    umask 022
    make_stack_dirs
    make_root
    ensure_daemon newer root unshare --mount --pid --fork --kill-child \
        env AIFLUX_STACK_DIR="$stack_dir" "$here/newer.sh" hold
    wait_until 10 is_inside || fail "no root directory; see $log_dir/newer.log"
    run tests/stack/up >&2
    [[ -e $root$copy/.venv/bin/pytest ]] || install_tests
    say "$(run sinfo -V)"
}

# The processes inside end with their first one, and the mounts with them.
down() {
    local first
    if first=$(held); then kill -KILL "$first"; fi
    stop_daemon newer
    ! grep -F " $root" /proc/mounts >&2 || fail "$root has mounts; it is not removed"
    rm -rf --one-file-system "$root" "$root.new"
}

"$@"
