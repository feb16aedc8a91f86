# shellcheck shell=bash
# Sourced by tpu.sh: the tables of TPU types, and the checks before anything is created.

# --- TPU types -------------------------------------------------------------------------------------
# Sizes and zones as listed at cloud.google.com/tpu/docs/regions-zones and the pages of each TPU;
# runtimes at cloud.google.com/tpu/docs/runtimes. --unlisted skips the check of sizes and zones.
FAMILIES=(v4 v5litepod v5p v6e)
MOST_SLICES=256
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

# TYPE -> RUNTIME, CHIPS and HOSTS of one slice. v4 and v5p names count cores, two per chip.
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

# --- messages and strings --------------------------------------------------------------------------
say() { printf '%s\n' "${DRY:+# }$*" >&2; }
bad() { printf 'error: %s\n' "$*" >&2 && exit 2; }
fail() { printf 'error: %s\n' "$*" >&2 && exit 1; }

# Prints its arguments as a shell command line, quoted where needed.
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

command_for() { quoted launch/tpu.sh "$1" --name="$NAME" --zone="$ZONE" ${GIVEN_PROJECT:+--project="$PROJECT"}; }

# Prints the one of $2... with the longest common prefix with $1.
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
  local verbs=(babysit run create setup status stop logs delete) needs="NAME ZONE" need
  [[ -n $VERB ]] || bad "a verb is needed: ${verbs[*]} (see launch/tpu.sh --help)"
  [[ " ${verbs[*]} " == *" $VERB "* ]] ||
    bad "unknown verb '$VERB'; nearest: '$(nearest "$VERB" "${verbs[@]}")'"
  case $VERB in
    create) needs+=" TYPE" ;;
    run | babysit) needs+=" TYPE CONFIG WORKDIR" ;;
  esac
  case $COMMAND in
    train) ;;
    prepare_data)
      needs=${needs/ CONFIG/}
      MARKER=info.json
      [[ -z $CONFIG ]] || bad "--config=$CONFIG is for training; the flags of prepare_data go after --"
      ;;
    encode_latents) bad "--command=encode_latents is now --command=prepare_data; latents need --codec=sd_vae after --" ;;
    *) bad "--command=$COMMAND must be train or prepare_data" ;;
  esac
  for need in $needs; do
    [[ -n ${!need} ]] || bad "$VERB needs --${need,,}=..."
  done
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    bad "--name=$NAME must be at most 40 lower-case letters, digits and '-', with a letter first and no '-' last"
  [[ -z $SPOT || -z $RESERVATION ]] || bad "--spot and --reservation exclude each other"
  [[ -z $WORKDIR || $WORKDIR == gs://?*/?* ]] ||
    bad "--workdir=$WORKDIR must be gs://BUCKET/FOLDER, because every worker writes to it"
  [[ $VERB == babysit || -z $DELETE_WHEN_DONE$MAX_HOURS ]] ||
    bad "--delete-when-done and --max-hours are only supported by babysit"
  # Bash reads a leading zero as octal, and numbers of 20 digits as others.
  local whole='(0|[1-9][0-9]{0,8})'
  [[ ${SLICES:-1} =~ ^[1-9][0-9]{0,2}$ && ${SLICES:-1} -le $MOST_SLICES ]] ||
    bad "--slices=$SLICES must be a number from 1 to $MOST_SLICES"
  [[ $MAX_RESTARTS =~ ^$whole$ ]] || bad "--max-restarts=$MAX_RESTARTS must be a number"
  [[ $POLL =~ ^$whole$ ]] || bad "--poll-seconds=$POLL must be a number"
  [[ $LINES_SHOWN =~ ^$whole$ ]] || bad "--lines=$LINES_SHOWN must be a number"
  [[ $WORKER =~ ^($whole:)?$whole$ ]] || bad "--worker=$WORKER must be a number, or SLICE:WORKER"
  local number="^$whole?(\.[0-9]{1,9})?$"
  [[ -z $PRICE || $PRICE =~ $number ]] || bad "--price-per-chip-hour=$PRICE must be a number, such as 1.5"
  [[ -z $MAX_HOURS || $MAX_HOURS =~ $number ]] || bad "--max-hours=$MAX_HOURS must be a number, such as 1.5"
  [[ -z $TYPE ]] || check_type
}

check_type() {
  local family=${TYPE%-*} size=${TYPE##*-} known best
  [[ $family != v5e ]] || bad "--type=$TYPE: Google names it v5litepod-$size"
  [[ " ${FAMILIES[*]} " == *" $family "* && $TYPE == *-* ]] ||
    bad "--type=$TYPE: unknown TPU type; nearest: $(nearest "$TYPE" "${FAMILIES[@]/%/-8}") (of: ${FAMILIES[*]/%/-N})"
  [[ $size =~ ^[1-9][0-9]{0,5}$ ]] || bad "--type=$TYPE: a number must follow $family-"
  slice_facts
  SLICES=${SLICES:-1}
  [[ -z $UNLISTED ]] || return 0
  best=1
  for known in $(sizes "$family"); do
    if ((known <= size || best < 2)); then best=$known; fi
  done
  ((best == size)) || bad "--type=$TYPE is not listed; nearest: $family-$best (--unlisted skips this check)"
  # shellcheck disable=SC2046 # one word per zone
  [[ " $(zones "$family") " == *" $ZONE "* ]] ||
    bad "--zone=$ZONE has no listed $family; nearest: $(nearest "$ZONE" $(zones "$family"))" \
      "(of: $(zones "$family"); --unlisted skips this check)"
}

SCRATCH='' ERRORS=/dev/null
# Sets PROJECT and OWNER (a label that separates the users of a project); checks the code to be shipped.
check_gcloud() {
  local account
  GIVEN_PROJECT=$PROJECT
  if [[ -n $DRY ]]; then
    exec 3>&1
    PROJECT=${PROJECT:-your-project} OWNER=your-account COMMIT=HEAD ARCHIVE=/tmp/monoformer.tar.gz
    case $VERB in create | run | babysit) DRY_STATE=ABSENT ;; esac
    say "Dry run: nothing is called; your-account and your-project stand for those of gcloud."
    return
  fi
  command -v gcloud >/dev/null || bad "gcloud is not installed: cloud.google.com/sdk/docs/install"
  SCRATCH=$(mktemp -d)
  ERRORS=$SCRATCH/errors
  query config list --format='csv[no-heading](core.account,core.project)' || fail "gcloud: $ERROR"
  account=${ANSWER%%,*} PROJECT=${PROJECT:-${ANSWER##*,}}
  [[ -n $account ]] || bad "gcloud is not logged in: gcloud auth login"
  [[ -n $PROJECT ]] || bad "no project: gcloud config set project PROJECT, or --project=PROJECT"
  OWNER=${account,,} OWNER=${OWNER//[^a-z0-9_-]/-} OWNER=${OWNER:0:63}
  case $VERB in setup | run | babysit) check_tree ;; esac
}

check_tree() {
  local changed file=${CONFIG%%:*}
  COMMIT=$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null) || bad "$ROOT is not a git checkout, but only committed code is shipped"
  [[ -z $file ]] || git -C "$ROOT" cat-file -e "HEAD:$file" 2>/dev/null ||
    bad "--config=$file is not in commit $COMMIT, which would be shipped"
  changed=$(git -C "$ROOT" status --porcelain | cut -c4- | head -n 8 | paste -sd ' ')
  if [[ -n $changed && -z $ALLOW_DIRTY ]]; then
    bad "uncommitted changes would not be shipped: $changed; commit them, or use --allow-dirty"
  fi
  ARCHIVE=$SCRATCH/monoformer.tar.gz
}
