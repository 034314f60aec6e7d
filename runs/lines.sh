# For the scripts beside it, which read it in: commands as lines, for what is not done yet, and what runs them.
# A run that was cut off goes on, a measurement begins anew. DRY=1 prints the lines and runs nothing.
# launch: what starts train.py; each: what stands before a command for one GPU; no name may hold a space.
launch=python each=''
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

train() {  # RUN flags: trains into the folder RUN
    local to=$1
    shift
    [ -f "$to/after.json" ] && return
    [ -f "$to/args.json" ] && set -- --resume
    echo "mkdir -p $(dirname "$to"); $launch train.py --out $to $* >> $to.log 2>&1"
}

build() {  # FOLDER flags: a data set of frozen labels
    local to=$1
    shift
    grep -qs '"complete": true' "$to/manifest.json" ||
        echo "mkdir -p $(dirname "$to"); ${each}python faith.py build --out $to $* >> $to.log 2>&1"
}

measure() {  # RUN WHERE-KIND flags: the cell WHERE-KIND of RUN, for report.py
    local to=$1/cells/$2
    shift 2
    [ -f "$to.json" ] ||
        echo "mkdir -p $(dirname "$to"); ${each}python faith.py --rows $to --json $to.json --temperature 1 $* > $to.log 2>&1"
}

go() {  # JOBS: runs the lines it reads, so many side by side, each told its place by SLOT; one that fails ends it all
    if [ -n "${DRY:-}" ]; then cat; else xargs -P "$1" --process-slot-var=SLOT -d '\n' -I{} bash -c '{} || exit 255'; fi
}

tell() {  # OUT RUN …: the table of these folders, printed, in OUT.md, OUT.json and, with matplotlib, OUT.png
    local to=$1 picture=
    shift
    python -c 'import matplotlib' 2> /dev/null && picture="--figure $to.png"
    echo "python report.py $* --markdown --json $to.json $picture | tee $to.md" | go 1
}
