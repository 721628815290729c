# Sourced by recipes: `launch flags...` trains on NNODES machines of GPUS devices in steps of GLOBAL_BATCH pairs;
# accumulation follows from them. DRY=1 prints the command. From the recipe or the environment, with defaults:
#   GLOBAL_BATCH, PER_DEVICE    pairs per optimizer step, pairs per forward
#   GPUS or GPUS_PER_NODE (1)   devices of each machine. Slurm's count is taken only where the recipe says so (tulu3): the
#                               others have a count of their own, which an allocation does not change.
#   NNODES (SLURM_NNODES or 1)  machines; run the recipe once on each (srun, one task per node)
#   NODE_RANK (SLURM_NODEID or 0), MASTER_ADDR (first of SLURM_JOB_NODELIST), MASTER_PORT (29500)    who is who of several
source scripts/environment.sh

launch() {
    local number per_forward hosts command
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
    command=(-m)
    if (( NNODES > 1 )); then
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
        command+=(--master_addr "${MASTER_ADDR:-MASTER_ADDR}" --master_port "${MASTER_PORT:-29500}" -m)
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
    exec "$PYTHON" "${command[@]}"
}
