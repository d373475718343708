#!/usr/bin/env bash
# Starts and stops one host's training; launch/tpu.sh calls it on every host of a slice.
#
#   launch/host.sh start -- --config=...   under launch/supervise.sh, in the background; its output is appended to train.log. A reboot of the host
#                                          starts it again (crontab), unless it had ended or was stopped
#   launch/host.sh stop                    asks it to save and stop; nothing starts it again
#   launch/host.sh reboot                  what crontab runs
#
# The started command is kept in train.args until it ends or is stopped, the process of its supervisor in train.pid.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$PWD

is_running() { # the supervisor, and not another process that was given its number later
  [[ -f train.pid && -r /proc/$(<train.pid)/cmdline ]] && grep -qa supervise.sh "/proc/$(<train.pid)/cmdline"
}

schedule() { # on: at the next boot, off: no more
  command -v crontab >/dev/null || {
    echo 'launch/host.sh: no crontab on this host: a reboot will not start the training again' >&2
    return 0
  }
  {
    crontab -l 2>/dev/null | grep -vF "$here/launch/host.sh" || true
    [[ $1 == off ]] || printf '@reboot %q reboot\n' "$here/launch/host.sh"
  } | crontab -
}

start() {
  if is_running; then
    echo "error: a training runs on this host already (process $(<train.pid)); stop it first" >&2
    exit 2
  fi
  # shellcheck disable=SC1091  # made by tpu.sh setup
  [[ ! -f .venv/bin/activate ]] || . .venv/bin/activate
  local args
  mapfile -d '' -t args <train.args
  # A host that shuts down ends it with 75: there is work left for the next boot.
  nohup bash -c '"$@"; code=$?; rm -f train.pid; ((code == 75)) || rm -f train.args' host launch/supervise.sh python -m kdjax.train --distributed "${args[@]}" >>train.log 2>&1 </dev/null &
  echo $! >train.pid
  schedule on
}

case ${1:-} in
start)
  shift && [[ ${1:-} == -- ]] && shift
  printf '%s\0' "$@" >train.args
  start
  ;;
reboot) [[ ! -f train.args ]] || start ;;
stop)
  rm -f train.args
  schedule off
  if is_running; then pkill -TERM -P "$(<train.pid)"; else echo 'launch/host.sh: nothing to stop'; fi
  ;;
*)
  sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
  exit 2
  ;;
esac
