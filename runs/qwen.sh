#!/usr/bin/env bash
# Qwen2.5-Coder-0.5B-Instruct on e-SNLI with bias phrases. Its LoRA adapters are on only while it explains, so its decisions stay
# as they are and are labelled once. Three seeds; then held-out personas, other tasks and adverbs; then the table.
#     bash runs/qwen.sh MODEL_DIR DATA_DIR OUT_DIR [SEED ...]        DATA_DIR has esnli/, comve/, strategyqa/
# What is done is not done again, what was cut off goes on. DRY=1 prints the commands. STEPS (400), THREADS (2). In bf16, which
# CPUs with AVX512-BF16 or AMX compute fast: DTYPE=fp32 for others, DTYPE=auto for a GPU.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 3 "$@"
model=$(model_at "$1") data=$(realpath -m "$2") out=$(realpath -m "$3") seeds=("${@:4}")
[ ${#seeds[@]} = 0 ] && seeds=(0 1 2)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${THREADS:-2}

task="--task esnli --data $data/esnli --intervention bias --dtype ${DTYPE:-bf16}"
run="--lora 16 --train-only explanation --labels frozen --dataset $out/labels --prompts 8 --samples 8 --max-new-tokens 16 \
    --steps ${STEPS:-400} --lr 1.5e-4 --kl 0.05 --warmup 5 --checkpoint-every 5"
build "$out/labels" --model "$model" $task --size 2000 | run_lines 1
for seed in "${seeds[@]}"; do train "$out/seed-$seed" --model "$model" $task $run --seed "$seed"; done | run_lines 1

runs=("$out/base" "${seeds[@]/#/$out/seed-}")
for run in "${runs[@]}"; do  # the same questions with the same edits for all
    measured=$run/model
    [ "$run" = "$out/base" ] && measured=$model
    asked="--model $measured --max-new-tokens 16 --dtype ${DTYPE:-bf16}"
    measure "$run/cells/esnli-bias" $asked $task --limit 300 --fit 300 --controls
    measure "$run/cells/held-out-bias" $asked $task --limit 300 --fit 300 --words held-out
    measure "$run/cells/esnli-adverb" $asked --task esnli --data "$data/esnli" --intervention adverb --limit 300 --fit 300
    for other in strategyqa comve; do
        measure "$run/cells/$other-bias" $asked --task $other --data "$data/$other" --intervention bias --limit 200 --fit 200
    done
done | run_lines 1
for run in "${runs[@]:1}"; do signs_of_gaming "$out/base" "$run" esnli-bias; done | run_lines 1
make_table "$out/table" "${runs[@]}"
