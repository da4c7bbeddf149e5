# shellcheck shell=bash
# shellcheck disable=SC2034 # variables are used by the scripts that source this
# Shared by the scripts of the test stack: paths, messages, apt, daemons, ports. To be sourced.

# The interface: all paths of the stack derive from these.
stack_dir=${AIFLUX_STACK_DIR:-/var/tmp/aiflux-stack}
stack_user=aifluxtest
# In the order of startup; <part>.sh accepts up, down or status.
read -r -a parts <<<"${AIFLUX_STACK_PARTS:-user apptainer slurm ssh registry modules ollama llamacpp vllm}"
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd -- "$here/../.." && pwd)
run_dir=$stack_dir/run
log_dir=$stack_dir/log
missing_dir=$stack_dir/missing
slurm_conf=$stack_dir/slurm/slurm.conf
export DEBIAN_FRONTEND=noninteractive
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# --- messages -------------------------------------------------------------------------------

# Exits with an error; the text is stored in missing/<part>.
fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# Prints the result of a part: one short line on stdout.
say() {
    printf '%s\n' "$*"
}

require_root() {
    [[ $EUID -eq 0 ]] || fail "run the test stack as root: it creates a user, device nodes and daemons"
}

# Slurm's configuration cannot quote spaces, and a socket's path has at most 107 bytes.
require_plain_stack_dir() {
    [[ $stack_dir =~ ^/[A-Za-z0-9/._-]+$ && ${#stack_dir} -le 70 ]] ||
        fail "AIFLUX_STACK_DIR=$stack_dir: need an absolute path of letters, digits and / . _ -, at most 70 characters"
}

make_stack_dirs() {
    install -d -m 0755 "$stack_dir" "$run_dir" "$log_dir" "$missing_dir"
}

as_user() {
    runuser -u "$stack_user" -- env HOME="$(user_home)" USER="$stack_user" LOGNAME="$stack_user" "$@"
}

user_home() {
    getent passwd "$stack_user" | cut -d: -f6
}

# --- packages -------------------------------------------------------------------------------

# Prints the packages that are not installed, one per line.
not_installed() {
    local package
    for package in "$@"; do
        dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^.i' || printf '%s\n' "$package"
    done
}

# Installs missing packages; refreshes apt's lists only if the first attempt fails.
apt_install() {
    local -a wanted
    mapfile -t wanted < <(not_installed "$@")
    ((${#wanted[@]})) || return 0
    # The parts run one after the other, so they can share one policy-rc.d.
    forbid_service_starts
    apt_get install "${wanted[@]}" || {
        apt_get update
        apt_get install "${wanted[@]}"
    }
    allow_service_starts
}

apt_get() {
    apt-get -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" </dev/null >&2
}

# Debian's package scripts ask policy-rc.d before they start a daemon; 101 forbids it.
forbid_service_starts() {
    [[ ! -e /usr/sbin/policy-rc.d ]] || return 0
    printf '#!/bin/sh\n# aiflux test stack\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 0755 /usr/sbin/policy-rc.d
    trap allow_service_starts EXIT
}

allow_service_starts() {
    if grep -qs 'aiflux test stack' /usr/sbin/policy-rc.d; then
        rm -f /usr/sbin/policy-rc.d
    fi
}

# Prints "URI SUITE" of the Debian archive in this machine's apt sources for its release.
debian_source() {
    local codename found
    codename=$(. /etc/os-release && printf "%s" "${VERSION_CODENAME:-}")
    found=$(archive_of "$codename")
    # apt can distinguish its sources only after it has fetched their lists once.
    if [[ -z $found ]]; then
        apt_get update
        found=$(archive_of "$codename")
    fi
    [[ -n $found ]] || found=$(archive_of sid) # sid's os-release has the name of the next release
    [[ -n $found ]] || fail "no http source of Debian $codename (main) in this machine's apt sources"
    printf "%s\n" "$found"
}

archive_of() {
    # shellcheck disable=SC2016 # the $(...) are apt's own
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v release="$1" '$2 == release && $3 == "main" && $1 ~ /^https?:/ && !found {
            sub("/$", "", $1); print $1, $2; found = 1 }'
}

# --- Debian sid -----------------------------------------------------------------------------
# Downloads and unpacked files go below $work, which the part sets.

# shellcheck source=container/debian-sid.sh
source "$repo/container/debian-sid.sh"

# Puts the packages into $work/debs.
from_sid() {
    local archive
    archive=$(debian_source)
    rm -rf "$work/debs"
    download_from_sid "$work" "${archive% *}" "$@"
}

unpack() {
    rm -rf "$2"
    mkdir -p "$2"
    dpkg-deb -x "$work"/debs/"$1"_*.deb "$2"
}

# --- what the user assembles ----------------------------------------------------------------

need_pip() {
    python3 -m pip --version >/dev/null 2>&1 || apt_install python3 python3-pip
}

# user_assemble SCRIPT ARGUMENT...: runs a script of container/ as the user. From a copy, as the
# checkout may be where only root can read; and it may write in $stack_dir/user, which the user owns.
user_assemble() {
    local owned=$stack_dir/user script=$1
    shift
    install -d -m 0755 -o "$stack_user" -g "$stack_user" "$owned"
    rm -rf "$owned/container"
    cp -r "$repo/container" "$owned/container"
    chmod -R go+rX "$owned/container"
    as_user "$owned/container/$script" "$@" >&2
}

# --- daemons --------------------------------------------------------------------------------
# run/<name>.pid has "PID STARTTIME PROGRAM", which together identify a process uniquely.

# Field 22 of /proc/PID/stat; the command name in field 2 can contain spaces and brackets.
start_time() {
    local stat
    { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
    awk '{ print $20 }' <<<"${stat##*) }"
}

# Prints the program: the first word of the command line.
called_as() {
    local word
    IFS= read -r -d '' word 2>/dev/null <"/proc/$1/cmdline" && printf '%s\n' "$word"
}

# Prints the pid of a daemon of this stack if the recorded process is still running, else status 1.
daemon_pid() {
    local pid started program
    [[ -e $run_dir/$1.pid ]] || return 1
    read -r pid started program <"$run_dir/$1.pid"
    [[ $(start_time "$pid") == "$started" && $(called_as "$pid") == "$program" ]] || return 1
    printf '%s\n' "$pid"
}

# start_daemon NAME USER PROGRAM ARGUMENT...: detached, with its own environment.
start_daemon() {
    local name=$1 user=$2 program=$3 pid
    shift 2
    (
        cd /
        # A background child of a script is not a group leader, so setsid does not fork and the pid stays.
        exec setsid env -i PATH="$PATH" LANG=C.UTF-8 SLURM_CONF="$slurm_conf" \
            setpriv --reuid "$user" --regid "$(id -g "$user")" --init-groups "$@"
    ) </dev/null >>"$log_dir/$name.log" 2>&1 9>&- &
    pid=$!
    printf '%s %s %s\n' "$pid" "$(start_time "$pid")" "$program" >"$run_dir/$name.pid"
}

ensure_daemon() {
    daemon_pid "$1" >/dev/null || start_daemon "$@"
}

# SIGTERM, then SIGKILL after ten seconds; only for the recorded process.
stop_daemon() {
    local name=$1 pid
    if pid=$(daemon_pid "$name"); then
        kill -TERM "$pid"
        wait_until 10 daemon_gone "$name" || kill -KILL "$pid"
    fi
    rm -f "$run_dir/$name.pid"
}

daemon_gone() {
    ! daemon_pid "$1" >/dev/null
}

# wait_until SECONDS COMMAND...: polls ten times a second.
wait_until() {
    local end=$((SECONDS + $1 + 1))
    shift
    while ! "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

# --- ports ----------------------------------------------------------------------------------

# remembered_port NAME FIRST: the port recorded for NAME, or the first free port from FIRST.
remembered_port() {
    local file=$run_dir/$1.port port=$2
    if [[ ! -s $file ]]; then
        while port_taken "$port"; do port=$((port + 1)); done
        printf '%s\n' "$port" >"$file"
    fi
    cat "$file"
}

port_taken() {
    grep -lqs "^$1\$" "$run_dir"/*.port || ss -Hltn "sport = :$1" | grep -q .
}

# --- files ----------------------------------------------------------------------------------

# Writes stdin to a file if that changes it; status 1 if the file is unchanged.
replace_if_changed() {
    local new=$1.new
    cat >"$new"
    if cmp -s "$new" "$1"; then
        rm -f "$new"
        return 1
    fi
    mv -f "$new" "$1"
}
