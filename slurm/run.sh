#!/usr/bin/env bash
# Any other command of launch/ as a job, its options as they are typed:
#
#   sbatch slurm/run.sh evaluate model=outputs/distill_4b data.path=outputs/data output=outputs/ppl
#   GPUS=1 sbatch --gpus-per-node=0 slurm/run.sh export_hf model=outputs/distill_4b output=outputs/hf    one process, no GPU
#
# launch/submit.py does the same from a cluster's preset, and checks the options first.
#SBATCH --job-name=minitron
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
set -euo pipefail

OUTPUT=$(printf '%s\n' "$@" | sed -n 's/^output=//p')
OUTPUT=${OUTPUT:?give the command an output=…}
FOLDERS=${FOLDERS:-}                                   # what a container must see beside ROOT and OUTPUT, comma-separated
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}                # this repository

IFS=, read -ra folders <<< "$FOLDERS"
# shellcheck source=slurm/common.sh
. "$ROOT/slurm/common.sh" "$ROOT" "${folders[@]}"

launch "$@"
