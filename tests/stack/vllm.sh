#!/usr/bin/env bash
# A CPU build of vLLM and a small Hugging Face model: container/engines/vllm assembles both, and knows
# itself when that is not needed. The download is 600 MB: AIFLUX_STACK_WITHOUT_VLLM=1 leaves it out.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

program=$stack_dir/user/vllm/bin/vllm
model=$stack_dir/user/smollm2

left_out() {
    [[ ${AIFLUX_STACK_WITHOUT_VLLM:-} == 1 ]]
}

up() {
    if ! left_out; then
        apt_install libnuma1 python3
        need_pip
        user_assemble engines/vllm/cpu-build.sh "$stack_dir/user/vllm"
        user_assemble engines/vllm/demo-model.sh "$stack_dir/user/vllm" "$model"
    fi
    status
}

status() {
    left_out && say "left out: AIFLUX_STACK_WITHOUT_VLLM=1" && return
    [[ -x $program ]] || fail "not assembled yet"
    [[ -f $model/config.json ]] || fail "the model $model is missing"
    say "$program"
}

down() { :; }

"$1"
