"""Which questions a step trains on: the stream, labels of the current model, balance; the decision anchor."""

import dataclasses

import numpy as np
import pytest
import torch
from launch import DATA, SMALL, flags, ran, same

import batches
import faith
import reward
import tasks
import train
from batches import DecisionAnchor, NothingToBalance, Stream, balance, balanced_batch, label, shuffle_influence
from rollout import Completion
from run import reading
from run.args import Args
from run.policy import Policy
from run.ranks import Ranks

QUESTIONS = tasks.load("esnli", DATA)


def arguments(**changes):
    return Args(**SMALL | changes)


def labelled_cases(subject, n):
    return label(subject, Stream(QUESTIONS, arguments()).next_cases(n), Ranks())


def move(network, size=0.3):
    """Changes the weights by noise, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in network.parameters():
            w += size * torch.randn(w.shape, generator=generator)


def test_balance():
    def chosen(influences, size):
        return [i for i, _ in balance([(i, {"kind": "bias", "influence": x}) for i, x in enumerate(influences)], size)]

    assert chosen([0, 0, 1, 0, 1, 1, 0], 4) == [2, 0, 4, 1]  # the first of either kind, alternating
    assert chosen([0, 0, 1, 0, 1, 1, 0], 5) == [2, 0, 4, 1]
    assert chosen([0, 1, 0, 0], 4) == [1, 0]  # fewer of both if one kind is short
    assert chosen([0, 0, 0], 4) == chosen([1, 1], 4) == chosen([], 4) == []


def test_balanced_batch(subject):
    """Half and half by what the current model does, with no more labels than needed, also when it has changed."""

    def drawn(stream, **changes):
        return balanced_batch(subject, stream, 0, arguments(**changes), Ranks())

    stream = Stream(QUESTIONS, arguments())
    for _ in range(2):
        batch, labelled = drawn(stream, prompts=6, candidates=400)
        assert [row["influence"] for _, row in batch] == [1, 0] * 3 and len(labelled) <= 100
        cases = [case for case, _ in labelled]
        for (case, row), logp in zip(labelled, zip(*faith.decide_pairs(subject, cases), strict=True), strict=True):
            assert (row["id"], row["y"], row["y_edit"]) == (case.question.id, *(int(x.argmax()) for x in logp))
            assert row["influence"] == (row["y"] != row["y_edit"])
        move(subject.sampler.model)
    batch, labelled = drawn(Stream(QUESTIONS, arguments()), prompts=60, candidates=50)
    assert len(labelled) == 50 and 0 < len(batch) <= 50
    assert sum(row["influence"] for _, row in batch) * 2 == len(batch)
    with pytest.raises(NothingToBalance, match="none or all of 1 edits"):
        drawn(stream, candidates=1)


def test_frozen_labels_are_drawn_anew_at_each_step(subject):
    args = arguments(labels="frozen")
    stream = Stream(QUESTIONS, args)
    stream.frozen = label(subject, stream.next_cases(40), Ranks())
    drawn = [balanced_batch(subject, stream, n, args, Ranks()) for n in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(labelled) == 40 for _, labelled in drawn)


def test_shuffled_labels_are_a_permutation(subject):
    """Of I alone, among the cases of a task, by seed, and uncorrelated. Balance and reward go by the permuted ones."""
    plain = labelled_cases(subject, 40)
    plain += [(dataclasses.replace(case, question=dataclasses.replace(case.question, task="other")), row)
              for case, row in plain[:10]]  # fmt: skip
    mixed = shuffle_influence(plain, 0)

    def influences(labelled, task):
        return [row["influence"] for case, row in labelled if case.question.task == task]

    assert [(case, row | {"influence": 0}) for case, row in mixed] == [(c, r | {"influence": 0}) for c, r in plain]
    for task in ("esnli", "other"):
        assert sorted(influences(mixed, task)) == sorted(influences(plain, task))
        x, y = influences(plain, task), influences(mixed, task)
        rounding = 0.5 * len(x) / (sum(x) * (len(x) - sum(x)))
        assert x != y and abs(np.corrcoef(x, y)[0, 1]) <= rounding + 1e-9
    assert shuffle_influence(plain, 0) == mixed != shuffle_influence(plain, 1)
    args, stream = arguments(labels="shuffled", prompts=60), Stream(QUESTIONS, arguments())
    stream.frozen = mixed[:40]
    batch, labelled = balanced_batch(subject, stream, 0, args, Ranks())
    assert len(labelled) == 40 and sum(row["influence"] for _, row in batch) * 2 == len(batch) > 0
    assert sum(row["influence"] != (row["y"] != row["y_edit"]) for _, row in batch) > 2
    group = [Completion([subject.tokenizer.tokenizer.token_to_id("uncle")], [0.0], False)]
    for case, row in batch:
        (entry,) = train.score(subject, case, row, group, 0)
        assert entry["reward"] == ((case.intervention.word == "uncle") == row["influence"])


def test_a_run_with_shuffled_labels_is_measured_with_the_true_ones(folder, tmp_path):
    ran(flags(folder, tmp_path / "o", labels="shuffled", steps=3, eval_questions=8, checkpoint_every=2))
    log, tested = (reading.read_jsonl(tmp_path / "o" / f"{name}.jsonl") for name in ("explanations", "after.T1"))
    moved = [e["influence"] != (e["y"] != e["y_edit"]) for e in log]
    assert any(moved) and not all(moved) and all((e["mention"] == e["influence"]) == e["reward"] for e in log)
    assert [r["influence"] for r in tested] == [r["y"] != r["y_edit"] for r in tested]
    ran(flags(folder, tmp_path / "p", labels="shuffled", steps=2, eval_questions=8, checkpoint_every=2))
    ran(["--resume", "--out", tmp_path / "p", "--steps", "3"])
    same(tmp_path / "o", tmp_path / "p")


def test_stream():
    """Every question once an epoch, each epoch with a new order and new edits, only words for training."""
    args, n = arguments(), len(QUESTIONS)
    stream, twin = Stream(QUESTIONS, args), Stream(QUESTIONS, args)
    cases = stream.next_cases(7) + stream.next_cases(33)
    assert cases == twin.next_cases(40) and stream.drawn == 40
    first, second = cases[:n], cases[n : 2 * n]
    assert {c.question.id for c in first} == {c.question.id for c in second} == {q.id for q in QUESTIONS}
    assert [c.question.id for c in first] != [c.question.id for c in second]
    assert {c.edited for c in first} != {c.edited for c in second}
    assert {c.intervention.word for c in cases} <= set(reward.words("bias", held_out=False))
    assert Stream(QUESTIONS, arguments(seed=1)).next_cases(40) != cases
    for taken in (0, 7, n, n + 3):  # it goes on from anywhere
        stream, resumed = Stream(QUESTIONS, args), Stream(QUESTIONS, args)
        stream.next_cases(taken) if taken else None
        resumed.resume_at(**stream.position())
        assert resumed.next_cases(9) == stream.next_cases(9) and resumed.drawn == taken + 9
    wordless = [tasks.Question("strategyqa", "1", ("Hm?",), ("yes", "no"), 0, "1")]
    few = [dataclasses.replace(wordless[0], id=str(k), group=str(k)) for k in range(20)]
    few.append(dataclasses.replace(wordless[0], id="20", parts=("Does he eat an apple every day?",)))
    usable = Stream(few, arguments(intervention="adverb"))  # however far apart its turns in two epochs are
    assert {case.question.id for case in usable.next_cases(40)} == {"20"}
    with pytest.raises(ValueError, match="no training question of strategyqa has a place"):
        Stream(wordless, arguments(intervention="adverb")).next_cases(1)


def anchor_of(subject, labelled, **changes):
    args = arguments(**changes)
    return DecisionAnchor(subject, Policy(subject.sampler.model, args, Ranks()), labelled, args, Ranks())


@pytest.mark.parametrize("offsets", [None, [-1.0, -2.0, -0.5]])
@pytest.mark.parametrize("weight, micro", [(2.0, 4), (0.5, 2), (0.5, 1)])
def test_anchor_by_hand(subject, offsets, weight, micro):
    """Loss and gradient of KL(initial ‖ current) over the letters of X and X', against each prompt alone."""
    subject.offsets = {} if offsets is None else {"esnli": np.array(offsets)}
    labelled = labelled_cases(subject, 3)
    network, tokenizer = subject.sampler.model, subject.tokenizer
    anchor = anchor_of(subject, labelled, prompts=6, anchor=weight, micro=micro)
    assert abs(anchor.backward(1)) < 1e-6  # nothing has moved yet
    move(network)
    network.zero_grad()
    figure = anchor.backward(1)
    ours = {name: g.clone() for name, g in network.named_tensors(lambda p: p.grad).items()}
    network.zero_grad()
    kl = 0.0
    for case, row in labelled:
        for question, p in ((case.question, row["p"]), (case.edited, row["p_edit"])):
            prompt = faith.decision_prompt(tokenizer, question)
            logits = network(torch.tensor([prompt]))[0, -1, faith.letter_tokens(tokenizer, 3)]
            q = (logits - torch.tensor(offsets or [0.0] * 3)).softmax(-1)
            kl = kl + (torch.tensor(p) * (torch.tensor(p).log() - q.log())).sum() / 6
    (weight * kl).backward()
    theirs = network.named_tensors(lambda p: p.grad)
    assert kl > 0.01 and float(figure) == pytest.approx(kl.item(), rel=1e-4)
    size = max(g.abs().max() for g in theirs.values())
    assert size > 1e-4 and max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-5 * size
    assert anchor_of(subject, [], anchor=weight).backward(1) == 0.0


def test_the_anchor_takes_other_questions_at_each_step(subject, monkeypatch):
    labelled, asked, scores = labelled_cases(subject, 30), [], batches.option_scores
    monkeypatch.setattr(batches, "option_scores", lambda m, pairs, o: asked.append(pairs) or scores(m, pairs, o))
    anchor = anchor_of(subject, labelled, prompts=8, anchor=1.0, micro=3)
    for n in (1, 2, 2):
        anchor.backward(n)
    assert asked[:2] != asked[2:4] == asked[4:] and [len(pairs) for pairs in asked] == [3, 1] * 3


def test_samples_of_a_step(subject):
    """Explanations of the prompt with the current pick, drawn anew at each step, rewarded where M = I."""
    args = arguments()
    batch = labelled_cases(subject, 12)
    prompts = [faith.explanation_prompt(subject.tokenizer, c.edited, row["y_edit"]) for c, row in batch]
    keys = [case.key for case, _ in batch]
    answers = train.sample(subject, prompts, keys, 0, args)
    for (case, row), group in zip(batch, answers, strict=True):
        entries, texts = train.score(subject, case, row, group, 7), [subject.tokenizer.decode(c.tokens) for c in group]
        assert [e["text"] for e in entries] == texts and len(entries) == 4
        for entry, text in zip(entries, texts, strict=True):
            assert (entry["step"], entry["id"]) == (7, case.question.id)
            assert entry["mention"] == (case.intervention.word in text.split())
            assert entry["reward"] == float(entry["mention"] == row["influence"])
    assert train.sample(subject, [], [], 0, args) == []  # a rank without work

    def drawn(n, seed, order=1):
        groups = train.sample(subject, prompts[::order], keys[::order], n, arguments(seed=seed))
        return [c.tokens for group in groups[::order] for c in group]

    tokens = [c.tokens for group in answers for c in group]
    assert drawn(0, 0, order=-1) == tokens
    for n, seed in ((1, 0), (0, 1)):
        assert sum(a == b for a, b in zip(tokens, drawn(n, seed), strict=True)) < 5


def test_the_step_asks_with_the_opening_and_as_why_says(subject, monkeypatch):
    """Forced first words are in the prompt of the samples, with the letter of the pick, and not in what is measured."""
    args, asked, sample = arguments(), [], train.sample
    subject.opening, subject.why = "the hypothesis ({letter}) is true", "neutral"
    monkeypatch.setattr(train, "sample", lambda s, prompts, *rest: asked.append(prompts) or sample(s, prompts, *rest))
    policy = Policy(subject.sampler.model, args, Ranks())
    batch, _ = balanced_batch(subject, Stream(QUESTIONS, args), 0, args, Ranks())
    _, log = train.step(0, subject, policy, Stream(QUESTIONS, args), anchor_of(subject, []), args, Ranks())
    for (case, row), prompt in zip(batch, asked[0], strict=True):
        plain = faith.explanation_prompt(subject.tokenizer, case.edited, row["y_edit"], why="neutral")
        assert prompt == plain + subject.tokenizer.encode(f"the hypothesis ({'ABC'[row['y_edit']]}) is true")
    assert len(log) == 16 and not any("hypothesis" in e["text"][:12] for e in log)
