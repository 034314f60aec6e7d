#!/usr/bin/env bash
# SmolLM2-135M-Instruct on e-SNLI with bias phrases: on-policy labels, calibrated decisions, 16 x 8 a step.
#     bash runs/smollm2.sh MODEL_DIR ESNLI_DIR OUT_DIR
# Two ranks of one thread each, or as LAUNCH says (LAUNCH=python: one GPU). Seen on two free CPU cores: 33 s a step, so some two hours, and about ten minutes for each
# measurement. Explanations begin with "My" and are trained on their first 8 tokens, where the persona is named or not.
# The recorded run took 37 steps at --lr 3e-5, at which the letters swayed, and went on with --resume --lr 1.2e-5 (docs/log-2026-11.md).
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 3 "$@"
model=$(model_at "$1") data=$(realpath -m "$2") out=$(realpath -m "$3")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
${LAUNCH:-torchrun --nproc-per-node 2} train.py --model "$model" --task esnli --data "$data" --out "$out" --intervention bias \
    --calibrate --calibration-questions 150 --fit-questions 300 --eval-questions 1000 --no-eval-before \
    --steps 223 --prompts 16 --samples 8 --opening My --max-new-tokens 8 --lr 1.2e-5 --warmup 15 --beta2 0.99 \
    --anchor 1 --kl 0.1 --save-every 50 --checkpoint-every 10 --note "${NOTE:-}"
for which in before after; do
    measured=$out/model
    [ $which = before ] && measured=$model
    python faith.py --model "$measured" --task esnli --data "$data" --intervention bias --temperature 0 1 --opening My \
        --max-new-tokens 8 --calibration "$out/calibration.json" --limit 600 --fit 300 \
        --json "$out/$which.600.json" --rows "$out/$which.600"
done
python -m lab.report "$out"/before.600.T1.jsonl "$out"/after.600.T1.jsonl
