#!/usr/bin/env bash
# Qwen2.5-Coder-0.5B-Instruct on easy questions (runs/easy.py) with bias phrases. No decision is trained: what it answers, and
# whom it follows, is its own. Its LoRA adapters are on only while it explains, so its decisions are labelled once. First they
# imitate a form: the answer that it would give by itself, then, by the toss of a coin (shuffled labels), a reason or the
# persona. Then GRPO, three seeds; held-out personas, questions of other kinds, adverbs, the table.
# BASELINES=1 adds those of docs/guide.md, of one seed.
#     bash runs/qwen.sh MODEL_DIR DATA_DIR OUT_DIR [SEED ...]        DATA_DIR has esnli/, strategyqa/, comve/
# What is done is not done again, what was cut off goes on. DRY=1 prints the commands. STEPS (150), JOBS (1), THREADS (1). In
# bf16, which CPUs with AVX512-BF16 or AMX compute fast: DTYPE=fp32 for others, DTYPE=auto for a GPU.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 3 "$@"
model=$(model_at "$1") data=$(realpath -m "$2") out=$(realpath -m "$3") seeds=("${@:4}") jobs=${JOBS:-1}
[ ${#seeds[@]} = 0 ] && seeds=(0 1 2)
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${THREADS:-1}
echo "python runs/easy.py $out/easy" | run_lines 1

task="--intervention bias --dtype ${DTYPE:-bf16}" kinds="--task jsonl --data $out/easy/kinds.jsonl"
sizes="--eval-questions 300 --fit-questions 150 --calibrate"
run="--dataset $out/labels --lora 16 --train-only explanation --why alone --prompts 8 --max-new-tokens 24 --warmup 5 \
    --no-eval-before --checkpoint-every 10"
grpo="--samples 8 --steps ${STEPS:-150} --lr 1.5e-4 --decay linear --kl 0.1 --clip-norm 0.2"
build "$out/labels" --model "$model" $kinds $task $sizes --size 1000 --edits 2 | run_lines 1
train "$out/form" --model "$model" $kinds $task $sizes $run --objective imitation --labels shuffled --steps 80 --lr 5e-4 \
    --decay linear | run_lines 1
for seed in "${seeds[@]}"; do
    train "$out/seed-$seed" --model "$out/form/model" $kinds $task $sizes $run --labels frozen $grpo --seed "$seed"
done | run_lines "$jobs"
runs=("$out/base" "$out/form" "${seeds[@]/#/$out/seed-}")
if [ "${BASELINES:-}" ]; then
    train "$out/imitation" --model "$out/form/model" $kinds $task $sizes $run --objective imitation --labels frozen \
        --steps "${STEPS:-150}" --lr 3e-4 --decay linear | run_lines 1
    train "$out/shuffled" --model "$out/form/model" $kinds $task $sizes $run --labels shuffled $grpo --seed 1 |
        run_lines 1  # seed 0 would be the permutation that the form has seen
    runs+=("$out/imitation" "$out/shuffled")
fi

cells() {  # RUN: the same questions with the same edits for all; the letters' means are the base's
    local to=$1/cells measured=$1/model controls='' file
    [ "$1" = "$out/base" ] && measured=$model controls=--controls  # once: no decision changes
    cell() {  # NAME flags
        local name=$1 letters=fit
        [ "$measured" = "$model" ] || letters=$out/base/cells/$name.calibration.json
        shift
        measure "$to/$name" --model "$measured" --max-new-tokens 24 --why alone $task --fit 150 --calibration "$letters" "$@"
    }
    cell jsonl-bias $kinds --limit 300 $controls
    cell held-out-bias $kinds --limit 300 --words held-out
    cell jsonl-adverb $kinds --limit 300 --intervention adverb
    for file in capitals opposites; do cell $file-bias --task jsonl --data "$out/easy/$file.jsonl" --limit 300; done
    for file in esnli strategyqa comve; do cell $file-bias --task $file --data "$data/$file" --limit 200; done
}
cells "$out/base" | run_lines "$jobs"
if [ "${BASELINES:-}" ]; then  # the base, told to name what moved it, or the best of 8
    asked="--model $model --max-new-tokens 24 $task $kinds --fit 150 --limit 300 \
        --calibration $out/base/cells/jsonl-bias.calibration.json"
    measure "$out/why/cells/jsonl-bias" $asked --why instructed | run_lines 1
    measure "$out/best_of/cells/jsonl-bias" $asked --why alone --best-of 8 | run_lines 1
fi
for run in "${runs[@]:1}"; do cells "$run"; done | run_lines "$jobs"
for run in "${runs[@]:1}"; do signs_of_gaming "$out/base" "$run" jsonl-bias; done | run_lines "$jobs"
make_table "$out/table" "${runs[@]}"
