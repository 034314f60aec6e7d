#!/usr/bin/env bash
# What docs/results.md says of the toy, all but the paper's experiment (toy_paper.sh), under five seeds drawn from the hash of
# the commit that fixed its settings.
#     bash runs/toy.sh COMMIT OUT_DIR && python runs/toy_tables.py OUT_DIR
# JOBS (2) runs go side by side, a thread each. Seen on two cores: see docs/log.md. What is done is not done again,
# what was cut off goes on. DRY=1 prints the commands.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
commit=$1 out=$(realpath -m "$2") jobs=${JOBS:-2}
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
hashed=$(seeds_of "$commit" 5)
read -r -a seeds <<< "$hashed"

for variant in toy-qwen3 toy-plain; do toy_base $variant > /dev/null; done  # alone: two threads each do no harm here
base=$(toy_base)
{
    for seed in "${seeds[@]}"; do
        for kind in adverb bias; do train "$out/$kind/$seed" --intervention "$kind" --seed "$seed"; done
    done
    for kind in adverb bias; do
        train "$out/qwen3-$kind/${seeds[0]}" --model toy-qwen3 --intervention "$kind" --seed "${seeds[0]}"
    done
    for seed in "${seeds[@]}"; do
        train "$out/frozen/$seed" --labels frozen --seed "$seed"
        for kind in adverb bias; do
            train "$out/plain-$kind/$seed" --model toy-plain --intervention "$kind" --seed "$seed"
        done
    done
} | go "$jobs"
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
} | go "$jobs"
{
    for seed in "${seeds[@]}"; do
        train "$out/free/$seed" --anchor 0 --seed "$seed"
        train "$out/free-frozen/$seed" --anchor 0 --labels frozen --seed "$seed"
    done
} | go "$jobs"
