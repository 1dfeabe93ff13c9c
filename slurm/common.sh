# shellcheck shell=bash
# What the job scripts share. A script sets its variables (ROOT, OUTPUT), sources this file with the folders that a container
# needs, and calls `launch COMMAND option=value …`.
#
#   job script, on the first node ──srun──▶ torchrun, one a node ──▶ launch/COMMAND.py, one process a GPU
#        │                                        ▲                        │
#        └── SIGUSR1 before the time limit ───────┴──▶ saves, ends with 75 ┘──▶ requeued, and continues
#
# A job that is requeued, and a command that is started again, continues from its last checkpoint: see docs/cluster.md.

GPUS=${GPUS:-${SLURM_GPUS_PER_NODE:-8}}                # processes a node
GPUS=${GPUS##*:}                                       # Slurm may write h100:8
CONTAINER=${CONTAINER:-}                               # image for enroot/pyxis; empty: the environment of ACTIVATE
MOUNTS=${MOUNTS:-}                                     # more mounts of the container: FROM:TO,FROM:TO
ACTIVATE=${ACTIVATE:-$ROOT/.venv/bin/activate}         # sourced on every node, without a container
LOGS=${LOGS:-outputs/logs}                             # a log a node: JOB-NODE'S NUMBER-NODE'S NAME.log
RESTARTS=${RESTARTS:-3}                                # how often in a row to start again without a new checkpoint
readonly USER_MISTAKE=2 REQUEUE=75                     # exit statuses of launch/
# This job to Slurm's programs. In an array the number of a task may be that of the whole, which would be signalled and requeued.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}

# --- What PyTorch and NCCL read -------------------------------------------------------------------------------------

export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Kernels start in the order in which they are queued: tensor parallelism relies on it to overlap its communication.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# NVLink SHARP takes memory for its multicast buffers and gains little where tensor groups are small.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# An error says what failed (a link, a device); INFO prints which networks and rings were chosen.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Not set here, passed on where set: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (the interface that the nodes reach one another
# by, where the first one is a wrong guess) and NCCL_IB_HCA (the InfiniBand adapters to use).

# --- How processes start --------------------------------------------------------------------------------------------

# An absolute path: a container has another working directory.
absolute() { realpath --canonicalize-missing -- "$1"; }

# The rendezvous is on the first node, at its address in Slurm (its name, unless the cluster says otherwise); the port follows
# the job, so that two jobs on a node do not meet.
# All lines are read: one that ends early would end the script, by the signal that its writer gets.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes[0]}
address=$(scontrol --oneliner show node "$first_node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
torchrun=(python -m minitron_megatron.parallel.torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$GPUS"
    --rdzv-backend c10d --rdzv-endpoint "${address:-$first_node}:$((20000 + SLURM_JOB_ID % 20000))")

# One task a node, which torchrun shares out to its processes: not bound to one core. When a node's task has ended, the others
# have a minute to end too: nothing waits for a rank that is gone.
mkdir -p "$LOGS" "$(dirname "$OUTPUT")"
step=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=60
    --output="$(absolute "$LOGS")/%j-%n-%N.log" --open-mode=append)
if [ -n "$CONTAINER" ]; then
    # Every folder is mounted where it is outside, so that the same options are right inside.
    mounts=$(for folder in "$ROOT" "$PWD" "$(dirname "$OUTPUT")" "$@"; do absolute "$folder"; done | sort -u |
        sed 's/.*/&:&/' | paste -sd,)
    step+=(--container-image="$CONTAINER" --container-mounts="$mounts${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD")
else
    # shellcheck disable=SC2016  # $0 and $@ are for the shell on each node
    step+=(bash -c '. "$0" && exec "$@"' "$ACTIVATE")
fi

# --- Running to the end ---------------------------------------------------------------------------------------------

# Whether the output is whole; a chain's is its summary, a training run's its model.
finished() { [ -e "$OUTPUT/manifest.yaml" ] || [ -e "$OUTPUT/model/manifest.yaml" ] || [ -e "$OUTPUT/chain.json" ]; }

# What is whole under the output: it changes when a checkpoint is written.
progress() {
    [ ! -e "$OUTPUT" ] || find "$OUTPUT" -maxdepth 5 \( -name manifest.yaml -o -path '*/checkpoints/step_*' -prune \) 2> /dev/null | sort || true
}

# Whether Slurm still wants this job: not when it is cancelled, preempted or over its time.
wanted() {
    case $(squeue --noheader --format=%T --jobs="$JOB" 2> /dev/null) in
        CANCELLED | COMPLETING | DEADLINE | NODE_FAIL | PREEMPTED | REQUEUE* | TIMEOUT) false ;;
        *) [ -z "$ended" ] ;;
    esac
}

# What comes before a limit (#SBATCH --signal=B:USR1@…): the processes of all nodes save, and the job is requeued.
stop=''
trap 'stop=yes; scancel --signal=USR1 "$JOB" || true' USR1
# Slurm ends or requeues the job and has told every process itself.
ended=''
trap 'ended=yes' TERM

# Run a command and leave its exit status in $status; in the background, since bash handles no signal while it waits otherwise.
run() {
    "$@" &
    local pid=$!
    # A signal cuts `wait` short.
    while kill -0 "$pid" 2> /dev/null; do wait "$pid" || true; done
    status=0
    wait "$pid" || status=$?
}

# Give the nodes back and queue up again, unless start after start brings nothing new.
requeue() {
    if [ "$(progress)" = "$1" ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "$RESTARTS" ]; then
        echo "error: no new checkpoint since the start, and requeued $RESTARTS times before: not requeued" >&2
        exit 1
    fi
    echo "stopped before its end (status $status): requeued"
    scontrol requeue "$JOB"
    exit 0
}

# Run something until the output is whole: start it again after a crash, requeue the job when it was asked to stop.
persist() {
    local before first attempts=0
    first=$(progress)
    while true; do
        before=$(progress)
        run "$@"
        if finished || ! wanted; then exit "$status"; fi
        if [ -n "$stop" ] || [ "$status" -eq "$REQUEUE" ]; then requeue "$first"; fi
        case $status in 0 | "$USER_MISTAKE") exit "$status" ;; esac
        if [ "$(progress)" != "$before" ]; then attempts=0; fi
        attempts=$((attempts + 1))
        if [ "$attempts" -gt "$RESTARTS" ]; then exit "$status"; fi
        echo "ended with status $status; started again ($attempts of $RESTARTS before a new checkpoint)"
    done
}

# launch/COMMAND.py on every node of the job, with these options; an installed package has its commands in a module.
launch() {
    local command=$1 program
    shift
    program=("$ROOT/launch/$command.py")
    [ -e "${program[0]}" ] || program=(-m minitron_megatron "$command")
    persist on_nodes "${program[@]}" "$@"
}

# A rendezvous is used once: each start has one of its own.
on_nodes() { exec "${step[@]}" "${torchrun[@]}" --rdzv-id "$SLURM_JOB_ID-$RANDOM" "$@"; }
