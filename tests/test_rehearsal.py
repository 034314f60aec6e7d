"""rehearsal.rehearse: a pass as large as any that may come, and nothing else changes. On CUDA a run begins with it."""

import random

import pytest
import torch
from launch import flags, ran, refused, timeless, weights

import batches
import faith
import grpo
import model as models
import train
from lab import experiment, rehearsal
from rollout import Sampler
from run import lora
from run.args import Args
from run.policy import make_policy
from run.ranks import Ranks


@pytest.fixture
def forced(monkeypatch):
    """On the CPU, too, a run begins with it."""
    run = experiment.measure_and_train

    def rehearsed(args, ranks, policy, step, train, logged, subject, test, fit, stream):
        ranks.together(lambda: rehearsal.rehearse(subject, policy, stream.questions, args, ranks))
        return run(args, ranks, policy, step, train, logged, subject, test, fit, stream)

    monkeypatch.setattr(experiment, "measure_and_train", rehearsed)


@pytest.mark.parametrize("rank, dtype", [(0, torch.float32), (0, torch.bfloat16), (4, torch.bfloat16)])
def test_it_is_the_largest_pass(folder, questions, monkeypatch, rank, dtype):
    args = Args(model=str(folder), kl=0.1, anchor=1.0, micro=3, prompts=16, samples=5, max_new_tokens=7, lora=rank)
    network, seen, passes = models.load(folder, dtype=dtype), [], []
    network = lora.attach(network, rank, 8.0) if rank else network
    subject, ranks = faith.Subject(Sampler(network), models.Tokenizer(folder)), Ranks()
    policy = make_policy(network, args, ranks)
    pack, scores = train.pack, batches.option_scores
    monkeypatch.setattr(train, "pack", lambda groups, device: seen.append(groups) or pack(groups, device))
    monkeypatch.setattr(batches, "option_scores", lambda model, pairs, letters: passes.append(pairs)
                        or scores(model, pairs, letters))  # fmt: skip
    scored = grpo.token_logprobs
    monkeypatch.setattr(train, "token_logprobs", lambda model, *given: passes.append(model) or scored(model, *given))
    backward, gradients = policy.backward, []
    monkeypatch.setattr(policy, "backward", lambda loss: (backward(loss), gradients.append(
        all(master.grad is not None for master in policy.masters))))  # fmt: skip
    before = [w.clone() for w in network.parameters()]
    random.seed(3)
    generators = torch.get_rng_state(), random.getstate()
    rehearsal.rehearse(subject, policy, questions, args, ranks)
    drawn = [case.edited for case in faith.draw_cases(questions, "bias", 0)]
    lengths = sorted(len(faith.explanation_prompt(subject.tokenizer, q, 0)) for q in drawn)
    (groups,) = seen
    assert [len(prompt) for prompt, _ in groups] == sorted(len(prompt) for prompt, _ in groups)
    assert all(len(prompt) >= length for (prompt, _), length in zip(groups, lengths[-3:], strict=True))
    assert [[len(tokens) for tokens in answers] for _, answers in groups] == [[7] * 5] * 3
    pairs, *models_run = passes
    assert [len(pair) for pair in pairs] == [2, 2, 2] and pairs[0][0] != pairs[0][1]
    assert models_run == [policy.trained, policy.initial] and gradients == [True, True]
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert not policy.adam.state and all(w.grad is None for w in [*network.parameters(), *policy.masters])
    assert torch.equal(generators[0], torch.get_rng_state()) and generators[1] == random.getstate()


def test_it_changes_no_result(folder, tmp_path, request):
    given = {"kl": 0.05, "anchor": 1.0, "anchor_questions": 6, "eval_questions": 0}
    ran(flags(folder, tmp_path / "plain", **given))
    request.getfixturevalue("forced")
    ran(flags(folder, tmp_path / "forced", **given))
    for name in ("metrics.jsonl", "explanations.jsonl"):
        assert timeless(tmp_path / "plain" / name) == timeless(tmp_path / "forced" / name)
    plain, rehearsed = (weights(tmp_path / name / "model") for name in ("plain", "forced"))
    assert all(torch.equal(plain[name], rehearsed[name]) for name in plain)


def test_out_of_memory(folder, tmp_path, monkeypatch, forced):
    def full(*given):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 9."
        )

    monkeypatch.setattr(train, "token_logprobs", full)
    for changes, more in (({}, ", or add --recompute or --lora 16"), ({"recompute": True}, ", or add --lora 16"),
                          ({"recompute": True, "lora": 4}, "")):  # fmt: skip
        error = refused(flags(folder, tmp_path / "-".join(changes), **changes))
        assert error == (
            "train.py: the largest micro-batch does not fit into memory (CUDA out of memory. Tried to allocate 20.00 "
            f"MiB); lower --micro 4, --rows, --samples 4 or --max-new-tokens 10{more}\n"
        )
