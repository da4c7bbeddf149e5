# shellcheck shell=sh
# Sourced. Downloads packages of Debian sid with a private apt: the machine's lists and sources stay
# as they are.

private_apt() {
    apt-get -qq -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts="$apt/none" \
        -o Dir::Etc::Preferences="$apt/none" -o Dir::Etc::PreferencesParts="$apt/none" \
        -o Dir::State="$apt/state" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache" \
        -o APT::Sandbox::User=root -o Acquire::Languages=none "$@" </dev/null >&2
}

# Usage: download_from_sid DIR MIRROR PACKAGE...
# Puts the packages into DIR/debs, and the files of apt into DIR/apt.
download_from_sid() {
    mkdir -p "$1/debs" "$1/apt"
    debs=$(CDPATH='' cd -- "$1/debs" && pwd) # apt takes relative paths from directories of its own
    apt=${debs%/debs}/apt
    mkdir -p "$apt/none" "$apt/state/lists/partial" "$apt/cache/archives/partial"
    : >"$apt/status"
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    signed=
    [ ! -e "$keys" ] || signed="[signed-by=$keys] "
    printf 'deb %s%s sid main\n' "$signed" "$2" >"$apt/sources.list"
    shift 2
    private_apt update && (cd "$debs" && private_apt download "$@")
}
