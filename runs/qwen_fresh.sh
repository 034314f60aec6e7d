#!/usr/bin/env bash
# After runs/qwen.sh, in its OUT_DIR: GRPO where being wrong tells nothing, on new words. First imitation of true labels on
# rows where the model's own answer is wrong as often as right (runs/even.py) teaches the comparison: the persona is named
# where the stated letter differs from the answer. Then GRPO on such rows of fresh.jsonl, whose words imitation has not seen.
# `fresh-imitation` goes on with imitation on the same rows instead. Measured on the test questions of qwen.sh.
#     bash runs/qwen_fresh.sh MODEL_DIR OUT_DIR [SEED ...]
# What is done is not done again, what was cut off goes on. DRY=1 prints the commands. STEPS (80), JOBS (1), DTYPE as there.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 2 "$@"
model=$(model_at "$1") out=$(realpath -m "$2") seeds=("${@:3}") jobs=${JOBS:-1}
[ ${#seeds[@]} = 0 ] && seeds=(0 1 2)
cd "$(dirname "$0")/.."

task="--intervention bias --dtype ${DTYPE:-bf16}"
kinds="--task jsonl --data $out/easy/kinds.jsonl" fresh="--task jsonl --data $out/easy/fresh.jsonl"
sizes="--eval-questions 300 --fit-questions 150 --calibrate"
run="--labels frozen --lora 16 --train-only explanation --why alone --prompts 8 --max-new-tokens 24 --warmup 5 \
    --decay linear --no-eval-before --checkpoint-every 10"
imitation="--objective imitation --steps 150 --lr 3e-4"
grpo="--samples 8 --steps ${STEPS:-80} --lr 1.5e-4 --kl 0.1 --clip-norm 0.2"
even() { [ -f "$2/manifest.json" ] || echo "python runs/even.py $1 $2"; }

even "$out/labels" "$out/labels-even" | run_lines 1
build "$out/fresh-labels" --model "$model" $fresh $task $sizes --size 1200 --edits 2 | run_lines 1
even "$out/fresh-labels" "$out/fresh-even" | run_lines 1
train "$out/imitation-even" --model "$out/form/model" $kinds $task $sizes $run --dataset "$out/labels-even" $imitation |
    run_lines 1
from="--model $out/imitation-even/model $fresh $task $sizes $run --dataset $out/fresh-even"
{
    for seed in "${seeds[@]}"; do train "$out/fresh-$seed" $from $grpo --seed "$seed"; done
    train "$out/fresh-imitation" $from $imitation
} | run_lines "$jobs"
for run in imitation-even fresh-imitation "${seeds[@]/#/fresh-}"; do
    asked="--model $out/$run/model --max-new-tokens 24 --why alone $task --fit 150 --limit 300"
    letters=$out/base/cells
    measure "$out/$run/cells/jsonl-bias" $asked $kinds --calibration "$letters/jsonl-bias.calibration.json"
    measure "$out/$run/cells/held-out-bias" $asked $kinds --words held-out \
        --calibration "$letters/held-out-bias.calibration.json"
done | run_lines "$jobs"
for run in imitation-even fresh-imitation "${seeds[@]/#/fresh-}"; do  # the shortcut is fitted on the usual rows of training
    echo "python -m lab.report $out/$run/cells/jsonl-bias.T1.jsonl --fit $out/labels/train.jsonl | tee $out/$run/figures.txt"
done | run_lines 1
