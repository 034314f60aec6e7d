"""runs/: what each script would run is accepted as it stands and belongs together; the sampler's profile."""

import hashlib
import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import faith
import tasks
import toy
from lab import build, measure, paper
from run import args as flags

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"toy_paper.sh": ("OUT",), "smollm2_paper.sh": ("MODEL", "DATA", "OUT"), "paper.sh": ("DATA", "OUT"),
           "qwen.sh": ("MODEL", "DATA", "OUT")}  # fmt: skip
COMMIT = "91a860ac1a53780b3859ada33e8ce417b21c9118"  # what runs/toy.sh was run with
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def parse(words):
    """The flags of a run; ends the test where one is wrong."""
    args = flags.parse(words, {}, toy.SETTINGS)
    flags.check(args)
    return args


def lines(script, out, **environment):
    """What `DRY=1 bash runs/SCRIPT` prints: (the program, its arguments) of each command."""
    given = [str(out) if name == "OUT" else name for name in SCRIPTS.get(script, (COMMIT, "OUT"))]
    done = subprocess.run(["bash", ROOT / "runs" / script, *given], capture_output=True, text=True, cwd=out,
                          env=os.environ | {"DRY": "1", "BASELINES": "1", "PATH": PATH} | environment)  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    for line in done.stdout.splitlines():
        words = shlex.split(line.split("; ")[-1].split(" | ")[0])
        words = words[: next((n for n, word in enumerate(words) if word.startswith(">")), len(words))]
        (at,) = [n for n, word in enumerate(words) if word.endswith(".py") or word.startswith("lab.")]
        assert set(words[:at]) <= {*"python torchrun --nproc-per-node 2 8 -m CUDA_VISIBLE_DEVICES=$SLOT".split()}
        yield words[at], words[at + 1 :]


def homes_of(run):
    """The names of the cells that a run was trained on."""
    return [f"{task}-{run.intervention}" for task in run.task.split(",")]


def planned(script, tmp_path, monkeypatch):
    """The parsed commands: runs by folder, data sets by folder, cells by run and name, the folders of each table."""
    runs, sets, cells, tables, games = {}, {}, defaultdict(dict), [], {}
    for module, name, stand_in in (
        (measure, "check_arguments", lambda args: None), (measure, "run_measure", lambda args: seen.append(args)),
        (build, "build", lambda args: seen.append(args) or {"splits": {}, "short": ""}),
        (paper, "tables", lambda folders: seen.append(folders) or []), (paper, "draw", lambda *_: None),
        (paper.files, "check_writable", lambda *_: None), (paper.files, "write_json", lambda *_: None),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, stand_in)
    for program, words in lines(script, tmp_path):
        seen = []
        if program == "train.py":
            args = parse(words)
            runs[args.out] = args
            continue
        if program == "runs/easy.py":
            assert words == [f"{tmp_path}/easy"]
            continue
        if program == "lab.page":  # of each run at home, beside the base's
            before, after, *rest = words
            folder = after.split("/cells/")[0]
            cell = after.removeprefix(f"{folder}/")
            page = f"{folder}/gaming" + f"-{cell[6:].rpartition('-')[0]}" * (script == "paper.sh")
            assert rest == ["--to", f"{page}.html", "--json", f"{page}.json"] and (folder, cell) not in games
            games[folder, cell] = before
            continue
        assert {"faith.py": faith.main, "lab.paper": paper.main, "lab.build": build.main}[program](words) == 0
        (args,) = seen
        if program == "lab.paper":
            tables.append(args)
        elif program == "lab.build":
            sets[args.out] = args
        else:
            folder, name = args.rows.split("/cells/")
            assert args.json == f"{args.rows}.json" and 1 in args.temperature and name not in cells[folder]
            cells[folder][name] = args
    homes = [(folder, f"cells/{name}.T1.jsonl") for folder, run in runs.items() for name in homes_of(run)]
    assert games == {(folder, home): f"{Path(folder).parent}/base/{home}" for folder, home in homes}
    return runs, sets, cells, tables


def test_fresh_words_go_on_from_what_qwen_sh_made(tmp_path):
    """Every model, data set and calibration is one that qwen.sh or an earlier line makes."""
    made, runs = {str(tmp_path / "easy")}, {}
    for program, words in [*lines("qwen.sh", tmp_path), *lines("qwen_fresh.sh", tmp_path)]:
        if program == "runs/even.py":
            assert words[0] in made
            made.add(words[1])
        elif program == "lab.build":
            made.add(words[words.index("--out") + 1])
        elif program == "train.py":
            args = runs[words[words.index("--out") + 1].removeprefix(f"{tmp_path}/")] = parse(words)
            assert not args.dataset or args.dataset in made
            made.add(f"{args.out}/model")
        elif program == "faith.py":
            given = dict(itertools.pairwise(words))
            made.add(f"{given['--rows']}.calibration.json")
            assert given["--calibration"] in made | {"fit"} and given["--model"] in made | {"MODEL"}
    grpo, more, even = runs["fresh-1"], runs["fresh-imitation"], runs["imitation-even"]
    assert {run.model for run in (grpo, more)} == {f"{even.out}/model"} and even.model == runs["seed-0"].model
    assert {run.dataset for run in (grpo, more)} == {f"{tmp_path}/fresh-even"}
    assert {run.objective for run in (more, even)} == {"imitation"} and grpo.objective == "disclosure"


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_are_accepted_and_belong_together(script, tmp_path, monkeypatch):
    runs, sets, cells, tables = planned(script, tmp_path, monkeypatch)
    count = {"toy_paper.sh": 9, "smollm2_paper.sh": 3, "paper.sh": 12, "qwen.sh": 6}[script]
    assert len(runs) == count and len(tables) == (2 if script == "paper.sh" else 1)
    alone = {f"{tmp_path}/{name}": {name} for name in ("why", "best_of") if script == "qwen.sh"}
    assert sorted(folder for table in tables for folder in table) == sorted(cells.keys() - alone)
    for folder, flag in alone.items():  # the base, asked as in the table but for one flag
        (cell,), base = cells[folder].values(), cells[f"{tmp_path}/base"]["jsonl-bias"]
        assert cell.calibration == f"{base.rows}.calibration.json"
        differs = {key for key, value in vars(cell).items() if value != vars(base)[key]}
        assert differs == flag | {"rows", "json", "controls", "calibration"}
    for table in tables:
        base, *trained = table
        assert base.endswith("/base") and set(trained) <= set(runs)
        for folder in trained:
            run, count = runs[folder], {"toy_paper.sh": 3, "paper.sh": 6, "qwen.sh": 8}.get(script, 5)
            assert {*homes_of(run)} <= {*cells[folder]} and len(cells[folder]) == count
            for name, cell in cells[folder].items():  # the base and every run are asked the same
                assert cell.model == f"{folder}/model"
                for key in "task data intervention limit fit seed max_new_tokens opening words dtype".split():
                    assert getattr(cell, key) == getattr(cells[base][name], key)
                assert all(getattr(cell, key) == getattr(run, key) for key in ("opening", "max_new_tokens", "dtype"))
                assert name.endswith(f"-{cell.intervention}")
                if cell.task in run.task.split(","):  # never a question trained on
                    assert cell.limit <= run.eval_questions
                fitted = cells[base][name].calibration
                assert (cell.calibration != "none") == run.calibrate
                assert cell.calibration == (fitted if fitted != "fit" else f"{base}/cells/{name}.calibration.json")
    rows = defaultdict(list)
    for run in runs.values():
        row = {"detection": "RQ1", "imitation": f"imitation-{run.labels}"}.get(run.objective, f"RQ2-{run.labels}")
        rows[run.model, run.task, run.intervention].append(row)
    if script == "qwen.sh":  # the form is learned first, of the model itself; the others go on from there
        form = rows.pop(("MODEL", "jsonl", "bias"))
        assert form == ["imitation-shuffled"] and [model for model, *_ in rows] == [f"{tmp_path}/form/model"]
    wanted = {"qwen.sh": ["imitation-frozen", "RQ2-shuffled", "RQ2-frozen"]}
    wanted = wanted.get(script, ["RQ1", "RQ2-frozen", "RQ2-on-policy"])
    assert all({*of} == {*wanted} for of in rows.values())

    assert len(sets) == {"paper.sh": 4, "qwen.sh": 1}.get(script, 0)
    assert {run.dataset for run in runs.values()} - {""} == set(sets)
    for run in runs.values():
        for key in "model task data intervention eval_questions fit_questions calibrate dtype".split():
            form = key == "model" and run.model == f"{tmp_path}/form/model"  # an adapter, off while it decides
            assert not run.dataset or form or getattr(run, key) == getattr(sets[run.dataset], key)
        if run.objective == "detection":  # learns from the initial model's labels, as in the paper, but on the toy
            assert run.labels == ("on-policy" if script == "toy_paper.sh" else "frozen") and run.parallel != "shard"
        if script == "paper.sh":  # 8 billion trained weights do not fit on one GPU: what cannot be cut has adapters
            assert (run.parallel == "shard") == (run.lora == 0)
        if script == "smollm2_paper.sh":  # ends with no more questions than its cells are asked
            assert run.eval_questions == cells[run.out]["esnli-bias"].limit


def shell(text, cwd, *given):
    """A bash script that has read in runs/lines.sh, in the folder cwd."""
    text = f"set -euo pipefail; . {shlex.quote(str(ROOT / 'runs' / 'lines.sh'))}; {text}"
    return subprocess.run(["bash", "-c", text, "bash", *given], capture_output=True, text=True, cwd=cwd,
                          env=os.environ | {"DRY": "", "PATH": PATH})  # fmt: skip


@pytest.mark.parametrize("line", ["false | tee x", "exit 3", "(exit 3) > log 2>&1", "echo $SLOT | ( '"])
def test_a_line_that_fails_ends_it_all_and_is_named(tmp_path, line):
    got = shell('printf "%s\\n" "touch \'be fore\'; echo \\$SLOT" "$1" "touch after" | run_lines 1', tmp_path, line)
    assert got.returncode != 0 and f"failed: {line}\n" in got.stderr
    assert (tmp_path / "be fore").exists() and not (tmp_path / "after").exists()
    assert shell("true | run_lines 2", tmp_path).returncode == 0


def test_what_the_toy_prints_while_it_is_made_is_not_its_folder(tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "base.py").write_text("""
from pathlib import Path
def prepare():
    if not Path('toy').exists():
        print('making it'), Path('toy').mkdir()
    return Path('toy').resolve()
""")
    first, again = (shell('base=$(toy_base); echo "<$base>"', tmp_path) for _ in range(2))
    assert first.stdout == again.stdout == f"<{tmp_path / 'toy'}>\n"
    assert (first.stderr, again.stderr) == ("making it\n", "")
    (tmp_path / "lab" / "base.py").write_text("raise SystemExit(3)")
    for wrong in ("base=$(toy_base); echo on", "toy_base; echo on", "PATH=/usr/none; all=$(seeds_of a 3); echo on"):
        got = shell(wrong, tmp_path)
        assert got.returncode != 0 and not got.stdout


def test_runs_of_the_toy(tmp_path):
    """All that runs/toy.sh trains is accepted, under the five seeds of the commit."""
    runs = [parse(words) for program, words in lines("toy.sh", tmp_path) if program == "train.py"]
    seeds = {int(hashlib.sha256(f"{COMMIT}/{n}".encode()).hexdigest()[:6], 16) for n in range(5)}
    assert len({run.out for run in runs}) == len({(run.intervention, run.seed) for run in runs}) == len(runs) == 10
    assert {run.seed for run in runs} == seeds


WORK = """train a/run --seed 1; train a/other --no-eval-before; build data --size 9
measure a/run/cells/x; signs_of_gaming base a/run x; measure base/cells/x"""
STAGES = [  # files, and the work of the above that is left when they are there as well
    ([], "a/run a/other data a/run/cells/x.json a/run/gaming.json base/cells/x.json"),
    (["a/run/args.json", "a/other/args.json"],
     "a/run --resume a/other --resume data a/run/cells/x.json a/run/gaming.json base/cells/x.json"),
    # A run with two measurements is done when they are compared.
    (["a/run/after.json", "a/other/after.json", "data/manifest.json"],
     "a/run --resume data a/run/cells/x.json a/run/gaming.json base/cells/x.json"),
    (["a/run/difference.T1.json", "base/cells/x.json"], "data a/run/cells/x.json a/run/gaming.json"),
    (["a/run/cells/x.json", "a/run/gaming.json"], "data"),
    # A run that was trained on keeps no measurement of what it was; the base has no model beside its cells.
    (["a/run/model"], "data a/run/cells/x.json a/run/gaming.json"),
]  # fmt: skip


def test_what_is_done_is_not_done_again(tmp_path):
    def left():
        return " ".join(re.findall(r"(?:--out|--json) (\S+(?: --resume)?)", shell(WORK, tmp_path).stdout))

    for age, (names, work) in enumerate(STAGES):
        for file in [tmp_path / name for name in names]:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text('{\n "complete": false\n}\n')
            os.utime(file, (age, age))
        assert left() == work
    (tmp_path / "data" / "manifest.json").write_text('{\n "complete": true\n}\n')
    assert left() == STAGES[-1][1].removeprefix("data ")


@pytest.mark.parametrize("script", ["toy.sh", "smollm2.sh", *SCRIPTS])
def test_paths_are_seen_from_where_the_script_is_called(tmp_path, script):
    """Relative ones; a hub id stays as it is."""
    for name in ("bin", "some/model", "some/data"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("torchrun", "python"):
        (tmp_path / "bin" / name).write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo 1 2 3 4 5; else echo "$@"; fi\n')
        (tmp_path / "bin" / name).chmod(0o755)
    given = SCRIPTS.get(script) or {"toy.sh": ("COMMIT", "OUT"), "smollm2.sh": ("MODEL", "DATA", "OUT")}[script]

    def run(model):
        names = {"MODEL": model, "DATA": "some/data", "OUT": "some/out", "COMMIT": "c"}
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(["bash", os.path.relpath(ROOT / "runs" / script, tmp_path), *(names[n] for n in given)],
                              capture_output=True, text=True, cwd=tmp_path, check=True,
                              env=os.environ | {"DRY": "1", "PATH": path, "MODELS": model})  # fmt: skip

    text = run("some/model").stdout
    for part in ("model", "data", "out") if "MODEL" in given or script == "paper.sh" else ("out",):
        assert f" {tmp_path}/some/{part}" in text
    assert " some/" not in text and "=some/" not in text
    if script not in ("toy.sh", "toy_paper.sh"):
        assert " --model meta-llama/Llama-3.1-8B-Instruct " in run("meta-llama/Llama-3.1-8B-Instruct").stdout


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "runs").glob("*.sh") if path.name != "lines.sh")
)
def test_without_arguments_a_script_says_what_it_takes(script):
    got = subprocess.run(["bash", ROOT / "runs" / script], capture_output=True, text=True)
    assert (got.returncode, got.stdout) == (2, "") and got.stderr.startswith(f"usage: bash runs/{script} ")
    assert got.stderr.count("\n") == 1


def test_easy_questions(tmp_path):
    """They are read as they are, are right, and the right option is first in half of them."""
    spec = importlib.util.spec_from_file_location("easy", ROOT / "runs" / "easy.py")
    easy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(easy)
    assert easy.main([str(tmp_path)]) == 0 and easy.main([str(tmp_path), "x"]) == 2
    capitals, opposites = dict(easy.pairs(easy.CAPITALS)), [set(pair) for pair in easy.pairs(easy.OPPOSITES)]
    kinds = {f"Which of these is {name}?": set(words.split()) for name, words in easy.KINDS.items()}
    more = {f"Which of these is {name}?": set(words.split()) for name, words in easy.FRESH.items()}
    tested = {"jsonl": str(tmp_path / "kinds.jsonl")}, {"test": 300, "fit": 150}, False
    tested, groups = {q.group for part in tasks.load_splits(*tested)[1].values() for q in part}, set()
    for name, count in (("kinds", 2000), ("capitals", 600), ("opposites", 600), ("fresh", 3000)):
        questions = tasks.load("jsonl", tmp_path / f"{name}.jsonl")
        assert not groups & {q.group for q in questions}  # a run on one file may be tested on another
        groups |= {q.group for q in questions}
        asked = {(q.parts, frozenset(q.options)) for q in questions}
        assert len(questions) == count == 2 * sum(q.gold for q in questions) and len(asked) > 0.99 * count
        for q in questions:
            right, wrong = q.options[q.gold], q.options[1 - q.gold]
            if name == "kinds":
                assert right in kinds[q.parts[0]] and wrong not in kinds[q.parts[0]] and q.group == right
            elif name == "fresh":
                assert right in more[q.parts[0]] and q.group == right and not {right, wrong} & tested
                assert wrong not in more[q.parts[0]] | kinds.get(q.parts[0], set())
            elif name == "capitals":
                country = q.parts[0].removeprefix("What is the capital of ").rstrip("?")
                assert q.group == f"capital of {country}" and capitals[country] == right != wrong
            else:
                word = q.parts[0].split('"')[1]
                assert {word, right} in opposites and {*q.group.split()} == {word, right} and wrong not in {word, right}


@pytest.mark.parametrize("launch", ["", "python"])
def test_how_training_is_started(tmp_path, monkeypatch, launch):
    """By two processes, or by one where a machine has one GPU."""
    monkeypatch.setenv("DRY", "1"), monkeypatch.setenv("LAUNCH", launch)
    printed = subprocess.check_output(["bash", ROOT / "runs/smollm2_paper.sh", "MODEL", "DATA", tmp_path], text=True)
    assert re.findall(r"; (\S.*) train\.py ", printed) == [launch or "torchrun --nproc-per-node 2"] * 3
