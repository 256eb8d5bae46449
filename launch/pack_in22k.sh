#!/usr/bin/env bash
# Packs ImageNet-22K into shards:  sbatch launch/pack_in22k.sh SOURCE OUT [option …]   (from the repository's root)
# Each task of the array packs a part on its own node; the last task to finish merges the parts. The same command again resumes.
# On this machine, without Slurm:  bash launch/pack_in22k.sh SOURCE OUT [option …]
# The options are those of `python -m data pack`.
#SBATCH --job-name=pack_in22k
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/launch" && exec bash job.sh pack "$@"
echo "error: submit this from the repository's root: cd REPOSITORY && sbatch launch/pack_in22k.sh …" >&2; exit 2
