#!/usr/bin/env bash
# What a person does with a Cloud TPU slice from a laptop. `launch/tpu.sh --help` lists it.
# The bash 3.2 of macOS runs this too: no associative arrays, no ${x@Q}, and "${empty[@]}" is an error.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command_name=

help_all() {
  cat <<'END'
usage: launch/tpu.sh COMMAND [--settings FILE] [--dry-run] ...

  create                       ask for the slice and wait until it is ready
  install                      fetch the code and install it on all workers
  run RUN [--watch] -- ARGS    start training on all workers; --watch: until the run is complete
  logs [RUN] [--worker N]      follow the log of a worker
  status [RUN]                 slice, processes, last metrics, whether the run is complete
  stop                         have the run save and end
  fetch RUN [DIR]              copy the model of a complete run here
  delete [--yes]               delete the slice; asks first

COMMAND --help tells more. --dry-run prints the commands, to be read or pasted, and runs none.
Settings are read from launch/tpu.env (copy launch/tpu.env.example), from $FR3E_TPU_ENV, or from --settings.
Exit codes: 0 done, 1 failed, 2 a mistake in the settings, the command line or the run's options.
END
}

help_create() {
  cat <<'END'
usage: launch/tpu.sh create [--settings FILE] [--dry-run]

Asks for the slice of the settings and waits until it is ready, at most WAIT_MINUTES. CAPACITY=on-demand
creates it at once or fails; spot and queued wait in a queue, and a request outlives this command: run it
again to go on waiting. A slice or request that is there already is not asked for a second time.
The slice costs money from the moment it is ready until `launch/tpu.sh delete`.
END
}

help_install() {
  cat <<'END'
usage: launch/tpu.sh install [--settings FILE] [--dry-run]

On every worker: fetches REF of REPOSITORY to ~/fr3e_jax, makes a Python 3.12 with uv in ~/fr3e_venv,
installs '.[tpu]' in the versions of requirements.lock, and copies DATA, if set, to ~/data.
Where a worker fails, says which and why, and exits with 1. Refuses while a run is going on.
END
}

help_run() {
  cat <<'END'
usage: launch/tpu.sh run RUN [--watch] [--settings FILE] [--dry-run] -- ARGS

Starts on every worker, detached:
    python -m fr3e_jax.train --distributed.initialize true --run_dir BUCKET/runs/RUN ARGS
ARGS are checked before anything is started: that --config is in the repository, and, where a Python here can
import fr3e_jax, every option.
A run that is complete or going on is not started a second time, one that ended is taken up where it saved.
HF_TOKEN and WANDB_API_KEY, where they are exported in this shell, reach the workers over the ssh
connection's standard input, and lie there in a file that only you can read.

--watch stays until the run is complete, which is when BUCKET/runs/RUN/summary.json exists, and then exits
with 0. A slice that was preempted (FAILED, SUSPENDED, PREEMPTED) is deleted, created again, installed, and
the run started on it; a run that ended without being complete is started again. It gives up with 2 when the
run ended with 2 (its options are at fault), with 1 when it ended MAX_FAILURES times in a row without a new
checkpoint, and with 3 when it was ended by `launch/tpu.sh stop`. Ending the watch leaves the run alone; the
same command takes the watch up again.
END
}

help_logs() {
  cat <<'END'
usage: launch/tpu.sh logs [RUN] [--worker N] [--lines N] [--no-follow] [--settings FILE] [--dry-run]

Follows the log of worker N (0) from its last N (100) lines on, until Ctrl-C. Without RUN: the run that was
started last.
END
}

help_status() {
  cat <<'END'
usage: launch/tpu.sh status [RUN] [--settings FILE] [--dry-run]

Shows the state of the slice and of the process on each worker, with its exit code if it has ended. With RUN
also the last line of its metrics, and whether it is complete.
END
}

help_stop() {
  cat <<'END'
usage: launch/tpu.sh stop [--settings FILE] [--dry-run]

Sends SIGTERM to training on every worker, which saves a checkpoint and ends. `run` takes it up again; a
watch does not. The slice stays, and costs: `launch/tpu.sh delete`.
END
}

help_fetch() {
  cat <<'END'
usage: launch/tpu.sh fetch RUN [DIR] [--settings FILE] [--dry-run]

Copies BUCKET/runs/RUN/model, a Hugging Face directory, to DIR (runs/RUN/model). Needs no slice. Refuses
while the run is not complete. A copy that broke off is completed by the same command.
END
}

help_delete() {
  cat <<'END'
usage: launch/tpu.sh delete [--yes] [--settings FILE] [--dry-run]

Deletes the slice and its request. Asks first; scripts say --yes. What is in the bucket stays.
END
}

say() { echo "$(date +%H:%M:%S) $1" >&2; }

fail() {
  echo "tpu.sh${command_name:+ $command_name}: $1" >&2
  exit "${2:-1}"
}

misused() { fail "$1 (see launch/tpu.sh${command_name:+ $command_name} --help)" 2; }

# ---- quoting and dry runs

# The word as a shell reads it back. Not printf %q, whose results differ between versions of bash.
quote() {
  local LC_ALL=C rest=$1 quoted=
  case $rest in
    '' | *[!A-Za-z0-9_./:=@%+,-]*) ;;
    *) printf '%s' "$rest" && return ;;
  esac
  while :; do
    case $rest in
      *\'*) quoted="$quoted${rest%%\'*}'\\''" rest=${rest#*\'} ;;
      *) break ;;
    esac
  done
  printf "'%s'" "$quoted$rest"
}

quote_all() {
  local word separator=
  for word in "$@"; do
    printf '%s' "$separator"
    quote "$word"
    separator=' '
  done
}

note() { if [ -n "$dry" ]; then echo "# $1"; fi; }

show() {
  quote_all "$@"
  echo
}

# Runs a command, or shows it in a dry run.
act() { if [ -n "$dry" ]; then show "$@"; else "$@"; fi; }

# ---- settings

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

# ---- the slice

tpus() { # KIND VERB FLAGS...
  local kind=$1 verb=$2
  shift 2
  act gcloud compute tpus "$kind" "$verb" "$NAME" "--zone=$ZONE" "--project=$PROJECT" "$@" --quiet
}

# The end of an error of gcloud, and what to do where it is one of the login.
said_by_gcloud() { # FILE LINES
  if grep -Eiq 'gcloud auth login|auth tokens|reauth|invalid_grant|active account|authentication credentials' \
    "$1"; then
    printf '%s' 'gcloud is not logged in: run gcloud auth login. It said: '
  fi
  tail -n "$2" "$1"
}

# Leaves what gcloud answers in $answer. Returns 1 where there is no such thing, and 2 where it could not say:
# a network that is down must not look like a slice that is gone.
describe() { # KIND FORMAT
  local code=0
  answer=
  if [ -n "$dry" ]; then
    tpus "$1" describe "--format=$2"
    return
  fi
  answer=$(tpus "$1" describe "--format=$2" 2>"$temporary/describe") || code=$?
  [ "$code" != 0 ] || return 0
  if grep -q NOT_FOUND "$temporary/describe"; then return 1; fi
  answer=$(said_by_gcloud "$temporary/describe" 3)
  return 2
}

# Sets $slice to absent, waiting, ready, lost (preempted), stopped or unknown, and $detail to gcloud's word.
look_at_slice() {
  local code=0
  if [ "$CAPACITY" != on-demand ]; then
    describe queued-resources 'value(state.state)' || code=$?
    if [ -n "$dry" ]; then describe tpu-vm 'value(state)' && return; fi
    detail=$answer
    case $code/$answer in
      0/ACTIVE) ;;
      0/FAILED | 0/SUSPENDED) slice=lost && return ;;
      0/*) slice=waiting && return ;;
      1/*) slice=absent detail=absent && return ;;
      *) slice=unknown && return ;;
    esac
    # A request may be ACTIVE for a while after its slice was preempted.
  fi
  code=0
  describe tpu-vm 'value(state)' || code=$?
  if [ -n "$dry" ]; then return; fi
  detail=$answer
  case $code/$answer in
    0/READY) slice=ready ;;
    0/PREEMPTED | 0/TERMINATED) slice=lost ;;
    0/STOPPED | 0/HIDDEN) slice=stopped ;;
    0/*) slice=waiting ;;
    1/*) if [ "$CAPACITY" = on-demand ]; then slice=absent detail=absent; else slice=waiting; fi ;;
    *) slice=unknown ;;
  esac
}

need_slice() {
  look_at_slice
  if [ -n "$dry" ]; then return; fi
  case $slice in
    ready) ;;
    absent) fail "there is no slice $NAME in $ZONE: launch/tpu.sh create" ;;
    lost) fail "the slice $NAME was preempted ($detail): launch/tpu.sh delete, then create and install; or \
run RUN --watch, which does this by itself" ;;
    unknown) fail "gcloud does not say what the slice is doing: $detail" ;;
    *) fail "the slice $NAME is not ready: $detail" ;;
  esac
}

request_slice() {
  if [ "$CAPACITY" = on-demand ]; then
    tpus tpu-vm create "--accelerator-type=$TYPE" "--version=$RUNTIME"
  elif [ "$CAPACITY" = spot ]; then
    tpus queued-resources create "--node-id=$NAME" "--accelerator-type=$TYPE" \
      "--runtime-version=$RUNTIME" --spot
  else
    tpus queued-resources create "--node-id=$NAME" "--accelerator-type=$TYPE" \
      "--runtime-version=$RUNTIME"
  fi
}

delete_slice() {
  if [ "$CAPACITY" = on-demand ]; then
    tpus tpu-vm delete
  else
    tpus queued-resources delete --force
  fi
}

create() {
  local begun=$SECONDS shown='' polls=0
  look_at_slice
  if [ -n "$dry" ]; then
    note "where there is none yet:"
    request_slice
    note "then, every $POLL_SECONDS seconds until it is ready, for at most $WAIT_MINUTES minutes:"
    look_at_slice
    return
  fi
  case $slice in
    absent)
      say "asking for $NAME ($TYPE, $CAPACITY) in $ZONE"
      request_slice
      ;;
    lost) fail "$NAME is $detail: launch/tpu.sh delete, then create it again" ;;
    unknown) fail "gcloud does not say what is there: $detail" ;;
    *) say "$NAME was asked for before" ;;
  esac
  while :; do
    look_at_slice
    if [ "$shown" != "$detail" ] || [ $((polls % 10)) = 0 ]; then
      say "$NAME: $detail, $(((SECONDS - begun) / 60)) min"
      shown=$detail
    fi
    polls=$((polls + 1))
    case $slice in
      ready) break ;;
      lost | stopped) fail "$NAME is $detail: launch/tpu.sh delete, then create it again" ;;
      absent) fail "$NAME is gone" ;;
    esac
    [ $((SECONDS - begun)) -lt $((WAIT_MINUTES * 60)) ] ||
      fail "$NAME was not ready within $WAIT_MINUTES minutes. The request stays: create waits on, delete ends it"
    sleep "$POLL_SECONDS"
  done
  say "$NAME is ready. It costs until launch/tpu.sh delete"
}

# ---- the workers

ssh_to() { # WORKER COMMAND [with-secrets]
  if [ -z "$dry" ]; then
    if [ -n "${3-}" ]; then secrets; fi | tpus tpu-vm ssh "--worker=$1" "--command=$2"
    return "${PIPESTATUS[1]}"
  fi
  # ssh would read the lines that are pasted after it.
  if [ -n "${3-}" ]; then show_secrets; else printf '</dev/null '; fi
  tpus tpu-vm ssh "--worker=$1" "--command=$2"
}

secrets() { printf '%s\n' "HF_TOKEN=${HF_TOKEN-}" "WANDB_API_KEY=${WANDB_API_KEY-}" end; }

show_secrets() {
  # shellcheck disable=SC2016
  printf '%s' "printf '%s\\n' \"HF_TOKEN=\${HF_TOKEN-}\" \"WANDB_API_KEY=\${WANDB_API_KEY-}\" end | "
}

# Runs a command on every worker, and keeps output and exit code of each in $temporary/STEP.WORKER.*.
# One connection a worker: --worker=all gives the first exit code of all, and one standard input to share.
each_worker() { # STEP COMMAND [with-secrets]
  local worker=0 batch
  rm -f "$temporary/$1".*
  while [ "$worker" -lt "$workers" ]; do
    batch=0
    while [ "$worker" -lt "$workers" ] && [ "$batch" -lt "$PARALLEL" ]; do
      if [ -n "$dry" ]; then
        ssh_to "$worker" "$2" "${3-}"
      else
        one_worker "$1" "$worker" "$2" "${3-}" &
      fi
      worker=$((worker + 1)) batch=$((batch + 1))
    done
    if [ -z "$dry" ]; then wait; fi
  done
}

one_worker() { # STEP WORKER COMMAND [with-secrets]
  local code=0 files="$temporary/$1.$2"
  ssh_to "$2" "$3" "$4" >"$files.out" 2>"$files.err" || code=$?
  echo "$code" >"$files.code"
}

# Names the workers on which a step failed; fails where there are any.
check_workers() { # STEP WHAT
  local worker=0 code failed=
  if [ -n "$dry" ]; then return; fi
  while [ "$worker" -lt "$workers" ]; do
    code=$(cat "$temporary/$1.$worker.code" 2>/dev/null || echo lost)
    if [ "$code" != 0 ]; then
      failed="$failed $worker"
      echo "tpu.sh $command_name: worker $worker failed to $2 (exit code $code):" >&2
      cat "$temporary/$1.$worker.out" "$temporary/$1.$worker.err" | tail -n 15 |
        sed "s/^/  worker $worker: /" >&2
    fi
    worker=$((worker + 1))
  done
  [ -z "$failed" ]
}

on_worker='bash fr3e_jax/launch/worker.sh'

install() {
  local fetch
  need_slice
  # The first connection makes the ssh key and gives it to the slice, which is not for many to do at once.
  if [ -n "$dry" ]; then
    ssh_to 0 true
  else
    say "installing $REF of $REPOSITORY on $workers workers: minutes"
    ssh_to 0 true >"$temporary/first" 2>&1 ||
      fail "cannot reach worker 0: $(tail -n 5 "$temporary/first")"
  fi
  fetch="set -eu; export GIT_TERMINAL_PROMPT=0; mkdir -p .fr3e fr3e_jax; exec 8>.fr3e/installing; flock 8; "
  fetch="${fetch}flock --shared --nonblock .fr3e/lock true || { echo 'a run is going on here' >&2; exit 3; }; "
  fetch="${fetch}cd fr3e_jax; git init --quiet; "
  fetch="${fetch}git fetch --quiet --depth 1 --force $(quote_all "$REPOSITORY" "$REF"); "
  fetch="${fetch}git checkout --quiet --force --detach FETCH_HEAD; cd; "
  each_worker install "$fetch$on_worker install $(quote "$DATA")"
  check_workers install "install" || return 1
  if [ -z "$dry" ]; then say "$(cat "$temporary/install.0.out") on $workers workers"; fi
}

# Sets what the workers are doing: the numbers of each kind, and the exit codes of those that ended this run.
look_at_workers() {
  local worker=0 line word what code name
  running=0 ended=0 stopped=0 idle=0 uninstalled=0 unreachable='' other='' codes='' told=''
  each_worker state "$on_worker state"
  if [ -n "$dry" ]; then return; fi
  while [ "$worker" -lt "$workers" ]; do
    line=$(grep '^fr3e ' "$temporary/state.$worker.out" 2>/dev/null | tail -n 1 || true)
    # The name is the rest of the line, spaces and all.
    IFS=' ' read -r word what code name <<<"$line" || true
    case $(cat "$temporary/state.$worker.code" 2>/dev/null)/$word in
      0/fr3e) ;;
      127/*) what=uninstalled code=- name=- ;;
      *) what=unreachable code=- name=- ;;
    esac
    told="$told  worker $worker: $what"
    case $what in ended | stopped) told="$told with exit code $code" ;; esac
    case $name in '' | -) told="$told"$'\n' ;; *) told="$told, run $name"$'\n' ;; esac
    case $what in
      running) running=$((running + 1)); if [ "$name" != "$run" ]; then other=$name; fi ;;
      uninstalled) uninstalled=$((uninstalled + 1)) ;;
      unreachable) unreachable="$unreachable $worker" ;;
      idle) idle=$((idle + 1)) ;;
      *)
        if [ "$name" != "$run" ]; then
          idle=$((idle + 1))
        else
          ended=$((ended + 1)) codes="$codes $code"
          if [ "$what" = stopped ]; then stopped=$((stopped + 1)); fi
        fi
        ;;
    esac
    worker=$((worker + 1))
  done
}

# ---- the run

# 0 complete, 1 not yet, 2 the bucket could not be asked.
complete() {
  if [ -n "$dry" ]; then
    act gcloud storage ls "$run_dir/summary.json" "--project=$PROJECT"
    return 1
  fi
  if gcloud storage ls "$run_dir/summary.json" "--project=$PROJECT" >/dev/null 2>"$temporary/ls"; then
    return 0
  fi
  if grep -q 'matched no objects' "$temporary/ls"; then return 1; fi
  return 2
}

# The step of the newest checkpoint, 0 where there is none.
newest_checkpoint() {
  { gcloud storage ls "$run_dir/checkpoints/" "--project=$PROJECT" 2>/dev/null || true; } |
    sed -n 's|.*/\([0-9][0-9]*\)/$|\1|p' | sort -n | tail -n 1 | grep . || echo 0
}

start() {
  local name sent=
  for name in HF_TOKEN WANDB_API_KEY; do
    if [ -n "${!name-}" ]; then sent="$sent $name"; fi
  done
  if [ -z "$dry" ]; then say "starting $run on $workers workers${sent:+, with$sent}"; fi
  each_worker start "$on_worker start $(quote_all "$run" --distributed.initialize true --run_dir "$run_dir" \
    ${extra[@]+"${extra[@]}"})" with-secrets
  check_workers start "start the run" && return
  # Workers that did start would wait for those that did not.
  each_worker end "$on_worker end"
  return 1
}

check_secrets() {
  local name word
  for name in HF_TOKEN WANDB_API_KEY; do
    [ -n "${!name-}" ] || continue
    case ${!name} in *$'\n'*) fail "$name has more than one line" 2 ;; esac
    for word in "$run" ${extra[@]+"${extra[@]}"}; do
      case $word in
        *"${!name}"*) fail "an argument holds the value of $name, which logs would show" 2 ;;
      esac
    done
  done
}

# The workers read configurations from the checkout of REF: a file that only this laptop has is none.
check_config_files() {
  local word before='' file
  for word in ${extra[@]+"${extra[@]}"}; do
    file=
    case $word in --config=*) file=${word#*=} ;; esac
    if [ "$before" = --config ]; then file=$word; fi
    before=$word
    case $file in '' | /* | '~'*) continue ;; esac
    [ -f "$here/../$file" ] ||
      fail "there is no file $file in the repository, from which the workers read --config" 2
    if git -C "$here/.." rev-parse >/dev/null 2>&1; then
      git -C "$here/.." ls-files --error-unmatch "$file" >/dev/null 2>&1 ||
        fail "$file is not committed, and the workers read --config from REF of REPOSITORY" 2
    fi
  done
}

# Parses the options of training as the workers will, where a Python here can import the package.
check_options() {
  local python code=0 program
  program='import sys
from fr3e_jax.cli import fail, parse
from fr3e_jax.config import Config, ConfigError, check, resolve
config, _ = parse(Config, "train", "configs/quickstart.yaml", sys.argv[1:], lambda _: None)
try:
    check(resolve(config), 1, 2**31)
except ConfigError as error:
    fail("train", error)'
  for python in python3 python; do
    if command -v "$python" >/dev/null; then break; fi
  done
  (cd "$here/.." && "$python" -c "$program" ${extra[@]+"${extra[@]}"}) >/dev/null 2>"$temporary/options" ||
    code=$?
  case $code in
    0) ;;
    2) fail "the options of training are wrong: $(tail -n 1 "$temporary/options" | sed 's/^.*: error: //')" 2 ;;
    *)
      [ -n "$dry" ] || say "the options of training are checked on the workers alone: no Python here imports fr3e_jax"
      ;;
  esac
}

run_command() {
  local code=0
  check_secrets
  check_config_files
  check_options
  complete || code=$?
  if [ "$code" = 0 ]; then
    say "$run is complete: $run_dir/summary.json. launch/tpu.sh fetch $(quote "$run")"
    return
  fi
  [ "$code" != 2 ] || fail "cannot read $run_dir: $(said_by_gcloud "$temporary/ls" 2)"
  if [ -n "$watch" ] && [ -z "$dry" ]; then
    watch_run
    return
  fi
  need_slice
  look_at_workers
  if [ -n "$dry" ]; then
    note "where nothing is running:"
    start
    if [ -n "$watch" ]; then dry_watch; fi
    return
  fi
  [ -z "$unreachable" ] ||
    fail "cannot reach worker(s)$unreachable: $(tail -n 2 "$temporary/state.${unreachable##* }.err")"
  [ -z "$other" ] || fail "run '$other' is going on: launch/tpu.sh stop"
  [ "$uninstalled" = 0 ] ||
    fail "$uninstalled of $workers workers have nothing installed: launch/tpu.sh install"
  if [ "$running" = "$workers" ]; then
    say "$run is going on already: launch/tpu.sh logs"
    return
  fi
  [ "$running" = 0 ] ||
    fail "$running of $workers workers are still in the run; they end by themselves: launch/tpu.sh status"
  start || fail "the run was not started"
  say "started. launch/tpu.sh logs follows it, launch/tpu.sh status $(quote "$run") shows where it is"
}

dry_watch() {
  note "then, every $POLL_SECONDS seconds, the first commands again, until $run_dir/summary.json exists."
  note "when the slice was preempted:"
  delete_slice
  request_slice
  note "and when it is ready:"
  install
  start
}

# Counts what went wrong on a slice that is up; a new checkpoint clears the count.
failed_once() { # WHAT
  local now
  now=$(newest_checkpoint)
  if [ "$now" -gt "$checkpoint" ]; then failures=0 checkpoint=$now; fi
  failures=$((failures + 1))
  say "$1 ($failures of $MAX_FAILURES without a new checkpoint; the newest is $checkpoint)"
  [ "$failures" -lt "$MAX_FAILURES" ]
}

show_log_end() {
  # The first worker that ended with an error of its own, not for lack of another one, is not known.
  say "the end of the log of worker 0 (launch/tpu.sh logs --worker N shows others):"
  ssh_to 0 "$on_worker logs 20 no" 2>/dev/null | sed 's/^/  /' >&2 || true
}

watch_run() {
  local code lately='' asked='' trouble=''
  failures=0 checkpoint=$(newest_checkpoint) quiet=0 begun=''
  say "watching $run; Ctrl-C ends the watch and leaves the run alone"
  while :; do
    code=0
    complete || code=$?
    if [ "$code" = 0 ]; then
      say "$run is complete: $run_dir/summary.json"
      say "the slice still costs: launch/tpu.sh delete"
      return
    fi
    if [ "$code" = 2 ] && [ -z "$trouble" ]; then say "cannot read $run_dir: $(said_by_gcloud "$temporary/ls" 2)"; fi
    if [ "$code" = 2 ]; then trouble=yes; else trouble=; fi
    look_at_slice
    if [ "$lately" != "$detail" ]; then say "$NAME: $detail" && lately=$detail; fi
    case $slice in
      ready)
        asked=
        code=0
        look_after_run || code=$?
        # 9: go on
        [ "$code" = 9 ] || return "$code"
        ;;
      lost)
        # A request that fails before it ever was a slice is not a preemption.
        if [ -n "$asked" ]; then failed_once "the slice could not be created" || return 1; fi
        say "$NAME was preempted ($detail): deleting it, to create it again"
        if delete_slice; then
          asked=yes
          request_slice || failed_once "the slice could not be created" || return 1
        else
          failed_once "the preempted slice could not be deleted" || return 1
        fi
        ;;
      absent)
        [ -n "$asked" ] ||
          fail "there is no slice $NAME: somebody deleted it, so it is not created again. launch/tpu.sh create"
        request_slice || failed_once "the slice could not be created" || return 1
        ;;
      stopped) fail "the slice $NAME is $detail" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# One look at the run on a slice that is ready. Returns 9 to go on watching.
look_after_run() {
  look_at_workers
  [ -z "$other" ] || fail "run '$other' is going on"
  if [ -n "$unreachable" ] || { [ "$running" -gt 0 ] && [ "$running" -lt "$workers" ]; }; then
    # Either is short: a slice that is being preempted, or workers that end because another one did.
    quiet=$((quiet + 1))
    if [ "$quiet" -ge 20 ]; then
      quiet=0
      printf '%s' "$told" >&2
      if [ -z "$unreachable" ]; then
        say "workers hang since others ended: killing them"
        each_worker kill "$on_worker kill"
      else
        failed_once "cannot reach worker(s)$unreachable" || return 1
      fi
    fi
    return 9
  fi
  quiet=0
  if [ "$running" = "$workers" ]; then begun=yes && return 9; fi
  # How it ended before this watch is no matter: whoever starts the watch wants it to go on.
  if [ -n "$begun" ] && [ "$ended" -gt 0 ]; then
    if [ "$stopped" -gt 0 ]; then
      say "$run was stopped by hand; the same command takes it up again"
      return 3
    fi
    case "$codes " in
      *' 2 '*)
        say "$run ended with exit code 2: its options are at fault, and it is not started again"
        show_log_end
        return 2
        ;;
    esac
    # A preemption ends the run first and is told of later; and the last thing a run writes is its summary.
    sleep "$POLL_SECONDS"
    look_at_slice
    if [ "$slice" != ready ]; then return 9; fi
    complete && return 9
    if ! failed_once "$run ended, exit codes$codes, and is not complete"; then
      say "giving up on $run"
      show_log_end
      return 1
    fi
  fi
  if [ "$uninstalled" -gt 0 ] && ! install; then
    failed_once "the installation failed" || return 1
    return 9
  fi
  begun=yes
  start || failed_once "the run could not be started" || return 1
  return 9
}

logs() {
  ssh_to "$worker_asked" "$on_worker logs $lines $follow${run:+ $(quote "$run")}"
}

status() {
  look_at_slice
  if [ -z "$dry" ]; then
    echo "slice $NAME ($TYPE, $ZONE): $detail"
  fi
  if [ -n "$dry" ] || [ "$slice" = ready ]; then
    look_at_workers
    printf '%s' "$told"
  fi
  if [ -n "$run" ]; then show_run; fi
}

show_run() {
  local code=0 metrics
  if [ -n "$dry" ]; then
    act gcloud storage cat --range=-65536 "$run_dir/metrics.jsonl" "--project=$PROJECT"
  else
    metrics=$(gcloud storage cat --range=-65536 "$run_dir/metrics.jsonl" "--project=$PROJECT" 2>/dev/null |
      tail -n 1) || true
    echo "metrics: ${metrics:-none yet}"
  fi
  complete || code=$?
  if [ -n "$dry" ]; then return; fi
  case $code in
    0) echo "complete: yes" ;;
    1) echo "complete: no" ;;
    *) echo "complete: unknown, $(said_by_gcloud "$temporary/ls" 2)" ;;
  esac
}

stop() {
  need_slice
  each_worker stop "$on_worker stop"
  check_workers stop "stop the run" || exit 1
  if [ -z "$dry" ]; then say "told training to save and end; launch/tpu.sh status shows when it has"; fi
}

fetch() {
  local code=0 target=${directory:-runs/$run/model}
  complete || code=$?
  if [ -z "$dry" ]; then
    [ "$code" != 2 ] || fail "cannot read $run_dir: $(said_by_gcloud "$temporary/ls" 2)"
    [ "$code" = 0 ] || fail "$run is not complete: $run_dir/summary.json is not there"
  fi
  act mkdir -p "$target"
  act gcloud storage rsync --recursive "$run_dir/model" "$target" "--project=$PROJECT"
  if [ -z "$dry" ]; then say "the model is in $target"; fi
}

delete() {
  local reply=
  if [ -n "$dry" ]; then
    delete_slice
    return
  fi
  look_at_slice
  case $slice in
    absent) say "there is no slice $NAME in $ZONE" && return ;;
    unknown) fail "gcloud does not say what is there: $detail" ;;
  esac
  if [ -z "$yes" ]; then
    [ -t 0 ] || fail "nobody is here to be asked: add --yes" 2
    printf '%s' "Delete $NAME ($TYPE, $detail) in $ZONE of $PROJECT? The bucket stays. [y/N] " >&2
    read -r reply || true
    case $reply in y | Y | yes) ;; *) fail "nothing was deleted" ;; esac
  fi
  delete_slice
  say "deleted $NAME"
}

# ---- the command line

check_run() {
  local LC_ALL=C
  # Characters that gcloud storage reads as patterns, that end a path or a line, or that look like a flag.
  case $run in
    '' | [.-]* | *[!A-Za-z0-9\ ._+=@,-]* | *' ' | ' '*)
      misused "'$run' is no name for a run: letters, digits, spaces and . _ - + = @ ,"
      ;;
  esac
  run_dir=$BUCKET/runs/$run
}

check_extra() {
  local word
  for word in ${extra[@]+"${extra[@]}"}; do
    case $word in
      --run_dir | --run_dir=* | --distributed.initialize | --distributed.initialize=*)
        misused "$word is set by run itself" ;;
      *$'\n'*) misused "an argument has a line break in it" ;;
    esac
  done
}

need_value() { # FLAG WORDS_LEFT
  [ "$2" -ge 2 ] || misused "$1 needs a value"
}

main() {
  local allowed positional=0 takes=0 after_dashes=
  settings=${FR3E_TPU_ENV:-$here/tpu.env}
  dry='' watch='' yes='' worker_asked=0 lines=100 follow=yes run='' run_dir='' directory='' extra=()
  case ${1-} in
    '') help_all >&2 && exit 2 ;;
    --help | -h | help) help_all && exit 0 ;;
    create | install | stop) allowed=' ' ;;
    run) allowed=' --watch ' takes=1 ;;
    logs) allowed=' --worker --lines --no-follow ' takes=1 ;;
    status) allowed=' ' takes=1 ;;
    fetch) allowed=' ' takes=2 ;;
    delete) allowed=' --yes ' ;;
    *) misused "there is no command '$1'" ;;
  esac
  command_name=$1
  if [ "$1" = run ]; then after_dashes='; options of training come after --'; fi
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) "help_$command_name" && exit 0 ;;
      --dry-run) dry=yes ;;
      --settings) need_value "$1" $# && settings=$2 && shift ;;
      --settings=*) settings=${1#*=} ;;
      --)
        [ "$command_name" = run ] || misused "-- is for run"
        shift
        extra=(${1+"$@"})
        break
        ;;
      -*)
        case $allowed in *" ${1%%=*} "*) ;; *) misused "there is no option $1$after_dashes" ;; esac
        case $1 in
          --watch) watch=yes ;;
          --yes) yes=yes ;;
          --no-follow) follow=no ;;
          --worker) need_value "$1" $# && worker_asked=$2 && shift ;;
          --worker=*) worker_asked=${1#*=} ;;
          --lines) need_value "$1" $# && lines=$2 && shift ;;
          --lines=*) lines=${1#*=} ;;
          *) misused "$1 takes no value" ;;
        esac
        ;;
      *)
        positional=$((positional + 1))
        [ "$positional" -le "$takes" ] || misused "'$1' is one word too many$after_dashes"
        if [ "$positional" = 1 ]; then run=$1; else directory=$1; fi
        ;;
    esac
    shift
  done
  case $command_name in
    run | fetch) [ "$positional" -ge 1 ] || misused "the name of a run is missing" ;;
  esac
  read_settings
  if [ "$positional" -ge 1 ]; then check_run; fi
  check_extra
  if [ "$command_name" = run ] && [ "${#extra[@]}" = 0 ]; then
    misused "run '$run' has no options of training, and would train the quickstart: name a configuration, \
as in run $(quote "$run") -- --config configs/slices/qwen2.5_7b_v5e16.yaml"
  fi
  case $lines in '' | *[!0-9]*) misused "--lines $lines is no number" ;; esac
  case $worker_asked in '' | *[!0-9]*) misused "--worker $worker_asked is no number" ;; esac
  [ "$worker_asked" -lt "$workers" ] || misused "$TYPE has no worker $worker_asked: they are 0 to $((workers - 1))"
  if [ -z "$dry" ]; then
    command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  fi
  temporary=$(mktemp -d "${TMPDIR:-/tmp}/fr3e-tpu.XXXXXX")
  trap 'rm -rf "$temporary"' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  case $command_name in
    run) run_command ;;
    install) install || exit 1 ;;
    *) "$command_name" ;;
  esac
}

main "$@"
