#!/usr/bin/env bash
# Llama-3.1 8B into Llama-3.1-Minitron 4B Width, as published: 94 B tokens, batch 1152 × 8192 tokens, AdamW 1e-4 → 1e-5 with 40
# steps of warm-up (conf/experiment/llama3_1_minitron_4b_width.yaml).
#
#   TEACHER=… STUDENT=… DATA=… sbatch slurm/distill_4b.sh
#   TEACHER=… STUDENT=… DATA=… sbatch --nodes=4 slurm/distill_4b.sh trainer.tokens=10e9 logger.wandb=offline
#
# 32 nodes of 8 GPUs: tensor 2, data 128, 9 micro-batches of one sample a step (1152 does not divide over 256). Other numbers of
# nodes: tensor × micro-batches must still divide the batch, which a dry run on any machine tells:
#   python launch/distill.py experiment=llama3_1_minitron_4b_width dry_run=true parallel.world_size=256
#SBATCH --job-name=distill_4b
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
OUTPUT=${OUTPUT:-outputs/distill_4b}
TENSOR=${TENSOR:-2}                                    # tensor-parallel size
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}                # this repository

# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh" "$TEACHER" "$STUDENT" "$DATA"

launch distill experiment=llama3_1_minitron_4b_width "teacher=$TEACHER" "student=$STUDENT" "data.path=$DATA" \
    "output=$OUTPUT" "parallel.tensor=$TENSOR" "$@"
