#!/usr/bin/env bash
# A Cloud TPU slice (or several) as a queued resource, from a laptop: create it, put this working tree on it, train, look, go on, delete it.
#
#   launch/tpu.sh create --name=kd --project=my-project --zone=us-east5-b --accelerator=v6e-64 --spot
#   launch/tpu.sh setup  --name=kd --project=my-project --zone=us-east5-b
#   launch/tpu.sh run    --name=kd --project=my-project --zone=us-east5-b -- --config=configs/weak2strong.py:scale=paper --config.runs=gs://my-bucket/runs
#   launch/tpu.sh logs | status | resume | stop | delete   ... with the same three settings
#
# `runs` must be a folder that all hosts see: a bucket (gs://my-bucket/runs), or a Filestore share.
# Settings may stand in the environment too (NAME, PROJECT, ZONE, ACCELERATOR, RUNTIME, SLICES, PROVISIONING=spot|reserved). --dry-run prints what would be done.
#
#   create   asks for the slice; --spot, --reserved, or on demand; --slices=N joins several (set --config.mesh.replica=N in run). What was asked
#            for is kept in launched/, for the commands below: from another machine say it again
#   setup    waits for the slice, copies the tracked files with their uncommitted changes to every host, and installs them
#   run      starts training on every host with launch/host.sh: a process that was preempted, crashed or lost its host to a reboot resumes by itself,
#            a config error ends the job. The commit, the uncommitted changes and the command are recorded in launched/
#   logs     follows host 0's
#   resume   runs again as before. A slice that was taken away (SUSPENDED, FAILED) is deleted and created again, one that is still queued is waited
#            for, and nothing is changed if its state cannot be asked
#   stop     asks every host to save and stop
#   delete   gives the slice back
#
# It has been checked with shellcheck and its dry runs only: no slice was at hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/common.sh
. launch/common.sh

commands=(create setup run logs status resume stop delete)
options=(NAME PROJECT ZONE ACCELERATOR RUNTIME SLICES PROVISIONING)
switches=(SPOT RESERVED)
parse "$@"
[[ ${SPOT:-} != true ]] || PROVISIONING=spot
[[ ${RESERVED:-} != true ]] || PROVISIONING=reserved
asked=launched/${NAME:-}/slice # what create has asked for; said again, it counts anew
if [[ $command != create && -f $asked ]]; then
  while IFS='=' read -r key value; do
    [[ -n ${!key:-} ]] || printf -v "$key" '%s' "$value"
  done <"$asked"
fi
case $command in
create | resume) requires NAME PROJECT ZONE ACCELERATOR ;;
*) requires NAME PROJECT ZONE ;;
esac
[[ $command != run ]] || requires_train

SLICES=${SLICES:-1} PROVISIONING=${PROVISIONING:-on-demand}
case ${ACCELERATOR:-} in # Cloud TPU's names of the machine's image for each generation
v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
v5p-*) runtime=v2-alpha-tpuv5 ;;
v6e-*) runtime=v2-alpha-tpuv6e ;;
*) runtime=tpu-ubuntu2204-base ;;
esac
place=(--project="$PROJECT" --zone="$ZONE")

on_all_hosts() { # a command on every host of every slice
  local node
  for node in $(nodes); do
    does gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1"
  done
}
nodes() {
  if ((SLICES == 1)); then printf '%s\n' "$NAME"; else for ((i = 0; i < SLICES; i++)); do printf '%s-%d\n' "$NAME" "$i"; done; fi
}
state() { # of the queued resource; ABSENT where there is none. Fails where that cannot be known: a broken connection is no reason to delete anything
  local said
  if said=$(gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)' 2>&1); then
    printf '%s\n' "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* || $said == *'not found'* ]]; then
    printf 'ABSENT\n'
  else
    printf 'UNKNOWN: %s\n' "${said%%$'\n'*}"
  fi
}
wait_until_active() {
  local now unknown=0
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
    SUSPENDED* | FAILED* | ABSENT) fail "$command: $NAME is $now and will not become active; see launch/tpu.sh status, and launch/tpu.sh resume to ask for it again" ;;
    UNKNOWN*)
      ((++unknown < 10)) || fail "$command: the state of $NAME is not known (${now#UNKNOWN: })"
      ;;
    *) unknown=0 ;;
    esac
    printf 'waiting for %s to become ACTIVE (%s)\n' "$NAME" "$now"
    sleep "${PAUSE:-30}"
  done
}

create() {
  local ask=(gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="${RUNTIME:-$runtime}")
  if ((SLICES == 1)); then ask+=(--node-id="$NAME"); else ask+=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  [[ $PROVISIONING == on-demand ]] || ask+=("--$PROVISIONING")
  does "${ask[@]}"
  local setting
  if $dry_run; then
    printf 'record in %s: accelerator, runtime, slices, provisioning\n' "$asked"
  else
    mkdir -p "${asked%/*}"
    for setting in ACCELERATOR RUNTIME SLICES PROVISIONING; do printf '%s=%s\n' "$setting" "${!setting:-}"; done >"$asked"
  fi
}

setup() {
  $dry_run || wait_until_active
  local archive=launched/$NAME.tar.gz
  if $dry_run; then
    printf 'pack the tracked files with their uncommitted changes into %s\n' "$archive"
  else
    mkdir -p launched
    tracked_files | tar --null -T - -czf "$archive"
  fi
  local node
  for node in $(nodes); do
    does gcloud compute tpus tpu-vm scp "$archive" "$node:kdjax.tar.gz" "${place[@]}" --worker=all
  done
  # The image's Python may be older than 3.11: uv brings one.
  on_all_hosts "mkdir -p kdjax && tar -xzf kdjax.tar.gz -C kdjax && cd kdjax && pip install -q uv && python3 -m uv venv -q --python 3.12 .venv && python3 -m uv pip install -q -p .venv -e '.[tpu,gcs]'"
}

run() {
  record
  on_all_hosts "kdjax/launch/host.sh start -- $(train_words)"
}

case $command in
create | setup | run) "$command" ;;
logs) does gcloud compute tpus tpu-vm ssh "$(nodes | head -n 1)" "${place[@]}" --worker=0 --command='tail -n 100 -F kdjax/train.log' ;;
status) does gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" ;;
stop) on_all_hosts 'kdjax/launch/host.sh stop' ;;
delete) does gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet ;;
resume)
  recall
  now=SUSPENDED
  $dry_run || now=$(state)
  case $now in
  ACTIVE) ;;
  SUSPENDED* | FAILED*)
    does gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet
    create
    setup
    ;;
  ABSENT) create && setup ;;
  UNKNOWN*) fail "resume: the state of $NAME is not known, so nothing was changed (${now#UNKNOWN: })" ;;
  *) setup ;; # asked for already, and not there yet
  esac
  run
  ;;
esac
