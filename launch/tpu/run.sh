# shellcheck shell=bash
# A run: checked and started, shown, stopped, fetched. Read by launch/tpu.sh.

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
