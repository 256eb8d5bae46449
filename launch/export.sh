#!/usr/bin/env bash
# Exports the weights of complete runs to RUN/weights, in the formats of run.export:  sbatch launch/export.sh RUN …   (from the repository's root)
# Keeps files that are complete and of the last step. On this machine, without Slurm:  bash launch/export.sh RUN …
#SBATCH --job-name=van_export
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=1:00:00
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/launch" && exec bash job.sh export "$@"
echo "error: submit this from the repository's root: cd REPOSITORY && sbatch launch/export.sh …" >&2; exit 2
