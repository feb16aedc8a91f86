# shellcheck shell=bash
# Sourced by tpu.sh: calls of gcloud, the slice, its workers, and the message on exit.

# --- gcloud ----------------------------------------------------------------------------------------
show() { printf '%s\n' "$(quoted "$@")" >&3; }

# Runs a command, or prints it in a dry run.
run_or_print() { if [[ -n $DRY ]]; then show "$@"; else "$@"; fi; }
cloud() {
  local where=(--project="$PROJECT" --zone="$ZONE")
  [[ $1 != storage ]] || where=()
  run_or_print gcloud "$@" "${where[@]}" --quiet
}

# Sets ANSWER to the output of a gcloud query; fails if the resource does not exist.
query() {
  local try
  ANSWER='' ERROR=''
  [[ -z $DRY ]] || { show gcloud "$@" && return 1; }
  for ((try = 1; ; try++)); do
    if ANSWER=$(gcloud "$@" 2>"$ERRORS"); then return 0; fi
    ERROR=$(<"$ERRORS")
    [[ ${ERROR,,} != *not_found* && ${ERROR,,} != *"not found"* && $ERROR != *"matched no objects"* ]] || return 1
    if is_refused; then refused; fi
    ((try < 10)) || fail "gcloud ${*:1:4} failed $try times: ${ERROR%%$'\n'*}"
    back_off "$try"
  done
}

# True for errors that a retry cannot fix.
is_refused() {
  [[ $ERROR =~ RESOURCE_EXHAUSTED|[Qq]uota|PERMISSION_DENIED|INVALID_ARGUMENT|[Rr]eauth|'auth login' ]]
}
refused() {
  [[ -z $TOUCHED ]] || fail "gcloud rejected the request: ${ERROR%%$'\n'*}"
  bad "gcloud rejected the request, nothing was created: ${ERROR%%$'\n'*}"
}

# Sleeps in the background, because bash handles a signal during `wait` but not during `sleep`.
wait_seconds() {
  (($1 > 0)) && [[ -z $DRY ]] || return 0
  sleep "$1" &
  wait "$!"
}
back_off() { wait_seconds $(((POLL < 5 ? POLL : 5) * 2 ** ($1 < 5 ? $1 - 1 : 4))); } # 5 s to 80 s

# Runs a command up to five times, with back-off, while the slice is READY.
retry() {
  local try
  for ((try = 1; ; try++)); do
    if "$@"; then return 0; fi
    update_state
    [[ $STATE == READY ]] && ((try < 5)) || return 1
    say "failed; retrying ($try)"
    back_off "$try"
  done
}

run_is_complete() {
  query storage ls "$WORKDIR/$MARKER" && return 0
  [[ -n $DRY || $ERROR == *"matched no objects"* ]] || bad "--workdir=$WORKDIR: $ERROR"
  return 1
}

# --- the slice -------------------------------------------------------------------------------------
STATE='' UPTIME=0 POLLED_AT=0 NODES=() REPORT='' OUTCOME='' FAILED_CODE=1 FAILED_WORKER=''
TOUCHED='' # set once a slice may exist, which costs money
DRY_STATE=ACTIVE

# Updates STATE; checks owner, type and number of slices of the queued resource.
update_state() {
  local before=$STATE owner type slices node
  if query compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" --format="csv[no-heading](state.state,tpu.nodeSpec[0].node.labels.owner,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[0].multisliceParams.nodeCount)"; then
    IFS=, read -r STATE owner type slices <<<"$ANSWER"
    [[ $owner == "$OWNER" ]] ||
      bad "'$NAME' in $ZONE belongs to '${owner:-an unknown user (no owner label)}', not to '$OWNER': choose another --name"
    [[ ${TYPE:=$type} == "$type" && ${SLICES:=${slices:-1}} == "${slices:-1}" ]] ||
      bad "'$NAME' is ${slices:-1} x $type, not $SLICES x $TYPE: delete it, or choose another --name"
    TOUCHED=1
  else
    STATE=ABSENT
    [[ -z $DRY ]] || STATE=$DRY_STATE
  fi
  [[ -z $TYPE ]] || slice_facts
  name_nodes
  if [[ $STATE == ACTIVE ]]; then
    STATE=READY
    for node in "${NODES[@]}"; do
      query compute tpus tpu-vm describe "$node" --project="$PROJECT" --zone="$ZONE" --format='value(state)' || ANSWER=GONE
      if [[ $ANSWER != READY && -z $DRY ]]; then STATE=$ANSWER; fi
    done
  fi
  if [[ $STATE == READY && $before == READY ]]; then UPTIME=$((UPTIME + EPOCHSECONDS - POLLED_AT)); fi
  POLLED_AT=$EPOCHSECONDS
}

name_nodes() {
  local i
  SLICES=${SLICES:-1} NODES=("$NAME")
  ((SLICES > 1)) || return 0
  for ((i = 0; i < SLICES; i++)); do NODES[i]=$NAME-$i; done
}

# Waits until the slice is READY: requests it if it is absent, and replaces it if it failed.
create_slice() {
  local last='' replaced=0
  while true; do
    update_state
    [[ $STATE == "$last" ]] || say "$NAME: $STATE"
    last=$STATE
    case $STATE in
      READY) return ;;
      ABSENT) request_slice ;;
      CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) wait_seconds "$POLL" ;;
      SUSPENDING | DELETING | STARTING | RESTARTING | REPAIRING) wait_seconds "$POLL" ;;
      *)
        if [[ $STATE == FAILED ]]; then explain_failure; fi
        ((++replaced < 5)) || fail "$NAME ended as $STATE five times in a row"
        delete_slice
        back_off "$replaced"
        ;;
    esac
  done
}

request_slice() {
  local try how=(--node-id="$NAME") tier=()
  ((SLICES == 1)) || how=(--node-count="$SLICES" --node-prefix="$NAME")
  [[ -z $SPOT ]] || tier=(--spot)
  [[ -z $RESERVATION ]] || tier=(--reserved)
  for ((try = 1; ; try++)); do
    TOUCHED=1 DRY_STATE=ACTIVE
    if cloud compute tpus queued-resources create "$NAME" "${how[@]}" --accelerator-type="$TYPE" \
      --runtime-version="$RUNTIME" "${tier[@]}" --labels="owner=$OWNER" 2>"$ERRORS"; then
      return
    fi
    ERROR=$(<"$ERRORS")
    if is_refused; then TOUCHED='' && refused; fi
    ((try < 5)) || fail "the request failed $try times: ${ERROR%%$'\n'*}"
    back_off "$try"
    update_state # the request may have succeeded despite the error
    [[ $STATE == ABSENT ]] || return 0
  done
}

explain_failure() {
  query compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.failedData.error.message)' && say "$NAME failed: $ANSWER"
}

existing_slice() {
  update_state
  [[ $STATE == READY ]] || bad "'$NAME' in $ZONE is $STATE; create it with: $(command_for create) --type=..."
}

delete_slice() {
  local try
  for ((try = 1; ; try++)); do
    if cloud compute tpus queued-resources delete "$NAME" --force 2>"$ERRORS"; then break; fi
    ERROR=$(<"$ERRORS")
    [[ ${ERROR,,} != *not_found* ]] || break
    ((try < 5)) || fail "'$NAME' could not be deleted and may still cost money: ${ERROR%%$'\n'*}"
    back_off "$try"
  done
  TOUCHED='' STATE=ABSENT DRY_STATE=ABSENT
  say "$NAME: deleted"
}

# --- the workers -----------------------------------------------------------------------------------
# Runs FUNCTION SLICE NODE ARG... for all slices in parallel; fails if it fails for one.
each_slice() {
  local slice pid pids=() failed=0
  for slice in "${!NODES[@]}"; do
    if [[ -n $DRY || ${#NODES[@]} == 1 ]]; then
      "$1" "$slice" "${NODES[slice]}" "${@:2}" || failed=1
    else
      "$1" "$slice" "${NODES[slice]}" "${@:2}" &
      pids+=("$!")
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return "$failed"
}
ship_to() { cloud compute tpus tpu-vm scp "$ARCHIVE" "$2:monoformer.tar.gz" --worker=all; }
# Only the first @SLICE@, which stands before every value of the user, is the slice number.
ssh_to() {
  cloud compute tpus tpu-vm ssh "$2" --worker=all --command="${3/@SLICE@/$1}" </dev/null
}
ship() { each_slice ship_to; }
on_workers() { each_slice ssh_to "$1"; }

REMOTE=monoformer/code/launch/tpu_worker.sh
worker_command() { quoted bash "$REMOTE" "$@"; }

setup_workers() {
  [[ -z $DRY && -f $ARCHIVE ]] ||
    run_or_print git -C "$ROOT" archive --format=tar.gz --output="$ARCHIVE" "$COMMIT"
  say "shipping commit $COMMIT to every worker and installing launch/requirements-tpu.lock"
  retry ship && retry on_workers "rm -rf monoformer/code && mkdir -p monoformer/code && \
tar -xzf monoformer.tar.gz -C monoformer/code && $(worker_command setup)"
}

# JAX finds the other workers and slices through the metadata of the machines.
start_workers() {
  local stamp
  stamp=$(date -u +%Y%m%dT%H%M%SZ)-$COMMIT # the prefix of the log names, equal on all workers
  retry on_workers "$(worker_command start @SLICE@ "$WORKDIR" "$stamp" "$COMMAND" ${CONFIG:+--config="$CONFIG"} "${TRAIN_FLAGS[@]}")"
}

# Sets REPORT to one line per worker (see tpu_worker.sh status); fails unless all workers respond.
worker_report() {
  local line lines='' count=0
  REPORT=$(on_workers "slice=@SLICE@; if [ -f $REMOTE ]; then $(worker_command status) \$slice; else \
echo worker \$slice:\${HOSTNAME##*-w-} new; fi" 2>"$ERRORS") || true
  [[ -z $DRY ]] || return 0
  while IFS= read -r line; do
    [[ $line != worker\ * ]] || lines+=$line$'\n' count=$((count + 1))
  done <<<"$REPORT"
  REPORT=${lines%$'\n'}
  ((count == HOSTS * SLICES))
}

# Polls until the run has ended or the slice is gone; OUTCOME: done, preempted, stopped or failed.
monitor_workers() {
  local silent=0 ended=0
  while true; do
    wait_seconds "$POLL"
    update_state
    stop_in_time
    OUTCOME=preempted
    if [[ $STATE != READY ]]; then
      say "$NAME: $STATE"
      return
    elif worker_report; then
      [[ -z $DRY ]] || return 0 # one poll shows every command
      silent=0
    elif ((++silent < 5)); then
      continue
    else
      say "not every worker responded in $silent polls: $(<"$ERRORS")"
      delete_slice
      return
    fi
    set_outcome
    # Polls again before it decides: a failed worker may be the first sign of a preemption, and
    # others may still be running.
    [[ $OUTCOME != running ]] || continue
    if [[ $OUTCOME == failed || $REPORT == *running* ]] && ((++ended < 3)); then continue; fi
    if [[ $OUTCOME == 'done' || $OUTCOME == failed ]]; then
      if run_is_complete; then
        OUTCOME='done'
      elif [[ $OUTCOME == 'done' ]]; then
        OUTCOME=failed FAILED_CODE=1 FAILED_WORKER=0:0
        say "every trainer exited with 0, but there is no $WORKDIR/$MARKER"
      fi
    fi
    return 0
  done
}

# REPORT -> OUTCOME, and the first worker that failed. A preempted worker makes the others fail too, so
# one worker that saved (75) or is lost takes precedence over every other exit code.
set_outcome() {
  local where state code time first=''
  OUTCOME='done'
  while read -r _ where state code time; do
    case $state:$code in
      stopped:) OUTCOME=stopped && return ;;
      lost: | new: | exited:75) OUTCOME=preempted ;;
      exited:0) ;;
      exited:*)
        [[ $OUTCOME == preempted ]] || OUTCOME=failed
        if [[ -z $first || $time -lt $first ]]; then
          first=$time FAILED_WORKER=$where FAILED_CODE=$code
        fi
        ;;
      *) [[ $OUTCOME != 'done' ]] || OUTCOME=running ;;
    esac
  done <<<"$REPORT"
}

show_failure() {
  local meaning=''
  case $FAILED_CODE in
    2) meaning=' (bad input)' ;;
    3) meaning=' (the loss is not finite)' ;;
    4) meaning=' (crash loop)' ;;
    5) meaning=' (it hung)' ;;
    137) meaning=' (killed, possibly out of memory)' ;;
  esac
  say "worker $FAILED_WORKER of $NAME exited with code $FAILED_CODE$meaning; the end of its log:"
  cloud compute tpus tpu-vm ssh "${NODES[${FAILED_WORKER%%:*}]}" --worker="${FAILED_WORKER##*:}" \
    --command="$(worker_command tail 20)" </dev/null >&2 || say "(its log cannot be read)"
}

# --- time and money --------------------------------------------------------------------------------
cost() {
  awk -v seconds="$UPTIME" -v chips="$((CHIPS * SLICES))" -v price="$PRICE" 'BEGIN {
    hours = seconds / 3600
    printf "%.2f h x %d chips", hours, chips
    if (price != "") printf " x %s = %.2f", price, hours * chips * price
  }'
}

stop_in_time() {
  [[ -n $MAX_HOURS && -z $DRY ]] && awk "BEGIN { exit !($UPTIME >= $MAX_HOURS * 3600) }" || return 0
  say "--max-hours=$MAX_HOURS is reached: saving and deleting"
  on_workers "$(worker_command stop)" || say "not every trainer could save"
  delete_slice
  fail "stopped after $(cost)"
}

# Sets UPTIME to the seconds since the node was created, perhaps by another call of tpu.sh.
node_uptime() {
  query compute tpus tpu-vm describe "${NODES[0]}" --project="$PROJECT" --zone="$ZONE" \
    --format='value(createTime.date("%s"))' && UPTIME=$((EPOCHSECONDS - ${ANSWER%%.*}))
}

# On every exit: deletes the slice, or warns that it still costs money.
on_exit() {
  local code=$? answer=''
  trap - EXIT INT TERM
  set +e
  if [[ -n $TOUCHED && -z $DRY && $VERB != status && $VERB != logs ]]; then
    if [[ -n $DELETE_WHEN_DONE ]]; then
      answer=y
    elif [[ -t 0 && -t 2 ]] && ((code != 0 && code != 2)) || [[ -t 0 && -t 2 && $VERB == babysit ]]; then
      read -r -p "'$NAME' ($STATE) may still cost money. Delete it now? [y/N] " answer
    fi
    if [[ $answer == [yY]* ]]; then
      delete_slice
    else
      say "'$NAME' ($STATE) still exists and may cost money; delete it with: $(command_for delete)"
    fi
  fi
  [[ -z $SCRATCH ]] || rm -rf "$SCRATCH"
  exit "$code"
}
