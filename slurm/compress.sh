#!/usr/bin/env bash
# A chain of rounds (importance, prune, distill, evaluate), each stage over all nodes of the allocation.
#
#   MODEL=… DATA=… sbatch slurm/compress.sh                                  Nemotron-4 15B's sizes to 8B and on to 4B
#   MODEL=… DATA=… CHAIN=my_chain sbatch --nodes=4 slurm/compress.sh         conf/chain/my_chain.yaml
#
# launch/compress.py itself runs on the first node, in the environment of ACTIVATE, and holds no GPU; `start=` is what starts a
# stage on all of them. Every layout, batch and shape of the chain is checked before its first stage, and by a dry run on any
# machine:
#   python launch/compress.py … processes=256 dry_run=true
# The same command continues a chain that was stopped: finished stages are passed by, distillation goes on from its last checkpoint.
#SBATCH --job-name=compress
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
MODEL=${MODEL:?folder of the model, from launch/import_hf.py}
DATA=${DATA:?data folder, from launch/prepare_data.py}
CHAIN=${CHAIN-minitron_15b_8b_4b}                      # a preset of conf/chain; empty: rounds=[…] as an option
OUTPUT=${OUTPUT:-outputs/${CHAIN:-chain}}
TENSOR=${TENSOR:-8}                                    # tensor-parallel size
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}                # this repository

# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh" "$MODEL" "$DATA"

# Stages follow one another, so one rendezvous does for all.
printf -v start '%q ' "${step[@]}" "${torchrun[@]}" --rdzv-id "$SLURM_JOB_ID"
# shellcheck source=/dev/null
. "$ACTIVATE"
persist python "$ROOT/launch/compress.py" "model=$MODEL" "data.path=$DATA" "output=$OUTPUT" ${CHAIN:+"chain=$CHAIN"} \
    "processes=$((SLURM_JOB_NUM_NODES * GPUS))" "parallel.tensor=$TENSOR" parallel.sequence=true "start=${start% }" "$@"
