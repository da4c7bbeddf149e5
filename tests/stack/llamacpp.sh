#!/usr/bin/env bash
# llama-server of Debian sid, the second engine of the tests: container/engines/llamacpp assembles it.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

target=$stack_dir/user/llamacpp
program=$target/bin/llama-server

up() {
    debian_source >/dev/null # fetches apt's lists if there are none
    user_assemble engines/llamacpp/cpu-build.sh "$target"
    status
}

status() {
    [[ -x $program ]] || fail "not assembled yet"
    "$program" --version >/dev/null 2>&1 || fail "$program does not run: $("$program" --version 2>&1 | tail -n 1 || true)"
    say "$program"
}

down() { :; }

"$1"
