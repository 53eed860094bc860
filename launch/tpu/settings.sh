# shellcheck shell=bash
# The file of settings, and what a type of slice implies. Read by launch/tpu.sh.

set_value() { # KEY VALUE WHERE
  case $1 in
    PROJECT) PROJECT=$2 ;; ZONE) ZONE=$2 ;; NAME) NAME=$2 ;; TYPE) TYPE=$2 ;; CAPACITY) CAPACITY=$2 ;;
    BUCKET) BUCKET=$2 ;; REPOSITORY) REPOSITORY=$2 ;; REF) REF=$2 ;; RUNTIME) RUNTIME=$2 ;; DATA) DATA=$2 ;;
    WAIT_MINUTES) WAIT_MINUTES=$2 ;; POLL_SECONDS) POLL_SECONDS=$2 ;; MAX_FAILURES) MAX_FAILURES=$2 ;;
    PARALLEL) PARALLEL=$2 ;;
    *TOKEN* | *KEY* | *SECRET*) fail "$3: $1 does not belong in a file: export it in the shell" 2 ;;
    *) fail "$3: there is no setting $1" 2 ;;
  esac
}

# The file is read as text and never run.
read_settings() {
  local line number=0 key value where seen=' '
  PROJECT='' ZONE='' NAME='' TYPE='' CAPACITY='' BUCKET='' REPOSITORY='' REF='' RUNTIME='' DATA=''
  WAIT_MINUTES=60 POLL_SECONDS=30 MAX_FAILURES=3 PARALLEL=16
  [ -f "$settings" ] || fail "there is no file of settings at $settings: copy launch/tpu.env.example to \
launch/tpu.env and fill it in, or name yours with --settings FILE" 2
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    where="$settings, line $number"
    line=${line%$'\r'}
    line=${line#"${line%%[![:space:]]*}"}
    line=${line%"${line##*[![:space:]]}"}
    case $line in '' | '#'*) continue ;; esac
    key=${line%%=*} value=${line#*=}
    case $key in
      "$line" | '' | *[!A-Z_]*) fail "$where: not a line KEY=VALUE" 2 ;;
    esac
    case $seen in *" $key "*) fail "$where: $key is set twice" 2 ;; esac
    seen="$seen$key "
    set_value "$key" "$value" "$where"
  done <"$settings"
  check_settings
}

expect() { # KEY VALUE PATTERN WHAT
  local LC_ALL=C # elsewhere [a-z] may hold capitals
  [[ $2 =~ $3 ]] || fail "$settings: $1='$2' is not $4" 2
}

check_settings() {
  local key unfilled='' count='^[1-9][0-9]{0,3}$'
  for key in PROJECT ZONE NAME TYPE CAPACITY BUCKET REPOSITORY REF; do
    [ -n "${!key}" ] || fail "$settings: $key is missing" 2
  done
  for key in PROJECT ZONE NAME BUCKET REPOSITORY; do
    case ${!key} in *YOUR-* | */OWNER/*) unfilled="$unfilled $key" ;; esac
  done
  [ -z "$unfilled" ] || fail "$settings: fill in$unfilled: the example's value still stands there" 2
  expect PROJECT "$PROJECT" '^[a-z][a-z0-9.:-]+$' "the id of a project"
  expect ZONE "$ZONE" '^[a-z]+-[a-z]+[0-9]+-[a-z]$' "a zone, such as us-west4-a"
  expect NAME "$NAME" '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$' "a name: lower-case letters, digits and hyphens"
  expect CAPACITY "$CAPACITY" '^(on-demand|spot|queued)$' "one of on-demand, spot, queued"
  BUCKET=${BUCKET%/}
  expect BUCKET "$BUCKET" '^gs://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9._-]+)*$' "a bucket, such as gs://my-bucket"
  expect REPOSITORY "$REPOSITORY" '^[^-[:space:]][^[:space:]]*$' "the URL of a git repository"
  case $REPOSITORY in
    *://*:*@*) fail "$settings: REPOSITORY has a password in it, which logs would show" 2 ;;
  esac
  expect REF "$REF" '^[A-Za-z0-9][A-Za-z0-9._/-]*$' "a branch, a tag or a full commit"
  expect DATA "$DATA" '^(gs://.+)?$' "a folder gs://..."
  expect RUNTIME "$RUNTIME" '^[a-z0-9.-]*$' "a runtime version"
  expect WAIT_MINUTES "$WAIT_MINUTES" '^[0-9]{1,6}$' "a number of minutes"
  expect POLL_SECONDS "$POLL_SECONDS" '^[0-9]+(\.[0-9]+)?$' "a number of seconds"
  expect MAX_FAILURES "$MAX_FAILURES" "$count" "a number from 1 on"
  expect PARALLEL "$PARALLEL" "$count" "a number from 1 on"
  read_type
}

# The runtime version of a type, and the number of its workers: 4 chips each, 8 on the largest single host.
read_type() {
  local size runtime
  case $TYPE in v5e-*) TYPE=v5litepod-${TYPE#v5e-} ;; esac
  expect TYPE "$TYPE" '^(v5litepod|v6e|v5p|v4)-[1-9][0-9]{0,4}$' \
    "a type: v5e-N or v5litepod-N, v6e-N, v5p-N, v4-N"
  size=${TYPE##*-}
  case $TYPE in
    v5litepod-* | v6e-*)
      case $size in
        1 | 4 | 8) workers=1 ;;
        *) if [ "$size" -ge 16 ] && [ $((size % 4)) = 0 ]; then workers=$((size / 4)); else workers=0; fi ;;
      esac
      ;;
    *) if [ $((size % 8)) = 0 ]; then workers=$((size / 8)); else workers=0; fi ;;
  esac
  [ "$workers" -gt 0 ] || fail "$settings: there is no slice TYPE='$TYPE'" 2
  case $TYPE in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
  RUNTIME=${RUNTIME:-$runtime}
}
