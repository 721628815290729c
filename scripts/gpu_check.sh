#!/usr/bin/env bash
# What:  all that has to be seen on a GPU: the gpu tests, the recipe on the toy (3 layouts x ZeRO 0, 2, 3, against the CPU in
#        float32), the GPU profile of the benchmark, and what attention costs beside matrix products; in this order, each
#        also where one before it failed.
# Needs: one GPU, and a python that has the requirements (PYTHON, else .venv's, else python3). Nothing is installed, and
#        versions are as they are: torch 2.11 to 2.13.
# Gives: a folder (OUT, output/gpu_check) with a log of each part, its results, and summary.txt; status 0 where all passed.
#        SMOKE=1 runs all of it on a CPU, in small. DRY=1 prints the parts. ONLY="tests recipe" picks parts.
#        Seconds of each part, 14 minutes in all: TESTS_SECONDS, RECIPE_SECONDS, PROFILE_SECONDS, ATTENTION_SECONDS.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

SMOKE=${SMOKE:-0} DRY=${DRY:-0} OUT=${OUT:-output/gpu_check} ONLY=${ONLY:-tests recipe profile attention}
TESTS_SECONDS=${TESTS_SECONDS:-210} RECIPE_SECONDS=${RECIPE_SECONDS:-200}
PROFILE_SECONDS=${PROFILE_SECONDS:-385} ATTENTION_SECONDS=${ATTENTION_SECONDS:-40}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
unset DS_ACCELERATOR  # the code asks torch

for name in $ONLY; do
    if [[ " tests recipe profile attention " != *" $name "* ]]; then
        echo "error: ONLY=$name: the parts are tests, recipe, profile and attention" >&2
        exit 1
    fi
done
for number in "$TESTS_SECONDS" "$RECIPE_SECONDS" "$PROFILE_SECONDS" "$ATTENTION_SECONDS"; do
    if ! [[ $number =~ ^[1-9][0-9]*$ ]]; then
        echo "error: seconds of a part are a number of 1 or more, not '$number'" >&2
        exit 1
    fi
done
small=()
runs_at_once=${RUNS_AT_ONCE:-3} run_seconds=${RUN_SECONDS:-100}  # of the recipe
if [[ $SMOKE == 1 ]]; then
    small=(--smoke)
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    runs_at_once=${RUNS_AT_ONCE:-2} run_seconds=${RUN_SECONDS:-$RECIPE_SECONDS}  # a CPU may be busy
elif [[ $DRY != 1 ]] && ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "error: PYTHON=$PYTHON cannot import torch; set PYTHON to a python that has the requirements" >&2
    exit 1
elif [[ $DRY != 1 ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "error: $PYTHON sees no GPU (torch.cuda.is_available()); SMOKE=1 runs all of it on a CPU, in small" >&2
    exit 1
fi

child=""
interrupted() {
    echo "interrupted; what was measured is in $OUT" >&2
    if [[ -n $child ]]; then
        kill -TERM "$child" 2>/dev/null
        wait "$child"
    fi
    exit 130
}
trap interrupted INT TERM HUP

failed=0
part() {  # name, seconds, words...: run them for at most so long, and say how it went
    local name=$1 seconds=$2 status began=$SECONDS log="$OUT/$1.log"
    shift 2
    [[ " $ONLY " == *" $name "* ]] || return 0
    if [[ $DRY == 1 ]]; then
        echo "$name, at most $seconds s: $*"
        return
    fi
    echo "== $name, at most $seconds s; log: $log"
    # TERM first, on which the benchmark still draws what it has; then KILL. `timeout` has a process group of its own, which
    # is why an interruption has to be passed on.
    timeout --kill-after=15 "$seconds" "$@" > >(tee "$log") 2>&1 &
    child=$!
    wait "$child"
    status=$?
    child=""
    case $status in
        0) echo "passed  $name ($((SECONDS - began)) s)" ;;
        124 | 137) echo "FAILED  $name: ended after $seconds s; see $log" ;;
        *) echo "FAILED  $name: status $status ($((SECONDS - began)) s); see $log" ;;
    esac >>"$OUT/summary.txt"
    (( status == 0 )) || failed=1
}

if [[ $DRY != 1 ]]; then
    mkdir -p "$OUT" || exit 1
    {
        "$PYTHON" -c 'from benchmarks import card; print(card.describe(card.facts()))' || echo "the machine: unknown, see above"
        [[ $SMOKE == 1 ]] && echo "a smoke run on the CPU: that every part runs, and no measurement"
    } >"$OUT/summary.txt"
fi
part tests "$TESTS_SECONDS" "$PYTHON" -m pytest -m gpu --continue-on-collection-errors -p no:cacheprovider -rfEs tests
part recipe "$RECIPE_SECONDS" "$PYTHON" -m benchmarks.toy_runs --output "$OUT/recipe" --at_once "$runs_at_once" \
    --seconds "$run_seconds"
tenths=$(( (PROFILE_SECONDS - 25) / 6 ))  # of a minute; it ends by itself before it is ended
part profile "$PROFILE_SECONDS" "$PYTHON" -m benchmarks.throughput --profile gpu --output "$OUT/profile" \
    --minutes "$(( tenths / 10 )).$(( tenths % 10 ))" "${small[@]}"
part attention "$ATTENTION_SECONDS" "$PYTHON" -m benchmarks.attention_cost "${small[@]}"
[[ $DRY == 1 ]] && exit 0
for log in recipe attention; do  # a few lines each, worth having together
    [[ -s $OUT/$log.log ]] && { echo; cat "$OUT/$log.log"; } >>"$OUT/summary.txt"
done
echo
cat "$OUT/summary.txt"
echo "results in $OUT; summary in $OUT/summary.txt"
exit "$failed"
