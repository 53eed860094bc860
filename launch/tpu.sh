#!/usr/bin/env bash
# What a person does with a Cloud TPU slice from a laptop. `launch/tpu.sh --help` lists it.
# The bash 3.2 of macOS runs this too: no associative arrays, no ${x@Q}, and "${empty[@]}" is an error.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command_name=

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

# ---- the parts

# shellcheck source=tpu/help.sh
. "$here/tpu/help.sh"
# shellcheck source=tpu/settings.sh
. "$here/tpu/settings.sh"
# shellcheck source=tpu/slice.sh
. "$here/tpu/slice.sh"
# shellcheck source=tpu/workers.sh
. "$here/tpu/workers.sh"
# shellcheck source=tpu/run.sh
. "$here/tpu/run.sh"
# shellcheck source=tpu/watch.sh
. "$here/tpu/watch.sh"

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
