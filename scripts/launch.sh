# Sourced by recipes for one machine: `launch flags...` runs the recipe on GPUS devices in steps of GLOBAL_BATCH pairs.
# GPUS (1), PER_DEVICE (pairs a forward) and GLOBAL_BATCH come from the recipe or the environment; DRY=1 prints the command.
source scripts/environment.sh

launch() {
    local number per_forward command
    GPUS=${GPUS:-1}
    for number in "$GLOBAL_BATCH" "$PER_DEVICE" "$GPUS"; do
        if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
            echo "error: GLOBAL_BATCH, PER_DEVICE and GPUS are counts of 1 or more, not '$number'" >&2
            exit 1
        fi
    done
    per_forward=$((PER_DEVICE * GPUS))
    if (( GLOBAL_BATCH % per_forward != 0 )); then
        echo "error: GLOBAL_BATCH=$GLOBAL_BATCH is not a multiple of PER_DEVICE x GPUS = $per_forward" >&2
        exit 1
    fi
    command=(-m)
    (( GPUS > 1 )) && command=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS" -m)
    command+=(open_rm.reward_modeling --per_device_train_batch_size "$PER_DEVICE")
    command+=(--gradient_accumulation_steps $((GLOBAL_BATCH / per_forward)) "$@")
    if [[ ${DRY:-0} == 1 ]]; then
        printf '%q ' python "${command[@]}"; echo
        exit
    fi
    set_up_python requirements.txt
    exec "$PYTHON" "${command[@]}"
}
