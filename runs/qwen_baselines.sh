#!/usr/bin/env bash
# The baselines of docs/guide.md beside runs/qwen.sh, which makes and shares OUT_DIR/labels: the prompt alone, the best of 8
# explanations, imitation of templates, shuffled labels. Then the table of base, imitation and shuffled labels; with
# OUT_DIR/seed-0 and so on `python -m lab.paper` makes it of all.
#     bash runs/qwen_baselines.sh MODEL_DIR DATA_DIR OUT_DIR [SEED ...]        DATA_DIR has esnli/
# What is done is not done again, what was cut off goes on. DRY=1 prints the commands. STEPS, THREADS, DTYPE as in qwen.sh.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 3 "$@"
model=$(model_at "$1") data=$(realpath -m "$2") out=$(realpath -m "$3") seeds=("${@:4}")
[ ${#seeds[@]} = 0 ] && seeds=(0)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${THREADS:-2}

task=(--task esnli --data "$data/esnli" --intervention bias --dtype "${DTYPE:-bf16}")
run=(--lora 16 --train-only explanation --dataset "$out/labels" --prompts 8 --samples 8 --max-new-tokens 16
    --steps "${STEPS:-400}" --warmup 5 --checkpoint-every 5 --no-eval-before)
cell=("${task[@]}" --limit 300 --fit 300 --max-new-tokens 16)

build "$out/labels" --model "$model" "${task[@]}" --size 2000 | run_lines 1
{
    measure "$out/base/cells/esnli-bias" --model "$model" "${cell[@]}" --controls  # as in qwen.sh
    measure "$out/why/cells/esnli-bias" --model "$model" "${cell[@]}" --why instructed
    measure "$out/best_of/cells/esnli-bias" --model "$model" "${cell[@]}" --best-of 8
} | run_lines 1
for seed in "${seeds[@]}"; do
    train "$out/imitation-$seed" --model "$model" "${task[@]}" "${run[@]}" --labels frozen --objective imitation --lr 5e-4 --seed "$seed"
    train "$out/shuffled-$seed" --model "$model" "${task[@]}" "${run[@]}" --labels shuffled --lr 1.5e-4 --kl 0.05 --seed "$seed"
done | run_lines 1
runs=("${seeds[@]/#/$out/imitation-}" "${seeds[@]/#/$out/shuffled-}")
for to in "${runs[@]}"; do measure "$to/cells/esnli-bias" --model "$to/model" "${cell[@]}"; done | run_lines 1
for to in "${runs[@]}"; do signs_of_gaming "$out/base" "$to" esnli-bias; done | run_lines 1
make_table "$out/baselines" "$out/base" "${runs[@]}"
