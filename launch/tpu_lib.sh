# shellcheck shell=bash
# Sourced by tpu.sh: what there is, checks before anything is created, and the steps of a launch.
# STATE of a slice: ABSENT, READY, or what the queue or its worst node says (see look).

# --- what there is ---------------------------------------------------------------------------------
# Sizes and zones as listed at cloud.google.com/tpu/docs/regions-zones and the pages of each TPU;
# runtimes at cloud.google.com/tpu/docs/runtimes. --unlisted goes past the sizes and zones.
FAMILIES="v4 v5litepod v5p v6e"
sizes() {
  case $1 in
    v4) echo 8 16 32 64 128 256 512 1024 2048 4096 ;;
    v5p) echo 8 16 32 64 {128..12288..128} ;;
    v5litepod | v6e) echo 1 4 8 16 32 64 128 256 ;;
  esac
}
zones() {
  case $1 in
    v4) echo us-central2-b ;;
    v5litepod) echo us-central1-a us-south1-a us-west1-c us-west4-a europe-west4-b ;;
    v5p) echo us-central1-a us-east5-a europe-west4-b ;;
    v6e) echo us-central1-b us-east1-d us-east5-a us-east5-b europe-west4-a asia-northeast1-b \
      southamerica-west1-a ;;
  esac
}

# TYPE -> RUNTIME, CHIPS and HOSTS of one slice. v4 and v5p are named by their cores, two a chip.
slice_facts() {
  local size=${TYPE##*-}
  case $TYPE in
    v4-*) RUNTIME=tpu-ubuntu2204-base CHIPS=$((size / 2)) ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite CHIPS=$size ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 CHIPS=$((size / 2)) ;;
    v6e-*) RUNTIME=v2-alpha-tpuv6e CHIPS=$size ;;
  esac
  HOSTS=$(((CHIPS + 3) / 4))
  if [[ $TYPE == v5litepod-8 || $TYPE == v6e-8 ]]; then HOSTS=1; fi
}

# --- words -----------------------------------------------------------------------------------------
say() { printf '%s\n' "${DRY:+# }$*" >&2; }
bad() { printf 'error: %s\n' "$*" >&2 && exit 2; }
fail() { printf 'error: %s\n' "$*" >&2 && exit 1; }

# Its arguments as a line for a shell, quoted where that is needed.
quoted() {
  local word line=''
  for word in "$@"; do
    if [[ $word =~ ^--[a-z-]+= && ! $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]]; then
      word=${word%%=*}=$(quoted "${word#*=}")
    elif [[ ! $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]]; then
      word=${word@Q}
    fi
    line+=" $word"
  done
  printf '%s' "${line# }"
}

again() { quoted launch/tpu.sh "$1" --name="$NAME" --zone="$ZONE" ${GIVEN_PROJECT:+--project="$PROJECT"}; }

# The one of $2... that begins most like $1.
nearest() {
  local wanted=$1 word best=$2 length=0
  for word in "${@:2}"; do
    while [[ ${word:0:length+1} == "${wanted:0:length+1}" && $length -lt ${#word} ]]; do
      best=$word length=$((length + 1))
    done
  done
  echo "$best"
}

# --- checks before anything is created -------------------------------------------------------------
check_options() {
  local verbs="babysit run create setup status stop logs delete" needs="NAME ZONE" need
  [[ -n $VERB ]] || bad "which of: $verbs? (launch/tpu.sh --help)"
  [[ " $verbs " == *" $VERB "* ]] || bad "there is no verb '$VERB'; nearest: '$(nearest "$VERB" $verbs)'"
  case $VERB in
    create) needs+=" TYPE" ;;
    run | babysit) needs+=" TYPE CONFIG WORKDIR" ;;
  esac
  for need in $needs; do
    [[ -n ${!need} ]] || bad "$VERB needs --${need,,}=..."
  done
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    bad "--name=$NAME: at most 40 lower-case letters, digits and '-', a letter first"
  [[ -z $SPOT || -z $RESERVATION ]] || bad "--spot and --reservation exclude each other"
  [[ -z $WORKDIR || $WORKDIR == gs://?*/?* ]] ||
    bad "--workdir=$WORKDIR: every worker writes there, so it must be gs://BUCKET/FOLDER"
  [[ $VERB == babysit || -z $DELETE_WHEN_DONE$MAX_HOURS ]] ||
    bad "--delete-when-done and --max-hours need somebody who watches: use babysit"
  [[ -z $SLICES || $SLICES =~ ^[1-9][0-9]*$ ]] || bad "--slices=$SLICES: a number from 1"
  [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || bad "--max-restarts=$MAX_RESTARTS: a number"
  [[ $POLL =~ ^[0-9]+$ ]] || bad "--poll-seconds=$POLL: a number"
  [[ $LINES_SHOWN =~ ^[0-9]+$ ]] || bad "--lines=$LINES_SHOWN: a number"
  [[ $WORKER =~ ^([0-9]+:)?[0-9]+$ ]] || bad "--worker=$WORKER: a number, or SLICE:WORKER"
  for need in PRICE MAX_HOURS; do
    [[ -z ${!need} || ${!need} =~ ^[0-9]*\.?[0-9]+$ ]] || bad "$need=${!need}: a number, such as 1.5"
  done
  [[ -z $TYPE ]] || check_type
}

check_type() {
  local family=${TYPE%-*} size=${TYPE##*-} known best
  [[ $family != v5e ]] || bad "--type=$TYPE: Google names it v5litepod-$size"
  [[ " $FAMILIES " == *" $family "* && $TYPE == *-* ]] ||
    bad "--type=$TYPE: there is no such TPU; nearest: $(nearest "$TYPE" ${FAMILIES// /-8 }-8) (of: $FAMILIES)"
  [[ $size =~ ^[1-9][0-9]*$ ]] || bad "--type=$TYPE: a number must follow $family-"
  slice_facts
  SLICES=${SLICES:-1}
  [[ -z $UNLISTED ]] || return 0
  best=1
  for known in $(sizes "$family"); do
    if ((known <= size || best < 2)); then best=$known; fi
  done
  ((best == size)) || bad "--type=$TYPE is not listed; nearest: $family-$best (--unlisted takes it as it is)"
  # shellcheck disable=SC2046 # one word a zone
  [[ " $(zones "$family") " == *" $ZONE "* ]] ||
    bad "--zone=$ZONE has no listed $family; nearest: $(nearest "$ZONE" $(zones "$family"))" \
      "(of: $(zones "$family"); --unlisted takes it as it is)"
}

SCRATCH='' ERRORS=/dev/null
# PROJECT, OWNER (a label that keeps users of one project apart), and that the code can be shipped.
log_in() {
  local account
  GIVEN_PROJECT=$PROJECT
  if [[ -n $DRY ]]; then
    exec 3>&1
    PROJECT=${PROJECT:-your-project} OWNER=your-account COMMIT=HEAD ARCHIVE=/tmp/monoformer.tar.gz
    case $VERB in create | run | babysit) DRY_STATE=ABSENT ;; esac
    say "Nothing is called; your-account stands for what gcloud would say."
    return
  fi
  command -v gcloud >/dev/null || bad "gcloud is not installed: cloud.google.com/sdk/docs/install"
  SCRATCH=$(mktemp -d)
  ERRORS=$SCRATCH/errors
  ask config list --format='csv[no-heading](core.account,core.project)' || fail "gcloud: $ERROR"
  account=${ANSWER%%,*} PROJECT=${PROJECT:-${ANSWER##*,}}
  [[ -n $account ]] || bad "gcloud is not logged in: gcloud auth login"
  [[ -n $PROJECT ]] || bad "no project: gcloud config set project PROJECT, or --project=PROJECT"
  OWNER=${account,,} OWNER=${OWNER//[^a-z0-9_-]/-} OWNER=${OWNER:0:63}
  case $VERB in setup | run | babysit) check_tree ;; esac
}

check_tree() {
  local changed config=${CONFIG%%:*}
  COMMIT=$(git -C "$ROOT" rev-parse --short HEAD) || bad "$ROOT is no git checkout: the committed code is shipped"
  [[ -z $config ]] || git -C "$ROOT" cat-file -e "HEAD:$config" 2>/dev/null ||
    bad "--config=$config is not in commit $COMMIT, which is what would be shipped"
  changed=$(git -C "$ROOT" status --porcelain | cut -c4- | head -n 8 | paste -sd ' ')
  if [[ -n $changed && -z $ALLOW_DIRTY ]]; then
    bad "not committed, so not shipped: $changed; commit, or go without with --allow-dirty"
  fi
  ARCHIVE=$SCRATCH/monoformer.tar.gz
}

# --- gcloud ----------------------------------------------------------------------------------------
show() { printf '%s\n' "$(quoted "$@")" >&3; }

# A command that changes something or shows it.
do_it() { if [[ -n $DRY ]]; then show "$@"; else "$@"; fi; }
cloud() {
  local where=(--project="$PROJECT" --zone="$ZONE")
  [[ $1 != storage ]] || where=()
  do_it gcloud "$@" "${where[@]}" --quiet
}

# gcloud's answer to a question in ANSWER; fails where the thing asked for does not exist.
ask() {
  local try
  ANSWER='' ERROR=''
  [[ -z $DRY ]] || { show gcloud "$@" && return 1; }
  for ((try = 1; ; try++)); do
    if ANSWER=$(gcloud "$@" 2>"$ERRORS"); then return 0; fi
    ERROR=$(<"$ERRORS")
    [[ ${ERROR,,} != *not_found* && ${ERROR,,} != *"not found"* && $ERROR != *"matched no objects"* ]] || return 1
    ((try < 5)) || fail "gcloud ${*:1:4} failed $try times: $ERROR"
    back_off "$try"
  done
}

# Sleeps such that a signal is heard at once.
nap() {
  (($1 > 0)) && [[ -z $DRY ]] || return 0
  sleep "$1" &
  wait "$!"
}
back_off() { nap $(((POLL < 5 ? POLL : 5) * 2 ** ($1 - 1))); }

# A command up to five times, with back-off, as long as the slice stands.
retry() {
  local try
  for ((try = 1; ; try++)); do
    if "$@"; then return 0; fi
    look
    [[ $STATE == READY ]] && ((try < 5)) || return 1
    say "failed; trying again ($try)"
    back_off "$try"
  done
}

run_is_complete() {
  ask storage ls "$WORKDIR/done.json" && return 0
  [[ -n $DRY || $ERROR == *"matched no objects"* ]] || bad "--workdir=$WORKDIR: $ERROR"
  return 1
}

# --- the slice -------------------------------------------------------------------------------------
STATE='' ALIVE=0 LOOKED_AT=0 NODES=() REPORT='' OUTCOME='' FAILED_CODE=1 FAILED_WORKER=''
TOUCHED='' # set once there may be something that costs money
DRY_STATE=ACTIVE

# STATE, and what the queued resource says of itself: owner, type, slices.
look() {
  local before=$STATE owner type slices node
  if ask compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" --format="csv[no-heading](state.state,tpu.nodeSpec[0].node.labels.owner,tpu.nodeSpec[0].node.acceleratorType,tpu.nodeSpec[0].multisliceParams.nodeCount)"; then
    IFS=, read -r STATE owner type slices <<<"$ANSWER"
    [[ $owner == "$OWNER" ]] ||
      bad "'$NAME' in $ZONE belongs to '${owner:-somebody who set no owner label}', not to '$OWNER': choose another --name"
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
      ask compute tpus tpu-vm describe "$node" --project="$PROJECT" --zone="$ZONE" --format='value(state)' || ANSWER=GONE
      if [[ $ANSWER != READY && -z $DRY ]]; then STATE=$ANSWER; fi
    done
  fi
  if [[ $STATE == READY && $before == READY ]]; then ALIVE=$((ALIVE + EPOCHSECONDS - LOOKED_AT)); fi
  LOOKED_AT=$EPOCHSECONDS
}

name_nodes() {
  local i
  SLICES=${SLICES:-1} NODES=("$NAME")
  ((SLICES > 1)) || return 0
  for ((i = 0; i < SLICES; i++)); do NODES[i]=$NAME-$i; done
}

# Until it is READY: requests it, waits in the queue, and replaces what is settled otherwise.
create_slice() {
  local last='' replaced=0
  while true; do
    look
    [[ $STATE == "$last" ]] || say "$NAME: $STATE"
    last=$STATE
    case $STATE in
      READY) return ;;
      ABSENT) request_slice ;;
      CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) nap "$POLL" ;;
      SUSPENDING | DELETING | STARTING | RESTARTING | REPAIRING) nap "$POLL" ;;
      *)
        if [[ $STATE == FAILED ]]; then explain_failure; fi
        ((++replaced <= 5)) || fail "$NAME ended as $STATE five times in a row"
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
    if [[ $ERROR =~ RESOURCE_EXHAUSTED|[Qq]uota|PERMISSION_DENIED|INVALID_ARGUMENT ]]; then
      TOUCHED=''
      bad "the request was refused, nothing was created: $ERROR"
    fi
    ((try < 5)) || fail "the request failed $try times: $ERROR"
    back_off "$try"
    look # it may have arrived all the same
    [[ $STATE == ABSENT ]] || return 0
  done
}

explain_failure() {
  ask compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.failedData.error.message)' && say "$NAME failed: $ANSWER"
}

existing_slice() {
  look
  [[ $STATE == READY ]] || bad "'$NAME' in $ZONE is $STATE; make it with: $(again create) --type=..."
}

delete_slice() {
  local try
  for ((try = 1; ; try++)); do
    if cloud compute tpus queued-resources delete "$NAME" --force 2>"$ERRORS"; then break; fi
    ERROR=$(<"$ERRORS")
    [[ ${ERROR,,} != *not_found* ]] || break
    ((try < 5)) || fail "'$NAME' could not be deleted and may still cost money: $ERROR"
    back_off "$try"
  done
  TOUCHED='' STATE=ABSENT DRY_STATE=ABSENT
  say "$NAME: deleted"
}

# --- the workers -----------------------------------------------------------------------------------
# A function for every slice at the same time: FUNCTION SLICE NODE ARG...; fails if it fails for one.
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
ssh_to() {
  cloud compute tpus tpu-vm ssh "$2" --worker=all --command="${3//SLICE/$1}" </dev/null
}
ship() { each_slice ship_to; }
on_workers() { each_slice ssh_to "$1"; } # the word SLICE becomes the number of the slice

REMOTE=monoformer/code/launch/tpu_worker.sh
worker_command() { quoted bash "$REMOTE" "$@"; }

setup_workers() {
  [[ -z $DRY && -f $ARCHIVE ]] ||
    do_it git -C "$ROOT" archive --format=tar.gz --output="$ARCHIVE" "$COMMIT"
  say "shipping commit $COMMIT to every worker and installing launch/requirements-tpu.lock"
  retry ship && retry on_workers "rm -rf monoformer/code && mkdir -p monoformer/code && \
tar -xzf monoformer.tar.gz -C monoformer/code && $(worker_command setup)"
}

# JAX finds the other workers and slices by itself: the machines' metadata names them.
start_workers() {
  local stamp
  stamp=$(date -u +%Y%m%dT%H%M%SZ)-$COMMIT # the same on all workers: it begins the logs' names
  retry on_workers "$(worker_command start SLICE "$WORKDIR" "$stamp" --config="$CONFIG" "${TRAIN_FLAGS[@]}")"
}

# One line a worker in REPORT (see tpu_worker.sh status); fails unless every worker has answered.
worker_report() {
  local line lines='' count=0
  REPORT=$(on_workers "if [ -f $REMOTE ]; then $(worker_command status SLICE); else \
echo worker SLICE:\${HOSTNAME##*-w-} new; fi" 2>"$ERRORS") || true
  [[ -z $DRY ]] || return 0
  while IFS= read -r line; do
    [[ $line != worker\ * ]] || lines+=$line$'\n' count=$((count + 1))
  done <<<"$REPORT"
  REPORT=${lines%$'\n'}
  ((count == HOSTS * SLICES))
}

# Looks until the run has ended or the slice is gone; OUTCOME: done, preempted, stopped or failed.
watch_workers() {
  local silent=0 ended=0
  while true; do
    nap "$POLL"
    look
    stop_in_time
    OUTCOME=preempted
    if [[ $STATE != READY ]]; then
      say "$NAME: $STATE"
      return
    elif worker_report; then
      [[ -z $DRY ]] || return 0 # one look shows every command
      silent=0
    elif ((++silent < 5)); then
      continue
    else
      say "$silent times not every worker answered: $(<"$ERRORS")"
      delete_slice
      return
    fi
    judge
    # A worker that fails may be the first sign of a preemption, or one that waits for the others.
    [[ $OUTCOME != running ]] || continue
    if [[ $OUTCOME == failed || $REPORT == *running* ]] && ((++ended < 3)); then continue; fi
    if [[ $OUTCOME == 'done' || $OUTCOME == failed ]]; then
      if run_is_complete; then
        OUTCOME='done'
      elif [[ $OUTCOME == 'done' ]]; then
        OUTCOME=failed FAILED_CODE=1 FAILED_WORKER=0:0
        say "every trainer ended with 0, but there is no $WORKDIR/done.json"
      fi
    fi
    return 0
  done
}

# REPORT -> OUTCOME, and the first worker that failed. What a preempted worker leaves behind makes
# others fail too, so one that saved (75) or is gone outweighs every other code.
judge() {
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
    3) meaning=' (the loss is no longer a number)' ;;
    4) meaning=' (it crashes again and again)' ;;
    5) meaning=' (it hung)' ;;
    137) meaning=' (killed, as when memory runs out)' ;;
  esac
  say "worker $FAILED_WORKER of $NAME ended with code $FAILED_CODE$meaning; the end of its log:"
  cloud compute tpus tpu-vm ssh "${NODES[${FAILED_WORKER%%:*}]}" --worker="${FAILED_WORKER##*:}" \
    --command="$(worker_command tail 20)" </dev/null >&2 || say "(its log cannot be read)"
}

# --- time and money --------------------------------------------------------------------------------
cost() {
  awk -v seconds="$ALIVE" -v chips="$((CHIPS * SLICES))" -v price="$PRICE" 'BEGIN {
    hours = seconds / 3600
    printf "%.2f h x %d chips", hours, chips
    if (price != "") printf " x %s = %.2f", price, hours * chips * price
  }'
}

stop_in_time() {
  [[ -n $MAX_HOURS && -z $DRY ]] && awk "BEGIN { exit !($ALIVE >= $MAX_HOURS * 3600) }" || return 0
  say "--max-hours=$MAX_HOURS are over: saving and deleting"
  on_workers "$(worker_command stop)" || say "not every trainer could save"
  delete_slice
  fail "stopped after $(cost)"
}

# ALIVE of a slice that others may have made: since its node was created.
node_hours() {
  ask compute tpus tpu-vm describe "${NODES[0]}" --project="$PROJECT" --zone="$ZONE" \
    --format='value(createTime.date("%s"))' && ALIVE=$((EPOCHSECONDS - ${ANSWER%%.*}))
}

# On every exit: nothing that costs money is left unseen.
farewell() {
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
      say "'$NAME' ($STATE) is there and may cost money until: $(again delete)"
    fi
  fi
  [[ -z $SCRATCH ]] || rm -rf "$SCRATCH"
  exit "$code"
}
