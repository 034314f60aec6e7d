#!/usr/bin/env bash
# What only a GPU can show, in five stages and nine minutes at most; tests/gpu.py says what each of them measures.
#
#     bash tests/gpu.sh [STAGE …]     writes gpu.json, gpu.log and a file per stage into $OUT (default: out/gpu-DATE)
#     DRY=1 bash tests/gpu.sh         tiny shapes on the CPU: shows that the script itself works
#
# Nothing is fetched. A stage that fails, or takes longer than its box, does not stop the next one. BOX=SECONDS gives
# every stage that many. Exit status 0: all stages passed.
set -u
boxes="kernels:110 tests:140 rollout:105 train:80 toy:80"

root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$root/out/gpu-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$out" && out=$(cd "$out" && pwd) && scratch=$(mktemp -d) || exit 2
cd "$root"
exec > >(tee "$out/gpu.log") 2>&1
python=$(command -v python3 || command -v python)
cores=$(nproc)
export DRY=${DRY:-} SCRATCH=$scratch PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}
base=
if [ "$DRY" ]; then
    export CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1
else  # the toy's base is trained on the CPU meanwhile, because the last stage needs it
    "$python" -m lab.base > "$scratch/toy.log" 2>&1 &
    base=$!
fi
trap 'kill $base 2> /dev/null; rm -rf "$scratch"' EXIT

results=()
for pair in $boxes; do
    stage=${pair%:*} box=${BOX:-${pair#*:}}
    [ $# = 0 ] || [[ " $* " == *" $stage "* ]] || continue
    echo "== $stage, at most $box s"
    rm -f "$out/$stage.json"
    [ "$stage" = toy ] && [ "$base" ] && wait "$base"
    began=$SECONDS
    timeout -k 5 "$box" "$python" tests/gpu.py "$stage" "$out" < /dev/null
    results+=("$stage:$?:$((SECONDS - began))")
done
"$python" tests/gpu_table.py "$out" ${results[@]+"${results[@]}"}
