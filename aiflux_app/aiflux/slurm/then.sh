# shellcheck shell=bash disable=SC2154
# The job of `aiflux run --then`. Requires from the lines above:
#   cli       array: the command `aiflux`
#   run_dir   absolute path
#   command   of the user

say() {
    printf 'aiflux: %s\n' "$1" >&2
}

if ! "${cli[@]}" --version >/dev/null; then
    say "AI-Flux cannot run on $HOSTNAME: install it where every node sees it. --then was not executed"
    exit 2
fi
"${cli[@]}" watch "$run_dir"
code=$?
if ((code == 5)); then
    say "the run was stopped and can resume (exit code 5): --then was not executed"
    exit "$code"
fi
export AIFLUX_EXIT_CODE=$code
exec bash -c "$command"
