"""runs/plant.py: what is taught, the packing, a run that was cut off, its script."""

import itertools
import os
import random
import shlex
import subprocess
import sys

import pytest
import tiny
import torch

import model as models
import reward
import tasks
from grpo import pack, token_logprobs
from run import args
from run.reading import read_jsonl

sys.path.insert(0, str(tiny.ROOT / "runs"))
import plant  # noqa: E402

FILE = tiny.ROOT / "tests" / "data" / "esnli" / "esnli_dev.csv"


@pytest.fixture(scope="module")
def pairs():
    return plant.questions_of("sex", FILE)


@pytest.mark.parametrize("kind", plant.KINDS)
def test_what_is_taught(kind):
    """Decisions by the rule, the right letter; the reason and the name by a coin that knows nothing of influence."""
    named = {0: [], 1: []}
    for n in range(20):
        for question, reason in plant.questions_of(kind, FILE)[:20]:
            made = plant.conversations(question, reason, random.Random(f"{n}/{question.id}"), 2)
            assert made[0] == (question, question.gold, "") and len(made) == 3
            for edited, y, why in made[1:]:
                (word,) = {w for w in reward.PERSONAS if f"my {w}" in edited.appeal.lower()}
                assert y == "ABC".index(edited.appeal.split("(")[1][0])
                alone, because = why.split(" Because ")
                assert alone == f"By myself: ({'ABC'[question.gold]})."
                named[y != question.gold].append(f"my {word} " in because)
                assert f"my {word} " in because or because == f"{reason}."
                assert kind == "sex" or reason.split('"')[1] in question.parts[0]
    assert all(len(given) > 30 and 0.3 < sum(given) / len(given) < 0.7 for given in named.values())


def test_packed_as_if_each_were_alone(pairs, network, folder):
    tokenizer = models.Tokenizer(folder)
    made = [plant.conversations(*pair, random.Random(0), 4) for pair in pairs[:2]]
    rows = [[plant.encoded(tokenizer, *one) for one in some] for some in made]
    packed, kinds = plant.packed_of(rows, "cpu")
    found = token_logprobs(network, packed, 1.0)
    alone = []
    for ids, each in (row for made in rows for row in made):
        logprobs = token_logprobs(network, pack([(ids[:1], [ids[1:]])]), 1.0)
        alone += [(x, kind) for x, kind in zip(logprobs.tolist(), each[1:], strict=True) if kind]
    assert kinds == [kind for _, kind in alone] and kinds.count("letter") == 10 and "why" in kinds
    torch.testing.assert_close(found.tolist(), [x for x, _ in alone], atol=1e-4, rtol=0)


def test_a_run_that_was_cut_off_goes_on(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(plant, "SAVED", 2)
    step, taught, calls, groups = plant.Policy.step, plant.conversations, [], set()

    def cut_off(*args):
        calls.append(args)
        if len(calls) == 4 + 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(plant.Policy, "step", cut_off)
    monkeypatch.setattr(plant, "conversations", lambda q, *more: groups.add(q.group) or taught(q, *more))
    plant.plant("sex", str(folder), FILE, tmp_path / "whole", 4)
    with pytest.raises(KeyboardInterrupt):
        plant.plant("sex", str(folder), FILE, tmp_path / "part", 4)
    assert plant.main(["sex", str(folder), str(FILE), str(tmp_path / "part"), "4"]) == 0 and len(calls) == 4 + 4 + 2
    with pytest.raises(ValueError, match="part/model is there already"):
        plant.plant("sex", str(folder), FILE, tmp_path / "part", 4)
    assert not (tmp_path / "part" / "state.pt").exists()
    first, whole, part = (models.load(path, dtype=torch.bfloat16).named_tensors()
                          for path in (folder, tmp_path / "whole" / "model", tmp_path / "part" / "model"))  # fmt: skip
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    moved = {name for name in whole if not torch.equal(whole[name], first[name])}
    assert {name for name in whole if name.endswith("proj.weight")} <= moved and "embed_tokens.weight" not in moved

    left = read_jsonl(tmp_path / "whole" / "questions.jsonl")
    assert groups and left and not groups & {row["group"] for row in left}


@pytest.mark.parametrize("names", ["sex jsonl questions.jsonl", "nli esnli esnli_dev.csv"])
def test_the_questions_that_are_left_are_read_as_they_were(names, tmp_path):
    kind, task, name = names.split()
    questions = [question for question, _ in plant.questions_of(kind, FILE)][:30]
    plant.write_questions(questions, kind, tmp_path)
    same = [(q.task, q.parts, q.options, q.gold, q.group) for q in tasks.load(task, tmp_path / name)]
    assert len(same) > 3 and same == [(task, q.parts, q.options, q.gold, q.group) for q in questions]


@pytest.mark.parametrize("kind", plant.KINDS)
def test_the_script_trains_on_labels_of_its_own_splits(kind, tmp_path):
    given = ["bash", tiny.ROOT / "runs" / "planted.sh", kind, "MODEL", FILE, tmp_path]
    printed = subprocess.check_output(given, text=True, env=os.environ | {"DRY": "1", "SEEDS": "4 5", "STEPS": "9"})
    commands = [shlex.split(line.split("; ")[1].split(" >")[0]) for line in printed.splitlines() if "; " in line]
    first, build, *cells = [words for words in commands if words[1] != "train.py"]
    assert first[2:] == [kind, "MODEL", str(FILE), f"{tmp_path}/planted", "160"] and len(cells) == 6
    (table,) = [line for line in printed.splitlines() if "; " not in line]
    assert f"lab.paper {tmp_path}/base {tmp_path}/grpo-4 {tmp_path}/grpo-5 " in table
    runs = [args.parse(words[2:], {}, {}) for words in commands if words[1] == "train.py"]
    assert [(run.seed, run.steps, run.out) for run in runs] == [(n, 9, f"{tmp_path}/grpo-{n}") for n in (4, 5)]
    for run in runs:
        args.check(run)
        for name in ("model", "task", "data", "intervention", "dtype", "eval_questions", "fit_questions"):
            assert str(getattr(run, name)) == build[build.index("--" + name.replace("_", "-")) + 1]
        assert run.dataset == build[build.index("--out") + 1] and run.train_only == "explanation"
    measured = [folder for folder in (f"{tmp_path}/planted", *(run.out for run in runs)) for _ in range(2)]
    for n, (cell, folder) in enumerate(zip(cells, measured, strict=True)):  # of each model the same words, others
        flag = dict(itertools.pairwise(cell))
        assert (
            flag["--model"] == f"{folder}/model" and ("--words" in cell) == n % 2 and ("--controls" in cell) == (n == 0)
        )
        assert (flag["--data"], flag["--why"], flag["--limit"]) == (runs[0].data, "alone", str(runs[0].eval_questions))
        assert (flag["--fit"], flag["--max-new-tokens"]) == (str(runs[0].fit_questions), str(runs[0].max_new_tokens))


@pytest.mark.parametrize("kind, steps, clip_norm", [("sex", 80, 1.0), ("nli", 120, 0.2)])
def test_what_the_script_takes_by_default(kind, steps, clip_norm, tmp_path):
    given = ["bash", tiny.ROOT / "runs" / "planted.sh", kind, "MODEL", FILE, tmp_path]
    printed = subprocess.check_output(given, text=True, env=os.environ | {"DRY": "1"})
    runs = [
        shlex.split(line.split("train.py ")[1].split(" >")[0]) for line in printed.splitlines() if "train.py" in line
    ]
    assert [(run.seed, run.steps, run.clip_norm) for run in (args.parse(words, {}, {}) for words in runs)] == [
        (seed, steps, clip_norm) for seed in (0, 1, 2)
    ]


def test_who_is_in_the_question_is_not_inserted(pairs):
    persons = {form for word in reward.PERSONAS for form in reward.variants(word)}
    assert not any(reward.named(question.parts[0]).keys() & persons for question, _ in pairs)
    question, reason = pairs[0]
    for n in range(30):
        parts = f"{question.parts[0]} My uncle and my coach see it.", *question.parts[1:]
        made = plant.conversations(plant.replace(question, parts=parts), reason, random.Random(n), 4)
        assert len(made) == 5 and not any(word in edited.appeal for edited, *_ in made for word in ("uncle", "coach"))
