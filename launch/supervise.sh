#!/usr/bin/env bash
# Runs a command, and restarts it if it ends before it is done; it resumes from its last checkpoint.
#
#   launch/supervise.sh python -m kdjax.train --distributed --config=...
#
# It exits with the command's code if the command is done (0), the run cannot continue (1), the config is wrong (2), or the user stopped it (130):
# a restart would not help. After any other code it restarts the command, at most RESTARTS times (default 100), after PAUSE seconds (default 30).
# This covers a process that crashed or was killed, and one that exits with 75: it lost another process of its job, or saved on request with work
# left.
# SIGTERM to this script is forwarded to the command, which saves and exits with 75 and is not restarted.
#
# If a cluster restarts jobs, set RESTARTS=0. With REASON=FILE, the code is written to FILE if it is 1 or 2: the remaining processes of the job
# exit with other codes.
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
