#!/usr/bin/env bash
# Installs Slurm from the distribution's packages for the cluster tests; prints how to get it where it may not install.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
if command -v slurmctld slurmd sbatch srun > /dev/null; then
    exit 0
fi
how="as root: apt-get install slurm-wlm (or your distribution's packages of slurmctld, slurmd and the client commands)"
as_root=()
if [[ $(id -u) != 0 ]]; then
    as_root=(sudo -n)
    if ! sudo -n true 2> /dev/null; then
        echo "Slurm is missing and cannot be installed without root: the cluster tests will be skipped. To get it, $how" >&2
        exit 0
    fi
fi
if ! command -v apt-get > /dev/null; then
    echo "Slurm is missing and there is no apt-get: the cluster tests will be skipped. To get it, $how" >&2
    exit 0
fi
echo "installing Slurm for the cluster tests"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm > /dev/null
