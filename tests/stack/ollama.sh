#!/usr/bin/env bash
# The CPU Ollama of the tests. container/cpu-ollama.sh assembles it if needed.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

assembler=$repo/container/cpu-ollama.sh
target=$stack_dir/ollama-cpu

need_pip() {
    python3 -m pip --version >/dev/null 2>&1 || apt_install python3 python3-pip
}

# The assembler writes next to its target, so the user owns the parent directory. It runs from a copy,
# as the checkout may only be readable for root.
assemble() {
    local owned=$stack_dir/user
    install -d -m 0755 -o "$stack_user" -g "$stack_user" "$owned"
    rm -rf "$owned/container"
    cp -r "$repo/container" "$owned/container"
    chmod -R go+rX "$owned/container"
    as_user "$owned/container/${assembler##*/}" "$owned/ollama-cpu" >&2
    ln -sfn user/ollama-cpu "$target"
}

up() {
    if [[ -e $assembler ]]; then
        need_pip
        assemble
    fi
    status
}

status() {
    [[ -e $assembler || -x $target/bin/ollama ]] || { say "not built: container/cpu-ollama.sh does not exist" && return; }
    [[ -x $target/bin/ollama ]] || fail "not assembled yet"
    say "$target/bin/ollama"
}

down() { :; }

"$1"
