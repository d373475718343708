#!/usr/bin/env bash
# Training on TPU slices through Google's xpk (pip install xpk; checked against 1.16), on a cluster that `xpk cluster create` has made.
#
#   launch/xpk.sh run --name=kd --cluster=my-cluster --project=my-project --zone=us-east5-b --accelerator=v6e-64 --image=IMAGE -- \
#     --config=configs/weak2strong.py:scale=paper --config.runs=gs://my-bucket/runs
#   launch/xpk.sh logs | status | delete ... with the first four settings
#
# --image is built as launch/Dockerfile says. With --base-image instead, xpk puts this folder on top of it, all that .dockerignore leaves, and uploads that.
# `runs` must outlive the pods: gs://..., or a folder of a storage that was attached to the cluster (xpk storage).
# Settings may stand in the environment too (NAME, CLUSTER, PROJECT, ZONE, ACCELERATOR, SLICES, IMAGE, BASE_IMAGE, SPOT). --dry-run prints what would be done.
#
#   run      --slices=N joins several (set --config.mesh.replica=N). What was preempted, lost or crashed is started again, all of it, at most RESTARTS times
#            (100); where a process ends with code 2 (a config error) or 1, the job fails at once. What runs (commit, uncommitted changes, command) is written
#            beside it, in launched/. The same command goes on where the job was deleted or has failed
#   logs     follows host 0's, through kubectl as xpk has set it up
#   status   the job in the cluster's queue
#   delete   removes it; its processes save first
#
# It has been checked with shellcheck, its dry runs and xpk's own parser and dry run: no cluster was at hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/common.sh
. launch/common.sh

commands=(run logs status delete)
options=(NAME CLUSTER PROJECT ZONE ACCELERATOR SLICES IMAGE BASE_IMAGE)
switches=(SPOT)
parse "$@"
place=(--cluster="${CLUSTER:-}" --project="${PROJECT:-}" --zone="${ZONE:-}")

run() {
  local ask=(xpk workload create --workload="$NAME" "${place[@]}" --tpu-type="$ACCELERATOR" --num-slices="${SLICES:-1}")
  if [[ -n ${IMAGE:-} ]]; then ask+=(--docker-image="$IMAGE"); else ask+=(--base-docker-image="$BASE_IMAGE" --script-dir=.); fi
  [[ ${SPOT:-} != true ]] || ask+=(--spot)
  # 75: a process saved and stopped on request, or lost another process. xpk itself restarts after signals (127 and above).
  ask+=(--max-restarts="${RESTARTS:-100}" --restart-on-exit-codes=75 --termination-grace-period-seconds=120)
  record
  does "${ask[@]}" --command="RESTARTS=0 exec bash launch/supervise.sh python -m kdjax.train --distributed $(train_words)"
}

case $command in
run)
  [[ -z ${IMAGE:-} || -z ${BASE_IMAGE:-} ]] || fail 'run: --image or --base-image, not both'
  requires NAME CLUSTER PROJECT ZONE ACCELERATOR "$([[ -n ${BASE_IMAGE:-} ]] && echo BASE_IMAGE || echo IMAGE)"
  requires_train
  requires_runs
  ! keeps_local '.+' || fail "$command: local checkpoints would go with xpk's pods; leave --config.checkpoint.local out, or use launch/gke.sh"
  run
  ;;
logs)
  requires NAME
  does kubectl logs --follow --tail=100 --container=jax-tpu --selector="$(first_pod)"
  ;;
status)
  requires NAME CLUSTER PROJECT ZONE
  does xpk workload list "${place[@]}" --filter-by-job="$NAME"
  ;;
delete)
  requires NAME CLUSTER PROJECT ZONE
  does xpk workload delete --workload="$NAME" "${place[@]}"
  ;;
esac
