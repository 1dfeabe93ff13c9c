#!/usr/bin/env bash
# A chain of rounds (importance, prune, distill, evaluate), each stage over all nodes of the allocation.
#
#   MODEL=… DATA=… sbatch slurm/compress.sh                                  Nemotron-4 15B's sizes to 8B and on to 4B
#   MODEL=… DATA=… CHAIN=my_chain sbatch --nodes=4 slurm/compress.sh         conf/chain/my_chain.yaml
#
# launch/compress.py itself runs on the first node and holds no GPU; `start=` is what starts a stage on all of them. Every
# layout, batch and shape of the chain is checked before its first stage, and by a dry run on any machine:
#   python launch/compress.py … processes=256 dry_run=true
# The same command continues a chain that was stopped: finished stages are passed by, distillation goes on from its last
# checkpoint. Slurm's SIGTERM reaches the running stage through its step, which saves and ends.
#SBATCH --job-name=compress
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x_%j.log

set -euo pipefail

# What to change: folders on storage that every node sees, and how python is found on a node.
MODEL=${MODEL:?folder of the model, from launch/import_hf.py}
DATA=${DATA:?data folder, from launch/prepare_data.py}
CHAIN=${CHAIN-minitron_15b_8b_4b}                     # a preset of conf/chain; empty: rounds=[…] in EXTRA
OUTPUT=${OUTPUT:-outputs/${CHAIN:-chain}}
TENSOR=${TENSOR:-8}                                   # tensor-parallel size
GPUS=${GPUS:-8}                                       # processes a node
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}               # this repository
CONTAINER=${CONTAINER:-}                              # image for pyxis; empty: the environment of ACTIVATE
ACTIVATE=${ACTIVATE:-$ROOT/.venv/bin/activate}        # on this node in any case: it runs launch/compress.py
EXTRA=${EXTRA:-}                                      # more options, such as distill.logger.wandb=offline

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The stages follow one another, so one rendezvous does for all; the port follows the job so that two jobs on a node do
# not meet.
PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Tensor parallelism overlaps its communication with computation only when kernels are queued in issue order.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# A rank that dies must fail the job at once rather than leave the others waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

torchrun=(torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS"
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD:$PORT")
if [ -n "$CONTAINER" ]; then
    step=(srun --container-image="$CONTAINER" --container-mounts="$ROOT,$(dirname "$MODEL"),$(dirname "$DATA"),$(dirname "$OUTPUT")")
else
    # shellcheck disable=SC2016  # $0 and $@ are for the shell on each node
    step=(srun bash -c '. "$0" && exec "$@"' "$ACTIVATE")
fi
printf -v start '%q ' "${step[@]}" "${torchrun[@]}"
read -ra extra <<< "${CHAIN:+chain=$CHAIN }$EXTRA"

# shellcheck source=/dev/null
. "$ACTIVATE"
exec python "$ROOT/launch/compress.py" "model=$MODEL" "data.path=$DATA" "output=$OUTPUT" \
    "processes=$((SLURM_JOB_NUM_NODES * GPUS))" "parallel.tensor=$TENSOR" parallel.sequence=true \
    "start=${start% }" "${extra[@]}"
