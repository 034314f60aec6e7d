# For the scripts beside it: commands as lines, for what is not done yet, and what runs them. A run that was cut off goes
# on, a measurement begins anew. DRY=1 prints the lines and runs nothing. A script reads this in and resolves the paths it
# was given before it goes to the repository's folder, for they are seen from where it was called.
# launch: what starts train.py; each: what stands before a command for one GPU; no name may hold a space.
launch=python each=''
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

model_at() {  # MODEL: a folder in full, a hub id as it is
    if [ -d "$1" ]; then realpath -s "$1"; else echo "$1"; fi
}

seeds_of() {  # COMMIT N: seeds drawn from the commit's hash
    python -c 'import hashlib, sys
print(*(int(hashlib.sha256(f"{sys.argv[1]}/{i}".encode()).hexdigest()[:6], 16) for i in range(int(sys.argv[2]))))' "$@"
}

toy_base() {  # [VARIANT]: its folder, made where it is missing; what that prints is shown, not taken
    if [ -n "${DRY:-}" ]; then echo TOY && return; fi
    python -c 'import sys, toy; toy.prepare(*sys.argv[1:])' "$@" >&2 &&
        python -c 'import sys, toy; print(toy.prepare(*sys.argv[1:]))' "$@"
}

train() {  # RUN flags: trains into the folder RUN
    local to=$1 last=difference.T1.json  # the last that a run measures
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

current() {  # FILE RUN: it is there, and not older than the run's model
    [ -f "$1" ] && [ ! "$1" -ot "$2/model" ]
}

measure() {  # TO flags: rows and figures in TO.…; RUN/cells/WHERE-KIND is a cell of the table of lab.paper
    local to=$1
    shift
    current "$to.json" "$(dirname "$(dirname "$to")")" ||
        echo "mkdir -p $(dirname "$to"); ${each}python faith.py --rows $to --json $to.json --temperature 1 $* > $to.log 2>&1"
}

game() {  # BASE RUN CELL: signs of gaming, in RUN/gaming.json and .txt, and a page of explanations to be read
    current "$2/gaming.json" "$2" ||
        echo "python -m lab.page $1/cells/$3.T1.jsonl $2/cells/$3.T1.jsonl --to $2/gaming.html --json $2/gaming.json > $2/gaming.txt"
}

go() {  # JOBS: runs the lines it reads, so many side by side, each told its place by SLOT; one that fails ends it all
    if [ -n "${DRY:-}" ]; then cat && return; fi
    xargs -P "$1" --process-slot-var=SLOT -d '\n' -I{} \
        bash -o pipefail -c '(eval "$1") || { echo "failed: $1" >&2; exit 255; }' go {}
}

tell() {  # OUT RUN …: the table of these folders, printed, in OUT.md, OUT.json and, with matplotlib, OUT.png
    local to=$1 picture=
    shift
    python -c 'import matplotlib' 2> /dev/null && picture="--figure $to.png"
    echo "python -m lab.paper $* --markdown --json $to.json $picture | tee $to.md" | go 1
}
