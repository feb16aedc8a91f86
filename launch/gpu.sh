#!/usr/bin/env bash
# Trains on NVIDIA GPUs: all of this host's, or those of a Slurm job. The same command resumes an
# interrupted run.
#
#   launch/gpu.sh --config=FILE --workdir=DIR [-- --config.a.b=1]     one process, all GPUs of the host
#   launch/gpu.sh --nodes=2 --gpus=8 [--partition=P --account=A --time=T] ...  srun, one process per GPU
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --requeue --signal=TERM@120 launch/gpu.sh ...
#
# In a Slurm job, the nodes and GPUs default to the job's. On the SIGTERM that Slurm sends 120 s before
# the time limit, the trainer saves and exits with 75; a batch job is then requeued.
# Arguments after -- are passed to the trainer. --dry-run prints the command without running it.
# The interpreter is .venv/bin/python (python3 -m venv .venv && .venv/bin/pip install -e '.[cuda,digits]') or
# $PYTHON. Exit codes: 2 bad input, otherwise the trainer's.
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
    *) bad "unexpected argument '$word'; see launch/gpu.sh --help" ;;
  esac
  case $word in
    --config) CONFIG=$value ;;
    --workdir) WORKDIR=$value ;;
    --nodes) NODES=$value ;;
    --gpus) GPUS=$value ;;
    --partition | --account | --time) SRUN+=("$word=$value") ;;
    *) bad "unknown option $word; see launch/gpu.sh --help (the trainer's flags go after --)" ;;
  esac
done

# sbatch runs a copy of this file in a spool folder, but in the working directory of the submission.
if [[ -z ${SLURM_JOB_ID:-} ]]; then cd "${BASH_SOURCE[0]%/*}/.."; fi
[[ -n $CONFIG && -n $WORKDIR ]] || bad "--config=FILE and --workdir=DIR are needed"
[[ -f ${CONFIG%%:*} ]] || bad "--config=${CONFIG%%:*}: no such file in $PWD"
PYTHON=${PYTHON:-.venv/bin/python}
command=("$PYTHON" -m monoformer_jax.train --config="$CONFIG" --workdir="$WORKDIR" "${TRAIN_FLAGS[@]}")

if [[ -n ${SLURM_JOB_ID:-} ]]; then
  NODES=${NODES:-$SLURM_JOB_NUM_NODES} GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-}}
fi
if [[ -n $NODES ]]; then
  [[ $NODES =~ ^[1-9][0-9]{0,4}$ && $GPUS =~ ^[1-9][0-9]{0,2}$ ]] ||
    bad "--nodes=$NODES --gpus=$GPUS: both must be positive numbers, of nodes and of GPUs per node"
  # jax.distributed reads the addresses from Slurm's variables and uses one GPU per process.
  command=(srun --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" --kill-on-bad-exit=1
    "${SRUN[@]}" "${command[@]}")
elif ((${#SRUN[@]})) || [[ -n $GPUS ]]; then
  bad "--gpus, --partition, --account and --time need --nodes=N; without Slurm, all GPUs of this host are used"
fi

if [[ -n $DRY ]]; then
  printf '%q ' "${command[@]}" && echo && exit 0
fi
if [[ -n $NODES ]]; then
  command -v srun >/dev/null || bad "--nodes=$NODES needs Slurm, but srun is not on the PATH"
elif ! nvidia-smi --list-gpus 2>/dev/null | grep -q .; then
  bad "nvidia-smi finds no GPU on this host"
fi
[[ -x $PYTHON ]] || command -v "$PYTHON" >/dev/null ||
  bad "$PYTHON does not exist; create it: python3 -m venv .venv && .venv/bin/pip install -e '.[cuda,digits]'"

export PYTHONUNBUFFERED=1 # writes each line to the log at once
code=0
"${command[@]}" || code=$?
if [[ $code == 75 && -n ${SLURM_JOB_ID:-} && -z ${SLURM_STEP_ID:-} ]]; then
  echo "saved; requeueing job $SLURM_JOB_ID" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
