#!/usr/bin/env bash
# The toy's results in docs/results.md, except the paper's experiment (toy_paper.sh). The five seeds are drawn from the hash
# of the commit that fixed the settings.
#     bash runs/toy.sh COMMIT OUT_DIR && python runs/toy_tables.py OUT_DIR
# JOBS (2) runs work side by side with one thread each. Finished runs are skipped, interrupted ones continue. DRY=1 prints
# the commands.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 2 "$@"
commit=$1 out=$(realpath -m "$2") jobs=${JOBS:-2}
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
hashed=$(seeds_of "$commit" 5)
read -r -a seeds <<< "$hashed"

for variant in toy-qwen3 toy-plain; do toy_base $variant > /dev/null; done
base=$(toy_base)
sizes="--eval-questions 1500 --fit-questions 500"  # more than by default, for narrower intervals
{
    for seed in "${seeds[@]}"; do
        for kind in adverb bias; do train "$out/$kind/$seed" --intervention "$kind" $sizes --seed "$seed"; done
    done
    for kind in adverb bias; do
        train "$out/qwen3-$kind/${seeds[0]}" --model toy-qwen3 --intervention "$kind" $sizes --seed "${seeds[0]}"
    done
    for seed in "${seeds[@]}"; do
        train "$out/frozen/$seed" --labels frozen $sizes --seed "$seed"
        for kind in adverb bias; do
            train "$out/plain-$kind/$seed" --model toy-plain --intervention "$kind" $sizes --seed "$seed"
        done
    done
} | run_lines "$jobs"
{
    for kind in adverb bias; do
        [ $kind = adverb ] && other=bias || other=adverb
        for seed in base "${seeds[@]}"; do
            model=$out/$kind/$seed/model drawn=$seed
            [ "$seed" = base ] && model=$base/model drawn=${seeds[0]}
            asked="--model $model --task toy --max-new-tokens 16 --limit 1500 --fit 500 --seed $drawn"
            measure "$out/other-form/$kind/$seed" $asked --data "$base/other.jsonl" --intervention $kind
            measure "$out/held-out/$kind/$seed" $asked --data "$base" --intervention $kind --words held-out
            measure "$out/transfer/$kind/$seed" $asked --data "$base" --intervention $other
        done
    done
} | run_lines "$jobs"
{
    for seed in "${seeds[@]}"; do
        train "$out/free/$seed" --anchor 0 $sizes --seed "$seed"
        train "$out/free-frozen/$seed" --anchor 0 --labels frozen $sizes --seed "$seed"
    done
} | run_lines "$jobs"
