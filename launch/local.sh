#!/usr/bin/env bash
# Trains without Slurm, with torchrun:  bash launch/local.sh CONFIG [key=value …]
#
# Starts one process per GPU of this machine, or RANKS processes (default 1 without a GPU). With several machines, run on each of them, with
# its own NODE_RANK and the address of the first,
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 MASTER_PORT=29500 bash launch/local.sh CONFIG [key=value …]
#
# A failure ends the job; the same command again resumes from the newest checkpoint. TERM, USR1 and Ctrl-C stop the job, which has two
# minutes to save. The first machine exports the weights of a complete run (run.export).
# Exit codes: 0 complete, 2 wrong settings, 1 anything else, because torchrun reports every other code as 1.
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
while kill -0 $training 2> /dev/null; do # a signal interrupts `wait`
    code=0
    wait $training || code=$?
done
if ((code == 0 && ${NODE_RANK:-0} == 0)); then
    .venv/bin/python -m pretrain export "$run"
fi
exit $code
