#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, with two fake GPUs each and its own munge.
# With AIFLUX_STACK_ACCOUNTING=1, it has accounts, associations and QOS, in a MariaDB of its own.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

slurm_dir=$stack_dir/slurm
munge_dir=$stack_dir/munge
nodes=(n1 n2)
gpus_per_node=2
export SLURM_CONF=$slurm_conf

# --- munge: signs user identities -----------------------------------------------------------

make_munge_key() {
    install -d -m 0755 -o munge -g munge "$munge_dir"
    [[ -s $munge_dir/key ]] ||
        runuser -u munge -- dd if=/dev/urandom of="$munge_dir/key" bs=128 count=1 status=none
    chmod 0600 "$munge_dir/key"
}

ensure_munged() {
    ensure_daemon munged munge /usr/sbin/munged --foreground --key-file="$munge_dir/key" \
        --socket="$munge_dir/socket" --pid-file="$munge_dir/munged.pid" \
        --log-file="$munge_dir/munged.log" --seed-file="$munge_dir/seed" --num-threads=2
    wait_until 10 munge_answers || fail "munged does not respond; see $munge_dir/munged.log"
}

munge_answers() {
    munge -S "$munge_dir/socket" -n >/dev/null 2>&1
}

# --- accounting: slurmdbd, with a database that only it can reach ---------------------------

accounting() {
    [[ ${AIFLUX_STACK_ACCOUNTING:-} == 1 ]]
}

sql() {
    mariadb --no-defaults --socket="$slurm_dir/db/socket" --user=root "$@"
}

database_answers() {
    sql -e 'SELECT 1' >/dev/null 2>&1
}

ensure_database() {
    local port
    port=$(remembered_port mariadbd 13306)
    if [[ ! -d $slurm_dir/db/mysql ]]; then
        install -d -m 0700 -o mysql -g mysql "$slurm_dir/db"
        mariadb-install-db --no-defaults --user=mysql --datadir="$slurm_dir/db" --skip-test-db \
            --auth-root-authentication-method=socket >&2
    fi
    ensure_daemon mariadbd root /usr/sbin/mariadbd --no-defaults --user=mysql \
        --datadir="$slurm_dir/db" --socket="$slurm_dir/db/socket" --pid-file="$slurm_dir/db/pid" \
        --bind-address=127.0.0.1 --port="$port"
    wait_until 60 database_answers || fail "mariadbd does not respond; see $log_dir/mariadbd.log"
    # slurmdbd would create the database, but cannot use its connection after that: MariaDB's library
    # (11.8.9) permits no columns once a connection failed, here because the database is missing.
    sql -e "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
        CREATE USER IF NOT EXISTS slurm@127.0.0.1 IDENTIFIED BY '$(database_password)';
        GRANT ALL ON slurm_acct_db.* TO slurm@127.0.0.1;"
}

database_password() {
    sha256sum "$munge_dir/key" | cut -c1-32
}

render_slurmdbd_conf() {
    cat <<CONF
DbdHost=localhost
DbdPort=$(remembered_port slurmdbd 16819)
SlurmUser=slurm
AuthType=auth/munge
AuthInfo=socket=$munge_dir/socket
PidFile=$slurm_dir/state/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$(remembered_port mariadbd 13306)
StorageUser=slurm
StoragePass=$(database_password)
StorageLoc=slurm_acct_db
CONF
}

accounts_answer() {
    timeout 5 sacctmgr -n list cluster >/dev/null 2>&1
}

ensure_accounting() {
    ensure_database
    render_slurmdbd_conf | replace_if_changed "$slurm_dir/slurmdbd.conf" || true
    chown slurm:slurm "$slurm_dir/slurmdbd.conf"
    chmod 0600 "$slurm_dir/slurmdbd.conf"
    ensure_daemon slurmdbd slurm /usr/sbin/slurmdbd -D
    wait_until 60 accounts_answer || fail "slurmdbd does not respond; see $log_dir/slurmdbd.log"
}

# Three accounts of the user, one with one GPU for a job, one below an account with one GPU for all
# jobs together; and a QOS that permits ten minutes and one GPU.
# slurmctld must run: it registers the GPUs.
make_accounts() {
    local account
    [[ -z $(sacctmgr -n list user "$stack_user") ]] || return 0
    sacctmgr -i add qos short MaxWall=00:10:00 MaxTRESPerUser=gres/gpu=1 >&2
    sacctmgr -i add account science Description=science Organization=test GrpTRES=gres/gpu=1 >&2
    for account in research teaching physics; do
        sacctmgr -i add account "$account" Description="$account" Organization=test \
            Parent="$([[ $account == physics ]] && printf science || printf root)" >&2
        sacctmgr -i add user "$stack_user" Account="$account" QOS=normal,short DefaultQOS=normal >&2
    done
    sacctmgr -i modify user "$stack_user" where Account=teaching set MaxTRES=gres/gpu=1 >&2
}

render_accounting() {
    accounting || return 0
    cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePass=$munge_dir/socket
AccountingStoragePort=$(remembered_port slurmdbd 16819)
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
PriorityType=priority/multifactor
PriorityWeightFairshare=1000
CONF
}

# --- configuration --------------------------------------------------------------------------

gpu_file() {
    printf '%s/dev/%s-gpu%s\n' "$slurm_dir" "$1" "$2"
}

# Slurm only counts GPUs whose file is a device node: these are additional null devices.
make_gpus() {
    local node index file
    mkdir -p "$slurm_dir/dev"
    for node in "${nodes[@]}"; do
        for ((index = 0; index < gpus_per_node; index++)); do
            file=$(gpu_file "$node" "$index")
            [[ -c $file ]] || mknod -m 0666 "$file" c 1 3
        done
    done
}

render_gres_conf() {
    local node
    for node in "${nodes[@]}"; do
        printf 'NodeName=%s Name=gpu File=%s\n' "$node" "$(gpu_file "$node" "[0-$((gpus_per_node - 1))]")"
    done
}

# cred_expire is also the time that a requeued job waits before it can start again.
render_slurm_conf() {
    local host control_port node_port
    host=$(hostname -s)
    control_port=$(remembered_port slurmctld 16817)
    node_port=$(remembered_port slurmd-n1 17001)
    cat <<CONF
ClusterName=aiflux
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$control_port
SlurmUser=slurm
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$munge_dir/socket,cred_expire=5

StateSaveLocation=$slurm_dir/state
SlurmdSpoolDir=$slurm_dir/spool-%n
SlurmctldPidFile=$slurm_dir/state/slurmctld.pid
SlurmdPidFile=$slurm_dir/slurmd-%n.pid
LogTimeFormat=iso8601,format_stderr
MailProg=/bin/true

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5

SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
DefMemPerCPU=1024
MaxArraySize=8

JobRequeue=1
KillWait=30
InactiveLimit=0
MinJobAge=300
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60

GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$node_port CPUs=8 RealMemory=16384 Gres=gpu:$gpus_per_node
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(remembered_port slurmd-n2 17002) CPUs=8 RealMemory=16384 Gres=gpu:$gpus_per_node
PartitionName=gpu Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE DefaultTime=10 MaxTime=1-0
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF DefaultTime=10 MaxTime=1-0
CONF
    render_accounting
}

# slurmd loads a cgroup plugin even if nothing uses it. The plugin for version 1 has no requirements.
# The default, detection, fails if no cgroup is mounted. 23.11 and later do not need this.
render_cgroup_conf() {
    local version plugin=cgroup/v1
    version=$(dpkg-query -W -f='${Version}' slurmd)
    if dpkg --compare-versions "$version" ge 23.11; then plugin=disabled; fi
    printf 'CgroupPlugin=%s\n' "$plugin"
}

# Status 0 if a file changed, so that running daemons must be restarted.
configure() {
    local changed=1
    install -d -m 0755 "$slurm_dir"
    install -d -m 0700 -o slurm -g slurm "$slurm_dir/state"
    render_slurm_conf | replace_if_changed "$slurm_conf" && changed=0
    render_gres_conf | replace_if_changed "$slurm_dir/gres.conf" && changed=0
    render_cgroup_conf | replace_if_changed "$slurm_dir/cgroup.conf" && changed=0
    return "$changed"
}

# --- the cluster ----------------------------------------------------------------------------

ensure_slurm_daemons() {
    local node
    ensure_daemon slurmctld root /usr/sbin/slurmctld -D -f "$slurm_conf"
    for node in "${nodes[@]}"; do
        ensure_daemon "slurmd-$node" root /usr/sbin/slurmd -D -N "$node" -f "$slurm_conf"
    done
}

# Lines "NODE STATE"; a * after the state means that the node does not respond.
# sinfo itself tries for minutes to reach an unavailable slurmctld.
node_states() {
    timeout 3 sinfo -h -N -p gpu -o '%N %T' 2>/dev/null
}

daemons_run() {
    [[ -z $(dead_daemons) ]]
}

dead_daemons() {
    local name
    for name in munged slurmctld "${nodes[@]/#/slurmd-}"; do
        daemon_pid "$name" >/dev/null || printf '%s ' "$name"
    done
}

# The last error in a daemon's log.
last_error() {
    grep -h -E 'fatal|error' "$log_dir/$1.log" 2>/dev/null | tail -n 1
}

cluster_ready() {
    local usable
    usable=$(node_states | grep -c -E ' (idle|mixed|allocated|completing)$')
    ((usable == ${#nodes[@]}))
}

ready_or_dead() {
    cluster_ready || ! daemons_run
}

# Let nodes that were drained or went down during an earlier start accept jobs again.
resume_nodes() {
    local node state
    while read -r node state; do
        case $state in
            drain* | down*) scontrol update "NodeName=$node" State=RESUME 2>/dev/null || true ;;
        esac
    done < <(node_states)
}

wait_for_cluster() {
    wait_until 10 ready_or_dead || resume_nodes
    wait_until 15 ready_or_dead || true
}

stop_slurm_daemons() {
    local node
    for node in "${nodes[@]}"; do stop_daemon "slurmd-$node"; done
    stop_daemon slurmctld
}

# A job's processes belong to Slurm, not to this script, so Slurm ends them.
cancel_jobs() {
    local -a jobs
    daemon_pid slurmctld >/dev/null || return 0
    mapfile -t jobs < <(timeout 3 squeue -h -o %A | sort -u)
    ((${#jobs[@]})) || return 0
    timeout 5 scancel "${jobs[@]}" || true
    wait_until 15 no_jobs || printf 'jobs that did not end: %s
' "${jobs[*]}" >&2
}

no_jobs() {
    [[ -z $(timeout 3 squeue -h -o %i 2>/dev/null) ]]
}

up() {
    apt_install slurm-wlm munge iproute2
    if accounting; then apt_install slurmdbd mariadb-server; fi
    make_munge_key
    make_gpus
    if configure; then stop_slurm_daemons; fi
    ensure_munged
    if accounting; then ensure_accounting; fi
    ensure_slurm_daemons
    wait_for_cluster
    if accounting; then make_accounts; fi
    status
}

status() {
    local dead
    dead=$(dead_daemons)
    [[ -z $dead ]] || fail "not running: $dead- $(last_error "${dead%% *}")"
    cluster_ready || fail "not ready: $(node_states | tr '
' ' ')- see $log_dir/slurmctld.log"
    say "$(sinfo -V), $(node_states | paste -s -d,)"
}

down() {
    cancel_jobs
    stop_slurm_daemons
    stop_daemon slurmdbd
    stop_daemon mariadbd
    stop_daemon munged
}

"$1"
