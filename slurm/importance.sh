#!/usr/bin/env bash
# Importance scores of every channel, head, neuron and layer, from 1024 samples of 8192 tokens forward.
#
#   MODEL=… DATA=… sbatch slurm/importance.sh
#SBATCH --job-name=importance
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
set -euo pipefail

# What to change: folders on storage that every node sees; common.sh has the rest (container or environment, logs).
MODEL=${MODEL:?folder of the model, from launch/import_hf.py}
DATA=${DATA:?data folder, from launch/prepare_data.py}
OUTPUT=${OUTPUT:-outputs/scores}
SAMPLES=${SAMPLES:-1024} SEQUENCE=${SEQUENCE:-8192}
TENSOR=${TENSOR:-2}                                    # tensor-parallel size
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}                # this repository

# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh" "$MODEL" "$DATA"

launch importance "model=$MODEL" "data.path=$DATA" "data.sequence_length=$SEQUENCE" "samples=$SAMPLES" \
    "output=$OUTPUT" "parallel.tensor=$TENSOR" "$@"
