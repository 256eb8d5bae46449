#!/usr/bin/env bash
# What the job scripts have in common:  job.sh CONFIG [key=value …]  trains;  job.sh evaluate SOURCE …  evaluates
# Inside a Slurm job: one task a GPU on every node, started again by Slurm after a stop signal (exit code 85). Elsewhere: on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ ! -x .venv/bin/python ]]; then
    echo "error: $PWD/.venv is missing; make it with: make setup" >&2
    exit 2
fi
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    exec .venv/bin/python -m launch "$@"
fi

# The first node's address as Slurm itself reaches it, and a port of this job's own.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first_node" --oneliner | grep -oP 'NodeAddr=\K\S+')
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

# srun returns the highest of its tasks' exit codes, and one that it ends counts as 143 or 137. Killing all on the first bad exit would
# hide the 85 or the 2 behind that; so the others have a minute to end by themselves, which is also time to say what they died of.
code=0
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" .venv/bin/python -m launch "$@" || code=$?
if [[ $code == 85 ]]; then
    echo "job $SLURM_JOB_ID was told to stop and has saved; it goes back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
