#!/usr/bin/env bash
# Runs a command, and runs it again where something else ended it: it resumes from its last checkpoint.
#
#   launch/supervise.sh python -m kdjax.train --distributed --config=...
#
# It ends with the command's code where the command is done (0), where the run cannot continue (1), where the config is wrong (2), or where the
# user has stopped it (130): started again, it would only end again. Anything else is started again, at most RESTARTS times (default 100) in all,
# after PAUSE seconds (default 30): a process that crashed or was killed, and one that exits with 75, because it lost another process of its job,
# or because it was told to stop, has saved and has work left.
# SIGTERM to this script goes to the command, which saves and exits with 75. It is not started again.
#
# Where a cluster restarts jobs, set RESTARTS=0. REASON=FILE is where the code is written if it is 1 or 2: the other processes of the job, left
# alone, end with codes of their own.
set -uo pipefail
(($#)) || {
  echo 'error: launch/supervise.sh needs a command' >&2
  exit 2
}
stopping=false child=''
trap 'stopping=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM INT
for ((restarts = 0; ; restarts++)); do
  "$@" &
  child=$!
  ! $stopping || kill -TERM "$child" 2>/dev/null # it came before there was a child to tell
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal of ours ends the waiting, not the command
  wait "$child"
  code=$?
  if [[ -n ${REASON:-} ]] && ((code == 1 || code == 2)); then echo "$code" >"$REASON"; fi
  if $stopping || ((code <= 2 || code == 130)); then exit "$code"; fi
  if ((restarts >= ${RESTARTS:-100})); then
    ((restarts == 0)) || echo "launch/supervise.sh: ended with code $code after $restarts restarts; giving up" >&2
    exit "$code"
  fi
  echo "launch/supervise.sh: ended with code $code; starting again in ${PAUSE:-30} s" >&2
  sleep "${PAUSE:-30}"
  ! $stopping || exit "$code"
done
