# Sourced by recipes: `launch flags...` trains on NNODES machines of GPUS devices in steps of GLOBAL_BATCH pairs;
# accumulation follows from them. DRY=1 prints the command. From the recipe or the environment, with defaults:
#   GLOBAL_BATCH, PER_DEVICE    pairs per optimizer step; pairs per forward, at most a device's share of the step
#   GPUS or GPUS_PER_NODE (1)   devices of each machine
#   NNODES (1), NODE_RANK (0), MASTER_ADDR, MASTER_PORT (29500)    who is who of several machines, the first of which the
#                               others meet; run the recipe once on each. Under Slurm and Kubernetes theirs: nodes.sh
#   RANK_LOGS                   folder in which each rank's output is a file of its own:
#                               node_NODE_RANK/START/.../LOCAL_RANK/stdout.log and stderr.log. This script's own output keeps
#                               all of the node's first rank and the stderr of the others.
#   RESTARTS (0)                how often a run that broke is started again; only while each attempt saves a checkpoint
#   OMP_NUM_THREADS (cores of the machine / GPUS, where there are several ranks)    torchrun would set 1, and AdamW would update
#                               what is offloaded to the CPU on one thread a rank
#   TORCH_NCCL_DUMP_ON_TIMEOUT (1), TORCH_FR_BUFFER_SIZE (2000)    a rank whose collective times out writes the last 2000 to
#                               ~/.cache/torch/comm_lib_trace_rank_RANK, from which `torchfrtrace` tells who was missing
# A recipe that defines `make_inputs` has it called before the training, on each node, once python is set up.
#
# With --dry_run among the flags nothing is trained: one python says what would be, for all NNODES x GPUS devices or for
# --world_size of them. Signals, statuses and restarts: supervise.sh.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    echo "error: launch.sh is sourced by recipes; run one of scripts/train, such as scripts/train/debug/reward_modeling.sh" >&2
    exit 1
fi
source scripts/environment.sh
source scripts/nodes.sh
source scripts/supervise.sh

launch() {
    local devices source="NNODES x GPUS" asked="" is_dry=0 command
    NNODES=${NNODES:-1}
    GPUS=${GPUS:-${GPUS_PER_NODE:-1}}     # recipes preset GPUS_PER_NODE, so that either name from the user wins
    GPUS=${GPUS##*:}                      # Slurm may write gpu:8
    RESTARTS=${RESTARTS:-0}
    check_counts
    devices=$((NNODES * GPUS))
    command=(-m)
    if is_true "$(flag_value dry_run "$@")"; then
        is_dry=1
        asked=$(flag_value world_size "$@")
        if [[ $asked =~ ^[1-9][0-9]*$ ]]; then devices=$asked source=--world_size; fi
    else
        check_node_rank
    fi
    share_the_step "$devices" "$source"
    if (( ! is_dry && NNODES * GPUS > 1 )); then start_ranks; fi
    command+=(open_rm.reward_modeling --per_device_train_batch_size "$PER_DEVICE")
    command+=(--gradient_accumulation_steps $((GLOBAL_BATCH / (PER_DEVICE * devices))))
    if (( is_dry )); then command+=(--world_size "$devices"); fi
    command+=("$@")
    if [[ ${DRY:-0} == 1 ]]; then
        printf '%q ' python "${command[@]}"; echo
        exit
    fi
    if (( ! is_dry )); then check_gpus; fi
    forget_the_group
    set_up_python requirements.txt
    if [[ $(type -t make_inputs) == function ]]; then make_inputs; fi
    if (( is_dry )); then
        # the devices of a node, as torchrun says them; beside --world_size a GPUS of 1 is no word about nodes
        if [[ -z $asked ]] || (( GPUS > 1 )); then export LOCAL_WORLD_SIZE=$((GPUS < devices ? GPUS : devices)); fi
        exec "$PYTHON" "${command[@]}"
    fi
    if [[ ${command[1]} == torch.distributed.run ]]; then prepare_ranks; fi
    train_to_the_end "$(output_folder "$@")" "${command[@]}"
}

check_counts() {
    local number
    for number in "$GLOBAL_BATCH" "$PER_DEVICE" "$NNODES" "$GPUS"; do
        if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
            echo "error: GLOBAL_BATCH, PER_DEVICE, NNODES and GPUS are counts of 1 or more, not '$number'" >&2
            exit 1
        fi
    done
    if ! [[ $RESTARTS =~ ^(0|[1-9][0-9]*)$ ]]; then
        echo "error: RESTARTS is a count of 0 or more, not '$RESTARTS'" >&2
        exit 1
    fi
}

# Lowers PER_DEVICE to what is left for each of $1 devices, a count that comes from $2; refuses what has no whole share.
share_the_step() {
    local share=$((GLOBAL_BATCH / $1))
    if (( GLOBAL_BATCH % $1 == 0 && PER_DEVICE > share )); then
        echo "PER_DEVICE=$share in place of $PER_DEVICE: each of $1 devices has $share of the $GLOBAL_BATCH pairs of a step" >&2
        PER_DEVICE=$share
    fi
    if (( GLOBAL_BATCH % (PER_DEVICE * $1) != 0 )); then
        echo "error: GLOBAL_BATCH=$GLOBAL_BATCH is not a multiple of PER_DEVICE x $2 = $PER_DEVICE x $1" >&2
        exit 1
    fi
}

start_ranks() {  # puts torchrun, which starts the ranks of this machine, into the command
    local rank tee=0:3
    command=(-m torch.distributed.run)
    if (( NNODES > 1 )); then
        find_master
        command+=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$GPUS")
        # Nodes wait an hour for each other: one may still install or download when the others are ready; torchrun's own 15
        # minutes are short for that.
        command+=(--rdzv_conf timeout=3600 --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    else
        command+=(--standalone --nproc_per_node "$GPUS")
    fi
    if [[ -n ${RANK_LOGS:-} ]]; then
        for (( rank = 1; rank < GPUS; rank++ )); do tee+=,$rank:2; done
        command+=(--redirects 3 --tee "$tee" --log_dir "$(logs_of_a_start)")
    fi
    command+=(-m)
}

logs_of_a_start() {
    echo "${RANK_LOGS%/}/node_$NODE_RANK/$(date +%Y%m%d_%H%M%S)"
}

prepare_ranks() {
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > GPUS ? cores / GPUS : 1))}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1} TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    if [[ -n ${RANK_LOGS:-} ]]; then
        # what a rank printed before it was killed is in its file; a line in this one says whose it is
        export PYTHONUNBUFFERED=1
        export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:-'[rank ${rank}] '}
    fi
}

# The value of flag $1 among the words behind it: the last one's, else that of their --config file, or nothing. A flag without
# one is true, and false as --no_NAME.
flag_value() {
    local name=$1 word key given value="" config=""
    shift
    while (( $# )); do
        word=$1
        shift
        [[ $word == --* ]] || continue
        key=${word#--} key=${key%%=*} key=${key//-/_}
        if [[ $word == *=* ]]; then given=${word#*=}
        elif (( $# )) && [[ $1 != --* ]]; then given=$1
        else given=true; fi
        case $key in
            "$name") value=$given ;;
            "no_$name") value=false ;;
            config) config=$given ;;
        esac
    done
    if [[ -z $value && -n $config && -r $config ]]; then
        value=$(sed -n -e "/^${name//_/[_-]}:/{" -e 's/^[^:]*: *//' -e 's/ #.*//' -e 's/ *$//' -e p -e '}' "$config")
        value=${value//[\"\']/}
    fi
    echo "$value"
}

is_true() {  # is this a flag's value other than false, in whatever case? What is neither is refused by the recipe itself.
    [[ -n $1 && ! $1 =~ ^([Ff][Aa][Ll][Ss][Ee]|[Nn][Oo]|[Oo][Ff][Ff])$ ]]
}

output_folder() {  # of these flags, or nothing
    local folder
    folder=$(flag_value output_dir "$@")
    if [[ $folder == '~'/* ]]; then folder=$HOME${folder#'~'}; fi
    echo "$folder"
}
