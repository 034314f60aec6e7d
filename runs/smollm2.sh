#!/usr/bin/env bash
# SmolLM2-135M-Instruct on e-SNLI with bias phrases: on-policy labels, calibrated decisions, 16 x 8 a step.
#     bash runs/smollm2.sh MODEL_DIR ESNLI_DIR OUT_DIR
# Two ranks of one thread each, or as LAUNCH says (LAUNCH=python: one GPU). Seen on two free CPU cores: 33 s a step, so some two
# hours, and about ten minutes for each measurement. What is done is not done again, what was cut off goes on. DRY=1 prints the
# commands. Explanations begin with "My" and are trained on their first 8 tokens, where the persona is named or not.
# The recorded run took 37 steps at --lr 3e-5, at which the letters swayed, and went on with --resume --lr 1.2e-5 (docs/log-2026-11.md).
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 3 "$@"
model=$(model_at "$1") data=$(realpath -m "$2") out=$(realpath -m "$3") launch=${LAUNCH:-torchrun --nproc-per-node 2}
cd "$(dirname "$0")/.."
asked="--task esnli --data $data --intervention bias --opening My --max-new-tokens 8"
train "$out" --model "$model" $asked --calibrate --calibration-questions 150 --fit-questions 300 --eval-questions 1000 \
    --no-eval-before --steps 223 --prompts 16 --samples 8 --lr 1.2e-5 --warmup 15 --beta2 0.99 --anchor 1 --kl 0.1 \
    --save-every 50 --checkpoint-every 10 | run_lines 1
for which in before after; do
    measured=$out/model
    [ $which = before ] && measured=$model
    measure "$out/cells/$which" --model "$measured" $asked --temperature 0 1 --calibration "$out/calibration.json" --limit 600 --fit 300
done | run_lines 1
echo "python -m lab.report $out/cells/before.T1.jsonl $out/cells/after.T1.jsonl" | run_lines 1
