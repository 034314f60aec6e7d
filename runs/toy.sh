#!/usr/bin/env bash
# All that the README says of the toy, under five seeds drawn from the hash of the commit that fixed its settings.
#     bash runs/toy.sh COMMIT OUT_DIR && python runs/toy_tables.py OUT_DIR
# JOBS (2) runs go side by side, a thread each. Seen on two cores: see LOG.md. What is done is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."
commit=$1 out=$(realpath -m "$2")
export OMP_NUM_THREADS=1
mkdir -p "$out"

draw='import hashlib, sys; print(*(int(hashlib.sha256(f"{sys.argv[1]}/{i}".encode()).hexdigest()[:6], 16) for i in range(5)))'
read -r -a seeds <<< "$(python -c "$draw" "$commit")"
side_by_side() { xargs -P "${JOBS:-2}" -d '\n' -I{} bash -c '{} || exit 255'; }  # a run that fails ends it all

train() {  # NAME flags: a line that trains into OUT/NAME, nothing where that is done
    local to=$out/$1
    shift
    [ -f "$to/difference.T1.json" ] || echo "rm -rf $to; mkdir -p $(dirname "$to"); python train.py --out $to $* > $to.log 2>&1"
}
measure() {  # NAME MODEL flags: a line that measures MODEL into OUT/NAME.json
    local to=$out/$1 model=$2
    shift 2
    [ -f "$to.json" ] || echo "mkdir -p $(dirname "$to"); python faith.py --model $model --task toy --temperature 1 \
        --max-new-tokens 16 --limit 1500 --fit 500 --json $to.json --rows $to $* > $to.log 2>&1"
}

for variant in toy toy-qwen3 toy-plain; do  # one after the other: two threads each do no harm here
    python -c 'import sys, toy; toy.prepare(sys.argv[1])' "$variant"
done
base=$(python -c 'import toy; print(toy.prepare())')
{
    for seed in "${seeds[@]}"; do
        for kind in adverb bias; do train "$kind/$seed" --intervention "$kind" --seed "$seed"; done
    done
    for kind in adverb bias; do
        train "qwen3-$kind/${seeds[0]}" --model toy-qwen3 --intervention "$kind" --seed "${seeds[0]}"
    done
    for seed in "${seeds[@]}"; do
        train "frozen/$seed" --labels frozen --seed "$seed"
        for kind in adverb bias; do
            train "plain-$kind/$seed" --model toy-plain --intervention "$kind" --seed "$seed"
        done
    done
} | side_by_side
{
    for kind in adverb bias; do
        [ $kind = adverb ] && other=bias || other=adverb
        for seed in base "${seeds[@]}"; do
            model=$out/$kind/$seed/model drawn=$seed
            [ "$seed" = base ] && model=$base/model drawn=${seeds[0]}
            measure "other-form/$kind/$seed" "$model" --data "$base/other.jsonl" --intervention $kind --seed "$drawn"
            measure "held-out/$kind/$seed" "$model" --data "$base" --intervention $kind --words held-out --seed "$drawn"
            measure "transfer/$kind/$seed" "$model" --data "$base" --intervention $other --seed "$drawn"
        done
    done
} | side_by_side
{
    for seed in "${seeds[@]}"; do
        train "free/$seed" --anchor 0 --seed "$seed"
        train "free-frozen/$seed" --anchor 0 --labels frozen --seed "$seed"
    done
} | side_by_side
