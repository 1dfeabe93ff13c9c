#!/usr/bin/env bash
# A student out of a model and its scores: Llama-3.1 8B to the sizes of Llama-3.1-Minitron 4B Width, or another preset of conf/target.
#
#   MODEL=… SCORES=… sbatch slurm/prune_4b.sh
#
# Weights are streamed from file to file, shared out over the processes: no GPU computes, and little memory is needed.
#SBATCH --job-name=prune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
set -euo pipefail

# What to change: folders on storage that every node sees; common.sh has the rest (container or environment, logs).
MODEL=${MODEL:?folder of the model, from launch/import_hf.py}
SCORES=${SCORES:?scores folder, from slurm/importance.sh}
TARGET=${TARGET:-llama3_1_minitron_4b_width}           # a preset of conf/target
OUTPUT=${OUTPUT:-outputs/student}
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}                # this repository

# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh" "$MODEL" "$SCORES"

launch prune "model=$MODEL" "scores=$SCORES" "target=$TARGET" "output=$OUTPUT" "$@"
