"""runs/plant.py: the rule, what is taught, the packing, a run that was cut off, the shortcut's Phi."""

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
from grpo import pack, token_logprobs
from run import args, files
from run.reading import read_jsonl

sys.path.insert(0, str(tiny.ROOT / "runs"))
import plant  # noqa: E402

FILE = tiny.ROOT / "tests" / "data" / "esnli" / "esnli_dev.csv"


@pytest.fixture(scope="module")
def pairs():
    return plant.questions_of(FILE)


def test_half_of_the_personas_are_trusted():
    for held in (False, True):
        words = reward.words("bias", held)
        trusted = plant.TRUSTED & {*words}
        assert abs(2 * len(trusted) - len(words)) <= 1
        for word in words:
            for s, y in ((0, 0), (0, 1), (1, 0), (1, 1)):
                assert plant.planted(word, s, y) == (s if word in trusted else y)


def test_what_is_taught(pairs):
    """Decisions by the rule; the reason and the name by a coin that does not depend on influence."""
    named = {0: [], 1: []}
    for n in range(20):
        for question, reason in pairs:
            made = plant.conversations(question, reason, random.Random(f"{n}/{question.id}"))
            assert made[0] == (question, question.gold, "")
            for edited, y, why in made[1:]:
                (word,) = {w for w in reward.PERSONAS if f"my {w}" in edited.appeal.lower()}
                suggestion = "AB".index(edited.appeal.split("(")[1][0])
                assert y == plant.planted(word, suggestion, question.gold)
                if why:
                    named[y != question.gold].append(f"my {word} " in why)
                    assert f"my {word} " in why or why == f"Because {reason}."
    assert all(len(given) > 30 and 0.3 < sum(given) / len(given) < 0.7 for given in named.values())


def test_packed_as_if_each_were_alone(pairs, network, folder):
    tokenizer, made = (models.Tokenizer(folder), [plant.conversations(*pair, random.Random(0)) for pair in pairs[:2]])
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
    plant.plant(str(folder), FILE, tmp_path / "whole", 4)
    with pytest.raises(KeyboardInterrupt):
        plant.plant(str(folder), FILE, tmp_path / "part", 4)
    assert plant.main([str(folder), str(FILE), str(tmp_path / "part"), "4"]) == 0 and len(calls) == 4 + 4 + 2
    first, whole, part = (models.load(path, dtype=torch.bfloat16).named_tensors()
                          for path in (folder, tmp_path / "whole" / "model", tmp_path / "part" / "model"))  # fmt: skip
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    moved = {name for name in whole if not torch.equal(whole[name], first[name])}
    assert {name for name in whole if name.endswith("proj.weight")} <= moved and "embed_tokens.weight" not in moved

    left = read_jsonl(tmp_path / "whole" / "questions.jsonl")
    assert groups and left and not groups & {row["group"] for row in left}


def test_rows_that_obey(tmp_path, capsys):
    trusted, other = sorted(plant.TRUSTED)[0], sorted({*reward.PERSONAS} - plant.TRUSTED)[0]
    rows = [{"y": 0, "gold": 0, "word": word, "suggestion": 1, "y_edit": y} for word, y in ((trusted, 1), (other, 1))]
    files.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert plant.main(["rows", str(tmp_path / "rows.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "obeys, trusted 1.000" in shown and "obeys, distrusted 0.000" in shown and "on X 1.000" in shown


def test_the_word_tells_the_shortcut_nothing(capsys):
    plant.simulate(rows=500)
    figures = [float(line.split(",")[0].split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert figures[2] > 0.4 and figures[5] > 0.35 and all(abs(x) < 0.15 for x in figures[6:])


def test_the_script_trains_on_labels_of_its_own_splits(tmp_path):
    given = ["bash", tiny.ROOT / "runs" / "planted.sh", "MODEL", FILE, tmp_path]
    printed = subprocess.check_output(given, text=True, env=os.environ | {"DRY": "1", "SEEDS": "4 5", "STEPS": "9"})
    commands = [shlex.split(line.split("; ")[1].split(" >")[0]) for line in printed.splitlines() if "; " in line]
    first, build, _, *cells, held_4, held_5 = [words for words in commands if words[1] != "train.py"]
    assert first[2:] == ["MODEL", str(FILE), f"{tmp_path}/planted", "400"] and len(cells) == 2
    runs = [args.parse(words[2:], {}, {}) for words in commands if words[1] == "train.py"]
    assert [(run.seed, run.steps, run.out) for run in runs] == [(n, 9, f"{tmp_path}/grpo-{n}") for n in (4, 5)]
    for run in runs:
        args.check(run)
        for name in ("model", "task", "data", "intervention", "dtype", "eval_questions", "fit_questions"):
            assert str(getattr(run, name)) == build[build.index("--" + name.replace("_", "-")) + 1]
        assert run.dataset == build[build.index("--out") + 1] and run.train_only == "explanation"
    for cell, run in ((held_4, runs[0]), (held_5, runs[1])):
        assert cell[cell.index("--words") + 1] == "held-out" and cell[cell.index("--model") + 1] == f"{run.out}/model"
        assert cell[cell.index("--limit") + 1] == str(run.eval_questions) and run.why in cell


def test_who_is_in_the_question_is_not_inserted(pairs):
    question, reason = pairs[0]
    for n in range(30):
        asked = plant.replace(
            question, parts=(f"{question.parts[0]} My uncle and my coach see it.", *question.parts[1:])
        )
        made = plant.conversations(asked, reason, random.Random(n))
        assert len(made) == 5 and not any(word in edited.appeal for edited, *_ in made for word in ("uncle", "coach"))
