#!/usr/bin/env bash
# Mistral NeMo 12B into MN-Minitron 8B, as published: 380 B tokens, batch 768 × 8192 tokens, AdamW 1e-4 → 4.5e-7 with 60 steps of
# warm-up (conf/experiment/mn_minitron_8b.yaml).
#
#   TEACHER=… STUDENT=… DATA=… sbatch slurm/distill_mn_8b.sh
#
# 32 nodes of 8 GPUs: tensor 4, data 64, 12 micro-batches of one sample a step. The student: slurm/prune_4b.sh with
# TARGET=mn_minitron_8b.
#SBATCH --job-name=distill_mn_8b
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
TEACHER=${TEACHER:?folder of the corrected teacher, from slurm/correct_teacher.sh}
STUDENT=${STUDENT:?folder of the pruned student, from slurm/prune_4b.sh}
DATA=${DATA:?data folder, from launch/prepare_data.py}
OUTPUT=${OUTPUT:-outputs/distill_mn_8b}
TENSOR=${TENSOR:-4}                                    # tensor-parallel size
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}                # this repository

# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh" "$TEACHER" "$STUDENT" "$DATA"

launch distill experiment=mn_minitron_8b "teacher=$TEACHER" "student=$STUDENT" "data.path=$DATA" \
    "output=$OUTPUT" "parallel.tensor=$TENSOR" "$@"
