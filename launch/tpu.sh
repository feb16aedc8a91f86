#!/usr/bin/env bash
# Creates a Cloud TPU slice, sets it up, and trains or encodes data on it until the bucket has the result:
#
#   launch/tpu.sh VERB --name=NAME --zone=ZONE [--type=TYPE --config=FILE --workdir=gs://...] [-- --config.a.b=1]
#
#   babysit   create, setup and run; recreate after a preemption, until the workdir is complete
#   run       create and setup if needed, then start the training and return
#   create    request the slice and wait for it; a READY one is kept, a failed one is replaced
#   setup     ship the committed code and install launch/requirements-tpu.lock on every worker
#   status    state, workers, hours and cost          stop    SIGTERM: the trainer saves and exits
#   logs      end of a worker's log                   delete  delete the slice
#
#   --name NAME               name of the slice and its queued resource; the same name resumes
#   --type TYPE               v4-8 ..., v5litepod-16 ..., v5p-8 ..., v6e-8 ...
#   --zone ZONE               such as us-central1-a
#   --project PROJECT         default: the project of the gcloud configuration
#   --command COMMAND         train (default), or prepare_data, whose flags follow after --
#   --config FILE[:ARG]       config file of the trainer, committed; none for prepare_data
#   --workdir gs://BUCKET/RUN folder of checkpoints, logs and done.json, or of the records, logs and
#                             info.json (--to of prepare_data); the same workdir resumes
#   --slices N                number of slices, joined by multislice over the data centre network (1)
#   --spot | --reservation    cheap and preemptible | from your reservation; default: on demand
#   --dry-run                 print every command, ready to be pasted, and call nothing
#   --allow-dirty             ship the last commit although there are uncommitted changes
#   --unlisted                accept a size or zone that is not in this script's tables
#   --worker W --lines N --follow   logs: worker (0, or SLICE:WORKER), number of lines (50), tail -F
#   --price-per-chip-hour X   print the cost; prices are at cloud.google.com/tpu/pricing
#   babysit: --delete-when-done     delete the slice on every exit, including errors and Ctrl-C
#            --max-hours H          delete it after H hours  --max-restarts N  limit of restarts (100)
#            --poll-seconds S       polling interval (60)
#
# Arguments after -- are passed to the command. Exit codes: 0 done, 2 bad input (nothing was created),
# the trainer's (3 loss not finite, 4 crash loop, 5 hung, ...), 1 any other error.
set -euo pipefail

if ((BASH_VERSINFO[0] < 5)); then
  echo "error: bash 5 or newer is needed, this is $BASH_VERSION; on macOS: brew install bash" >&2
  exit 2
fi
ROOT=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=tpu_checks.sh
source "$ROOT/launch/tpu_checks.sh"
# shellcheck source-path=SCRIPTDIR source=tpu_slice.sh
source "$ROOT/launch/tpu_slice.sh"

# --- the command line ------------------------------------------------------------------------------
VERB='' NAME='' TYPE='' ZONE='' PROJECT='' CONFIG='' WORKDIR='' SLICES='' PRICE='' MAX_HOURS=''
SPOT='' RESERVATION='' DRY='' ALLOW_DIRTY='' UNLISTED='' FOLLOW='' DELETE_WHEN_DONE=''
WORKER=0 LINES_SHOWN=50 MAX_RESTARTS=100 POLL=60 COMMAND=train MARKER=done.json
TRAIN_FLAGS=()

read_options() {
  local word value
  while (($#)); do
    word=$1
    shift
    case $word in
      -h | --help) usage && exit 0 ;;
      --) TRAIN_FLAGS=("$@") && break ;;
      --spot) SPOT=1 && continue ;;
      --reservation) RESERVATION=1 && continue ;;
      --dry-run) DRY=1 && continue ;;
      --allow-dirty) ALLOW_DIRTY=1 && continue ;;
      --unlisted) UNLISTED=1 && continue ;;
      --follow) FOLLOW=1 && continue ;;
      --delete-when-done) DELETE_WHEN_DONE=1 && continue ;;
      --*=*) value=${word#*=} word=${word%%=*} ;;
      --*)
        (($#)) && [[ $1 != --* ]] || bad "$word needs a value: $word=..."
        value=$1
        shift
        ;;
      *)
        [[ -z $VERB ]] || bad "only one verb is allowed, not both '$VERB' and '$word'"
        VERB=$word
        continue
        ;;
    esac
    case $word in
      --name) NAME=$value ;;
      --type) TYPE=$value ;;
      --zone) ZONE=$value ;;
      --project) PROJECT=$value ;;
      --command) COMMAND=$value ;;
      --config) CONFIG=$value ;;
      --workdir) WORKDIR=${value%/} ;;
      --slices) SLICES=$value ;;
      --worker) WORKER=$value ;;
      --lines) LINES_SHOWN=$value ;;
      --price-per-chip-hour) PRICE=$value ;;
      --max-hours) MAX_HOURS=$value ;;
      --max-restarts) MAX_RESTARTS=$value ;;
      --poll-seconds) POLL=$value ;;
      *) bad "unknown option $word; see launch/tpu.sh --help (the trainer's flags go after --)" ;;
    esac
  done
}

usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$ROOT/launch/tpu.sh"; }

# --- the verbs -------------------------------------------------------------------------------------
main() {
  trap on_exit EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  read_options "$@"
  check_options
  check_gcloud
  case $VERB in
    create) create_slice ;;
    setup) existing_slice && setup_workers ;;
    run) run ;;
    babysit) babysit ;;
    logs) existing_slice && show_log ;;
    status) status ;;
    stop) existing_slice && on_workers "$(worker_command stop)" && say "every trainer has saved and exited" ;;
    delete) delete ;;
  esac
}

run() {
  if run_is_complete; then
    say "$WORKDIR/$MARKER exists: the run is complete"
    return
  fi
  create_slice
  if worker_report && [[ $REPORT == *running* ]]; then
    bad "'$NAME' is already training; monitor it with 'babysit' or 'logs', end it with 'stop'"
  fi
  setup_workers || fail "setup failed on a worker (its output is above)"
  start_workers || fail "the training could not be started on every worker"
  say "started; see: $(command_for logs) --follow"
}

# Creates, sets up, runs and monitors; repeats this after every preemption.
babysit() {
  local restarts
  for ((restarts = 0; ; restarts++)); do
    if run_is_complete; then
      OUTCOME='done'
      break
    fi
    ((restarts <= MAX_RESTARTS)) || fail "gave up after $MAX_RESTARTS restarts"
    create_slice
    if worker_report && [[ $REPORT == *running* && $REPORT != *exited* && $REPORT != *new* ]]; then
      say "the training is already running: monitoring it"
      monitor_workers
    elif setup_workers && start_workers; then
      monitor_workers
    else
      [[ $STATE != READY ]] || fail "a worker could not be set up or started (its output is above)"
      OUTCOME=preempted
    fi
    [[ -z $DRY ]] || return 0 # one round shows every command
    say "$OUTCOME; $(cost)"
    [[ $OUTCOME == preempted ]] || break
  done
  case $OUTCOME in
    done) say "$WORKDIR/$MARKER exists: the run is complete; $(cost)" ;;
    stopped) say "stopped by the verb stop; the same command resumes the run" ;;
    failed) show_failure && exit "$FAILED_CODE" ;;
  esac
}

status() {
  update_state
  say "$NAME in $ZONE: $STATE${TYPE:+, $SLICES x $TYPE ($((CHIPS * SLICES)) chips)}"
  if [[ $STATE == READY ]]; then
    if worker_report; then printf '%s\n' "$REPORT"; else say "not every worker responds:" "$REPORT"; fi
    node_uptime && say "$(cost)"
  fi
  if [[ -n $WORKDIR ]]; then
    if run_is_complete; then say "complete"; else say "not complete: no $WORKDIR/$MARKER"; fi
  fi
}

delete() {
  update_state
  if [[ $STATE == ABSENT && -z $DRY ]]; then
    say "there is no '$NAME' in $ZONE: nothing to delete"
  else
    delete_slice
  fi
}

show_log() {
  local slice=0 worker=$WORKER
  [[ $WORKER != *:* ]] || slice=${WORKER%%:*} worker=${WORKER##*:}
  cloud compute tpus tpu-vm ssh "${NODES[slice]}" --worker="$worker" \
    --command="$(worker_command tail "$LINES_SHOWN" ${FOLLOW:+follow})"
}

main "$@"
