# Sourced by recipes: `launch flags...` trains on NNODES machines of GPUS devices in steps of GLOBAL_BATCH pairs;
# accumulation follows from them. DRY=1 prints the command. From the recipe or the environment, with defaults:
#   GLOBAL_BATCH, PER_DEVICE    pairs per optimizer step, pairs per forward
#   GPUS or GPUS_PER_NODE (1)   devices of each machine. Slurm's count is taken only where the recipe says so (tulu3): the
#                               others have a count of their own, which an allocation does not change.
#   NNODES (SLURM_NNODES or 1)  machines; run the recipe once on each (srun, one task per node)
#   NODE_RANK (SLURM_NODEID or 0), MASTER_ADDR (first of SLURM_JOB_NODELIST), MASTER_PORT (29500, or one of SLURM_JOB_ID's
#                               own, since two jobs may share a node)    who is who of several
#   OMP_NUM_THREADS (cores of the machine / GPUS, where there are several ranks)    torchrun would set 1, and AdamW would update
#                               what is offloaded to the CPU on one thread a rank
#   TORCH_NCCL_DUMP_ON_TIMEOUT (1), TORCH_FR_BUFFER_SIZE (2000)    a rank whose collective times out writes the last 2000 to
#                               ~/.cache/torch/comm_lib_trace_rank_RANK, from which `torchfrtrace` tells who was missing
#   RESTARTS (0)                how often a run that broke is started again; only while each attempt saves a checkpoint
# Nodes wait an hour for each other: one may still install or download when the others are ready; torchrun's own 15 minutes
# are short for that.
# TERM, INT and USR1 are passed on to the training, which saves a checkpoint and ends. The status is 75 where the same
# command goes on from there, else the training's own. Under torchrun that is 1 for all that goes wrong, so what counts is
# the checkpoint.
source scripts/environment.sh

launch() {
    local number per_forward hosts port command
    NNODES=${NNODES:-${SLURM_NNODES:-1}}
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
    GPUS=${GPUS:-${GPUS_PER_NODE:-1}}     # recipes preset GPUS_PER_NODE, so that either name from the user wins
    GPUS=${GPUS##*:}                      # Slurm may write gpu:8
    for number in "$GLOBAL_BATCH" "$PER_DEVICE" "$NNODES" "$GPUS"; do
        if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
            echo "error: GLOBAL_BATCH, PER_DEVICE, NNODES and GPUS are counts of 1 or more, not '$number'" >&2
            exit 1
        fi
    done
    if ! [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] || (( NODE_RANK >= NNODES )); then
        echo "error: NODE_RANK is a number from 0 to NNODES-1 = $((NNODES - 1)), not '$NODE_RANK'" >&2
        exit 1
    fi
    per_forward=$((PER_DEVICE * NNODES * GPUS))
    if (( GLOBAL_BATCH % per_forward != 0 )); then
        echo "error: GLOBAL_BATCH=$GLOBAL_BATCH is not a multiple of PER_DEVICE x NNODES x GPUS = $per_forward" >&2
        exit 1
    fi
    RESTARTS=${RESTARTS:-0}
    if ! [[ $RESTARTS =~ ^(0|[1-9][0-9]*)$ ]]; then
        echo "error: RESTARTS is a count of 0 or more, not '$RESTARTS'" >&2
        exit 1
    fi
    command=(-m)
    if (( NNODES > 1 )); then
        if [[ ${SLURM_NTASKS_PER_NODE:-1} != 1 ]]; then
            echo "error: each node runs this once and starts its $GPUS ranks; ask Slurm for --ntasks-per-node=1," \
                "not $SLURM_NTASKS_PER_NODE" >&2
            exit 1
        fi
        if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} ]]; then
            # not `| head`: under pipefail a long list cut short is an error; a container may have no scontrol
            hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null) || hosts=""
            MASTER_ADDR=${hosts%%$'\n'*}
        fi
        if [[ -z ${MASTER_ADDR:-} && ${DRY:-0} != 1 ]]; then
            echo "error: MASTER_ADDR is not set; export the address of the first of the $NNODES nodes on every node" >&2
            exit 1
        fi
        command=(-m torch.distributed.run --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS")
        command+=(--rdzv_conf timeout=3600)
        port=29500
        [[ -z ${SLURM_JOB_ID:-} ]] || port=$((20000 + SLURM_JOB_ID % 12000))  # below those that Linux gives out itself
        command+=(--master_addr "${MASTER_ADDR:-MASTER_ADDR}" --master_port "${MASTER_PORT:-$port}" -m)
    elif (( GPUS > 1 )); then
        command=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS" -m)
    fi
    command+=(open_rm.reward_modeling --per_device_train_batch_size "$PER_DEVICE")
    command+=(--gradient_accumulation_steps $((GLOBAL_BATCH / per_forward)) "$@")
    if [[ ${DRY:-0} == 1 ]]; then
        printf '%q ' python "${command[@]}"; echo
        exit
    fi
    set_up_python requirements.txt
    if [[ ${command[1]} == torch.distributed.run ]]; then prepare_ranks; fi
    train_to_the_end "$(output_folder "$@")" "${command[@]}"
}

prepare_ranks() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > GPUS ? cores / GPUS : 1))}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
}

output_folder() {  # the value of the last --output_dir among these flags, else that of their --config file, or nothing
    local flag value="" config="" next=0
    for flag in "$@"; do
        if (( next == 1 )); then value=$flag; elif (( next == 2 )); then config=$flag; fi
        next=0
        case $flag in
            --output_dir | --output-dir) next=1 ;;
            --output_dir=* | --output-dir=*) value=${flag#*=} ;;
            --config) next=2 ;;
            --config=*) config=${flag#*=} ;;
        esac
    done
    if [[ -z $value && -n $config && -r $config ]]; then
        value=$(sed -n 's/^output[_-]dir: *//p' "$config")
        value=${value//[\"\']/}
    fi
    if [[ $value == '~'/* ]]; then value=$HOME${value#'~'}; fi
    echo "$value"
}

latest_checkpoint() {  # prints the name of output folder $1's newest checkpoint, or nothing
    find_latest "$1"
    [[ -z $latest ]] || echo "$latest"
}

# The same as `latest`. Starts no process, here as in pass_on: Slurm may signal every process of a step, which ends one that
# is no script with traps.
find_latest() {
    local folder
    latest=""
    [[ -n $1 ]] || return 0
    for folder in "$1"/checkpoints/step_*; do
        folder=${folder##*/}
        [[ $folder =~ ^step_[0-9]+$ ]] || continue  # one in .tmp is still written to
        if [[ -z $latest || 10#${folder#step_} -gt 10#${latest#step_} ]]; then latest=$folder; fi
    done
}

newer_checkpoint() {  # does output folder $1 hold a checkpoint newer than the one named $2 (empty: any)? Sets latest.
    find_latest "$1"
    [[ -n $latest && ( -z $2 || 10#${latest#step_} -gt 10#${2#step_} ) ]]
}

# Run python with $2... until it has finished, was told to stop or broke once too often; exits with the status.
train_to_the_end() {
    local folder=$1 at_first at_start status attempt=0 arguments i
    shift
    arguments=("$@")
    if (( RESTARTS > 0 )) && [[ -z $folder ]]; then
        echo "RESTARTS=$RESTARTS has no effect without --output_dir: a second attempt would not find the first one" >&2
        RESTARTS=0
    fi
    child="" child_status=1 told="" uses_torchrun=0
    if [[ $2 == torch.distributed.run ]]; then uses_torchrun=1; fi
    trap 'stop TERM' TERM HUP  # a closed terminal is no reason to lose the run
    trap 'stop INT' INT
    trap 'stop USR1' USR1
    if [[ -t 0 ]]; then exec < /dev/null; fi  # who reads a terminal from the background hangs
    find_latest "$folder"
    at_first=$latest
    while true; do
        at_start=$latest
        run_child "${arguments[@]}"
        status=$child_status
        (( status != 0 )) || exit 0
        if [[ -n $told ]]; then
            # Torchrun turns the 75 of a run that was stopped while it loaded into 1; it goes on from what it found.
            if newer_checkpoint "$folder" "$at_first"; then status=75
            elif (( uses_torchrun )) && [[ -n $latest ]]; then status=75; fi
            break
        fi
        (( status != 75 && RESTARTS > 0 )) || break
        if ! newer_checkpoint "$folder" "$at_start"; then
            echo "the run ended with status $status and without a new checkpoint, so it is not started again" >&2
            break
        fi
        (( ++attempt <= RESTARTS )) || break
        echo "the run ended with status $status after $latest; restart $attempt of $RESTARTS" >&2
        for i in "${!arguments[@]}"; do
            # a node that is back early would join what the first node still has of the last attempt
            if [[ ${arguments[i]} == --master_port ]]; then arguments[i + 1]=$((arguments[i + 1] + 100)); fi
        done
    done
    if (( status == 75 )) && [[ -n $folder ]]; then
        find_latest "$folder"
        echo "stopped${latest:+ at $latest}; the same command goes on from there" >&2
    fi
    exit "$status"
}

# Start python with these arguments and wait until it has ended, whatever signals come meanwhile.
run_child() {
    [[ -z $told ]] || return 0    # told to stop between two attempts; the status is the last one's
    set -m  # a process group of its own: Ctrl-C at a terminal reaches this script alone, and is passed on once
    if (( uses_torchrun )); then
        # Torchrun's agent gives its ranks 30 s after a signal, too short for a large checkpoint, and USR1 ends it; where
        # Slurm signals every process of a step, that is the agent too. So it is deaf to the three. Its ranks start deaf
        # as well, until they listen. (A torch that does not know the setting keeps its handlers of TERM and INT.)
        (trap '' TERM INT USR1; PET_SIGNALS_TO_HANDLE=SIGHUP,SIGQUIT exec "$PYTHON" "$@") &
    else
        "$PYTHON" "$@" &
    fi
    child=$!
    set +m
    [[ -z $told ]] || pass_on "$told"  # it came when there was no child yet
    interrupted=1
    while (( interrupted )); do
        interrupted=0 child_status=0
        wait "$child" 2>/dev/null || child_status=$?    # a trap ends it early; asked again, it has the real status
    done
}

stop() {
    interrupted=1
    if [[ -z $told ]]; then
        echo "SIG$1: passed on to the training, which saves a checkpoint and ends; a second signal ends it at once" >&2
    fi
    told=$1
    pass_on "$1"
}

# Signal $1 to the ranks: torchrun's children, or the one python. A rank that does not listen yet (to TERM, number 15) has
# nothing to save and would stay deaf, so a run of torchrun in which none listens is hung up on (HUP); so is one whose
# ranks are not to be found, for want of /proc.
pass_on() {
    local file line parent name value listening=0
    [[ -n $child ]] || return 0
    if (( ! uses_torchrun )); then
        kill -s "$1" "$child" 2>/dev/null || true
        return 0
    fi
    for file in /proc/[0-9]*; do
        read -r line 2>/dev/null < "$file/stat" || continue
        parent=${line##*) ? }    # after the name in brackets and the state
        [[ ${parent%% *} == "$child" ]] || continue
        while read -r name value; do
            if [[ $name == SigCgt: ]] && (( 16#$value >> 14 & 1 )); then
                kill -s "$1" "${file#/proc/}" 2>/dev/null && listening=1
            fi
        done 2>/dev/null < "$file/status" || true
    done
    (( listening )) || kill -s HUP "$child" 2>/dev/null || true
}
