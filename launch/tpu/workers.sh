# shellcheck shell=bash
# Commands on every worker of the slice, and what they answer. Read by launch/tpu.sh.

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
