#!/usr/bin/env bash
# Pretrains VAN-B4 on ImageNet-22K:  sbatch launch/van_b4_in22k.sh [key=value …]   (from the repository's root)
# On this machine, without Slurm:  bash launch/van_b4_in22k.sh [key=value …]
#SBATCH --job-name=van_b4_in22k
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/launch" && exec bash job.sh configs/van_b4_in22k.yaml "$@"
echo "error: submit this from the repository's root: cd REPOSITORY && sbatch launch/van_b4_in22k.sh …" >&2; exit 2
