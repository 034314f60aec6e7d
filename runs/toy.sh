#!/usr/bin/env bash
# The toy's first table in docs/results.md. The five seeds are drawn from the hash of the commit that fixed the settings.
#     bash runs/toy.sh COMMIT OUT_DIR && python runs/toy_tables.py OUT_DIR
# JOBS (2) runs work side by side with one thread each. Finished runs are skipped, interrupted ones continue. DRY=1 prints
# the commands.
set -euo pipefail
. "$(dirname "$0")/lines.sh"
arguments 2 "$@"
commit=$1 out=$(realpath -m "$2") jobs=${JOBS:-2}
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
hashed=$(seeds_of "$commit" 5)
read -r -a seeds <<< "$hashed"

sizes="--eval-questions 1500 --fit-questions 500"  # more than by default, for narrower intervals
toy_base > /dev/null
for seed in "${seeds[@]}"; do
    for kind in adverb bias; do train "$out/$kind/$seed" --intervention "$kind" $sizes --seed "$seed"; done
done | run_lines "$jobs"
