#!/usr/bin/env bash
# Candidates side by side, a job array for each rung that waits for the one before. Run it where sbatch is:
#
#   FOUND=outputs/found DATA=outputs/data bash slurm/halving.sh distill.trainer.steps=400 parallel.tensor=2
#
#   cache ─▶ rung 1: task 1 … K ─▶ rung 2: task 1 … K/2 ─▶ …      its last task writes the results
#
# A task decides by the files of the rungs before which candidate is its own. A job that fails takes those after it off the queue;
# the same command again submits all, and what is done already ends at once. Everything is checked here first, by a dry run.
# Account and partition: SBATCH_ACCOUNT and SBATCH_PARTITION, which sbatch reads itself.
set -euo pipefail

FOUND=${FOUND:?shapes to try, from launch/search.py}
DATA=${DATA:?data folder, from launch/prepare_data.py}
OUTPUT=${OUTPUT:-outputs/candidates}                   # everything made goes here
NODES=${NODES:-1}                                      # of a candidate
GPUS=${GPUS:-8}                                        # of a node
AT_ONCE=${AT_ONCE:-}                                   # candidates that run side by side at most; empty: all of a rung
ROOT=${ROOT:-$PWD}                                     # this repository
ACTIVATE=${ACTIVATE:-$ROOT/.venv/bin/activate}         # for the dry run here, and sourced on every node
export ROOT FOUND DATA OUTPUT GPUS ACTIVATE RUNG LOGS=${LOGS:-$OUTPUT.logs}

plan=$(
    # shellcheck source=/dev/null
    . "$ACTIVATE"
    python "$ROOT/launch/distill_candidates.py" "found=$FOUND" "data.path=$DATA" "output=$OUTPUT" \
        "processes=$((NODES * GPUS))" dry_run=true "$@"
)
read -ra sizes < <(sed -n 's/^candidates of each rung: *//p' <<< "$plan")

# job AFTER WORDS… -- OPTIONS…: the job script once the job AFTER has succeeded; prints its number.
job() {
    local after=$1 words=() && shift
    while [ "$1" != -- ]; do words+=("$1") && shift; done
    shift
    sbatch --parsable --kill-on-invalid-dep=yes --nodes="$NODES" --gpus-per-node="$GPUS" ${after:+"--dependency=afterok:$after"} \
        "${words[@]}" "$ROOT/slurm/distill_candidates.sh" "$@"
}

RUNG=0
jobs=$(job '' --job-name=cache -- "$@")
said="cache $jobs"
for size in "${sizes[@]}"; do
    RUNG=$((RUNG + 1))
    jobs=$(job "$jobs" --job-name="rung_$RUNG" --array="1-$size${AT_ONCE:+%$AT_ONCE}" -- "$@")
    said+=", rung $RUNG $jobs ($size candidates)"
done
echo "$said: the results will be in $OUTPUT, logs in $LOGS"
