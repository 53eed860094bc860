#!/usr/bin/env bash
# The command of a pod on GKE: trains, and ends with 42 where the run saved and ended without being complete,
# as it does when it is preempted. xpk starts a workload again that ends with 42, and none that ends with 0.
set -euo pipefail

if [ $# = 0 ] || [ "$1" = --help ]; then
  echo "usage: launch/pod.sh gs://BUCKET/runs/RUN ARGS: see launch/README.md, GKE"
  exit 0
fi
run_dir=$1
shift
if [ $# = 0 ]; then
  echo "pod.sh: no options of training, which would train the quickstart: add --config FILE" >&2
  exit 2
fi

complete() {
  python -c 'import sys, tensorstore as ts
folder = ts.KvStore.open(sys.argv[1].rstrip("/") + "/").result()
sys.exit(folder.read("summary.json").result().state != "value")' "$run_dir"
}

code=0 told=
python -m fr3e_jax.train --distributed.initialize true --run_dir "$run_dir" "$@" &
child=$!
trap 'told=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT
# A signal ends wait before the child has ended.
wait "$child" || true
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
wait "$child" || code=$?
[ "$code" = 0 ] || exit "$code"

# The first process writes the summary; another one may be here before it.
until complete; do
  if [ -n "$told" ] || [ "$SECONDS" -gt $((${ended:=$SECONDS} + ${FR3E_POD_WAIT:-60})) ]; then exit 42; fi
  sleep 1
done
