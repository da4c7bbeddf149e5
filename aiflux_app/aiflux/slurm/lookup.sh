# shellcheck shell=bash disable=SC2034
# Usage: sbatch [SBATCH OPTIONS] slurm/run.sbatch INPUT [OUTPUT] [WORKER OPTIONS]
#   INPUT    requests, OpenAI Batch JSONL
#   OUTPUT   *.json or *.jsonl; INPUT's stem and .results.json in the current directory by default
#   options  of the worker, such as --model llama3.2:3b; and --no-seal or --seal
# Environment: AIFLUX_IMAGE, AIFLUX_MODELS_DIR, AIFLUX_DATA_DIR, AIFLUX_CONTAINERS_DIR, AIFLUX_SEAL,
# AIFLUX_GPU_VENDOR and what `aiflux run` reads for a run (MODEL_NAME, TEMPERATURE, ...).

# usage ERROR [REMEDY]
usage() {
    printf 'error: %s\n  -> %s\n' "$1" \
        "${2:-usage: sbatch slurm/run.sbatch INPUT.jsonl [OUTPUT.json|OUTPUT.jsonl] [--model NAME:TAG ...]}" >&2
    exit 2
}

# Directory in which sbatch was called: relative paths refer to it.
submit_dir=${SLURM_SUBMIT_DIR:-$PWD}
input='' output='' image='' models_dir=''

# absolute VARIABLE PATH: the path, not resolved.
absolute() {
    case $2 in
        *$'\n'*) usage "a path holds a line break: $2" ;;
        /*) printf -v "$1" %s "$2" ;;
        *) printf -v "$1" %s "${submit_dir%/}/$2" ;;
    esac
}

# The checkout of this script: Slurm runs a copy and shows its origin.
checkout() {
    local line
    [[ -n ${SLURM_JOB_ID:-} ]] || return 0
    while IFS= read -r line; do
        [[ $line == *Command=*/slurm/run.sbatch* ]] || continue
        line=${line#*Command=}
        printf '%s\n' "${line%%/slurm/run.sbatch*}"
        return
    done < <(scontrol show job "$SLURM_JOB_ID" 2>/dev/null)
}

find_image() {
    local here name=aiflux make="make image ENGINE=$engine"
    [[ $engine == ollama ]] || name+=-$engine
    [[ $gpu_vendor != amd ]] || name+=-amd make+=' GPU=amd'
    name+=.sif
    if [[ -n ${AIFLUX_IMAGE:-} ]]; then
        absolute image "$AIFLUX_IMAGE"
        [[ -e $image ]] || usage "AIFLUX_IMAGE names $image, which does not exist" "correct AIFLUX_IMAGE, or unset it"
        return
    fi
    here=$(checkout)
    for image in "$submit_dir/$name" ${here:+"$here/$name"} \
        "${AIFLUX_CONTAINERS_DIR:-$data_dir/containers}/$name"; do
        absolute image "$image"
        [[ ! -e $image ]] || return 0
    done
    usage "there is no image $name in $submit_dir${here:+, $here} or ${image%/*}" \
        "$make; or set AIFLUX_IMAGE=/path/to/$name"
}

[[ $# -gt 0 ]] || usage 'no input given'
absolute input "$1"
[[ -f $input && -r $input ]] || usage "the input $input is not a file that can be read"
shift

if [[ $# -gt 0 && $1 != --* ]]; then
    absolute output "$1"
    shift
else
    output=${input##*/}
    [[ $output != ?*.@(gz|gzip|zst|zstd) ]] || output=${output%.*}
    [[ $output != ?*.* ]] || output=${output%.*}
    absolute output "$output.results.json"
fi
output_dir=${output%/*}
[[ -d ${output_dir:=/} ]] || usage "the output's folder $output_dir is not there"
run_dir=$output.aiflux
shard=0
max_requeues=20
nodes=1

data_dir=${AIFLUX_DATA_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/aiflux}
absolute models_dir "${AIFLUX_MODELS_DIR:-$data_dir/models}"
case ${AIFLUX_SEAL:-yes} in
    [Tt][Rr][Uu][Ee] | [Yy][Ee][Ss] | [Oo][Nn] | 1) want_seal=1 ;;
    [Ff][Aa][Ll][Ss][Ee] | [Nn][Oo] | [Oo][Ff][Ff] | 0) want_seal=0 ;;
    *) usage "AIFLUX_SEAL is '$AIFLUX_SEAL'" "it must be true or false" ;;
esac
gpu_vendor=${AIFLUX_GPU_VENDOR:-auto}
case $gpu_vendor in
    auto | nvidia | amd) ;;
    *) usage "AIFLUX_GPU_VENDOR is '$gpu_vendor'" "it must be auto, nvidia or amd" ;;
esac
engine_url=${AIFLUX_ENGINE_URL:-} engine_ca=${AIFLUX_ENGINE_CA:-}
engine=${AIFLUX_ENGINE:-ollama} engine_command=${AIFLUX_ENGINE_COMMAND:-}
worker=() libraries=() worker_options=() model_paths=()
before=''
for argument in "$@"; do
    [[ $before != --engine-ca ]] || engine_ca=$argument
    [[ $before != --engine ]] || engine=$argument
    # The absolute path of a model, for engines that use paths.
    [[ $before != --model || $argument != /* ]] || model_paths+=("$argument")
    [[ $before != --lora || $argument != *=/* ]] || model_paths+=("${argument#*=}")
    before=$argument
    case $argument in
        --engine-ca=*) engine_ca=${argument#*=} ;;
        --engine=*) engine=${argument#*=} ;;
        --model=/*) model_paths+=("${argument#*=}") ;;
        --lora=*=/*) argument_path=${argument#*=} model_paths+=("${argument_path#*=}") ;;
        --no-seal) want_seal=0 && continue ;;
        --seal) want_seal=1 && continue ;;
        --engine-url*) engine_url=$argument ;;
        --engine-command*) engine_command=$argument ;;
    esac
    worker_options+=("$argument")
done
[[ -z $engine_command ]] || usage '--engine-command runs without an image, and this script needs one' \
    "use: aiflux run --engine-command ...; or leave it and AIFLUX_ENGINE_COMMAND out"
read -ra adapters <<<"${AIFLUX_LORA:-}"
for argument in ${adapters[@]+"${adapters[@]}"}; do
    [[ $argument != *=/* ]] || model_paths+=("${argument#*=}")
done
if [[ -n $engine_url ]]; then models_dir=''; else engine_ca=''; fi
[[ -z $engine_url && $engine =~ ^[a-z]+$ ]] || engine=ollama # the worker says what is wrong
find_image
prepare_args=("$input" "$output" --prepare ${worker_options[@]+"${worker_options[@]}"})
if [[ -n $engine_ca ]]; then
    absolute engine_ca "$engine_ca"
    [[ -r $engine_ca ]] || usage "--engine-ca names $engine_ca, which cannot be read" "correct it, or leave it out"
    prepare_args+=(--engine-ca "$engine_ca")
fi

# Settings of a run; the plan keeps them.
for name in MODEL_NAME BATCH_SIZE SAVE_FREQUENCY MAX_RETRIES RETRY_DELAY MAX_TOKENS TEMPERATURE \
    TOP_P TOP_K LOG_LEVEL; do
    [[ -z ${!name+set} ]] || export "APPTAINERENV_$name=${!name}" "SINGULARITYENV_$name=${!name}"
done
