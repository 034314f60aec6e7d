#!/usr/bin/env bash
# The paper's experiment at its size, on 8 GPUs of 80 GB: Llama-3.1-8B-Instruct and Qwen3-8B, trained on e-SNLI and on
# Social IQa, with adverbs and with bias phrases; base, RQ1, RQ2-frozen, RQ2-on-policy; the other tasks, the other
# intervention; then a table for each model.                       NOT YET RUN ON A GPU.
#     bash runs/paper.sh DATA_DIR OUT_DIR        DATA_DIR has esnli/, social_iqa/, comve/, strategyqa/ (docs/data.md)
# DRY=1 prints the commands and runs nothing. What is done is not done again, a run that was cut off goes on. All
# hyperparameters are ours, for the paper names none; SEEDS, GPUS and MODELS may be given in the environment.
#
# GPU-hours at least: 31. That is a lower bound, of products at the peak rate (990 TFLOP/s) and bytes at 3.35 TB/s; take
# several times as much. `python -m lab.plan --model configs/llama-3.1-8b.json --gpus 8 --kl --anchor --recompute` gives 4.2 s a
# step of RQ2, qwen3-8b.json 4.3 s: 8 runs of each model x 200 steps x 8 GPUs = 15 + 15. RQ1 is prefills only, 0.1 a run;
# a data set of 6,000 at 9 % flips 0.1, a cell of 1,000 questions some seconds of decoding, by the same count.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
data=$(realpath -m "$1") out=$(realpath -m "$2") gpus=${GPUS:-8} seeds=${SEEDS:-0}
models=$(for model in ${MODELS:-meta-llama/Llama-3.1-8B-Instruct Qwen/Qwen3-8B}; do model_at "$model"; done)
cd "$(dirname "$0")/.."
launch="torchrun --nproc-per-node $gpus" each='CUDA_VISIBLE_DEVICES=$SLOT '
test=1000 fit=300 elsewhere=500 new=200  # questions held out, of the shortcut, of another task; tokens of an explanation

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
    for task in esnli social_iqa; do
        for kind in adverb bias; do
            build "$to/data/$task-$kind" --model "$model" --task $task --data "$data/$task" --intervention $kind \
                --size 6000 --edits 8 --eval-questions $test --fit-questions $fit --seed 0
        done
    done | go "$gpus"

    for seed in $seeds; do
        for task in esnli social_iqa; do
            for kind in adverb bias; do
                asked="--model $model --task $task --data $data/$task --intervention $kind --seed $seed"
                set=$to/data/$task-$kind name=$task-$kind-$seed
                train "$to/rq1-$name" $asked $common $detection $frozen "$set"
                train "$to/rq2-frozen-$name" $asked $common $grpo $frozen "$set"
                train "$to/rq2-on-policy-$name" $asked $common $grpo --labels on-policy --candidates 1024
            done
        done
    done | go 1

    cell() {  # RUN MODEL TASK KIND: so many questions of a task, whoever is asked
        local questions=$elsewhere
        case $3 in esnli | social_iqa) questions=$test ;; esac
        measure "$1/cells/$3-$4" --model "$2" --task "$3" --data "$data/$3" --intervention "$4" --limit "$questions" \
            --fit $fit --max-new-tokens $new --detection --seed 0
    }
    runs=("$to/base")
    {
        for kind in adverb bias; do
            for task in esnli social_iqa comve strategyqa; do cell "$to/base" "$model" $task $kind; done
        done
        for home in esnli social_iqa; do
            for kind in adverb bias; do
                [ $kind = adverb ] && other=bias || other=adverb
                for row in rq1 rq2-frozen rq2-on-policy; do
                    for seed in $seeds; do
                        run=$to/$row-$home-$kind-$seed
                        for task in esnli social_iqa comve strategyqa; do cell "$run" "$run/model" $task $kind; done
                        cell "$run" "$run/model" $home $other
                    done
                done
            done
        done
    } | go "$gpus"
    games=
    for home in esnli social_iqa; do
        for kind in adverb bias; do
            for row in rq1 rq2-frozen rq2-on-policy; do
                for seed in $seeds; do
                    runs+=("$to/$row-$home-$kind-$seed")
                    games+=$(game "$to/base" "$to/$row-$home-$kind-$seed" $home-$kind)$'\n'
                done
            done
        done
    done
    sed '/^$/d' <<< "$games" | go "$gpus"
    tell "$to/table" "${runs[@]}"
done
