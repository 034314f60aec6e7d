"""Asking outright what moved the answer: the question, its odds, the loss and its gradient; whole runs; the figures."""

import math
import re
import types

import numpy as np
import pytest
import torch
from launch import DATA, close, ran, refused, same, weights
from launch import flags as plain_flags
from scipy import stats
from sklearn.metrics import matthews_corrcoef
from transformers import AutoModelForCausalLM, AutoTokenizer

import faith
import model as models
import report
import tasks
from lab import detect
from lab.compare import compare
from rollout import Sampler
from run import reading
from run.args import Args
from run.policy import Policy, make_policy
from run.ranks import Ranks


@pytest.fixture
def labelled(subject):
    """Twenty real questions with an edit each, and their decision rows."""
    cases = faith.draw_cases(tasks.load("esnli", DATA), "bias", 0)
    return list(zip(cases, faith.decision_rows(subject, cases), strict=True))


def test_odds_are_transformers(folder, subject, labelled):
    reference, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    odds = detect.detection_odds(subject, labelled)
    assert len(odds) == 20 and np.std(odds) > 0.1
    for (case, row), D in zip(labelled, odds, strict=True):
        would = f'Would your answer have been different without "{row["text_inserted"]}"? Answer yes or no.'
        said = f"The best answer is: ({'ABC'[row['y_edit']]})"
        turns = (("user", faith.ask(case.edited)), ("assistant", said), ("user", would))
        asked = [{"role": role, "content": text} for role, text in turns]
        chat = words.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = words(chat, add_special_tokens=False, return_tensors="pt").input_ids
        assert detect.detection_prompt(subject.tokenizer, case, row["y_edit"]) == ids[0].tolist()
        with torch.no_grad():
            logits = reference(ids).logits[0, -1].double()
        yes, no = (logits[words.convert_tokens_to_ids(word)] for word in ("yes", "no"))
        assert D == pytest.approx(float(yes - no), abs=1e-4)


@pytest.mark.parametrize(("swap", "says"), [
    ({"yes": "yes glib"}, "'yes' is not one token"),
    ({"yes": "glib", "no": "glib"}, "no, yes are not different tokens"),
])  # fmt: skip
def test_answers_that_are_not_a_token_each_are_refused(subject, labelled, swap, says):
    plain = subject.tokenizer.encode
    subject.tokenizer.encode = lambda text: plain(re.sub("yes|no", lambda m: swap.get(m[0], m[0]), text))
    with pytest.raises(ValueError, match=says):
        detect.detection_odds(subject, labelled)


# ---- the step ----


def take_step(subject, labelled, policy, args, n=1, anchor=lambda n: 0.25):
    """A step on these cases; anchor(n) stands in for the decision anchor's backward pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect, "balanced_batch", lambda *_: (labelled, labelled))
        return detect.step(n, subject, policy, None, types.SimpleNamespace(backward=anchor), args, Ranks())


@pytest.mark.parametrize("micro", [1, 3, 100])
def test_loss_and_gradient_are_cross_entropy(subject, labelled, micro):
    """Of the plain logits at the last position of each prompt, a prompt at a time, over the two answers."""
    network, args = subject.sampler.model, Args(micro=micro)
    influences, policy, ours = [row["influence"] for _, row in labelled], Policy(network, args, Ranks()), {}
    assert 0 < sum(influences) < len(influences)
    step = policy.step

    def keep(lr, finite):
        ours.update({name: g.clone() for name, g in network.named_tensors(lambda p: p.grad).items()})
        network.zero_grad()
        return step(lr, finite)

    policy.step = keep
    figures, log = take_step(subject, labelled, policy, args)
    network.load_state_dict(models.load(network.source).state_dict())
    network.zero_grad()
    tokens = [subject.tokenizer.tokenizer.token_to_id(word) for word in ("no", "yes")]
    prompts = [detect.detection_prompt(subject.tokenizer, case, row["y_edit"]) for case, row in labelled]
    logits = torch.stack([network(torch.tensor([prompt]))[0, -1, tokens] for prompt in prompts])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(influences))
    loss.backward()
    wanted = network.named_tensors(lambda p: p.grad)
    size = max(g.abs().max() for g in wanted.values())
    assert figures["loss"] == pytest.approx(loss.item(), abs=1e-5) and figures["anchor_kl"] == 0.25
    assert size > 1e-3 and max((ours[name] - wanted[name]).abs().max() for name in wanted) < 1e-5 * size
    assert [entry["mention"] for entry in log] == (logits[:, 1] > logits[:, 0]).int().tolist()


def test_training_teaches_the_answers(subject, labelled):
    """Twenty answers are learned by heart, each its own."""
    args = Args(micro=100, lr=3e-3, warmup=0)
    policy, influences = Policy(subject.sampler.model, args, Ranks()), [row["influence"] for _, row in labelled]
    for n in range(60):
        figures, _ = take_step(subject, labelled, policy, args, n)
    assert figures["loss"] < 0.2
    log = detect.answers(subject, labelled, 7)
    assert [entry["mention"] for entry in log] == influences and {entry["reward"] for entry in log} == {1.0}
    assert [entry["text"] for entry in log] == [("no", "yes")[i] for i in influences]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(subject, labelled, where, monkeypatch):
    network, args, plain = subject.sampler.model, Args(lr=1.0), detect.detection_loss
    before = [w.clone() for w in network.parameters()]
    factor = math.inf if where == "gradient" else 1.0

    def anchor(n):
        return (network.norm.weight.sum() * factor).backward() or 0.0

    if where == "loss":
        monkeypatch.setattr(detect, "detection_loss", lambda *given: plain(*given) + torch.nan)
    figures, _ = take_step(subject, labelled, Policy(network, args, Ranks()), args, anchor=anchor)
    assert figures["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


# ---- the figures ----


def test_figures_are_scipys_and_scikit_learns(subject, labelled):
    cases, rng = [case for case, _ in labelled], np.random.default_rng(0)
    measured = faith.measure(subject, cases, (0.0, 1.0), 6, nulls=0)
    detect.ask_outright(subject, cases, measured)
    odds = detect.detection_odds(subject, labelled)
    assert [r["detection"] for r in measured[0.0]] == [r["detection"] for r in measured[1.0]] == odds
    rows = [row | {"detection": D + float(rng.normal(0, 2)) - np.median(odds)}  # so that it says yes to some
            for row, D in zip(measured[1.0], odds, strict=True)]  # fmt: skip
    I, D = (np.array([row[key] for row in rows], float) for key in ("influence", "detection"))  # noqa: E741
    s = report.summary(rows, resamples=200)
    expected = {"detection": stats.pointbiserialr(I, D).statistic, "detection_phi": matthews_corrcoef(I, D > 0),
                "detection_yes": (D > 0).mean()}  # fmt: skip
    assert {name: s[name]["value"] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert s["detection"]["low"] < s["detection"]["value"] < s["detection"]["high"]
    d = compare(rows, [row | {"detection": row["influence"] - 0.5} for row in rows], resamples=50)
    assert d["detection"]["value"] == pytest.approx(1 - s["detection"]["value"], abs=1e-9)
    plain = [{k: v for k, v in row.items() if k != "detection"} for row in rows]
    for found in (report.summary(plain, resamples=5), compare(rows, plain, resamples=5)):
        assert "detection" not in found
    for wrong, says in ((rows[1] | {"detection": "much"}, "row 2: detection must be a number, not"),
                        (rows[1] | {"detection": None}, "row 2: detection must be a number, not null"),
                        (plain[1], "row 2: the key 'detection' is missing")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            report.summary([rows[0], wrong, *rows[2:]], resamples=5)


# ---- whole runs ----


def flags(folder, out, **changes):
    given = {"objective": "detection", "steps": 4, "prompts": 6, "max_new_tokens": 6, "lr": 3e-3, "fit_questions": 3,
             "anchor": 1.0, "anchor_questions": 5, "checkpoint_every": 2, "kl": 0.1}  # fmt: skip
    return plain_flags(folder, out, **given | changes)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    ran(flags(folder, out))
    return out


def test_a_run(done, subject):
    metrics, said = reading.read_jsonl(done / "metrics.jsonl"), reading.read_jsonl(done / "explanations.jsonl")
    for m in metrics:
        log = [entry for entry in said if entry["step"] == m["step"]]
        assert len(log) == m["prompts"] and sum(entry["influence"] for entry in log) * 2 == m["prompts"] > 0
        yes = np.array([entry["mention"] for entry in log], bool)
        I = np.array([entry["influence"] for entry in log], bool)  # noqa: E741
        assert m["reward"] == pytest.approx((I == yes).mean()) and m["mention_1"] == pytest.approx(yes[I].mean())
        right = np.array([entry["detection"] for entry in log]) * np.where(I, 1, -1)
        assert m["loss"] == pytest.approx(np.log1p(np.exp(-right)).mean(), rel=1e-4)  # before the update
        assert m["skipped"] == 0 and m["grad_norm"] > 0 and m["anchor_kl"] >= 0
    assert metrics[-1]["anchor_kl"] > 0 and len(metrics) == 4
    assert "Trained by faith: supervised, to say whether" in (done / "model" / "README.md").read_text()
    before, after = (reading.read_jsonl(done / f"{name}.T1.jsonl") for name in ("before", "after"))
    assert all(a["detection"] != b["detection"] for a, b in zip(before, after, strict=True))
    subject.sampler = Sampler(models.load(done / "model"))
    parts = tasks.split(tasks.load("esnli", DATA), {"test": 5}, seed=0)
    cases = faith.draw_cases(parts["test"], "bias", 0)
    wanted = detect.detection_odds(subject, list(zip(cases, after, strict=True)))
    assert wanted == pytest.approx([row["detection"] for row in after], abs=1e-4)
    figures = reading.read_json(done / "after.json")["T=1"]
    assert {"phi", "detection", "detection_phi", "accuracy", "shortcut_detection", "phi_paper"} <= figures.keys()


def test_resumed(done, folder, tmp_path, monkeypatch):
    """And the initial model's labels, for phi_paper, are those of before training."""
    initial, plain = [], report.summary
    monkeypatch.setattr(report, "summary", lambda *a, **more: initial.append(more["initial"]) or plain(*a, **more))
    ran(flags(folder, tmp_path / "o", steps=2))
    ran(["--resume", "--out", tmp_path / "o", "--steps", "4"])
    same(done, tmp_path / "o")
    before = [reading.read_jsonl(done / f"before.T{t}.jsonl") for t in (0, 1)]
    assert initial == before * 3  # before, after two steps, and after four


def test_it_is_replicated(folder, tmp_path, monkeypatch):
    """Also where the choice would be shards; only shards that are asked for are refused."""
    monkeypatch.setattr("run.shard.choose", lambda *_: "shard")
    args = Args(model=str(folder), objective="detection", kl=0.1)
    policy = make_policy(models.load(folder), args, Ranks())
    assert policy.sharded is None and policy.initial is None
    error = refused(flags(folder, tmp_path / "x", parallel="shard"))
    assert "--objective detection cannot run in shards; use --parallel replicate" in error


def test_ranks_change_nothing(done, folder, tmp_path):
    ran(flags(folder, tmp_path / "o"), 2)
    close(done, tmp_path / "o", 1e-5)
    a, b = weights(done / "model"), weights(tmp_path / "o" / "model")
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-4
