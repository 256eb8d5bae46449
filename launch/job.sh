#!/usr/bin/env bash
# What the job scripts have in common:
#
#   job.sh CONFIG [key=value …]     trains; inside a Slurm job it is started again after stops and failures (launch/attempt.py decides)
#   job.sh evaluate SOURCE …        what follows is for `python -m pretrain evaluate`
#   job.sh export RUN …             weights of runs that are complete
#   job.sh pack SOURCE OUT …        what follows is for `python -m data pack`; inside an array job each task packs a part
#
# Inside a Slurm job with one task a GPU on every node, elsewhere on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What a site may set in launch/site.env; launch/site.env.example tells of each.
PYTHON=.venv/bin/python CONTAINER=() WRAP=() SETTINGS=()
if [[ -f launch/site.env ]]; then
    # shellcheck source=/dev/null
    source launch/site.env
fi
export NO_COLOR=1
if [[ $PYTHON == .venv/* && ! -x $PYTHON ]]; then
    echo "error: $PWD/.venv is missing; make it with: make setup" >&2
    exit 2
fi

# A step of one task a GPU: each has its part of the node's cores, and the memory beside them. A task that fails takes the step down at once.
step() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks" --cpus-per-task="$cores" --cpu-bind=cores --mem-bind=local \
        --wait=300 "${CONTAINER[@]}" "${WRAP[@]}" "$PYTHON" "$@"
}

# One process on this node, beside the step if there is one.
alone=("${WRAP[@]}" "$PYTHON")
if [[ -n "${SLURM_JOB_ID:-}" && ${#CONTAINER[@]} != 0 ]]; then
    alone=(srun --overlap --mem=0 --nodes=1 --ntasks=1 "${CONTAINER[@]}" "${alone[@]}")
fi

# Puts the job back into the queue:  requeue SECONDS [NODE,NODE]
requeue() {
    local excluded usable restarts
    restarts=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -oP ' Restarts=\K\d+')
    if [[ $ended || $restarts != "${SLURM_RESTART_COUNT:-0}" ]]; then
        echo "Slurm itself ends the job or has started it again: it is not put into the queue from here"
        exit 1
    fi
    trap '' TERM # this script is ended by the next line; the others have to be said after it
    scontrol requeue "$SLURM_JOB_ID"
    if [[ -n "${2:-}" ]]; then
        excluded=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -oP 'ExcNodeList=\K\S+' | grep -v '(null)' || true)
        excluded=$2${excluded:+,$excluded}
        usable=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,mixed,allocated,completing --format=%N |
            sort -u | grep -cvxFf <(scontrol show hostnames "$excluded") || true)
        if ((usable >= SLURM_JOB_NUM_NODES)); then
            scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"
            echo "without $excluded from now on"
        else
            echo "without $2 the partition has $usable nodes for this job of $SLURM_JOB_NUM_NODES, so it may be given $2 again"
        fi
    fi
    if (($1 > 0)); then
        scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$1"
    fi
}

if [[ $1 == export ]]; then
    for run in "${@:2}"; do
        "${alone[@]}" -m pretrain export "$run"
    done
    exit
fi
if [[ $1 == pack ]]; then
    if [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
        exec "${alone[@]}" -m data "$@"
    fi
    "${alone[@]}" -m data "$@" --part "$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:?}))/$SLURM_ARRAY_TASK_COUNT" &
    packing=$! code=0 stopped=
    trap 'stopped=yes; kill $packing' USR1 # ahead of the time limit
    wait $packing || code=$?
    if [[ $stopped ]]; then
        echo "task $SLURM_ARRAY_TASK_ID of job $SLURM_ARRAY_JOB_ID is short of time; it goes back to the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
fi
job=("$@")
if [[ $1 != evaluate ]]; then
    job=("$1" "${SETTINGS[@]}" "${@:2}") # of two values for a key the later one counts
fi
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    exec "${WRAP[@]}" "$PYTHON" -m launch "${job[@]}"
fi

# The first node's address as Slurm itself reaches it, and a port of this job's own, another one after each restart.
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
MASTER_ADDR=$(scontrol show node "${NODES%% *}" --oneliner | grep -oP 'NodeAddr=\K\S+')
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0} % 10) % 20000))
# Of each node; a script that said it itself (--ntasks-per-node) would be given no more than the least of a range of nodes.
tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cores=$((SLURM_CPUS_ON_NODE > tasks ? SLURM_CPUS_ON_NODE / tasks : 1))
export NODES MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cores}" RANKS=$((tasks * SLURM_JOB_NUM_NODES)) SLURM_KILL_BAD_EXIT=1
ended=
trap 'ended=yes' TERM # comes here when Slurm ends the whole job: cancelled, out of time or out of its nodes
if [[ $1 == evaluate ]]; then
    step -m launch "${job[@]}" 2>&1 | { grep --line-buffered -v '^@van-pretrain ' || true; }
    exit
fi

exec 3>&1 # the job's output; what launch.attempt says on stderr is the verdict
verdict=$(
    {
        code=0
        # Tasks of preflight end by themselves, all with the same code, which srun would lose where it ended one.
        SLURM_KILL_BAD_EXIT=0 step -m launch.preflight "${job[@]}" && step -m launch "${job[@]}" || code=$?
        echo "@van-pretrain {\"kind\": \"step\", \"code\": $code}"
    } 2>&1 | (trap '' TERM USR1 && "${alone[@]}" -m launch.attempt "${job[@]}") 2>&1 1>&3
) || true
read -r what value nodes <<< "$(grep -E '^(complete|again|end)' <<< "$verdict" | tail -n 1)"
case $what in
    complete) exit 0 ;;
    again) requeue "$value" "$nodes" ;;
    end) exit "$value" ;;
    *)
        echo "$verdict" >&2
        exit 1
        ;;
esac
