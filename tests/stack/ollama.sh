#!/usr/bin/env bash
# The CPU Ollama of the tests. container/engines/ollama/cpu-build.sh assembles it if needed.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

assembler=$repo/container/engines/ollama/cpu-build.sh
target=$stack_dir/ollama-cpu

up() {
    if [[ -e $assembler ]]; then
        need_pip
        user_assemble engines/ollama/cpu-build.sh "$stack_dir/user/ollama-cpu"
        ln -sfn user/ollama-cpu "$target"
    fi
    status
}

status() {
    [[ -e $assembler || -x $target/bin/ollama ]] || { say "not built: container/engines/ollama/cpu-build.sh does not exist" && return; }
    [[ -x $target/bin/ollama ]] || fail "not assembled yet"
    say "$target/bin/ollama"
}

down() { :; }

"$1"
