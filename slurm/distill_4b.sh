#!/usr/bin/env bash
# Llama-3.1 8B into Llama-3.1-Minitron 4B Width, as published: 94 B tokens, batch 1152 × 8192 tokens, AdamW 1e-4 → 1e-5.
#
#   TEACHER=… STUDENT=… DATA=… sbatch slurm/distill_4b.sh
#
# 32 nodes of 8 GPUs: tensor 2, data 128, 9 micro-batches of one sample a step (1152 does not divide over 256). Smaller
# clusters: sbatch --nodes=N; tensor × micro-batches must still divide the batch, which a dry run on any machine tells:
#   python launch/distill.py … dry_run=true
# The same command continues a run that was stopped.
#SBATCH --job-name=distill_4b
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x_%j.log

set -euo pipefail

# What to change: folders on storage that every node sees, and how python is found on a node.
TEACHER=${TEACHER:?folder of the (corrected) teacher, from launch/import_hf.py}
STUDENT=${STUDENT:?folder of the pruned student, from launch/prune.py}
DATA=${DATA:?data folder, from launch/prepare_data.py}
OUTPUT=${OUTPUT:-outputs/distill_4b}
GPUS=${GPUS:-8}                                       # processes a node
ROOT=${ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}               # this repository
CONTAINER=${CONTAINER:-}                              # image for pyxis; empty: the environment of ACTIVATE
ACTIVATE=${ACTIVATE:-$ROOT/.venv/bin/activate}
EXTRA=${EXTRA:-}                                      # more options, such as logger.wandb=offline

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One rendezvous a job and restart; the port follows the job so that two jobs on a node do not meet.
PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Tensor parallelism overlaps its communication with computation only when kernels are queued in issue order.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# A rank that dies must fail the job at once rather than leave the others waiting.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

command=(torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS"
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$HEAD:$PORT"
    "$ROOT/launch/distill.py" experiment=llama3_1_minitron_4b_width
    "teacher=$TEACHER" "student=$STUDENT" "data.path=$DATA" "output=$OUTPUT" parallel.tensor=2)
read -ra extra <<< "$EXTRA"

if [ -n "$CONTAINER" ]; then
    exec srun --container-image="$CONTAINER" --container-mounts="$ROOT,$(dirname "$DATA"),$(dirname "$OUTPUT")" \
        "${command[@]}" "${extra[@]}"
fi
exec srun bash -c '. "$0" && exec "$@"' "$ACTIVATE" "${command[@]}" "${extra[@]}"
