#!/usr/bin/env bash
# Training as a job on a GPU cluster with Slurm, from a login node: submit it, look, stop it, go on.
#
#   launch/slurm.sh run --name=kd --nodes=4 --gpus-per-node=8 --time=12:00:00 -- --config=configs/weak2strong.py:scale=paper --config.runs=/shared/runs
#   launch/slurm.sh logs | status | stop --name=kd
#   launch/slurm.sh resume --name=kd --nodes=4 --gpus-per-node=8 --time=12:00:00
#
# This working tree and `runs` must be on a disk that all nodes see. The job runs in the environment from which it was submitted, on this tree as it is
# whenever it starts: to go on editing, submit from a `git worktree` of its own.
# Settings may stand in the environment too (NAME, NODES, GPUS_PER_NODE, CPUS_PER_TASK, PARTITION, ACCOUNT, TIME); what has no option here can be
# set by sbatch's own variables (SBATCH_QOS, SBATCH_CONSTRAINT, SBATCH_EXCLUSIVE, SBATCH_MEM_PER_NODE). --dry-run prints what would be done.
#
#   run      submits launch/slurm_job.sh: one process for every GPU, as JAX expects it of Slurm. What was preempted or out of time has saved and goes back
#            into the queue by itself, under the same job number; a config error ends the job. Saving has 120 seconds before the end of the time;
#            SBATCH_SIGNAL=TERM@600 gives it more. What runs (commit, uncommitted changes, command) is written beside it, in launched/
#   logs     follows it; each line begins with the number of its process
#   status   the job in the queue
#   stop     asks every process to save and stop, and keeps the job out of the queue
#   resume   submits again as before; where a job of this name still runs, it waits for its end
#
# It has been checked with shellcheck, its dry runs, and on one machine with Slurm 22.05, two processes on its CPU cores: the end of the time, preemption,
# stop and scancel. No cluster with GPUs was at hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=launch/common.sh
. launch/common.sh

commands=(run logs status stop resume)
options=(NAME NODES GPUS_PER_NODE CPUS_PER_TASK PARTITION ACCOUNT TIME)
parse "$@"
case $command in
run | resume) requires NAME NODES GPUS_PER_NODE ;;
*) requires NAME ;;
esac
[[ $command != run ]] || requires_train
job=(--me --name="$NAME")

submit() {
  local ask=(sbatch --job-name="$NAME" --output="launched/$NAME/train.log" --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --gpus-per-node="$GPUS_PER_NODE")
  local setting option
  for setting in CPUS_PER_TASK PARTITION ACCOUNT TIME; do
    option=${setting,,}
    [[ -z ${!setting:-} ]] || ask+=("--${option//_/-}=${!setting}")
  done
  record
  does "${ask[@]}" launch/slurm_job.sh "${train[@]}"
}

case $command in
run) submit ;;
resume)
  recall
  submit
  ;;
logs) does tail -n 100 -F "launched/$NAME/train.log" ;;
status) does squeue "${job[@]}" --long ;;
stop)
  $dry_run || [[ -d launched/$NAME ]] || fail "stop: launched/$NAME is not here; no job of this name was submitted from this tree"
  does touch "launched/$NAME/stop" # for launch/slurm_job.sh
  does scancel "${job[@]}" --state=PENDING
  does scancel "${job[@]}" --state=RUNNING --signal=TERM
  ;;
esac
