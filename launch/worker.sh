#!/usr/bin/env bash
# The part of launch/tpu.sh that runs on a worker of the slice, from the checkout that tpu.sh made there.
# gcloud repeats a command whose connection broke, so every command here may come twice.
set -euo pipefail
umask 077
state=$HOME/.fr3e
venv=$HOME/fr3e_venv
checkout=$HOME/fr3e_jax
mkdir -p "$state/runs"

fail() {
  echo "worker.sh: $1" >&2
  exit "${2:-1}"
}

# The process that holds a run holds this lock as long as it lives: unlike a process number, it is not
# left behind by a crash or a reboot.
running() { ! flock --shared --nonblock "$state/lock" true; }

current() { cat "$state/current" 2>/dev/null || true; }

install() { # DATA
  local data=${1-}
  cd "$checkout"
  rm -f "$venv/installed"
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --allow-existing --python 3.12 "$venv"
  # The lock has no libtpu: jax pins the one it was built for.
  uv pip install --quiet --python "$venv/bin/python" --constraint requirements.lock \
    --reinstall-package fr3e_jax '.[tpu]'
  if [ -n "$data" ]; then
    mkdir -p "$HOME/data"
    gcloud storage rsync --recursive "$data" "$HOME/data"
  fi
  git rev-parse HEAD >"$venv/installed"
  echo "installed $(cat "$venv/installed")"
}

# One line for tpu.sh, the name last since it may have spaces: "fr3e WHAT CODE RUN".
show_state() {
  local run
  run=$(current)
  if running; then
    echo "fr3e running - $run"
  elif [ ! -f "$venv/installed" ]; then
    echo "fr3e uninstalled - -"
  elif [ -z "$run" ]; then
    echo "fr3e idle - -"
  elif [ ! -f "$state/runs/$run/exit_code" ]; then
    echo "fr3e lost - $run"
  elif [ -f "$state/runs/$run/stopped" ]; then
    echo "fr3e stopped $(cat "$state/runs/$run/exit_code") $run"
  else
    echo "fr3e ended $(cat "$state/runs/$run/exit_code") $run"
  fi
}

# Lines KEY=VALUE and then "end". Without the end the connection broke off, and nothing must start.
read_secrets() {
  local line lines='' ended=
  while IFS= read -r line; do
    case $line in
      end) ended=1 && break ;;
      HF_TOKEN=?* | WANDB_API_KEY=?*) lines="$lines$line"$'\n' ;;
    esac
  done
  [ -n "$ended" ] || fail "the input broke off, nothing was started"
  if [ -n "$lines" ]; then
    rm -f "$state/secrets"
    printf '%s' "$lines" >"$state/secrets"
  fi
}

start() { # RUN ARGUMENTS...
  local run=$1 dir=$state/runs/$1
  if running; then
    [ "$(current)" = "$run" ] || fail "run '$(current)' is going on here" 3
    echo "already going on"
    return
  fi
  [ -f "$venv/installed" ] || fail "nothing is installed here: launch/tpu.sh install" 4
  read_secrets
  mkdir -p "$dir"
  rm -f "$dir/exit_code" "$dir/stopped" "$dir/pid"
  printf '%s\n' "$run" >"$state/current"
  setsid bash "$checkout/launch/worker.sh" hold "$@" </dev/null >>"$dir/log.txt" 2>&1 &
  while [ ! -f "$dir/pid" ]; do
    kill -0 $! 2>/dev/null || [ -f "$dir/pid" ] || fail "did not start: $(tail -n 3 "$dir/log.txt")" 5
    sleep 0.1
  done
  echo "started"
}

# Outlives the ssh session and keeps the exit code, which nohup would lose.
hold() { # RUN ARGUMENTS...
  local dir=$state/runs/$1 child code=0 line
  shift
  exec 9>"$state/lock"
  flock --wait 5 9 || fail "another run holds $state/lock"
  # A shutdown signals every process: this one waits for the code, and training saves. An ignored signal
  # would be ignored in training too, an empty trap is not.
  trap : TERM HUP INT
  if [ -f "$state/secrets" ]; then
    while IFS= read -r line; do export "${line?}"; done <"$state/secrets"
  fi
  export PYTHONUNBUFFERED=1
  cd "$checkout"
  # Left open in training, the lock would also be held by what training leaves behind.
  "$venv/bin/python" -m fr3e_jax.train "$@" 9>&- &
  child=$!
  echo "$child" >"$dir/pid"
  # A signal ends wait before the child has ended.
  wait "$child" || true
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
  wait "$child" || code=$?
  echo "$code" >"$dir/exit_code.new"
  mv "$dir/exit_code.new" "$dir/exit_code"
  echo "exit code $code"
}

# `stop` is a person's, and is remembered so that nobody starts the run again; `end` and `kill` are tpu.sh's.
signal() { # stop|end|kill
  local dir name=TERM
  dir=$state/runs/$(current)
  running || { echo "no run is going on" && return; }
  if [ "$1" = stop ]; then touch "$dir/stopped"; fi
  if [ "$1" = kill ]; then name=KILL; fi
  kill "-$name" "$(cat "$dir/pid")"
  echo "sent SIG$name"
}

logs() { # LINES FOLLOW [RUN]
  local run=${3:-$(current)}
  [ -n "$run" ] || fail "no run was started here"
  [ -f "$state/runs/$run/log.txt" ] || fail "run '$run' was not started here"
  if [ "$2" = yes ]; then
    exec tail -n "$1" -F "$state/runs/$run/log.txt"
  fi
  tail -n "$1" "$state/runs/$run/log.txt"
}

command=$1
shift
case $command in
  install | start | hold | logs) "$command" "$@" ;;
  state) show_state ;;
  stop | end | kill) signal "$command" ;;
  *) fail "no such command: $command" 2 ;;
esac
