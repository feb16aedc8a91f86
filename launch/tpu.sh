#!/usr/bin/env bash
# Trains on a Cloud TPU slice, from an empty project to done.json in the bucket:
#
#   launch/tpu.sh VERB --name=NAME --zone=ZONE [--type=TYPE --config=FILE --workdir=gs://...] [-- --config.a.b=1]
#
#   babysit   create, setup and run; recreate after a preemption, until done.json is in the workdir
#   run       create and setup if needed, then start the training and leave it alone
#   create    request the slice and wait for it; a READY one is kept, a broken one is replaced
#   setup     ship the committed code and install launch/requirements-tpu.lock on every worker
#   status    state, workers, hours and cost          stop    SIGTERM: the trainer saves and ends
#   logs      end of a worker's log                   delete  delete the slice
#
#   --name NAME               of the slice and its queued resource; the same name resumes
#   --type TYPE               v4-8 ..., v5litepod-16 ..., v5p-8 ..., v6e-8 ...
#   --zone ZONE               such as us-central1-a
#   --project PROJECT         default: the one that gcloud is set to
#   --config FILE[:ARG]       the experiment, committed
#   --workdir gs://BUCKET/RUN where checkpoints, logs and done.json go; the same workdir resumes
#   --slices N                slices of that type joined over the data centre's network (1)
#   --spot | --reservation    cheap and preemptible | from your reservation; default: on demand
#   --dry-run                 print every command, ready to be pasted, and call nothing
#   --allow-dirty             ship the last commit although there are uncommitted changes
#   --unlisted                accept a size or zone that is not in this script's tables
#   --worker W --lines N --follow   logs: which worker (0, or SLICE:WORKER), how much (50), go on
#   --price-per-chip-hour X   prints what was spent; the prices are at cloud.google.com/tpu/pricing
#   babysit: --delete-when-done     delete the slice at the end, whatever the end is, Ctrl-C too
#            --max-hours H          delete it after H hours in all  --max-restarts N  give up (100)
#            --poll-seconds S       how often it looks (60)
#
# What follows -- goes to the trainer. Exit codes: 0 done, 2 bad input (nothing was created), the
# trainer's own (3 loss not a number, 4 crash loop, 5 hung, ...), 1 anything else.
set -euo pipefail

if ((BASH_VERSINFO[0] < 5)); then
  echo "error: bash 5 or newer is needed, this is $BASH_VERSION; on macOS: brew install bash" >&2
  exit 2
fi
ROOT=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
# shellcheck source-path=SCRIPTDIR
source "$ROOT/launch/tpu_checks.sh"
# shellcheck source-path=SCRIPTDIR
source "$ROOT/launch/tpu_slice.sh"

# --- the command line ------------------------------------------------------------------------------
VERB='' NAME='' TYPE='' ZONE='' PROJECT='' CONFIG='' WORKDIR='' SLICES='' PRICE='' MAX_HOURS=''
SPOT='' RESERVATION='' DRY='' ALLOW_DIRTY='' UNLISTED='' FOLLOW='' DELETE_WHEN_DONE=''
WORKER=0 LINES_SHOWN=50 MAX_RESTARTS=100 POLL=60
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
        [[ -z $VERB ]] || bad "one verb at a time: '$VERB' or '$word'"
        VERB=$word
        continue
        ;;
    esac
    case $word in
      --name) NAME=$value ;;
      --type) TYPE=$value ;;
      --zone) ZONE=$value ;;
      --project) PROJECT=$value ;;
      --config) CONFIG=$value ;;
      --workdir) WORKDIR=${value%/} ;;
      --slices) SLICES=$value ;;
      --worker) WORKER=$value ;;
      --lines) LINES_SHOWN=$value ;;
      --price-per-chip-hour) PRICE=$value ;;
      --max-hours) MAX_HOURS=$value ;;
      --max-restarts) MAX_RESTARTS=$value ;;
      --poll-seconds) POLL=$value ;;
      *) bad "there is no option $word; see launch/tpu.sh --help (the trainer's own flags go after --)" ;;
    esac
  done
}

usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "$ROOT/launch/tpu.sh"; }

# --- the verbs -------------------------------------------------------------------------------------
main() {
  trap farewell EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  read_options "$@"
  check_options
  log_in
  case $VERB in
    create) create_slice ;;
    setup) existing_slice && setup_workers ;;
    run) run ;;
    babysit) babysit ;;
    logs) existing_slice && show_log ;;
    status) status ;;
    stop) existing_slice && on_workers "$(worker_command stop)" && say "every trainer has saved and ended" ;;
    delete) delete ;;
  esac
}

run() {
  if run_is_complete; then
    say "$WORKDIR/done.json is there: the run is complete"
    return
  fi
  create_slice
  if worker_report && [[ $REPORT == *running* ]]; then
    bad "'$NAME' is already training; follow it with 'babysit' or 'logs', end it with 'stop'"
  fi
  setup_workers || fail "setup failed on a worker (its own words are above)"
  start_workers || fail "the training could not be started on every worker"
  say "started; see: $(again logs) --follow"
}

# Creates, sets up, runs and watches, as often as preemption needs.
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
      say "it is training already: watching"
      watch_workers
    elif setup_workers && start_workers; then
      watch_workers
    else
      [[ $STATE != READY ]] || fail "a worker could not be set up or started (its own words are above)"
      OUTCOME=preempted
    fi
    [[ -z $DRY ]] || return 0 # one round shows every command
    say "$OUTCOME; $(cost)"
    [[ $OUTCOME == preempted ]] || break
  done
  case $OUTCOME in
    done) say "$WORKDIR/done.json is there: the run is complete; $(cost)" ;;
    stopped) say "stopped by hand; the same command goes on with it" ;;
    failed) show_failure && exit "$FAILED_CODE" ;;
  esac
}

status() {
  look
  say "$NAME in $ZONE: $STATE${TYPE:+, $SLICES x $TYPE ($((CHIPS * SLICES)) chips)}"
  if [[ $STATE == READY ]]; then
    if worker_report; then printf '%s\n' "$REPORT"; else say "not every worker answers:" "$REPORT"; fi
    node_hours && say "$(cost)"
  fi
  if [[ -n $WORKDIR ]]; then
    if run_is_complete; then say "complete"; else say "not complete: no $WORKDIR/done.json"; fi
  fi
}

delete() {
  look
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
