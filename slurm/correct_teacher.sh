#!/usr/bin/env bash
# Teacher correction (arXiv 2408.11796): the teacher is fine-tuned on the data of the distillation first, about 100 B tokens at one
# fifth of its original peak learning rate with 120 steps of warm-up. conf/experiment has the recipes and says what of them is published.
#
#   TEACHER=… DATA=… sbatch slurm/correct_teacher.sh                                                      Llama-3.1 8B
#   TEACHER=… DATA=… RECIPE=correct_mistral_nemo_12b TENSOR=4 OUTPUT=… sbatch slurm/correct_teacher.sh    Mistral NeMo 12B
#   TEACHER=… DATA=… sbatch slurm/correct_teacher.sh optim.lr=4e-5 trainer.tokens=50e9                    another teacher
#
# It needs no student: run it beside importance and pruning (slurm/road.sh does).
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
RECIPE=${RECIPE:-correct_llama3_1_8b}                  # a preset of conf/experiment
TENSOR=${TENSOR:-2}                                    # tensor-parallel size
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}                # this repository

# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh" "$TEACHER" "$DATA"

launch correct_teacher "experiment=$RECIPE" "model=$TEACHER" "data.path=$DATA" "output=$OUTPUT" \
    "parallel.tensor=$TENSOR" "$@"
