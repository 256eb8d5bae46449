#!/usr/bin/env bash
# Writes finished runs' weights to RUN/weights, in the formats of run.export:  sbatch launch/export.sh RUN …   (from the repository's root)
# On the machine at hand, without Slurm:  bash launch/export.sh RUN …
# What is there already, whole and of the last step, is left as it is.
#SBATCH --job-name=van_export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=1:00:00
#SBATCH --output=%x-%j.out
if ! cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/launch" || ! cd ..; then
    echo "error: submit this from the repository's root: cd REPOSITORY && sbatch launch/export.sh …" >&2
    exit 2
fi
if [[ ! -x .venv/bin/python ]]; then
    echo "error: $PWD/.venv is missing; make it with: make setup" >&2
    exit 2
fi
for run in "$@"; do
    .venv/bin/python -m pretrain export "$run" || exit
done
