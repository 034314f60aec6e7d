#!/usr/bin/env bash
# A model with a planted cause (runs/plant.py): planting, labels, GRPO on the explanations with three seeds, tests on
# held-out questions and on personas that GRPO never saw, the table.
#     bash runs/planted.sh KIND MODEL_DIR ESNLI_CSV OUT_DIR        KIND: sex (SmolLM2-135M), nli (Qwen2.5-Coder-0.5B)
# What is done is not done again, what was cut off goes on. SEEDS, STEPS, PLANT_STEPS, LABELS and JOBS may be given. DRY=1 prints
# the commands. Everything in bf16 on one thread.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 4 "$@"
kind=$1 model=$(model_at "$2") file=$(realpath -m "$3") out=$(realpath -m "$4") jobs=${JOBS:-1}
cd "$(dirname "$0")/.."
seeds=${SEEDS:-0 1 2}

planted=$out/planted
[ -d "$planted/model" ] ||
    echo "mkdir -p $out; python runs/plant.py $kind $model $file $planted ${PLANT_STEPS:-160} >> $out/planted.log 2>&1" | run_lines 1

case $kind in
sex) task=jsonl data=$planted/questions.jsonl labels=400 steps=80 rate="--lr 4e-4 --kl 0.05" ;;
nli) task=esnli data=$planted/esnli_dev.csv labels=600 steps=120 rate="--lr 2e-4 --kl 0.1 --clip-norm 0.2" ;;
esac
from="--task $task --data $data --intervention bias --dtype bf16"
sizes="--eval-questions 300 --fit-questions 150"
build "$out/labels" --model "$planted/model" $from $sizes --size "${LABELS:-$labels}" --edits 3 | run_lines 1

grpo="--labels frozen --dataset $out/labels --train-only explanation --lora 16 --why alone --prompts 8 --samples 8 \
    --steps ${STEPS:-$steps} --max-new-tokens 24 $rate --warmup 5 --no-eval-before --checkpoint-every 10"
for seed in $seeds; do
    train "$out/grpo-$seed" --model "$planted/model" $from $sizes $grpo --seed "$seed"
done | run_lines "$jobs"

runs=("$out/base")
for seed in $seeds; do runs+=("$out/grpo-$seed"); done
for run in "${runs[@]}"; do  # the same questions with the same edits for all
    measured=$run/model controls=
    [ "$run" = "$out/base" ] && measured=$planted/model controls=--controls  # once: GRPO changes no decision
    asked="--model $measured --max-new-tokens 24 --why alone $from --limit 300 --fit 150"
    measure "$run/cells/$task-bias" $asked $controls
    measure "$run/cells/held-out-bias" $asked --words held-out
done | run_lines "$jobs"
make_table "$out/table" "${runs[@]}"
