#!/usr/bin/env bash
# OpenSSH's server: tests start it as the ordinary user, on loopback. Nothing runs here.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

program=/usr/sbin/sshd

up() {
    apt_install openssh-client openssh-server openssl
    status
}

status() {
    [[ -x $program ]] || fail "openssh-server is not installed"
    say "$program"
}

down() { :; }

"$1"
