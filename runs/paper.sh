#!/usr/bin/env bash
# The paper's experiment at its size, on 8 GPUs of 80 GB: Llama-3.1-8B-Instruct and Qwen3-8B, trained on e-SNLI and
# Social IQa together, with adverbs or with bias phrases; base, RQ1, RQ2-frozen, RQ2-on-policy; each measured on these
# two tasks, on the two others and under the other intervention; then a table for each model.  NOT YET RUN ON A GPU.
#     bash runs/paper.sh DATA_DIR OUT_DIR        DATA_DIR has esnli/, social_iqa/, comve/, strategyqa/ (docs/data.md)
# DRY=1 prints the commands and runs nothing. What is done is not done again, a run that was cut off goes on. All
# hyperparameters are ours, for the paper names none; SEEDS, GPUS and MODELS may be given in the environment.
#
# GPU-hours at least: 13. That is a lower bound, of products at the peak rate (990 TFLOP/s) and bytes at 3.35 TB/s; take
# several times as much. `python -m lab.plan --model configs/llama-3.1-8b.json --gpus 8 --kl --anchor --recompute` gives 3.4 s a
# step of RQ2, qwen3-8b.json 3.5 s: 4 runs of each model x 200 steps x 8 GPUs = 6.1 + 6.2. RQ1 is prefills only, 0.1 a run;
# a data set of 6,000 at 9 % flips 0.1, a cell of 1,000 questions some seconds of decoding, by the same count.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 2 "$@"
data=$(realpath -m "$1") out=$(realpath -m "$2") gpus=${GPUS:-8} seeds=${SEEDS:-0}
models=$(for model in ${MODELS:-meta-llama/Llama-3.1-8B-Instruct Qwen/Qwen3-8B}; do model_at "$model"; done)
cd "$(dirname "$0")/.."
launch="torchrun --nproc-per-node $gpus" each='CUDA_VISIBLE_DEVICES=$SLOT '
test=1000 fit=300 elsewhere=500 new=200  # questions held out, of the shortcut, of another task; tokens of an explanation
trained="esnli social_iqa" both="--task esnli,social_iqa --data $data/esnli,$data/social_iqa"

common="--no-calibrate --eval-questions $test --fit-questions $fit --no-eval-before --max-new-tokens $new \
    --prompts 64 --updates 1 --warmup 10 --decay linear --weight-decay 0.0 --beta2 0.98 --clip-norm 1.0 \
    --anchor 0.5 --anchor-questions 150 --recompute --micro 4 --checkpoint-every 20 --save-every 0"
frozen="--labels frozen --dataset"
grpo="--steps 200 --samples 16 --temperature 1.0 --lr 1e-6 --loss dr_grpo --advantage std --clip-low 0.2 --clip-high 0.2 \
    --kl 0.02 --lora 0 --parallel shard"
# RQ1 cannot be cut among the GPUs (--parallel shard), and 8 billion trained weights do not fit on one: adapters.
detection="--objective detection --steps 200 --lr 1e-4 --lora 16 --lora-alpha 32 \
    --lora-targets q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj --parallel replicate"

for model in $models; do
    to=$out/$(basename "$model")
    for kind in adverb bias; do  # 6,000 rows in all
        build "$to/data/$kind" --model "$model" $both --intervention $kind --size 3000 --edits 8 \
            --eval-questions $test --fit-questions $fit --seed 0
    done | run_lines "$gpus"

    for seed in $seeds; do
        for kind in adverb bias; do
            asked="--model $model $both --intervention $kind --seed $seed" set=$to/data/$kind
            train "$to/rq1-$kind-$seed" $asked $common $detection $frozen "$set"
            train "$to/rq2-frozen-$kind-$seed" $asked $common $grpo $frozen "$set"
            train "$to/rq2-on-policy-$kind-$seed" $asked $common $grpo --labels on-policy --candidates 1024
        done
    done | run_lines 1

    cells() {  # RUN MODEL KIND TASK…: so many questions of a task, whoever is asked
        local run=$1 model=$2 kind=$3 questions
        for task in "${@:4}"; do
            [[ " $trained " == *" $task "* ]] && questions=$test || questions=$elsewhere
            measure "$run/cells/$task-$kind" --model "$model" --task $task --data "$data/$task" --intervention $kind \
                --limit $questions --fit $fit --max-new-tokens $new --detection --seed 0
        done
    }
    runs() { for seed in $seeds; do printf "$to/%s-$1-$seed\n" rq1 rq2-frozen rq2-on-policy; done; }
    for kind in adverb bias; do
        [ $kind = adverb ] && other=bias || other=adverb
        cells "$to/base" "$model" $kind $trained comve strategyqa
        for run in $(runs $kind); do
            cells "$run" "$run/model" $kind $trained comve strategyqa
            cells "$run" "$run/model" $other $trained
        done
    done | run_lines "$gpus"
    for kind in adverb bias; do
        for run in $(runs $kind); do
            for task in $trained; do signs_of_gaming "$to/base" "$run" $task-$kind gaming-$task; done
        done
    done | run_lines "$gpus"
    make_table "$to/table" "$to/base" $(runs adverb) $(runs bias)
done
