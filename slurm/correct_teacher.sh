#!/usr/bin/env bash
# Teacher correction (arXiv 2408.11796, section 4.1): the teacher is fine-tuned on the data of the distillation, about 100 B tokens
# at one fifth of its original peak learning rate (3e-4 for Llama-3.1 8B) and with 120 steps of warm-up.
#
#   TEACHER=… DATA=… sbatch slurm/correct_teacher.sh
#   TEACHER=… DATA=… LR=… TOKENS=127e9 TENSOR=4 OUTPUT=… sbatch --nodes=64 slurm/correct_teacher.sh        another teacher
#
# It needs no student: run it beside importance and pruning (slurm/road.sh does). The batch and the final learning rate are those
# of the distillation: the original ones were not published.
#SBATCH --job-name=correct_teacher
#SBATCH --nodes=32
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
TEACHER=${TEACHER:?folder of the teacher, from launch/import_hf.py}
DATA=${DATA:?data folder, from launch/prepare_data.py}
OUTPUT=${OUTPUT:-outputs/corrected_teacher}
TOKENS=${TOKENS:-100e9} BATCH=${BATCH:-1152} SEQUENCE=${SEQUENCE:-8192}
LR=${LR:-6e-5} MIN_LR=${MIN_LR:-1e-5} WARMUP=${WARMUP:-120}
TENSOR=${TENSOR:-2}                                    # tensor-parallel size
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}                # this repository

# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh" "$TEACHER" "$DATA"

launch correct_teacher "teacher=$TEACHER" "data.path=$DATA" "data.sequence_length=$SEQUENCE" "trainer.tokens=$TOKENS" \
    "trainer.global_batch_size=$BATCH" "optim.lr=$LR" "optim.min_lr=$MIN_LR" "optim.warmup_steps=$WARMUP" \
    "output=$OUTPUT" "parallel.tensor=$TENSOR" "$@"
