# shellcheck shell=bash
# What the commands say of themselves. Read by launch/tpu.sh.

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
run ended with 2 (its options are at fault, or another process has it), with 1 when it ended MAX_FAILURES
times in a row without a new checkpoint, and with 3 when it was ended by `launch/tpu.sh stop`. Ending the
watch leaves the run alone; the same command takes the watch up again.
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
