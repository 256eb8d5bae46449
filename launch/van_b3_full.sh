#!/usr/bin/env bash
# Submits a chain of jobs that pretrains VAN-B3 on ImageNet-22K, fine-tunes it, evaluates it and exports its weights:
#
#   bash launch/van_b3_full.sh [WORD …]      on a login node; or as a job:  sbatch launch/van_b3_full.sh [WORD …]
#
#   pretrain ─┬─ fine-tune at 224 px ── evaluate ── export
#             └─ fine-tune at 384 px ── evaluate ── export
#
# Both fine-tunings start from the pretrained weights. A job starts when the one before it has succeeded, after any number of requeues, and
# is canceled when the one before it fails. The same command again resumes a broken chain: jobs of complete runs end at once.
#
# A WORD is key=value, a setting of the three training jobs, or --option=value, an sbatch option for every job. The prefixes pretrain.,
# finetune., evaluate. and export. restrict a word to these jobs:
#
#   bash launch/van_b3_full.sh model.kernels=auto --account=vision pretrain.--nodes=4 pretrain.data.train=/data/in22k/train
#
# NAME=trial before the command names the runs runs/trial_in22k, runs/trial_in22k_ft_in1k_224 and runs/trial_in22k_ft_in1k_384
# (default van_b3).
#SBATCH --job-name=van_b3_full
#SBATCH --ntasks=1
#SBATCH --time=10
#SBATCH --output=%x-%j.out
set -euo pipefail
if ! cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/launch" || ! cd ..; then
    echo "error: submit this from the repository's root: cd REPOSITORY && sbatch launch/van_b3_full.sh …" >&2
    exit 2
fi
for variable in "${!SLURM_@}"; do # variables of this job, which sbatch would take as options
    [[ $variable == SLURM_CONF ]] || unset "$variable"
done
WORDS=("$@") PRETRAINED=${NAME:-van_b3}_in22k
FORMATS='run.export=[official,timm,mmseg,mmpretrain,hf]'

for word in "$@"; do
    key=$word
    case $word in pretrain.* | finetune.* | evaluate.* | export.*) key=${word#*.} ;; esac
    case $key in
        name=* | run.dir=* | model.init_from=*) problem="the chain sets this; name its runs with NAME=… before the command" ;;
        --*) continue ;;
        *=*)
            [[ $word == export.* ]] || continue
            problem="an export has no settings"
            ;;
        *) problem="neither key=value nor --option=value" ;;
    esac
    echo "error: $word: $problem" >&2
    exit 2
done

# sort_words PART: sorts the WORDS of one part of the chain into `options` and `settings`.
sort_words() {
    local part=$1 word
    options=() settings=()
    for word in "${WORDS[@]}"; do
        case $word in
            "$part".*) word=${word#*.} ;;
            pretrain.* | finetune.* | evaluate.* | export.*) continue ;;
            --*) ;;
            *) [[ $part == pretrain || $part == finetune ]] || continue ;;
        esac
        if [[ $word == --* ]]; then options+=("$word"); else settings+=("$word"); fi
    done
}

# submit PART AFTER SCRIPT ARGUMENT …: submits a job that waits for job AFTER, if given; sets `job` to its id.
submit() {
    local part=$1 after=$2 script=$3 dependency=()
    shift 3
    sort_words "$part"
    if [[ $after ]]; then
        dependency=("--dependency=afterok:$after" --kill-on-invalid-dep=yes)
    fi
    job=$(sbatch --parsable "${dependency[@]}" "${options[@]}" "launch/$script" "$@" "${settings[@]}")
    job=${job%%;*} # the cluster's name may follow
    jobs+=("$job")
    printf '%-10s %-9s %s%s\n' "$job" "$part" "$run" "${after:+, after $after}"
}

jobs=()
trap '(($? == 0 || ${#jobs[@]} == 0)) || { echo "error: the chain could not be submitted; canceling ${jobs[*]}" >&2; scancel "${jobs[@]}"; }' EXIT
run=runs/$PRETRAINED
submit pretrain "" van_b3_in22k.sh "name=$PRETRAINED"
pretraining=$job runs=("$run")
for size in 224 384; do
    run=runs/${PRETRAINED}_ft_in1k_$size
    runs+=("$run")
    submit finetune "$pretraining" finetune_in1k.sh "configs/van_b3_in22k_ft_in1k_$size.yaml" \
        "name=${run#runs/}" "model.init_from=runs/$PRETRAINED" "$FORMATS"
    submit evaluate "$job" evaluate.sh "$run"
    submit export "$job" export.sh "$run"
done
echo "watch:   squeue --me; .venv/bin/python -m pretrain status ${runs[*]} --follow"
echo "cancel:  scancel ${jobs[*]}"
