#!/usr/bin/env bash
# Trains on NVIDIA GPUs: all of this host's, or those of a Slurm job. The same command goes on with
# an interrupted run.
#
#   launch/gpu.sh --config=FILE --workdir=DIR [-- --config.a.b=1]             one process, all GPUs here
#   launch/gpu.sh --nodes=2 --gpus=8 [--partition=P --account=A --time=T] ...  srun, a process a GPU
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --requeue --signal=TERM@120 launch/gpu.sh ...
#
# In a Slurm job the nodes and GPUs are the job's. Slurm's TERM, 120 s before the end, lets the trainer
# save and end with 75; a batch job is then queued again. --dry-run prints the command and runs nothing.
# The interpreter is .venv/bin/python (python3 -m venv .venv && .venv/bin/pip install -e '.[cuda]') or
# $PYTHON. Exit codes: 2 bad input, else the trainer's.
set -euo pipefail

bad() { printf 'error: %s\n' "$*" >&2 && exit 2; }

CONFIG='' WORKDIR='' NODES='' GPUS='' DRY='' SRUN=() TRAIN_FLAGS=()
while (($#)); do
  word=$1
  shift
  case $word in
    -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$0" && exit 0 ;;
    --) TRAIN_FLAGS=("$@") && break ;;
    --dry-run) DRY=1 && continue ;;
    --*=*) value=${word#*=} word=${word%%=*} ;;
    --*)
      (($#)) && [[ $1 != --* ]] || bad "$word needs a value: $word=..."
      value=$1
      shift
      ;;
    *) bad "'$word' is no option; see launch/gpu.sh --help" ;;
  esac
  case $word in
    --config) CONFIG=$value ;;
    --workdir) WORKDIR=$value ;;
    --nodes) NODES=$value ;;
    --gpus) GPUS=$value ;;
    --partition | --account | --time) SRUN+=("$word=$value") ;;
    *) bad "there is no option $word; see launch/gpu.sh --help (the trainer's own flags go after --)" ;;
  esac
done

# Under sbatch this file is a copy elsewhere, and the job starts where it was submitted.
if [[ -z ${SLURM_JOB_ID:-} ]]; then cd "${BASH_SOURCE[0]%/*}/.."; fi
[[ -n $CONFIG && -n $WORKDIR ]] || bad "--config=FILE and --workdir=DIR are needed"
[[ -f ${CONFIG%%:*} ]] || bad "--config=${CONFIG%%:*}: there is no such file in $PWD"
PYTHON=${PYTHON:-.venv/bin/python}
command=("$PYTHON" -m monoformer_jax.train --config="$CONFIG" --workdir="$WORKDIR" "${TRAIN_FLAGS[@]}")

if [[ -n ${SLURM_JOB_ID:-} ]]; then
  NODES=${NODES:-$SLURM_JOB_NUM_NODES} GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-}}
fi
if [[ -n $NODES ]]; then
  [[ $NODES =~ ^[1-9][0-9]*$ && $GPUS =~ ^[1-9][0-9]*$ ]] ||
    bad "--nodes=$NODES --gpus=$GPUS: how many nodes, and how many GPUs on each?"
  # jax.distributed takes the addresses from Slurm's variables, and one GPU for each of its processes.
  command=(srun --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" --kill-on-bad-exit=1
    "${SRUN[@]}" "${command[@]}")
elif ((${#SRUN[@]})) || [[ -n $GPUS ]]; then
  bad "--gpus, --partition, --account and --time belong to --nodes=N; without Slurm all GPUs here are used"
fi

if [[ -n $DRY ]]; then
  printf '%q ' "${command[@]}" && echo && exit 0
fi
if [[ -n $NODES ]]; then
  command -v srun >/dev/null || bad "--nodes=$NODES needs Slurm, and there is no srun here"
elif ! nvidia-smi --list-gpus 2>/dev/null | grep -q .; then
  bad "nvidia-smi finds no GPU here"
fi
[[ -x $PYTHON ]] || command -v "$PYTHON" >/dev/null ||
  bad "there is no $PYTHON: python3 -m venv .venv && .venv/bin/pip install -e '.[cuda]'"

export PYTHONUNBUFFERED=1 # a log shows a line when it is printed
code=0
"${command[@]}" || code=$?
if [[ $code == 75 && -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then
  echo "saved; queueing job $SLURM_JOB_ID again" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
