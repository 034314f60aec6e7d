#!/usr/bin/env bash
# Qwen2.5-Coder-0.5B-Instruct on e-SNLI with bias phrases: LoRA adapters that are on only while the model explains, so that its
# decisions stay what they are, and labels made once; three seeds; then other personas, tasks and adverbs.
#     bash runs/qwen.sh MODEL_DIR DATA_DIR OUT_DIR [SEED ...]        DATA_DIR has esnli/, comve/, strategyqa/
# What is done is not done again, what was cut off goes on. DRY=1 prints the commands. STEPS (100), THREADS (2). In bf16, which
# CPUs with AVX512-BF16 or AMX compute fast: DTYPE=fp32 for others, DTYPE=auto for a GPU.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
model=$(model_at "$1") data=$(realpath -m "$2") out=$(realpath -m "$3") seeds=("${@:4}")
[ ${#seeds[@]} = 0 ] && seeds=(0 1 2)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${THREADS:-2}

task="--model $model --task esnli --data $data/esnli --intervention bias --dtype ${DTYPE:-bf16}"
run="--lora 16 --train-only explanation --labels frozen --dataset $out/labels --prompts 16 --samples 8 --max-new-tokens 16"
build "$out/labels" $task --size 2000 | go 1
for seed in "${seeds[@]}"; do
    train "$out/seed-$seed" $task $run --steps "${STEPS:-100}" --lr 3e-4 --warmup 5 --checkpoint-every 5 --seed "$seed"
done | go 1
