#!/usr/bin/env bash
# The whole road as jobs that wait for one another, from a Hugging Face model to a smaller one. Run it where sbatch is:
#
#   HF=/models/Llama-3.1-8B CORPUS=/data/corpus.jsonl bash slurm/road.sh
#
#   import ─▶ data ─┬─▶ importance ─▶ prune ─┬─▶ distill ─┬─▶ evaluate
#                   └─▶ correct teacher ─────┘            └─▶ export
#
# A job that fails takes those after it off the queue; the same command again submits all, and what is done already ends at once.
# Account and partition: SBATCH_ACCOUNT and SBATCH_PARTITION, which sbatch reads itself.
set -euo pipefail

HF=${HF:?folder of the Hugging Face model}
CORPUS=${CORPUS:?text to learn from: a .jsonl file or a folder}
WORK=${WORK:-outputs/road}                             # everything made goes here
NODES=${NODES:-32}                                     # of teacher correction and distillation
GPUS=${GPUS:-8}                                        # of a node
TARGET=${TARGET:-llama3_1_minitron_4b_width}           # a preset of conf/target
DISTILL=${DISTILL:-distill_4b}                         # the script that distills: this, or distill_mn_8b
RECIPE=${RECIPE:-correct_llama3_1_8b}                  # of teacher correction: a preset of conf/experiment
SEQUENCE=${SEQUENCE:-8192}                             # tokens of a sample when the student is evaluated
ROOT=${ROOT:-$PWD}                                     # this repository
export ROOT GPUS TARGET RECIPE LOGS=${LOGS:-$WORK/logs}

# job AFTER… -- WORDS…: sbatch WORDS… once the jobs AFTER… have succeeded; prints its number.
job() {
    local after=''
    while [ "$1" != -- ]; do after+=:$1 && shift; done
    shift
    sbatch --parsable --kill-on-invalid-dep=yes --gpus-per-node="$GPUS" ${after:+"--dependency=afterok$after"} "$@"
}
run=$ROOT/slurm/run.sh

import=$(FOLDERS=$HF job -- --job-name=import "$run" import_hf "hf=$HF" "output=$WORK/model")
data=$(FOLDERS=$CORPUS job "$import" -- --job-name=data "$run" \
    prepare_data "input=$CORPUS" "model=$WORK/model" "output=$WORK/data")

export MODEL=$WORK/model DATA=$WORK/data TEACHER STUDENT=$WORK/student SCORES=$WORK/scores
scores=$(OUTPUT=$SCORES job "$data" -- "$ROOT/slurm/importance.sh")
student=$(OUTPUT=$STUDENT job "$scores" -- "$ROOT/slurm/prune_4b.sh")
TEACHER=$MODEL
teacher=$(OUTPUT=$WORK/teacher job "$data" -- --nodes="$NODES" "$ROOT/slurm/correct_teacher.sh")
TEACHER=$WORK/teacher
distilled=$(OUTPUT=$WORK/distilled job "$student" "$teacher" -- --nodes="$NODES" "$ROOT/slurm/$DISTILL.sh")

evaluation=$(job "$distilled" -- --job-name=evaluate "$run" evaluate "model=$WORK/distilled" "data.path=$WORK/data" \
    "data.sequence_length=$SEQUENCE" "output=$WORK/evaluation")
export=$(job "$distilled" -- --job-name=export "$run" export_hf "model=$WORK/distilled" "output=$WORK/hf")

echo "import $import, data $data, importance $scores, prune $student, correct teacher $teacher, distill $distilled," \
    "evaluate $evaluation, export $export: the result will be in $WORK/hf, logs in $LOGS"
