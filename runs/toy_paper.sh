#!/usr/bin/env bash
# The paper's experiment in the embedded world: base, RQ1, RQ2-frozen and RQ2-on-policy, trained on adverbs with three seeds.
# All are measured on 1,500 held-out questions, on the other question form, and on bias phrases. Then the table is printed.
#     bash runs/toy_paper.sh OUT_DIR
# JOBS (2) runs work side by side with one thread each: 8 minutes on two cores. Finished runs are skipped,
# interrupted ones continue. DRY=1 prints the commands.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 1 "$@"
out=$(realpath -m "$1") jobs=${JOBS:-2} commit=7abf56bf7b82f16f0b6b55ebea6c3978ccc8bac2  # from before this script
cd "$(dirname "$0")/.."
hashed=$(seeds_of $commit 3)
read -r -a seeds <<< "$hashed"
base=$(toy_base)
sizes="--eval-questions 1500 --fit-questions 500 --no-eval-before"

for seed in "${seeds[@]}"; do
    train "$out/rq1-$seed" --objective detection --anchor 1 $sizes --seed "$seed"
    train "$out/rq2-frozen-$seed" --labels frozen $sizes --seed "$seed"
    train "$out/rq2-on-policy-$seed" $sizes --seed "$seed"
done | run_lines "$jobs"

runs=("$out/base")
for seed in "${seeds[@]}"; do runs+=("$out/rq1-$seed" "$out/rq2-frozen-$seed" "$out/rq2-on-policy-$seed"); done
for run in "${runs[@]}"; do  # the same questions with the same edits for all
    model=$run/model
    [ "$run" = "$out/base" ] && model=$base/model
    asked="--model $model --task toy --max-new-tokens 16 --limit 1500 --fit 500 --detection"
    measure "$run/cells/toy-adverb" $asked --data "$base" --intervention adverb
    measure "$run/cells/other-adverb" $asked --data "$base/other.jsonl" --intervention adverb
    measure "$run/cells/toy-bias" $asked --data "$base" --intervention bias
done | run_lines "$jobs"
for run in "${runs[@]:1}"; do signs_of_gaming "$out/base" "$run" toy-adverb; done | run_lines "$jobs"
make_table "$out/table" "${runs[@]}"
