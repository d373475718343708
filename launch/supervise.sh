#!/usr/bin/env bash
# Runs a command and, where something else ended it, runs it again: it goes on from its last checkpoint.
#
#   launch/supervise.sh python -m kdjax.train --distributed --config=...
#
# It ends where the command is done (0), where the config is wrong (2) or the run cannot go on (1): starting those again would only end
# them again. A process that was killed, lost another one of its job or crashed is started again, at most RESTARTS times (default 100) in all,
# after PAUSE seconds (default 30). SIGTERM goes to the command, which saves and stops, and is not started again.
#
# Where a cluster does the starting again, RESTARTS=0, and two settings tell it what the exit code alone would not:
# STOPPED=75 is the code of a command that ended well (0) after a SIGTERM: it has saved, and work is left;
# REASON=FILE is where the code is written if it is 1 or 2: the other processes of the job, left alone, end with codes of their own.
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
  if $stopping && ((code == 0)); then exit "${STOPPED:-0}"; fi
  if [[ -n ${REASON:-} ]] && ((code == 1 || code == 2)); then echo "$code" >"$REASON"; fi
  if $stopping || ((code <= 2)); then exit "$code"; fi
  if ((restarts >= ${RESTARTS:-100})); then
    ((restarts == 0)) || echo "launch/supervise.sh: ended with code $code after $restarts restarts; giving up" >&2
    exit "$code"
  fi
  echo "launch/supervise.sh: ended with code $code; starting again in ${PAUSE:-30} s" >&2
  sleep "${PAUSE:-30}"
  ! $stopping || exit "$code"
done
