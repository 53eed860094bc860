# shellcheck shell=bash
# The slice as gcloud knows it: asked for, looked at, deleted. Read by launch/tpu.sh.

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
