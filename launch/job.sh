#!/usr/bin/env bash
# Runs the jobs that the other scripts submit:
#
#   job.sh CONFIG [key=value …]             trains; in a Slurm job, launch/supervisor.py decides whether to requeue it
#   job.sh preflight CONFIG [key=value …]   checks the nodes of a Slurm allocation, or this machine
#   job.sh evaluate SOURCE …                same arguments as `python -m pretrain evaluate`
#   job.sh export RUN …                     exports the weights of complete runs
#   job.sh pack SOURCE OUT …                same arguments as `python -m data pack`; each task of an array job packs a part
#
# In a Slurm job it runs one task per GPU on every node; without Slurm, all processes run on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---------------------------------------------------------------- site

# launch/site.env may set these; launch/site.env.example describes each.
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
# Runs one process on this node; in a job with containers, as a separate step that overlaps the others.
python=("${WRAP[@]}" "$PYTHON")
if [[ -n "${SLURM_JOB_ID:-}" && ${#CONTAINER[@]} != 0 ]]; then
    python=(srun --overlap --mem=0 --nodes=1 --ntasks=1 "${CONTAINER[@]}" "${python[@]}")
fi

# ---------------------------------------------------------------- jobs of one process

if [[ $1 == export ]]; then
    for run in "${@:2}"; do
        "${python[@]}" -m pretrain export "$run"
    done
    exit
fi
if [[ $1 == pack ]]; then
    if [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]]; then
        exec "${python[@]}" -m data "$@"
    fi
    "${python[@]}" -m data "$@" --part "$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:?}))/$SLURM_ARRAY_TASK_COUNT" &
    packing=$! code=0 stopped=
    trap 'stopped=yes; kill $packing' USR1 # before the time limit
    wait $packing || code=$?
    if [[ $stopped ]]; then
        echo "requeueing task $SLURM_ARRAY_TASK_ID of job $SLURM_ARRAY_JOB_ID before its time limit"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
fi

# ---------------------------------------------------------------- without Slurm

kind=train
if [[ $1 == evaluate || $1 == preflight ]]; then
    kind=$1
    shift
fi
if [[ $kind != evaluate ]]; then
    set -- "$1" "${SETTINGS[@]}" "${@:2}" # the last value of a key wins
fi
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    case $kind in
        train) exec "${python[@]}" -m launch "$@" ;;
        evaluate) exec "${python[@]}" -m launch evaluate "$@" ;;
        preflight) exec "${python[@]}" -m launch.preflight "$@" ;;
    esac
fi

# ---------------------------------------------------------------- steps of a Slurm job

NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
# Tasks per node. Job scripts do not set --ntasks-per-node, with which Slurm would allocate the fewest of a range of nodes.
tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cpus=${SLURM_CPUS_ON_NODE:-1}
RANKS=$((tasks * SLURM_JOB_NUM_NODES))
# The address by which Slurm reaches the first node, and a port for this job and restart.
MASTER_ADDR=$(scontrol show node "${NODES%% *}" --oneliner | grep -oP 'NodeAddr=\K\S+')
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0} % 10) % 20000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > tasks ? cpus / tasks : 1))}
export NODES RANKS MASTER_ADDR MASTER_PORT OMP_NUM_THREADS

# step TASKS_PER_NODE OPTIONS… -m MODULE …: runs a step on all nodes. Each task gets its share of the cores, and the memory local to them.
step() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$1" --cpus-per-task=$((cpus > $1 ? cpus / $1 : 1)) \
        --cpu-bind=cores --mem-bind=local "${@:2}"
}

# Prints an event (pretrain/run/events.py) with the exit code of a step.
print_code() {
    echo "@van-pretrain job.sh . {\"kind\": \"step\", \"code\": $1}"
}

# reader -m MODULE …: runs a Python process that reads the output of a step. Signals to the whole job must not end it.
reader() {
    (trap '' TERM USR1 && exec "${python[@]}" "$@")
}

# preflight nodes|network …: runs a step of preflight, and its reader, which names unfit nodes. srun ends the tasks that still run a minute
# after the first has ended.
preflight() {
    local code=0 per_node=1
    if [[ $1 == network ]]; then
        per_node=$tasks
    fi
    {
        step "$per_node" --kill-on-bad-exit=0 --wait=60 "${CONTAINER[@]}" "${WRAP[@]}" "$PYTHON" -m launch.preflight.step "$@" || code=$?
        print_code "$code"
    } 2>&1 | reader -m launch.preflight --step "$@"
}

# Runs the step that trains or evaluates. The first task that fails ends the step.
run_ranks() {
    step "$tasks" --kill-on-bad-exit=1 --wait=300 "${CONTAINER[@]}" "${WRAP[@]}" "$PYTHON" -m launch "$@"
}

# Runs preflight and training; prints the exit code of the last step.
attempt() {
    local code=0
    { preflight nodes "$@" && { ((RANKS == 1)) || preflight network "$@"; } && run_ranks "$@"; } || code=$?
    print_code "$code"
}

# requeue SECONDS [NODE,NODE]: puts the job back into the queue, to start after this delay and without these nodes.
requeue() {
    local excluded usable restarts
    restarts=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -oP ' Restarts=\K\d+')
    if [[ $ended || $restarts != "${SLURM_RESTART_COUNT:-0}" ]]; then
        echo "Slurm has ended or restarted this job: not requeueing it"
        exit 1
    fi
    trap '' TERM # `scontrol requeue` sends TERM to this script, which still has to set nodes and start time
    scontrol requeue "$SLURM_JOB_ID"
    if [[ -n "${2:-}" ]]; then
        excluded=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -oP 'ExcNodeList=\K\S+' | grep -v '(null)' || true)
        excluded=$2${excluded:+,$excluded}
        usable=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,mixed,allocated,completing --format=%N |
            sort -u | grep -cvxFf <(scontrol show hostnames "$excluded") || true)
        if ((usable >= SLURM_JOB_NUM_NODES)); then
            scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"
            echo "excluding $excluded from now on"
        else
            echo "not excluding $2: the partition would have $usable nodes left for this job of $SLURM_JOB_NUM_NODES"
        fi
    fi
    if (($1 > 0)); then
        scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$1"
    fi
}

# ---------------------------------------------------------------- the job

if [[ $kind == preflight ]]; then
    preflight nodes "$@" && { ((RANKS == 1)) || preflight network "$@"; }
    exit
fi
if [[ $kind == evaluate ]]; then
    run_ranks evaluate "$@" 2>&1 | { grep --line-buffered -v '^@van-pretrain ' || true; }
    exit
fi
ended=
trap 'ended=yes' TERM # Slurm ends the whole job: it is cancelled, out of time or loses its nodes
exec 3>&1             # the job's output; the supervisor prints its decision on stderr
decision=$(attempt "$@" 2>&1 | reader -m launch.supervisor "$@" 2>&1 1>&3) || true
read -r action value nodes <<< "$(grep -E '^(complete|requeue|end)' <<< "$decision" | tail -n 1)"
case $action in
    complete) exit 0 ;;
    requeue) requeue "$value" "$nodes" ;;
    end) exit "$value" ;;
    *)
        echo "$decision" >&2
        exit 1
        ;;
esac
