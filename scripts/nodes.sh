# Sourced by launch.sh: which machine of how many this is, as whoever started it says. The first that is set wins:
#   by hand       Kubernetes (PyTorchJob, TrainJob)    Slurm
#   NNODES        PET_NNODES                           SLURM_NNODES
#   NODE_RANK     PET_NODE_RANK                        SLURM_NODEID
#   MASTER_ADDR   PET_MASTER_ADDR                      the first host of SLURM_JOB_NODELIST
#   MASTER_PORT   PET_MASTER_PORT                      one of SLURM_JOB_ID's own, since two jobs may share a node
#   GPUS          PET_NPROC_PER_NODE, if a number      only where the recipe says so (tulu3): the others have a count of their
#                                                      own, which an allocation does not change
NNODES=${NNODES:-${PET_NNODES:-${SLURM_NNODES:-}}}
NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-${SLURM_NODEID:-0}}}
MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-}}
if [[ ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]]; then GPUS=${GPUS:-$PET_NPROC_PER_NODE}; fi
check_node_rank() {
    if ! [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] || (( NODE_RANK >= NNODES )); then
        echo "error: NODE_RANK is a number from 0 to NNODES-1 = $((NNODES - 1)), not '$NODE_RANK'" >&2
        exit 1
    fi
}

find_master() {  # sets MASTER_ADDR and MASTER_PORT where several machines have to meet
    local hosts
    if [[ ${SLURM_NTASKS_PER_NODE:-1} != 1 ]]; then
        echo "error: each node runs this once and starts its $GPUS ranks; ask Slurm for --ntasks-per-node=1," \
            "not $SLURM_NTASKS_PER_NODE" >&2
        exit 1
    fi
    if [[ -z $MASTER_ADDR && -n ${SLURM_JOB_NODELIST:-} ]]; then
        # not `| head`: under pipefail a long list cut short is an error; a container may have no scontrol
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null) || hosts=""
        MASTER_ADDR=${hosts%%$'\n'*}
    fi
    if [[ -z $MASTER_ADDR && ${DRY:-0} != 1 ]]; then
        echo "error: MASTER_ADDR is not set; export the address of the first of the $NNODES nodes on every node" >&2
        exit 1
    fi
    MASTER_ADDR=${MASTER_ADDR:-MASTER_ADDR}
    if [[ -z $MASTER_PORT ]]; then
        MASTER_PORT=29500
        # below those that Linux gives out itself
        [[ -z ${SLURM_JOB_ID:-} ]] || MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
    fi
}

# Refuse more ranks than the machine has GPUs, where nvidia-smi tells. A machine without any computes on its CPU.
check_gpus() {
    local listed has where="nvidia-smi -L"
    if (( GPUS == 1 )) || [[ ${DS_ACCELERATOR:-} == cpu ]]; then return; fi
    listed=$(nvidia-smi -L 2>/dev/null) || return 0
    has=$(grep -c '^GPU ' <<< "$listed") || return 0
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        if [[ $CUDA_VISIBLE_DEVICES == "" || $CUDA_VISIBLE_DEVICES == -1 ]]; then return; fi
        where="CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES" has=${CUDA_VISIBLE_DEVICES//[^,]/}
        has=$((${#has} + 1))
    elif [[ $listed == *MIG* ]]; then
        return
    fi
    if (( GPUS > has )); then
        echo "error: GPUS=$GPUS, but $(uname -n) has $has ($where); set GPUS, or run it on more machines (NNODES)" >&2
        exit 1
    fi
}

# Whoever started this node may have said its RANK and WORLD_SIZE, which one python alone would take for its own, and torchrun
# would take the PET_ ones where the command says nothing. What counts stands in the command.
forget_the_group() {
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE PET_NNODES PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT PET_NPROC_PER_NODE
    export -n MASTER_ADDR MASTER_PORT
}
