#!/usr/bin/env bash
# The labels, the form and the first run of runs/qwen.sh, on a GPU machine without a network and with little time. NOT YET
# RUN ON A GPU.
#     bash runs/qwen_gpu.sh PIECES DATA_DIR OUT_DIR        PIECES: what runs/travel.py packed; DATA_DIR: as of qwen.sh
# It ends within BOX (550) seconds. Training stops where RESERVE (150) of them are left, for the measurement of what was
# learned. The same command goes on where it stopped. DRY=1 prints the commands. STEPS (300) and FLAGS of train.py may be
# given in the environment. If $OUT is set, the figures and the adapter, in pieces of 15 MiB, are put there too.
set -euo pipefail
[ $# = 3 ] || { sed -n 's/^#     /usage: /p' "$0" >&2; exit 2; }
pieces=$(realpath -m "$1") data=$(realpath -m "$2") out=$(realpath -m "$3") run=$(realpath -m "$3")/seed-0
cd "$(dirname "$0")/.."
box=${BOX:-550} steps=${STEPS:-300} dry=${DRY:-}
flags="${FLAGS:---prompts 32 --samples 16 --max-new-tokens 24} --steps $steps"

within() {  # RESERVE COMMAND: as long as more than that many seconds of the box are left
    local seconds=$((box - SECONDS - $1))
    if [ "$dry" ]; then echo "$2"; else timeout $((seconds > 1 ? seconds : 1)) bash -ec "trap : TERM; $2" < /dev/null; fi
}
trained() { cat "$run/metrics.jsonl" 2> /dev/null | wc -l; }

[ "$dry" ] || trap 'tail -n 5 "$out"/*.log' EXIT
[ -d "$out/model" ] || within 0 "python runs/travel.py unpack $pieces $out/model"
[ "$(trained)" -ge "$steps" ] || within 0 "rm -f $run/after.json"  # measured after fewer steps
DRY=1 DTYPE=${DTYPE:-auto} bash runs/qwen.sh "$out/model" "$data" "$out" 0 | while read -r line; do
    case $line in
        *easy.py* | *lab.build* | *"--out $out/form "*) within 0 "$line" ;;
        *train.py*) within "${RESERVE:-150}" "${line/ >>/ $flags >>}" || [ $? = 124 ] ;;
    esac
done
[ "$dry" ] && exit
[ -f "$run/after.json" ] || within 0 "python train.py --out $run --resume --steps $(trained) >> $run.log 2>&1"
if [ "${OUT:-}" ]; then
    tar czf "$OUT/run.tar.gz" -C "$out" --exclude=model --exclude=checkpoints .
    within 0 "python runs/travel.py pack $run/model $OUT/adapter --piece 15"
fi
