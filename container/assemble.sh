# shellcheck shell=sh
# Sourced by engines/*/cpu-build.sh, which set `what` and `mark` and define `stamp` and `assemble`.

die() {
    printf 'cpu-build: %s\n' "$1" >&2
    exit "${2:-1}"
}

# Usage: is_made DIR
is_made() {
    [ "$(cat "$1/$mark" 2>/dev/null)" = "$(stamp)" ]
}

# Usage: put NEW DIR
# If another process has put the same there meanwhile, it stays: somebody may be copying it.
put() {
    (
        flock 9 2>/dev/null || : # not every file system has locks
        if ! is_made "$2"; then
            [ ! -e "$2" ] || mv -T "$2" "$1.old" 2>/dev/null || :
            mv -T "$1" "$2" 2>/dev/null || is_made "$2" || mv -T "$1" "$2"
        fi
    ) 9<"$(dirname -- "$2")"
    rm -rf "$1.old"
}

# Usage: assemble_once DIR
# Assembles DIR, unless it was made from the same sources: its file `mark` has what `stamp` prints.
assemble_once() {
    dir=${1%/}
    is_made "$dir" && return
    [ ! -e "$dir" ] || [ -f "$dir/$mark" ] || rmdir "$dir" 2>/dev/null ||
        die "$dir exists and is not a $what: use another directory, or remove it" 2
    mkdir -p "$(dirname -- "$dir")"
    new=$(mktemp -d "$dir.new.XXXXXX")
    trap 'rm -rf "$new" "$new.old"' EXIT
    assemble "$new"
    stamp >"$new/$mark"
    chmod 755 "$new"
    put "$new" "$dir"
}
