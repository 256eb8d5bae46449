#!/usr/bin/env bash
# Fine-tunes pretrained weights on ImageNet-1K:  sbatch launch/finetune_in1k.sh configs/van_b3_in22k_ft_in1k_224.yaml [key=value …]
# On this machine, without Slurm:  bash launch/finetune_in1k.sh CONFIG [key=value …]
#SBATCH --job-name=van_finetune_in1k
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/launch" && exec bash job.sh "$@"
echo "error: submit this from the repository's root: cd REPOSITORY && sbatch launch/finetune_in1k.sh …" >&2; exit 2
