#!/usr/bin/env bash
# The batch script that launch/slurm.sh submits: starts a process for every GPU, and requeues the job while work is left.
#
# Near the end of the time limit, or when the job is preempted, Slurm sends SIGTERM to the processes but not to this script. They save and exit
# with 75. The codes 0, 1, 2 and 130 end the job, as do launch/slurm.sh stop and scancel. After any other code the job is requeued, at most
# RESTARTS times (default 100).
# --requeue covers the cases in which Slurm itself requeues the job: a lost node, a preemption without grace.
#
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --dependency=singleton
set -uo pipefail
folder=launched/$SLURM_JOB_NAME limit=${RESTARTS:-100} times=${SLURM_RESTART_COUNT:-0}
say() { printf 'launch/slurm_job.sh: %s\n' "$1" >&2; }

((times > 0)) || rm -f "$folder/stop" # another job's, which has ended
[[ ! -e $folder/stop ]] || exit 0
rm -f "$folder/reason"
trap : TERM # where this script is told too, it waits for the processes all the same
# One process for each GPU, all of a node's in sight of each: JAX takes from Slurm the number of tasks, and as its GPU the one of its number on the node.
# A process that ended must not take the others with it: they may be saving. Those that are left alone notice, and end.
RESTARTS=0 REASON=$folder/reason srun --label --kill-on-bad-exit=0 --wait=600 \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} launch/supervise.sh python -m kdjax.train --distributed "$@"
code=$?

if [[ -s $folder/reason ]]; then code=$(head -n 1 "$folder/reason"); fi
if [[ -e $folder/stop ]]; then exit "$((code == 75 ? 0 : code))"; fi
if ((code <= 2 || code == 130)); then exit "$code"; fi
if ((times >= limit)); then
  say "ended with code $code after $times restarts; giving up"
  exit "$code"
fi
state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")
if [[ $state != RUNNING ]]; then # cancelled, or already on its way back
  say "ended with code $code; the job is ${state:-gone}"
  exit "$code"
fi
say "ended with code $code; back into the queue"
scontrol requeue "$SLURM_JOB_ID"
