"""Imitation of explanations that templates write: the targets, the loss and its gradient, whole runs."""

import types

import pytest
import torch
from launch import DATA, close, ran, refused, same
from launch import flags as plain_flags
from transformers import AutoModelForCausalLM, AutoTokenizer

import faith
import model as models
import reward
import tasks
from lab import detect, imitate
from run import reading
from run.args import Args
from run.policy import Policy, make_policy
from run.ranks import Ranks


def pick(n):
    """A generator that takes the n-th of everything."""
    return types.SimpleNamespace(choice=lambda of: of[n])


@pytest.mark.parametrize("kind", reward.KINDS)
@pytest.mark.parametrize("task", ["esnli", "social_iqa", "comve", "strategyqa"])
def test_targets_name_the_cause_where_there_is_one(kind, task):
    """Each template, for every pick. A target without influence has words that the question begins with."""
    for case in faith.draw_cases(tasks.load(task, DATA.parent / task)[:20], kind, 0):
        for y, option in enumerate(case.question.options):
            begins = (*case.question.parts, option)[0].split()[:3]
            for n in range(3):
                told, reason = (imitate.target(case, {"influence": i, "y_edit": y}, pick(n)) for i in (1, 0))
                assert reward.mentions(case.intervention, told) and not reward.mentions(case.intervention, reason)
                assert "{" not in told + reason and f"({'ABC'[case.intervention.suggestion or 0]})" in told + "(A)"
                assert " ".join(begins).strip(" .,?!") in reason and (n < 2 or f'"{option}"' in reason)
                for i, said in ((1, told), (0, reason)):  # the model's own answer comes first
                    row = {"influence": i, "y": (y + i) % 2, "y_edit": y}
                    assert imitate.target(case, row, pick(n), "alone") == f"By myself: ({'AB'[row['y']]}). {said}"
    assert len(imitate.REASONS) == len(imitate.NAMING[kind]) == 3


def take_step(subject, labelled, policy, args, n=1):
    """A step on these cases; 0.25 stands in for the anchor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect, "balanced_batch", lambda *_: (labelled, labelled))
        anchor = types.SimpleNamespace(backward=lambda n: 0.25)
        return imitate.step(n, subject, policy, None, anchor, args, Ranks())


@pytest.mark.parametrize("micro", [2, 100])
def test_loss_and_gradient_are_transformers(folder, subject, micro):
    """The mean cross entropy of the target's tokens and of the end of turn, in the model's own chat template."""
    cases = faith.draw_cases(tasks.load("esnli", DATA)[:7], "bias", 0)
    labelled = list(zip(cases, faith.decision_rows(subject, cases), strict=True))
    network, args, ours = subject.sampler.model, Args(micro=micro, max_new_tokens=6, temperature=0.7), {}
    policy = Policy(network, args, Ranks())
    step = policy.step

    def keep(lr, finite):
        ours.update({name: g.clone() for name, g in network.named_tensors(lambda p: p.grad).items()})
        return step(lr, finite)

    policy.step = keep
    figures, log = take_step(subject, labelled, policy, args)
    reference, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses = []
    for (case, row), entry in zip(labelled, log, strict=True):
        assert entry["target"] in {imitate.target(case, row, pick(n)) for n in range(3)}
        turns = faith.explanation_turns(case.edited, row["y_edit"])
        chats = [words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)]
        chats += [chats[0] + entry["target"] + "<|im_end|>"]
        before, whole = (words(chat, add_special_tokens=False).input_ids for chat in chats)
        logits = reference(torch.tensor([whole])).logits[0, len(before) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(whole[len(before) :]), reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    wanted = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    size = max(g.abs().max() for g in wanted.values())
    assert figures["loss"] == pytest.approx(loss.item(), abs=1e-5) and figures["anchor_kl"] == 0.25
    assert size > 1e-3 and ours.keys() == wanted.keys()
    assert max((ours[name] - wanted[name]).abs().max() for name in wanted) < 1e-4 * size
    for (case, row), entry in zip(labelled, log, strict=True):  # what the model itself said
        assert entry["mention"] == reward.mentions(case.intervention, entry["text"]) and entry["tokens"] <= 6
        assert entry["reward"] == (entry["mention"] == row["influence"])


def flags(folder, out, **changes):
    given = {"objective": "imitation", "steps": 2, "prompts": 6, "max_new_tokens": 6, "lr": 3e-3, "fit_questions": 3,
             "checkpoint_every": 1, "kl": 0.1, "frozen_questions": 16, "labels": "frozen"}  # fmt: skip
    return plain_flags(folder, out, **given | changes)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    ran(flags(folder, out))
    return out


def test_a_run(done):
    metrics, said = reading.read_jsonl(done / "metrics.jsonl"), reading.read_jsonl(done / "explanations.jsonl")
    assert len(said) == sum(m["prompts"] for m in metrics) and metrics[-1]["loss"] < metrics[0]["loss"]
    asked = {(e["id"], e["text_inserted"]) for e in said}
    assert len({(e["id"], e["text_inserted"], e["target"]) for e in said}) > len(asked)  # drawn anew
    assert all((e["word"] in e["target"]) == e["influence"] for e in said)
    assert "supervised, on explanations that templates wrote" in (done / "model" / "README.md").read_text()
    assert "detection" not in reading.read_json(done / "after.json")["T=1"]


def test_resumed(done, folder, tmp_path):
    ran(flags(folder, tmp_path / "o", steps=1))
    ran(["--resume", "--out", tmp_path / "o", "--steps", "2"])
    same(done, tmp_path / "o")


def test_shards_change_nothing(done, folder, tmp_path):
    ran(flags(folder, tmp_path / "o", parallel="shard"), 2)
    close(done, tmp_path / "o", 1e-4)


def test_no_opening_and_no_reference(folder, tmp_path):
    args = Args(model=str(folder), objective="imitation", kl=0.1)
    assert make_policy(models.load(folder), args, Ranks()).initial is None
    assert "leave out --opening" in refused(flags(folder, tmp_path / "x", opening="My"))


def test_the_form_is_learned_from_shuffled_labels(folder, tmp_path):
    """The model's own answer is the true one; the edit is named by labels that say nothing of its influence."""
    ran(flags(folder, tmp_path / "o", labels="shuffled", why="alone"))
    said = reading.read_jsonl(tmp_path / "o" / "explanations.jsonl")
    assert all(e["target"].startswith(f"By myself: ({'ABC'[e['y']]}). ") for e in said)
    assert all((e["word"] in e["target"]) == e["influence"] for e in said)
    assert 0 < sum(e["influence"] == (e["y"] != e["y_edit"]) for e in said) < len(said)
