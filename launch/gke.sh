#!/usr/bin/env bash
# Training on TPU slices of a GKE cluster, as a JobSet: one job a slice, one pod a host. From wherever kubectl speaks to the cluster.
#
#   launch/gke.sh run --name=kd --image=IMAGE --accelerator=v6e-64 --spot -- --config=configs/weak2strong.py:scale=paper --config.runs=gs://my-bucket/runs
#   launch/gke.sh run --name=kd --image=IMAGE --accelerator=v5p-64 --slices=2 -- ... --config.mesh.replica=2
#   launch/gke.sh print ...   what `run` would give to the cluster, in YAML
#   launch/gke.sh logs | status | stop | resume | delete --name=kd
#
# The image is built as launch/Dockerfile says. The cluster needs node pools of the accelerator, one for each slice, and JobSet 0.8 or later.
# `runs` must outlive the pods: gs://..., or with --bucket=BUCKET, which is mounted with gcsfuse (the cluster's GcsFuseCsiDriver), a folder in /mnt/bucket.
# Several slices speak over their hosts' own network, and reach gs:// as the nodes' service account; a single slice, and pods with a mounted bucket, have the
# pods' network, which is slower between slices, and their service account (--service-account).
# Local checkpoints outlive the pods with --local=FOLDER, of each node (its memory: /dev/shm/kdjax), which is mounted as /mnt/local:
# -- ... --config.checkpoint.local=/mnt/local --config.checkpoint.local_every=50
# Settings may stand in the environment too (NAME, IMAGE, ACCELERATOR, SLICES, SPOT, BUCKET, LOCAL, SERVICE_ACCOUNT, CONTEXT, NAMESPACE).
# --dry-run prints what would be done.
#
#   run      creates the JobSet. After a preemption (code 75), a lost host or a crash, all jobs are restarted, at most RESTARTS times (100). If a process
#            exits with code 2 (a config error) or 1, the JobSet fails at once. The commit, uncommitted changes, command and YAML are recorded in
#            launched/; the code that runs is the image's
#   logs     follows host 0's
#   status   the JobSet and its pods
#   stop     asks every process to save and stop, and gives the hosts back (the JobSet is suspended)
#   resume   creates it again as it was, whether it was stopped, failed or deleted
#   delete   removes it; its processes save first
#
# It has been checked with shellcheck, its dry runs, a fake kubectl and JobSet's published types: no cluster was at hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/common.sh
. launch/common.sh

commands=(run print logs status stop resume delete)
options=(NAME IMAGE ACCELERATOR SLICES BUCKET LOCAL SERVICE_ACCOUNT CONTEXT NAMESPACE)
switches=(SPOT)
parse "$@"
case $command in
run | print) requires NAME IMAGE ACCELERATOR && requires_train && requires_runs
  ! keeps_local '.+' || { [[ -n ${LOCAL:-} ]] && keeps_local '/mnt/local(/[^ ]*)?'; } ||
    fail "$command: local checkpoints would go with the pods; add --local=FOLDER, of each node, and -- --config.checkpoint.local=/mnt/local"
  [[ ${LOCAL:-/} == /* ]] || fail "--local=$LOCAL: must be an absolute path, as /dev/shm/kdjax"
  ;;
*) requires NAME ;;
esac
SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-100}
for setting in NAME IMAGE SERVICE_ACCOUNT LOCAL BUCKET train; do
  declare -n value=$setting
  [[ "${value[*]:-}" != *[[:cntrl:]]* ]] || fail "$command: ${setting,,} holds a control character, such as a line break"
done
check_numbers SLICES RESTARTS
kube=(kubectl ${CONTEXT:+--context="$CONTEXT"} ${NAMESPACE:+--namespace="$NAMESPACE"})
jobset=launched/$NAME/jobset.yaml

describe() { # from the accelerator's name: GKE's own, its topology, its hosts of four chips each (the machines that end in -4t)
  [[ $ACCELERATOR =~ ^(v4|v5p|v5litepod|v6e)-([1-9][0-9]*)$ ]] || fail "--accelerator=$ACCELERATOR: no such slice; as in v4-128, v5litepod-256, v5p-64, v6e-64"
  local chips=${BASH_REMATCH[2]} directions=2 unit=chips exponent=2 sides=() i
  case ${BASH_REMATCH[1]} in
  v4) gke_name=tpu-v4-podslice directions=3 ;;
  v5p) gke_name=tpu-v5p-slice directions=3 ;;
  v5litepod) gke_name=tpu-v5-lite-podslice ;;
  v6e) gke_name=tpu-v6e-slice ;;
  esac
  ((directions == 2)) || unit='TensorCores, two a chip' chips=$((chips % 2 ? 0 : chips / 2))
  while ((1 << exponent < chips)); do ((++exponent)); done
  ((1 << exponent == chips)) || fail "--accelerator=$ACCELERATOR: counts $unit; there are slices of 4, 8, 16... chips"
  for ((i = 0; i < directions; i++)); do sides+=($((1 << (exponent + i) / directions))); done # as near to a square or cube as may be
  topology=$(IFS=x && echo "${sides[*]}")
  [[ $topology != 1x2x2 ]] || topology=2x2x1
  hosts=$((chips / 4))
}

yaml() { printf "'%s'" "${1//\'/\'\'}"; } # a string in single quotes

render() {
  local word
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(yaml "$NAME")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # each slice is a node pool
spec:
  failurePolicy:
    maxRestarts: $RESTARTS
    restartStrategy: BlockingRecreate # no new process is to meet an old one
    rules:
    - name: wrong
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $SLICES
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: kdjax, operator: In, values: [1, 2]}
        template:
EOF
  [[ -z ${BUCKET:-} ]] || cat <<EOF
          metadata:
            annotations:
              gke-gcsfuse/volumes: 'true'
              gke-gcsfuse/memory-limit: '0' # none
              gke-gcsfuse/ephemeral-storage-limit: '0' # none: a checkpoint is written there first
EOF
  cat <<EOF
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120 # to save in
EOF
  [[ -z ${SERVICE_ACCOUNT:-} ]] || echo "            serviceAccountName: $(yaml "$SERVICE_ACCOUNT")"
  ((SLICES == 1)) || [[ -n ${BUCKET:-} ]] || cat <<EOF
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
EOF
  cat <<EOF
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $gke_name
              cloud.google.com/gke-tpu-topology: $topology
EOF
  [[ ${SPOT:-} != true ]] || cat <<EOF
              cloud.google.com/gke-spot: 'true'
            tolerations: [{key: cloud.google.com/gke-spot, operator: Equal, value: 'true', effect: NoSchedule}]
EOF
  cat <<EOF
            containers:
            - name: kdjax
              image: $(yaml "$IMAGE")
              env: [{name: RESTARTS, value: '0'}] # see launch/supervise.sh
              resources: {limits: {google.com/tpu: 4}}
              command:
EOF
  for word in bash launch/supervise.sh python -m kdjax.train --distributed "${train[@]}"; do
    printf '              - %s\n' "$(yaml "${word//\$/\$\$}")" # $(...) would be a variable to Kubernetes
  done
  [[ -n ${BUCKET:-}${LOCAL:-} ]] || return 0
  echo '              volumeMounts:'
  [[ -z ${BUCKET:-} ]] || echo '              - {name: bucket, mountPath: /mnt/bucket}'
  [[ -z ${LOCAL:-} ]] || echo '              - {name: local, mountPath: /mnt/local}'
  echo '            volumes:'
  [[ -z ${LOCAL:-} ]] || echo "            - {name: local, hostPath: {path: $(yaml "$LOCAL"), type: DirectoryOrCreate}}"
  [[ -z ${BUCKET:-} ]] || cat <<EOF
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: $(yaml "$BUCKET"), mountOptions: 'implicit-dirs,rename-dir-limit=100000'}
EOF
}

run() {
  describe
  record
  if $dry_run; then
    printf 'write %s, as %s print shows it\n' "$jobset" "$script"
  else
    render >"$jobset"
  fi
  does "${kube[@]}" create --filename="$jobset"
}
remove() { does "${kube[@]}" delete jobset "$NAME" --cascade=foreground --ignore-not-found; } # with its pods, before it returns

case $command in
run) run ;;
print)
  describe
  render
  ;;
logs) does "${kube[@]}" logs --follow --tail=100 --container=kdjax --selector="$(first_pod)" ;;
status)
  does "${kube[@]}" get jobset "$NAME"
  does "${kube[@]}" get pods --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
  ;;
stop) does "${kube[@]}" patch jobset "$NAME" --type=merge --patch='{"spec":{"suspend":true}}' ;;
resume)
  [[ -f $jobset ]] || fail "resume: $jobset is not here; use run"
  remove
  does "${kube[@]}" create --filename="$jobset"
  ;;
delete) remove ;;
esac
