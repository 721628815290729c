# Sourced by launch.sh: `train_to_the_end FOLDER WORDS...` runs python until it has finished, passes signals on to the training
# and starts a run that broke again; the folder is the run's output folder, by whose checkpoints it is judged.
#
# TERM, INT and USR1 are passed on to the training, which saves a checkpoint and ends. The status is 75 where the same
# command goes on from there, else the training's own. Under torchrun that is 1 for all that goes wrong, so what counts is
# the checkpoint. A node that is told leaves the mark `.stopped` in the output folder, by which the others, whose ranks end
# too, know that it was a stop: none of them starts again and waits for one that does not.

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
    child="" child_status=1 told="" uses_torchrun=0 mark=""
    if (( NNODES > 1 )) && [[ -n $folder ]]; then
        mark=$folder/.stopped
        rm -f "$mark"    # the last run's
    fi
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
        if [[ -n $told || ( -n $mark && -e $mark ) ]]; then
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
            if [[ ${arguments[i]} == --log_dir ]]; then arguments[i + 1]=$(logs_of_a_start); fi
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
    # before the ranks can end; the folder is there once they listen
    if [[ -n $mark ]]; then : 2>/dev/null > "$mark" || true; fi
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
