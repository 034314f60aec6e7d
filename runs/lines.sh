# For the scripts beside it: functions that print the commands of unfinished work, one per line, and `run_lines`, which
# runs them.
# An interrupted run continues, an interrupted measurement starts again. DRY=1 prints the lines and runs nothing. A script
# sources this file and resolves its paths before it changes to the repository's folder. No path may contain a space.
# launch: the command that starts train.py. each: the prefix of a command that uses one GPU.
launch=python each=''
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

arguments() {  # N "$@": ends the script with its line of usage where fewer than N are given
    [ $# -gt "$1" ] || { sed -n 's/^#     /usage: /p' "$0" >&2; exit 2; }
}

model_at() {  # MODEL: the full path of a folder; a hub id unchanged
    if [ -d "$1" ]; then realpath -s "$1"; else echo "$1"; fi
}

seeds_of() {  # COMMIT N: seeds drawn from the commit's hash
    python -c 'import hashlib, sys
print(*(int(hashlib.sha256(f"{sys.argv[1]}/{i}".encode()).hexdigest()[:6], 16) for i in range(int(sys.argv[2]))))' "$@"
}

toy_base() {  # prints the toy's folder, made if missing; the progress goes to stderr
    if [ -n "${DRY:-}" ]; then echo TOY && return; fi
    python -c 'from lab import base; base.prepare()' >&2 && python -c 'from lab import base; print(base.prepare())'
}

train() {  # RUN flags: trains into the folder RUN
    local to=$1 last=difference.T1.json  # the last file that a run measures
    shift
    [[ " $* " == *" --no-eval-before "* ]] && last=after.json
    [ -f "$to/$last" ] && return
    [ -f "$to/args.json" ] && set -- --resume
    echo "mkdir -p $(dirname "$to"); $launch train.py --out $to $* >> $to.log 2>&1"
}

build() {  # FOLDER flags: a data set of frozen labels
    local to=$1
    shift
    grep -qs '"complete": true' "$to/manifest.json" ||
        echo "mkdir -p $(dirname "$to"); ${each}python -m lab.build --out $to $* >> $to.log 2>&1"
}

current() {  # FILE RUN: the file exists and is not older than the run's model
    [ -f "$1" ] && [ ! "$1" -ot "$2/model" ]
}

measure() {  # TO flags: rows and figures in TO.…; RUN/cells/WHERE-KIND is a cell of the table of lab.paper
    local to=$1
    shift
    current "$to.json" "$(dirname "$(dirname "$to")")" ||
        echo "mkdir -p $(dirname "$to"); ${each}python faith.py --rows $to --json $to.json --temperature 1 $* > $to.log 2>&1"
}

signs_of_gaming() {  # BASE RUN CELL [NAME]: signs of gaming in RUN/gaming.json and .txt, and a page of explanations to read
    local to=$2/${4:-gaming}
    current "$to.json" "$2" ||
        echo "python -m lab.page $1/cells/$3.T1.jsonl $2/cells/$3.T1.jsonl --to $to.html --json $to.json > $to.txt"
}

run_lines() {  # JOBS: runs the lines of its input, JOBS at a time, each with its number in SLOT; a failure ends all
    if [ -n "${DRY:-}" ]; then cat; return; fi
    xargs -P "$1" --process-slot-var=SLOT -d '\n' -I{} \
        bash -o pipefail -c '(eval "$1") || { echo "failed: $1" >&2; exit 255; }' run_lines {}
}

make_table() {  # OUT RUN …: prints the table of these folders, and writes OUT.md, OUT.json and, with matplotlib, OUT.png
    local to=$1 picture=
    shift
    python -c 'import matplotlib' 2> /dev/null && picture="--figure $to.png"
    echo "python -m lab.paper $* --markdown --json $to.json $picture | tee $to.md" | run_lines 1
}
