#!/usr/bin/env bash
# Short distillations of the shapes that launch/search.py found, over all nodes of the allocation: all of them one after another, or
# as a task of an array one candidate up to the next rung.
#
#   FOUND=… DATA=… sbatch slurm/distill_candidates.sh distill.trainer.steps=400                       one job for all
#   FOUND=… DATA=… bash slurm/halving.sh distill.trainer.steps=400                                    an array a rung
#   FOUND=… DATA=… RUNG=2 sbatch --array=1-3 slurm/distill_candidates.sh distill.trainer.steps=400    one of its arrays
#
# launch/distill_candidates.py itself runs on the first node, in the environment of ACTIVATE, and holds no GPU; `start=` is what
# starts a stage on all of them. The same command continues where it was stopped, within a rung from the last checkpoint.
#SBATCH --job-name=distill_candidates
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
set -euo pipefail

# What to change: folders on storage that every node sees; common.sh has the rest (container or environment, logs).
FOUND=${FOUND:?shapes to try, from launch/search.py}
DATA=${DATA:?data folder, from launch/prepare_data.py}
OUTPUT=${OUTPUT:-outputs/candidates}
RUNG=${RUNG:-}                                         # 0: the teacher's cache; n: the n-th rung; empty: everything
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}                # this repository
FOLDERS=${FOLDERS:-}                                   # what a container must see besides, comma-separated: model, scores, teacher

IFS=, read -ra folders <<< "$FOLDERS"
# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh" "$FOUND" "$DATA" "${folders[@]}"

# Each stage has a rendezvous of its own, by the port that follows the job; they follow one another, so one name does for all.
printf -v start '%q ' "${step[@]}" "${torchrun[@]}" --rdzv-id "$SLURM_JOB_ID"
# shellcheck source=/dev/null
. "$ACTIVATE"
persist python "$ROOT/launch/distill_candidates.py" "found=$FOUND" "data.path=$DATA" "output=$OUTPUT" ${RUNG:+"rung=$RUNG"} \
    ${SLURM_ARRAY_TASK_ID:+"candidate=$SLURM_ARRAY_TASK_ID"} "processes=$((SLURM_JOB_NUM_NODES * GPUS))" "start=${start% }" "$@"
