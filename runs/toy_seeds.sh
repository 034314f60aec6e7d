#!/usr/bin/env bash
# The toy under five seeds, drawn from the hash of the commit that fixed its settings.
#     bash runs/toy_seeds.sh COMMIT OUT_DIR [flags of train.py]
# Seen on two cores: about three minutes a seed, the base model cached.
set -euo pipefail
cd "$(dirname "$0")/.."
commit=$1 out=$2
shift 2
seeds='import hashlib, sys; print(*(int(hashlib.sha256(f"{sys.argv[1]}/{i}".encode()).hexdigest()[:6], 16) for i in range(5)))'
for seed in $(python -c "$seeds" "$commit"); do
    python train.py --intervention adverb --seed "$seed" --out "$out/$seed" "$@"
done
