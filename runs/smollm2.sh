#!/usr/bin/env bash
# SmolLM2-135M-Instruct on e-SNLI with bias phrases: on-policy labels, calibrated decisions, 16 x 8 a step.
#     bash runs/smollm2.sh MODEL_DIR ESNLI_DIR OUT_DIR
# Seen on two free CPU cores: 90 to 110 s a step and about 14 minutes for each measurement, so some two hours.
set -euo pipefail
cd "$(dirname "$0")/.."
exec torchrun --nproc-per-node 1 train.py --model "$1" --task esnli --data "$2" --out "$3" --intervention bias \
    --calibrate --calibration-questions 150 --fit-questions 150 --eval-questions 300 \
    --steps 150 --prompts 16 --samples 8 --max-new-tokens 24 --lr 1e-5 --warmup 10 --anchor 1 --save-every 25 \
    --note "${NOTE:-}"
