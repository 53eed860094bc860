# shellcheck shell=bash
# Watching a run: over preemptions, until it is complete. Read by launch/tpu.sh.

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
        say "$run ended with exit code 2: its options are at fault, or another process has it (the log says which), and it is not started again"
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
