#!/usr/bin/env bash
# Evaluates weights:  sbatch launch/evaluate.sh RUN|CHECKPOINT|WEIGHTS [CONFIG] [key=value …] [--weights ema] [--probe N]
# On this machine, without Slurm:  bash launch/evaluate.sh …
#SBATCH --job-name=van_evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=2:00:00
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/launch" && exec bash job.sh evaluate "$@"
echo "error: submit this from the repository's root: cd REPOSITORY && sbatch launch/evaluate.sh …" >&2; exit 2
