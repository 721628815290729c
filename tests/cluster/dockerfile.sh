#!/usr/bin/env bash
# What:  executes the Dockerfile without Docker, by buildah in a chroot, and uses the image as its head says: the debug recipe as
#        the image's user without network, with output/ on the host; the same on two nodes, a container each; every recipe's
#        command for several nodes.
# Needs: root, 15 GB of disk, a quarter of an hour; `apt-get install buildah debootstrap iproute2`; Debian's packages and PyPI.
# Gives: a line for each step with its seconds; status 0 only if all of them went well. Removes what it made.
#
# By hand: bash tests/cluster/dockerfile.sh
#   SUITE (bookworm), MIRROR     Debian's release of the base, which takes the place of the CUDA image
#   WORK (a new folder in /tmp)  where base, image and logs lie; KEEP=1 leaves them there
#   PIP_CONF, FOLDERS            a pip.conf for the build, and files and folders that it names: an index of your own, the
#                                certificates of a proxy. They are mounted at the same paths, and are not in the image.
set -euo pipefail
cd "$(dirname "$0")/../.."

SUITE=${SUITE:-bookworm}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
WORK=${WORK:-$(mktemp --directory /tmp/open_rm_dockerfile.XXXXXX)}
IGNORED=(.git .venv .venv.fills output local_dataset_cache wandb open_rm/__pycache__)
IMAGE=localhost/open_rm

main() {
    (( EUID == 0 )) || fail "chroot and mounts need root"
    for command in buildah debootstrap ip unshare; do
        command -v "$command" > /dev/null || fail "there is no $command; see the head of this script"
    done
    mkdir -p "$WORK"
    echo "logs: $WORK/*.log"
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    step base make_base
    step context make_context
    step refused refuse_root
    step build build
    step inside check_inside
    step recipe run_recipe
    step two_nodes run_two_nodes
    step other_requirements run_other_requirements
    step commands print_commands
    echo "all steps of the Dockerfile and of its use went well"
}

fail() {
    echo "error: $*" >&2
    exit 1
}

step() {  # run function $2 with its output in $1.log
    local started=$SECONDS status=0
    # in a process of its own, in which set -e holds: it does not where a command's status is asked for
    (set -e; "$2") > "$WORK/$1.log" 2>&1 &
    wait $! || status=$?
    if (( status )); then
        tail -n 30 "$WORK/$1.log" >&2
        fail "step $1 ended with status $status after $((SECONDS - started)) s; see $WORK/$1.log (KEEP=1 keeps it)"
    fi
    printf '%-20s %4d s   %s\n' "$1" $((SECONDS - started)) "$(tail -n 1 "$WORK/$1.log")"
}

quote() {  # the line with $1 in $2.log, which may be where this goes
    local line
    line=$(grep --max-count 1 "$1" "$WORK/$2.log")
    echo "$line"
}

clean_up() {
    local status=$?
    builder rm --all > /dev/null 2>&1 || true
    if [[ ${KEEP:-0} == 1 ]]; then return; fi
    builder rmi --all --force > /dev/null 2>&1 || true
    if grep -q " $WORK/" /proc/mounts; then
        echo "error: $WORK has mounts that could not be removed" >&2
        exit 1
    fi
    if (( status )); then find "$WORK" -mindepth 1 -maxdepth 1 ! -name '*.log' -exec rm -rf {} +; else rm -rf "$WORK"; fi
}

builder() {
    buildah --root "$WORK/store" --runroot "$WORK/running" --storage-driver overlay "$@"
}

# ---------------------------------------------------------------- the image

make_base() {  # Debian as its own image is, and Ubuntu's user of number 1000 in it
    local container
    debootstrap --variant=minbase "$SUITE" "$WORK/base" "$MIRROR"
    chroot "$WORK/base" useradd --create-home ubuntu
    [[ $(chroot "$WORK/base" id -u ubuntu) == 1000 ]]
    tar --directory "$WORK/base" --create --file "$WORK/base.tar" .
    container=$(builder from scratch)
    builder add --quiet "$container" "$WORK/base.tar" /
    builder commit --quiet --rm "$container" localhost/base
    rm -rf "$WORK/base" "$WORK/base.tar"
    builder images --format '{{.Name}} {{.Size}}' | grep base
}

make_context() {  # the repository as it stands, and in it what an image must not have
    local folder
    git ls-files --cached --others --exclude-standard -z | while IFS= read -r -d '' file; do
        if [[ -e $file ]]; then printf '%s\0' "$file"; fi  # not removed since
    done | tar --null --files-from - --create | tar --extract --directory "$(mkdir -p "$WORK/context"; echo "$WORK/context")"
    for folder in "${IGNORED[@]}"; do
        mkdir -p "$WORK/context/$folder"
        touch "$WORK/context/$folder/not_for_an_image"
    done
    du -sh "$WORK/context"
}

mounts_of_a_build() {
    local path
    if [[ -n ${PIP_CONF:-} ]]; then printf '%s\n' --volume "$PIP_CONF:/etc/pip.conf:ro"; fi
    for path in ${FOLDERS:-}; do printf '%s\n' --volume "$path:$path:ro"; done
}

refuse_root() {  # before anything is installed
    local status=0
    builder build --isolation chroot --build-arg BASE_IMAGE=localhost/base --build-arg USER_ID=0 "$WORK/context" || status=$?
    (( status != 0 ))
    quote "^error: USER_ID=0 is root" refused
}

build() {
    local mounts
    mapfile -t mounts < <(mounts_of_a_build)
    builder build --isolation chroot --layers --build-arg BASE_IMAGE=localhost/base "${mounts[@]}" --tag $IMAGE "$WORK/context"
    builder images --format '{{.Name}} {{.Size}}' | grep open_rm
}

# ---------------------------------------------------------------- its use

inside() {  # inside OPTION... -- COMMAND...: in a new container, as the image's user, without network
    local container options=() status=0
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    container=$(builder from $IMAGE)
    ip link set lo up
    builder run --isolation chroot "${options[@]}" "$container" -- "$@" || status=$?
    builder rm "$container" > /dev/null
    return $status
}

alone() {  # a function of this script in a network that is its loopback alone
    export WORK IMAGE
    unshare --net bash -c "set -euo pipefail; $(declare -f builder inside "$1"); $*"
}

check_inside() { alone look_inside; }

look_inside() {
    inside -- bash -euc '
        [[ $(id -u) == 1000 && $HOME == /home/trainer && $PWD == /workspace/open_rm ]]
        [[ $(command -v python3) == /opt/venv/bin/python3 ]]
        found=$(find / -name not_for_an_image 2>/dev/null || true)
        if [[ -n $found ]]; then echo "in the image: $found"; exit 1; fi
        for folder in . output local_dataset_cache ~/.cache/huggingface; do touch $folder/mine; done
        # what NCCL opens, and what Triton compiles
        python -c "import ctypes; [ctypes.CDLL(name) for name in (\"libibverbs.so.1\", \"librdmacm.so.1\")]"
        printf "#include <Python.h>\nint use(void) { return Py_IsInitialized(); }\n" > ~/launcher.c
        gcc -shared -fPIC -I"$(python -c "import sysconfig; print(sysconfig.get_path(\"include\"))")" ~/launcher.c -o ~/launcher.so
        source scripts/environment.sh
        set_up_python requirements.txt
        "$PYTHON" -c "import deepspeed, peft, sys, torch, transformers; print(sys.version.split()[0], torch.__version__)"
    '
}

run_recipe() {  # in a folder of the host, which belongs to number 1000
    mkdir -p "$WORK/output"
    chown 1000 "$WORK/output"
    alone train_once
    [[ $(stat -c %u "$WORK/output/debug/model.safetensors") == 1000 ]]
    quote "reload check" recipe
}

train_once() {
    inside --volume "$WORK/output:/workspace/open_rm/output" -- \
        bash scripts/train/debug/reward_modeling.sh --output_dir output/debug
}

run_two_nodes() {  # a container each, with a folder in common
    mkdir -p "$WORK/shared"
    chown 1000 "$WORK/shared"
    alone train_on_two
    quote "2 x cpu" node_0
    quote "reload check" node_0
}

train_on_two() {
    local rank pids=()
    for rank in 0 1; do
        inside --volume "$WORK/shared:/workspace/open_rm/output" \
            --env NNODES=2 --env NODE_RANK=$rank --env MASTER_ADDR=127.0.0.1 --env MASTER_PORT=29611 \
            --env OMP_NUM_THREADS=1 -- \
            bash scripts/train/debug/reward_modeling.sh --output_dir output/two_nodes --total_episodes 320 \
            > "$WORK/node_$rank.log" 2>&1 &
        pids+=($!)
    done
    for rank in 0 1; do wait "${pids[$rank]}"; done
}

run_other_requirements() {  # without network they cannot be had: said, with a status
    local status=0
    alone want_others || status=$?
    (( status == 1 ))
    quote "No matching distribution" other_requirements
}

want_others() {
    inside -- bash -c 'echo mended==1.0 >> requirements.txt && PIP_RETRIES=0 exec bash scripts/train/debug/reward_modeling.sh'
}

print_commands() { alone print_all; }

print_all() {
    inside --env DRY=1 --env NNODES=8 --env NODE_RANK=3 --env MASTER_ADDR=10.0.0.1 --env GPUS=8 --env GLOBAL_BATCH=256 \
        --env PER_DEVICE=2 -- bash -euc '
        for recipe in scripts/train/*/*.sh; do
            line=$(bash $recipe --learning_rate 1e-6)
            echo "$line"
            [[ $line == *"--nnodes 8"* && $line == *"--learning_rate 1e-6"* ]] || { echo "$recipe is not for 8 nodes"; exit 1; }
        done
        ls scripts/train/*/*.sh | wc --lines
    '
}

main
