#!/usr/bin/env bash
# The ordinary user of the test stack: no privileges, a home directory, and ids for user namespaces.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

ids_needed=65536

make_user() {
    getent passwd "$stack_user" >/dev/null ||
        useradd --create-home --user-group --shell /bin/bash "$stack_user" >&2
    [[ -d $(user_home) ]] || fail "$stack_user has no home directory"
}

# /etc/subuid and /etc/subgid lines are NAME:FIRST:COUNT.
has_range() {
    [[ -e $1 ]] && awk -F: -v user="$stack_user" -v need="$ids_needed" \
        '$1 == user && $3 >= need { found = 1 } END { exit !found }' "$1"
}

# Prints the first id after all ranges in the file.
next_free_id() {
    [[ -e $1 ]] || { printf '100000\n' && return; }
    awk -F: 'BEGIN { next_id = 100000 } $2 + $3 > next_id { next_id = $2 + $3 } END { print next_id }' "$1"
}

grant_range() {
    has_range "$1" || printf '%s:%s:%s\n' "$stack_user" "$(next_free_id "$1")" "$ids_needed" >>"$1"
}

# Tools of a typical personal machine: the tests follow the README as this user.
install_tools() {
    apt_install python3 python3-venv python3-pip make git gcc libc6-dev zsh fish
}

up() {
    make_user
    install_tools
    grant_range /etc/subuid
    grant_range /etc/subgid
    status
}

status() {
    getent passwd "$stack_user" >/dev/null || fail "no user $stack_user"
    has_range /etc/subuid || fail "$stack_user has no $ids_needed subordinate ids in /etc/subuid"
    has_range /etc/subgid || fail "$stack_user has no $ids_needed subordinate ids in /etc/subgid"
    say "$stack_user, home $(user_home)"
}

down() { :; }

"$1"
