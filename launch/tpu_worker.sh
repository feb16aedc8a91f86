#!/usr/bin/env bash
# Runs on every worker of a slice, where tpu.sh has unpacked the code:
#
#   tpu_worker.sh setup                                   Python and the locked packages
#   tpu_worker.sh start SLICE WORKDIR STAMP COMMAND FLAG... train or prepare_data, detached, with a log
#   tpu_worker.sh status SLICE                            one line: worker SLICE:INDEX STATE [CODE TIME]
#   tpu_worker.sh stop                                    the trainer saves and exits
#   tpu_worker.sh tail LINES [follow]
set -euo pipefail

UV=0.13.8 # installs Python: that of the images, 3.10, is too old
PYTHON=3.11
HERE=$HOME/monoformer # code/, venv/ and run/: pid, log, exit ("CODE TIME"), stopped
RUN=$HERE/run
LIBTPU_LOCK=${LIBTPU_LOCK:-/tmp/libtpu_lockfile}
SAVE_SECONDS=300 # time limit of the last checkpoint after SIGTERM
WORKER=${HOSTNAME##*-w-}

setup() {
  local uv=$HOME/.local/bin/uv
  if [[ ! -x $uv ]]; then
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet "uv==$UV"
  fi
  [[ -x $HERE/venv/bin/python ]] || "$uv" venv --quiet --python "$PYTHON" "$HERE/venv"
  "$uv" pip sync --quiet --python "$HERE/venv/bin/python" "$HERE/code/launch/requirements-tpu.lock"
  echo "worker $WORKER: ready"
}

is_running() {
  local pid
  [[ -f $RUN/pid ]] && read -r pid <"$RUN/pid" && grep -qs supervise "/proc/$pid/cmdline"
}

# Ends a trainer that still runs on this worker, with time to save.
end_trainer() {
  local pid waited
  if is_running; then
    read -r pid <"$RUN/pid"
    kill -TERM "$pid" || true # the supervisor forwards it to the trainer
    for ((waited = 0; waited < SAVE_SECONDS * 10; waited++)); do
      is_running || break
      sleep 0.1
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
  fi
}

start() {
  local slice=$1 workdir=$2 stamp=$3 command=$4 option=--workdir
  shift 4
  [[ $command == train ]] || option=--to
  end_trainer
  # Kills any other process that uses the chips; fuser fails if there is none.
  sudo fuser --silent --kill /dev/accel* /dev/vfio/* || true
  sudo rm -f "$LIBTPU_LOCK" # a stale lock gives "libtpu already in use"
  mkdir -p "$RUN"
  rm -f "$RUN/exit" "$RUN/stopped"
  cd "$HERE/code"
  nohup setsid bash launch/tpu_worker.sh supervise "$workdir/logs/$stamp-$slice-$WORKER.log" \
    "$command" "$option=$workdir" "$@" >"$RUN/log" 2>&1 </dev/null &
  echo $! >"$RUN/pid"
  until is_running || [[ -f $RUN/exit ]]; do sleep 0.05; done
  echo "worker $slice:$WORKER started"
}

# Runs the trainer, records its exit code, and copies its log to the bucket every minute.
supervise() {
  local bucket_log=$1 command=$2 code signalled=1 trainer
  shift 2
  echo "$HOSTNAME: $command $*"
  PYTHONUNBUFFERED=1 "$HERE/venv/bin/python" -m "monoformer_jax.$command" "$@" &
  trainer=$!
  trap 'signalled=1; kill -TERM "$trainer" 2>/dev/null || true' TERM
  while sleep 60; do copy_log "$bucket_log"; done &
  while ((signalled)); do # a signal interrupts `wait`, while the trainer is still saving
    signalled=0 code=0
    wait "$trainer" || code=$?
  done
  copy_log "$bucket_log"
  echo "$code $EPOCHSECONDS" >"$RUN/exit.new"
  mv "$RUN/exit.new" "$RUN/exit"
  kill -KILL -- "-$$" # ends the copying loop and its sleep too
}

copy_log() {
  if ! timeout 60 gcloud storage cp --quiet "$RUN/log" "$1" >/dev/null 2>"$RUN/copy_error"; then
    echo "the log could not be copied to $1: $(<"$RUN/copy_error")"
  fi
}

status() {
  local state=new
  if is_running; then
    state=running
  elif [[ -f $RUN/stopped ]]; then
    state=stopped
  elif [[ -f $RUN/exit ]]; then
    state="exited $(<"$RUN/exit")"
  elif [[ -f $RUN/pid ]]; then
    state=lost # the machine was restarted
  fi
  echo "worker $1:$WORKER $state"
}

stop() {
  mkdir -p "$RUN"
  touch "$RUN/stopped"
  end_trainer
}

case $1 in
  tail) tail -n "$2" ${3:+-F} "$RUN/log" ;;
  setup | start | supervise | status | stop) "$@" ;;
  *) echo "error: no such verb: $1" >&2 && exit 2 ;;
esac
