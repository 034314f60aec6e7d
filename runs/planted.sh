#!/usr/bin/env bash
# SmolLM2-135M-Instruct with a planted cause (runs/plant.py): planting, the probe, GRPO on the explanations with three
# seeds, tests on held-out questions and on personas that GRPO never saw.
#     bash runs/planted.sh MODEL_DIR ESNLI_CSV OUT_DIR
# What is done is not done again, what was cut off goes on. SEEDS, STEPS, PLANT_STEPS and JOBS may be given. DRY=1 prints the
# commands. Everything in bf16 on one thread. NOT YET RUN TO ITS END but on a tiny model: with
# SmolLM2 the rule was not learned in 180 steps of planting (docs/log.md). Seen, in CPU seconds on a busy
# machine: 3.0 to 3.5 for a step of planting; 60 for a GRPO run of two steps with --kl, its start and 40 labels.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
model=$(model_at "$1") file=$(realpath -m "$2") out=$(realpath -m "$3") jobs=${JOBS:-1}
cd "$(dirname "$0")/.."

planted=$out/planted
[ -d "$planted/model" ] ||
    echo "mkdir -p $out; python runs/plant.py $model $file $planted ${PLANT_STEPS:-400} >> $out/planted.log 2>&1" | go 1

asked="--model $planted/model --task jsonl --data $planted/questions.jsonl --intervention bias --dtype bf16"
sizes="--eval-questions 300 --fit-questions 150"
build "$out/labels" $asked $sizes --size 400 --edits 3 | go 1
[ -f "$out/probe.txt" ] ||
    echo "python runs/probe.py $planted/model $out/labels bf16 neutral > $out/part; mv $out/part $out/probe.txt" | go 1

tests="--max-new-tokens 16 --why neutral --temperature 1 --dtype bf16 --task jsonl --data $planted/questions.jsonl \
    --intervention bias --limit 300 --fit 150"
measure "$out/base/cells/same" --model "$planted/model" $tests --controls | go 1
measure "$out/base/cells/held-out" --model "$planted/model" $tests --words held-out | go 1

grpo="--labels frozen --dataset $out/labels --train-only explanation --lora 16 --why neutral \
    --steps ${STEPS:-100} --prompts 16 --samples 8 --max-new-tokens 16 --lr 1e-3 --warmup 5 --beta2 0.99 --kl 0 \
    --no-eval-before --checkpoint-every 10"
for seed in ${SEEDS:-0 1 2}; do train "$out/grpo-$seed" $asked $sizes $grpo --seed "$seed"; done | go "$jobs"
for seed in ${SEEDS:-0 1 2}; do
    measure "$out/grpo-$seed/cells/held-out" --model "$out/grpo-$seed/model" $tests --words held-out
done | go "$jobs"
