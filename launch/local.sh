#!/usr/bin/env bash
# Trains without Slurm, by torchrun:  bash launch/local.sh CONFIG [key=value …]
#
# One process for each GPU of this machine, or for each of RANKS (1 without a GPU). With several machines, on each of them:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 MASTER_PORT=29500 bash launch/local.sh CONFIG [key=value …]
#
# with its own NODE_RANK, and the first one's address. Nothing is started again by itself: whatever fails ends the job, and the same
# command goes on from the newest checkpoint. TERM, USR1 and Ctrl-C stop and save, for which there are two minutes. When training is complete
# the first machine exports the weights (run.export). torchrun makes 1 of every exit code but 0; settings that can't work end with 2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -x .venv/bin/python ]]; then
    echo "error: $PWD/.venv is missing; make it with: make setup" >&2
    exit 2
fi
run=$(
    .venv/bin/python - "$@" << 'END'
import sys
from data.common.command_line import job_words
from pretrain.config import ConfigError, load

try:
    print(load(*job_words(sys.argv[1:])).run.dir)
except ConfigError as error:
    sys.exit(f"error: {error}")
END
) || exit 2

RANKS=${RANKS:-$(.venv/bin/python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
threads=$(($(nproc) / RANKS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
if ((${NNODES:-1} == 1)); then
    place=(--standalone)
else
    place=(--nnodes="$NNODES" --node-rank="${NODE_RANK:?}" --master-addr="${MASTER_ADDR:?}" --master-port="${MASTER_PORT:?}")
fi
.venv/bin/torchrun "${place[@]}" --nproc-per-node="$RANKS" --max-restarts=0 --shutdown-timeout=120 -m pretrain train "$@" &
training=$!
trap 'kill -TERM $training' TERM USR1 INT
code=0
wait $training || code=$?
while kill -0 $training 2> /dev/null; do # a signal ended the waiting
    code=0
    wait $training || code=$?
done
if ((code == 0 && ${NODE_RANK:-0} == 0)); then
    .venv/bin/python -m pretrain export "$run"
fi
exit $code
