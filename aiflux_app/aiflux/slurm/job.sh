# shellcheck shell=bash disable=SC2154
# The steps of every job, and of `aiflux run --local`: prepare the models with the network, then
# work without it. Requires bash 4.2, and from the lines above:
#   image, input, output_dir            absolute paths; image is empty if there is a worker
#   worker                              array: command of the worker; empty if it is in the image
#   libraries                           array: variables that are not for that worker, but its engines
#   run_dir                             absolute path; empty: prepare only
#   models_dir                          absolute path; empty if the engine is elsewhere
#   engine_ca                           absolute path of certificates to trust there; may be empty
#   shard                               index of the shard to work on
#   plan_step                           array: command that plans the run, if this is not done yet
#   max_requeues                        0: the job is not requeued automatically
#   want_seal                           0: the container keeps the network while it works
#   nodes                               number of the engine's nodes
#   model_paths                         array: models that are not in models_dir, absolute paths
#   want_gpus                           1: the container gets the node's GPUs
#   gpu_vendor                          nvidia, amd, or auto: as the node has it
#   modules, prepare_args               arrays
#   site_setup                          a function with the site's setup commands

runtime='' prefix='' scratch='' # the container runtime, its variables' prefix, private directory
child='' pending='' signals=0   # the container's pid, a signal not yet forwarded, number of signals
forwarded=0                     # whether a signal was forwarded
stopped=0                       # 1 after TERM, INT or HUP: the job is to end
seal=() unsealed='' mounts=() deadline=() # why it is not sealed
gpu_flags=() ranks=''                    # process that runs the other nodes' ranks

# How Slurm's commands name this job: the bare id of an array's last task means the whole array.
job_id=${SLURM_JOB_ID:-}
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job_id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Made by the worker when its time is up and another start would make progress.
printf -v mark '%s/status/shard-%04d.requeue' "$run_dir" "$shard"

say() {
    printf 'aiflux: %s\n' "$1" >&2
}

# give_up ERROR REMEDY: end before any request is sent.
give_up() {
    printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
    exit 2
}

# --- signals: forwarded to the container, once each -------------------------------------------

on_signal() {
    signals=$((signals + 1))
    [[ $1 == USR1 && -n $pending ]] || pending=$1
    [[ $1 == USR1 ]] || stopped=1
    deliver
}

# A signal that arrives before the container runs is forwarded when it does. USR1 is not, if the
# job's end is known: the worker then watches the clock, and the signal may come a minute early and
# would kill the runtime during its start.
deliver() {
    local signal=$pending
    [[ -n $child && -n $signal ]] || return 0
    pending=''
    [[ $signal != USR1 || -z ${SLURM_JOB_END_TIME:-} ]] || return 0
    forwarded=1
    kill -s "$signal" "$child" 2>/dev/null
}

# Returns the child's own exit code. A trap makes `wait` return early with 128 + signal, so a
# code is valid only if no trap ran meanwhile; bash remembers the code of a child that has ended.
# If a second signal comes just as the child ends, bash 5.2 can lose the code, and `wait` returns
# -1: the job then counts as stopped, and the next start finds what is left to do.
wait_for_child() {
    local seen=-1 code=0
    while ((seen != signals)); do
        seen=$signals
        wait "$child"
        code=$?
    done
    child=''
    ((code >= 0)) || code=5
    # A signal can kill the runtime, or a worker without a container, before it handles any.
    if ((forwarded && code > 128)); then
        say "stopped by a signal while the work began or ended; run the same job again to resume"
        code=5
    fi
    return "$code"
}

# --- a step of a chain: see aiflux/api/chain_step.py ------------------------------------------

exec_plan_step() {
    exec "${plan_step[@]}" "$shard"
}

# Plans the run from the answers of earlier steps, with the Python that submitted the job and without
# the site's modules. 10: this task has nothing to do.
plan_the_step() {
    local code
    [[ ${plan_step+set} ]] || return 0
    supervise exec_plan_step
    code=$?
    ((code != 10)) || exit 0
    ((code != 126 && code != 127)) || give_up "${plan_step[0]} cannot run on $HOSTNAME" \
        "install AI-Flux where every node sees it, or continue with aiflux chain once earlier steps have ended"
    return "$code"
}

# --- the container ----------------------------------------------------------------------------

load_modules() {
    local file
    ((${#modules[@]})) || return 0
    # A batch shell is no login shell: `module` may not be defined yet.
    for file in /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh /etc/profile.d/modules.sh; do
        type module >/dev/null 2>&1 && break
        # shellcheck disable=SC1090 # the site's file
        [[ ! -r $file ]] || . "$file"
    done
    module load "${modules[@]}"
}

find_runtime() {
    if runtime=$(type -P apptainer); then
        prefix=APPTAINER
    elif runtime=$(type -P singularity); then
        prefix=SINGULARITY
    else
        give_up "neither apptainer nor singularity is on PATH on $HOSTNAME" \
            "name the site's module in aiflux.yaml (slurm: modules: [apptainer]), or load it before sbatch"
    fi
}

# A node with an NVIDIA GPU can have /dev/kfd too, of the graphics of an AMD processor.
choose_gpus() {
    unset AIFLUX_GPU_VENDOR
    ((want_gpus)) || return 0 # there may be no gpu_vendor either
    if [[ $gpu_vendor == auto ]]; then
        gpu_vendor=nvidia
        [[ ! -e /dev/kfd || -e /dev/nvidiactl ]] || gpu_vendor=amd
    fi
    gpu_flags=(--nv)
    [[ $gpu_vendor != amd ]] || gpu_flags=(--rocm)
    export AIFLUX_GPU_VENDOR=$gpu_vendor # for the worker
}

# Prevents running another image by accident. SIF files have their labels before the file system; a
# label does not prove the origin.
refuse_other_image() {
    [[ -r $image ]] || return 0 # the runtime reports the reason
    { head -c 1048576 -- "$image" | grep -aqF '"aiflux.version"'; } 2>/dev/null ||
        give_up "$image is not an AI-Flux image: it has no label aiflux.version" \
            "build one: make image; or set another: AIFLUX_IMAGE, --image"
}

# /tmp, /var/tmp and HOME of the container are here.
make_scratch() {
    trap 'end_ranks; remove_scratch' EXIT
    scratch=$(mktemp -d -- "${TMPDIR:-/tmp}/aiflux.XXXXXXXX") ||
        give_up "cannot create a private directory under ${TMPDIR:-/tmp} on $HOSTNAME" \
            "set TMPDIR to a writable directory of the node"
    remove_abandoned || return 0 # without flock it is unknown which folders are in use
    # The file is renamed after it is locked: folders without it are never removed.
    exec {lock}>"$scratch/.in-use.new"
    flock -n "$lock"
    mv -- "$scratch/.in-use.new" "$scratch/.in-use"
}

# Removes the directories of jobs killed with SIGKILL on this node; their locks ended with them.
remove_abandoned() {
    local folder
    type -P flock >/dev/null || return 1
    for folder in "${TMPDIR:-/tmp}"/aiflux.*; do
        [[ -O $folder && ! -L $folder && -f $folder/.in-use ]] || continue
        flock -n "$folder/.in-use" rm -rf -- "$folder" 2>/dev/null || true
    done
}

remove_scratch() {
    [[ -z $scratch ]] || rm -rf -- "$scratch"
    scratch=''
}

# bind PATH [ro]: mount at the same path. --mount reads CSV; --bind would split at , and :
bind() {
    local path=${1//\"/\"\"}
    mounts+=(--mount "type=bind,\"source=$path\",\"destination=$path\"${2:+,$2}")
}

# bind_all [ro]: with the models read-only or not. A directory comes before its content.
bind_all() {
    local path
    mounts=()
    # A folder used for both is mounted once, writable.
    if [[ -z $models_dir || $models_dir == "$output_dir" ]]; then
        bind "$output_dir"
    elif [[ $output_dir/ == "$models_dir"/* ]]; then
        bind "$models_dir" "$@"
        bind "$output_dir"
    else
        bind "$output_dir"
        bind "$models_dir" "$@"
    fi
    bind "$input" ro
    [[ -z $engine_ca ]] || bind "$engine_ca" ro
    for path in ${model_paths[@]+"${model_paths[@]}"}; do
        [[ ! -e $path ]] || bind "$path" ro
    done
}

stop_if_asked() {
    ((stopped)) || return 0
    say "stopped by a signal before the work began; run the same job again to resume"
    exit 5
}

# supervise FUNCTION ARGUMENT...: runs it in the background, because bash runs no trap while it
# waits for a command in the foreground.
supervise() {
    stop_if_asked
    (
        trap - INT # ignored in the background otherwise
        "$@"
    ) &
    child=$!
    deliver
    wait_for_child || explain "$?"
}

exec_container() {
    exec "$runtime" --quiet run --containall ${gpu_flags[@]+"${gpu_flags[@]}"} \
        ${seal[@]+"${seal[@]}"} --workdir "$scratch" --pwd "$output_dir" "${mounts[@]}" \
        "$image" "$@"
}

# explain CODE: report failures that the worker cannot report; return the exit code for them.
explain() {
    local code=$1
    if ((code == 255)) && [[ -n $runtime ]]; then
        say "$runtime could not start the container (see its messages above)"
        code=4
    elif ((code > 128 && code < 255)); then
        say "the worker was killed by signal $((code - 128)); if it was 9, memory may have run out: request more with --mem. Results so far are kept"
        code=5
    fi
    return "$code"
}

# --- the container's environment: by name, as --env would split at commas ---------------------

put() {
    export "${prefix}ENV_$1=$2"
}

pass() {
    local name
    for name in "$@"; do
        [[ -z ${!name+set} ]] || put "$name" "${!name}"
    done
}

unpass() {
    local name
    for name in "$@"; do
        unset "${prefix}ENV_$name"
    done
}

proxies=(http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY)

pass_environment() {
    local name id
    # Values are passed unchanged: nothing in them is evaluated.
    export "${prefix}_NO_EVAL=1"
    for name in "${!AIFLUX_@}"; do
        case $name in
            AIFLUX_*_DIR | AIFLUX_IMAGE | AIFLUX_IMAGE_ID | AIFLUX_SITE_CONFIG | AIFLUX_MODELS_FILE | AIFLUX_ENGINE_PROGRAM | AIFLUX_OLLAMA | AIFLUX_*SEALED | AIFLUX_SEAL) ;; # of the host
            *) pass "$name" ;;
        esac
    done
    pass CUDA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES SLURM_JOB_ID SLURM_JOB_NAME SLURM_RESTART_COUNT \
        SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURMD_NODENAME SLURM_CPUS_PER_TASK SLURM_CPUS_ON_NODE \
        SLURM_JOB_GPUS SLURM_JOB_END_TIME
    [[ -z $models_dir ]] || put AIFLUX_MODELS_DIR "$models_dir"
    id=$(image_id)
    [[ -z $id ]] || put AIFLUX_IMAGE_ID "$id"
    put LANG C.UTF-8
}

# The image's own id, as in `apptainer sif header`: 16 bytes after the magic, version and
# architecture of the SIF header.
image_id() {
    local header
    header=$({ od -An -v -tx1 -j32 -N32 -- "$image" | tr -d ' \n'; } 2>/dev/null)
    [[ $header == 5349465f4d41474943* && ${#header} -eq 64 ]] || return 0
    header=${header:32}
    printf '%s-%s-%s-%s-%s' "${header::8}" "${header:8:4}" "${header:12:4}" "${header:16:4}" "${header:20}"
}

# Older versions of Slurm do not export the time at which the job ends (Unix time).
find_end_time() {
    local end
    [[ -z ${SLURM_JOB_END_TIME:-} && -n $job_id ]] || return 0
    end=$(squeue -h -j "$job_id" -o %e 2>/dev/null) || return 0
    [[ $end == [0-9]*T* ]] && SLURM_JOB_END_TIME=$(date -d "$end" +%s)
}

# --- the two steps ----------------------------------------------------------------------------

# With the network, the models directory writable.
prepare() {
    seal=()
    unpass AIFLUX_SEALED AIFLUX_UNSEALED
    pass "${proxies[@]}"
    [[ -z $models_dir ]] || mkdir -p -- "$models_dir" ||
        give_up "cannot create the models directory $models_dir" "set AIFLUX_MODELS_DIR"
    bind_all
    supervise exec_container "${prepare_args[@]}" ${deadline[@]+"${deadline[@]}"}
}

# Loopback only, if the node supports that and the engine is in the container.
choose_seal() {
    local words
    if [[ -z $models_dir ]]; then
        unsealed='the engine is elsewhere'
    elif ((!want_seal)); then
        unsealed='--no-seal'
    elif ((nodes > 1)); then
        unsealed='--nodes-per-engine: the ranks of the engine use the network between the nodes'
        say "not sealed: $unsealed"
    elif words=$("$runtime" exec --containall --pwd / --net --network none "$image" true 2>&1); then
        seal=(--net --network none)
    else
        unsealed="this node cannot isolate a container from the network (${words##*$'\n'})"
        say "not sealed: $unsealed"
    fi
}

# supervise_work FUNCTION: runs the worker with it.
supervise_work() {
    stop_if_asked
    rm -f -- "$mark"
    supervise "$1" --run-dir "$run_dir" --shard "$shard" ${deadline[@]+"${deadline[@]}"} \
        ${ranks:+--ranks /tmp}
}

work() {
    local code
    stop_if_asked
    unpass "${proxies[@]}"
    # The runtime passes the host's proxies even to a clean environment.
    unset "${proxies[@]}" all_proxy ALL_PROXY ftp_proxy FTP_PROXY
    choose_seal
    if [[ -z $unsealed ]]; then
        put AIFLUX_SEALED 1
    else
        put AIFLUX_SEALED 0
        put AIFLUX_UNSEALED "$unsealed"
    fi
    bind_all ro
    start_ranks
    supervise_work exec_container
    code=$?
    end_ranks
    return "$code"
}

# --- the other nodes of an engine: see aiflux/engines/ranks.py ----------------------------------

# The worker, which opens the pipes, sees them in /tmp.
start_ranks() {
    ((nodes > 1)) || return 0
    mkdir -p -- "$scratch/tmp"
    keep_ranks &
    ranks=$!
}

# Runs a step on the other nodes whenever the worker opens the pipes, so also after a step that
# ended early. Each has new pipes: an old one would not end for the worker if it were opened again
# at once. The worker opens the orders first. The batch script runs on the first node, number 0.
# Its copy is on that node only, and the run directory may have another one by now: its text goes.
keep_ranks() {
    local step others=$((nodes - 1))
    trap '' HUP INT USR1
    unset SLURM_LABELIO SLURM_STDINMODE SLURM_STDOUTMODE # srun would change what it copies
    while :; do
        trap - TERM
        rm -f -- "$scratch/tmp/orders" "$scratch/tmp/reports"
        mkfifo -m 0600 -- "$scratch/tmp/reports" "$scratch/tmp/orders" || return
        exec {orders}<"$scratch/tmp/orders" {reports}>"$scratch/tmp/reports"
        : >"$scratch/step"
        srun --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --relative=1 --export=ALL \
            --mpi=none --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
            bash -c "$(<"${BASH_SOURCE[0]}")" bash rank <&"$orders" >&"$reports" &
        step=$!
        trap 'kill "$step" 2>/dev/null; wait "$step"; rm -f -- "$scratch/step"; exit' TERM
        exec {orders}<&- {reports}>&-
        wait "$step"
        rm -f -- "$scratch/step"
    done
}

# After the worker: the step, whose orders it ended, gets a moment to end by itself.
end_ranks() {
    local tries
    [[ -n $ranks ]] || return 0
    for ((tries = 0; tries < 100; tries++)); do
        [[ -e $scratch/step ]] || break
        kill -0 "$ranks" 2>/dev/null || break
        sleep 0.1
    done
    kill "$ranks" 2>/dev/null
    wait "$ranks"
    ranks=''
}

# On another node: standard input and output belong to the worker's orders and reports.
run_rank() {
    trap '' TERM HUP INT USR1 # the worker decides when to stop
    exec {orders}<&0 {reports}>&1 </dev/null >&2
    load_modules
    site_setup
    choose_gpus
    find_runtime
    refuse_other_image
    make_scratch
    pass_environment
    bind_all ro
    (exec_container --rank "$((SLURM_PROCID + 1))" --first "$SLURM_LAUNCH_NODE_IPADDR") \
        <&"$orders" >&"$reports"
}

# --- without an image: the worker of the installed package, next to the site's programs ----------

refuse_missing_worker() {
    local words
    words=$(cd / && "${worker[@]}" --version 2>&1) || give_up \
        "the worker cannot run on $HOSTNAME (${words##*$'\n'})" \
        "install AI-Flux where every node sees it, and submit again from there"
}

# The modules of the site can be for another Python than the worker's: the worker gets what
# `aiflux run` had, and its engines get these back.
hide_libraries() {
    local name
    for name in "${libraries[@]}"; do
        export "AIFLUX_JOB_$name=${!name-}"
        unset "$name"
    done
    export AIFLUX_JOB_DIR=$PWD AIFLUX_SEALED=0
    export AIFLUX_UNSEALED='--engine-command: there is no container'
}

# The private directory keeps Python from importing files of the current one.
exec_worker() {
    cd -- "$scratch" || exit
    export TMPDIR=$scratch
    exec "${worker[@]}" "$@"
}

# --- requeueing -------------------------------------------------------------------------------

# Only if the worker requests it and the job is not to end: Slurm itself requeues a preempted
# job, and a cancelled one must stay cancelled.
requeue() {
    local words code
    ((max_requeues > 0 && !stopped)) && [[ -n $job_id && -e $mark ]] || return 0
    rm -f -- "$mark"
    # As soon as the job is requeued, Slurm sends SIGTERM to everything that still runs: rm, and
    # even scontrol itself.
    remove_scratch
    say "the time is up; job $job_id goes back to the queue and will resume"
    words=$(scontrol requeue "$job_id" 2>&1)
    code=$?
    ((code != 0 && code <= 128 && !stopped)) || return 0
    printf 'error: Slurm did not requeue job %s: %s\n  -> %s %q\n' "$job_id" "${words##*$'\n'}" \
        "results so far are kept; resume the run with: aiflux resume" "$run_dir" >&2
}

main() {
    local code
    trap 'on_signal TERM' TERM
    trap 'on_signal INT' INT
    trap 'on_signal HUP' HUP
    trap 'on_signal USR1' USR1
    plan_the_step || exit
    load_modules
    site_setup
    choose_gpus
    if ((${#worker[@]})); then
        hide_libraries
        refuse_missing_worker
    else
        find_runtime
        refuse_other_image
    fi
    make_scratch
    find_end_time
    [[ -z ${SLURM_JOB_END_TIME:-} ]] || deadline=(--deadline "$SLURM_JOB_END_TIME")
    if ((${#worker[@]})); then
        supervise_work exec_worker
    else
        pass_environment
        prepare || exit
        [[ -n $run_dir ]] || return 0
        work
    fi
    code=$?
    ((code != 5)) || requeue
    return "$code"
}

if ((nodes > 1)) && [[ ${1:-} == rank ]]; then
    run_rank
else
    main
fi
