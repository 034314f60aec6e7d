"""train.py: the loss is GRPO's, however a step is cut up; what a run writes, refuses and repeats."""

import contextlib
import copy
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch

import faith
import kernels
import model as models
import reward
import tasks
import train
from rollout import Completion, Sampler

DATA = tiny.ROOT / "tests" / "data" / "esnli"
SMALL = {"steps": 2, "prompts": 4, "samples": 4, "candidates": 96, "frozen_questions": 40, "max_new_tokens": 10,
         "lr": 1e-3, "warmup": 0, "eval_questions": 5, "fit_questions": 5, "task": "esnli",
         "intervention": "bias"}  # fmt: skip
FORMS = ("grpo", "dapo", "dr_grpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model"))


@pytest.fixture
def network(folder):
    return models.load(folder)


@pytest.fixture(params=tiny.FAMILIES)
def each(request, tmp_path):
    """A network of each family."""
    return models.load(tiny.build(tmp_path, family=request.param))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same shape with other weights, as a reference."""
    return models.load(tiny.build(tmp_path_factory.mktemp("other"), seed=18)).requires_grad_(False)


# ---- the pure functions --------------------------------------------------------------------------------------


def test_advantages():
    rewards = [[1.0, 0, 0, 1, 1], [0.0, 1, 0, 0, 0], [1.0, 1, 1, 1, 1], [0.5, 2, -1, 0, 3]]
    for form in ("std", "mean"):
        got = train.advantages(torch.tensor(rewards), form)
        for row, wanted in zip(got.tolist(), rewards, strict=True):
            mean = sum(wanted) / 5
            std = math.sqrt(sum((r - mean) ** 2 for r in wanted) / 4)  # ddof 1
            scale = std + 1e-4 if form == "std" else 1
            assert row == pytest.approx([(r - mean) / scale for r in wanted], abs=1e-6)
        assert got[2].tolist() == [0.0] * 5
        assert got.mean(1).abs().max() < 1e-6


def test_token_weights():
    lengths = torch.tensor([3, 1, 2])  # of a step with 10 completions and 40 tokens in all
    got = {form: train.token_weights(lengths, form, 7, 10, 40).tolist() for form in FORMS}
    assert got["grpo"] == pytest.approx([1 / 30] * 3 + [1 / 10] + [1 / 20] * 2)
    assert got["dapo"] == pytest.approx([1 / 40] * 6)
    assert got["dr_grpo"] == pytest.approx([1 / 70] * 6)


def test_policy_loss():
    for ratio in (0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 3.0):
        for A in (-2.0, -0.5, 0.0, 0.5, 2.0):
            x = torch.tensor([-1.0], requires_grad=True)
            loss = train.policy_loss(x, x.detach() - math.log(ratio), torch.tensor([A]), 0.2, 0.3)
            clipped = min(max(ratio, 0.8), 1.3)
            assert loss.item() == pytest.approx(-min(ratio * A, clipped * A), abs=1e-6)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            stopped = (A > 0 and ratio > 1.3) or (A < 0 and ratio < 0.8)
            assert gradient.item() == pytest.approx(0 if stopped else -ratio * A, abs=1e-5)


def test_kl_k3():
    """Its mean over samples is the KL, in value; by the token it is exp(d) - d - 1."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    k3 = train.kl_k3(p.log(), q.log())
    assert (k3 >= 0).all() and train.kl_k3(p.log(), p.log()).abs().max() == 0
    assert (p * k3).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)
    assert k3.tolist() == pytest.approx([math.expm1(d) - d for d in (q / p).log().tolist()], abs=1e-6)


def test_learning_rate():
    def rates(**changes):
        args = train.Args(**{"lr": 2.0, "warmup": 4, "steps": 14, **changes})
        return [train.learning_rate(step, args) for step in range(args.steps)]

    warm = [0.5, 1.0, 1.5, 2.0]
    assert rates(decay="constant") == pytest.approx(warm + [2.0] * 10)
    assert rates(decay="linear") == pytest.approx(warm + [2 - 1.8 * i / 9 for i in range(10)])
    cosine = [0.2 + 0.9 * (1 + math.cos(math.pi * i / 9)) for i in range(10)]
    assert rates(decay="cosine") == pytest.approx(warm + cosine)
    for decay in ("linear", "cosine"):
        assert rates(decay=decay)[-1] == pytest.approx(0.2)
        assert rates(decay=decay, warmup=0, steps=1) == [2.0]
        assert rates(decay=decay, warmup=3, steps=2) == pytest.approx([2 / 3, 4 / 3])


# ---- the loss of a step --------------------------------------------------------------------------------------


def noisy_groups(network, temperature, seed=0, P=5, G=4, longest=10):
    """P groups of G ragged random completions and their rewards; old logprobs are off by some, so that ratios
    differ from 1 and some are clipped. The first group is of length 1 throughout, the second is flat."""
    generator = random.Random(seed)
    groups, rewards = [], []
    for p in range(P):
        prompt = [generator.randrange(5, 240) for _ in range(generator.choice([1, 4, 9, 17]))]
        lengths = [1 if p == 0 else generator.randint(1, longest) for _ in range(G)]
        lengths[-1] = 1 if p == 0 else longest
        answers = []
        for length in lengths:
            tokens = [generator.randrange(5, 240) for _ in range(length - 1)] + [tiny.END]
            with torch.no_grad():
                logits = network(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1] / temperature
            now = logits.log_softmax(-1)[range(length), tokens].tolist()
            answers.append(Completion(tokens, [lp + generator.gauss(0, 0.3) for lp in now], True))
        groups.append((prompt, answers))
        rewards.append([1.0] * G if p == 1 else [0.0, 1.0, *(float(generator.random() < 0.5) for _ in range(G - 2))])
    return groups, rewards


class Keep:
    """Stands in for the optimizer: keeps the gradient of a step and changes nothing."""

    def __init__(self, network):
        self.network = network
        network.zero_grad()

    def accumulate(self):
        pass

    def step(self, lr, clip_norm, ranks, good=True):
        self.gradient = {name: g.clone() for name, g in self.network.named_tensors(lambda p: p.grad).items()}
        return math.sqrt(sum(float(g.square().sum()) for g in self.gradient.values()))


def stepped(network, groups, rewards, reference=None, **changes):
    """(figures, gradient) of one update by the product."""
    keep = Keep(network)
    args = train.Args(**{"max_new_tokens": 12, "micro": 100, **changes})
    figures = train.update(network, reference, keep, groups, rewards, 0.0, args, train.Ranks())
    return figures, keep.gradient


def by_hand(network, groups, rewards, reference=None, **changes):
    """The same from the definition: a completion at a time, every logit, no packing, no cases left out."""
    args = train.Args(**{"max_new_tokens": 12, **changes})
    N = sum(len(answers) for _, answers in groups)
    tokens = sum(len(c.tokens) for _, answers in groups for c in answers)
    loss = kl = clipped = gap = nll = 0.0
    largest = 0.0
    for (prompt, answers), r in zip(groups, rewards, strict=True):
        A = np.array(r) - np.mean(r)
        A = A / (np.std(r, ddof=1) + 1e-4) if args.advantage == "std" else A
        for c, a in zip(answers, A, strict=True):
            row = torch.tensor([prompt + c.tokens])
            at = range(len(prompt) - 1, len(prompt) + len(c.tokens) - 1)
            scale = {"grpo": N * len(c.tokens), "dapo": tokens, "dr_grpo": N * args.max_new_tokens}[args.loss]
            logp = (network(row)[0] / args.temperature).log_softmax(-1)[at, c.tokens]
            ratio = (logp - torch.tensor(c.logprobs)).exp()
            bound = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
            each = -torch.minimum(ratio * a, bound * a)
            if reference is not None:
                ref = (reference(row)[0] / args.temperature).log_softmax(-1)[at, c.tokens]
                k3 = (ref - logp).exp() - (ref - logp) - 1
                each = each + args.kl * k3
                kl += k3.sum().item() / tokens
            loss = loss + each.sum() / scale
            clipped += ((bound - ratio) * a < 0).sum().item()
            if reference is not None or min(r) < max(r):
                gap += (logp - torch.tensor(c.logprobs)).abs().sum().item()
                nll -= logp.sum().item()
                largest = max(largest, (logp - torch.tensor(c.logprobs)).abs().max().item())
    network.zero_grad()
    loss.backward()
    live = [(g, r) for g, r in zip(groups, rewards, strict=True) if reference is not None or min(r) < max(r)]
    scored = sum(len(c.tokens) for (_, answers), _ in live for c in answers)
    figures = {"loss": loss.item(), "kl": kl, "clipped": clipped / scored, "sampler_gap": gap / scored,
               "nll": nll / scored, "sampler_gap_max": largest, "anchor_kl": 0.0, "skipped": 0}  # fmt: skip
    gradient = {name: g.clone() for name, g in network.named_tensors(lambda p: p.grad).items()}
    figures["grad_norm"] = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    return figures, gradient


def close(a, b, tolerance=1e-5):
    """Two (figures, gradient) pairs agree, the gradient relative to its largest entry."""
    assert a[0] == pytest.approx(b[0], rel=tolerance, abs=tolerance)
    size = max(g.abs().max() for g in b[1].values())
    assert size > 1e-4 and a[1].keys() == b[1].keys()
    assert max((a[1][name] - b[1][name]).abs().max() for name in b[1]) < tolerance * size


def one_by_one(q, k, v, runs):
    """What kernels.kernel gives, a run at a time; no log-sums."""
    outs = []
    for (a, b), (x, y) in zip(*(itertools.pairwise(ends.tolist()) for ends in runs[:2]), strict=True):
        assert 0 < b - a <= runs.q_most and b - a <= y - x <= runs.k_most
        some = [t.transpose(0, 1)[None] for t in (q[a:b], k[x:y], v[x:y])]
        mask = torch.ones(b - a, y - x).tril(y - x - b + a).bool()
        outs.append(torch.nn.functional.scaled_dot_product_attention(*some, attn_mask=mask, enable_gqa=True))
    assert runs.q_ends.dtype == runs.k_ends.dtype == torch.int32 and (b, y) == (len(q), len(k))
    return torch.cat(outs, 2)[0].transpose(0, 1), None


def test_all_parts_at_once(each, monkeypatch):
    """As on a GPU, where one kernel is told of all runs: logprobs, their gradient, options, samples."""
    groups, _ = noisy_groups(each, 1.0)
    groups = [(p, [c.tokens for c in g]) for p, g in groups]
    prompts, results, calls = [prompt + [7] * (i % 2) for prompt, _ in groups for i in range(2)], [], []

    def forward(q, k, v, runs):
        calls.append("gathered" if runs.keys is not None else "plain")
        return one_by_one(q, k, v, runs)

    def backward(grad, q, k, v, out, log_sums, runs):
        calls.append("backward")
        with torch.enable_grad():
            given = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(one_by_one(*given, runs)[0], given, grad)

    def called():
        taken = calls[:]
        calls.clear()
        return Counter(taken)

    seen = []
    for at_once in (False, True):
        if at_once:
            monkeypatch.setattr(kernels, "flashes", lambda q: True)
            monkeypatch.setattr(kernels, "kernel", forward)
            monkeypatch.setattr(kernels, "kernel_backward", backward)
        each.zero_grad()
        logprobs = train.token_logprobs(each, train.pack(groups), 1.0)
        logprobs.sum().backward()
        seen.append(called())
        sampler = Sampler(each)
        options = sampler.option_logprobs(prompts, [5, 6, 7], together=2)
        seen.append(called())
        drawn = [c.logprobs for g in sampler.generate(prompts, 3, 6) for c in g]
        seen.append(called())
        results.append((logprobs.detach(), options, {n: p.grad.clone() for n, p in each.named_parameters()}, drawn))
    assert seen == [{}] * 3 + [{"gathered": 2, "backward": 2}, {"gathered": 2}, {"plain": 2}]  # layers
    (a, b, c, d), (w, x, y, z) = results
    assert torch.allclose(a, w, atol=1e-4) and torch.allclose(b, x, atol=1e-4)
    assert all((c[name] - y[name]).abs().max() < 1e-4 * c[name].abs().max() + 1e-5 for name in c)
    assert [len(lp) for lp in d] == [len(lp) for lp in z]
    assert sum(d, []) == pytest.approx(sum(z, []), abs=1e-4)


def test_what_samples_share_is_summed_in_fp32(monkeypatch):
    """The gradient of a prompt's keys, in bf16 the sum of many samples' that each are lost beside it."""
    monkeypatch.setattr(kernels, "flashes", lambda q: True)
    monkeypatch.setattr(kernels, "kernel", lambda q, k, v, runs: (q.clone(), None))
    monkeypatch.setattr(
        kernels, "kernel_backward", lambda grad, q, k, v, *rest: (grad, torch.ones_like(k), torch.ones_like(v))
    )
    q, k, v = (torch.zeros(1, 1, 2 + 900, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    look = kernels.over_parts([(0, 2, 0, 0, [2]), (2, 902, 0, 2, [3] * 300)])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = look(0, q, k, v)
    assert kept and max(len(x) for x in kept) == 902  # not once for every sample
    out.sum().backward()
    for x in (k, v):
        assert (x.grad[0, 0, :2] == torch.tensor(301.0).bfloat16()).all()  # in bf16 1 + 256 is 256
        assert (x.grad[0, 0, 2:] == 1).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_loss_and_gradient_by_hand(each, other, form, kl):
    network = each
    settings = {"loss": form, "advantage": "std" if form != "dr_grpo" else "mean", "kl": kl, "temperature": 0.8,
                "clip_low": 0.2, "clip_high": 0.3}  # fmt: skip
    groups, rewards = noisy_groups(network, 0.8)
    reference = other if kl else None
    wanted = by_hand(network, groups, rewards, reference, **settings)
    assert 0.05 < wanted[0]["clipped"] < 0.6
    for micro in (1, 2, 100):
        close(stepped(network, groups, rewards, reference, micro=micro, **settings), wanted)
    ran = []
    network.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    network.recompute = True  # activation checkpointing: each block runs again in backward, the gradient is the same
    close(stepped(network, groups, rewards, reference, micro=100, **settings), wanted)
    assert len(ran) == 2


@pytest.mark.parametrize("form", FORMS)
def test_how_a_step_is_cut_up_changes_nothing(network, other, form, monkeypatch):
    groups, rewards = noisy_groups(network, 1.0, seed=1, P=7)
    wanted = stepped(network, groups, rewards, other, loss=form, kl=0.1)
    order = [3, 0, 6, 1, 5, 2, 4]
    moved = [groups[i] for i in order], [rewards[i] for i in order]
    close(stepped(network, *moved, other, loss=form, kl=0.1, micro=3), wanted)
    shared = train.pack
    alone = lambda groups, device: shared([(p, [c]) for p, cs in groups for c in cs], device)  # noqa: E731
    monkeypatch.setattr(train, "pack", alone)  # each completion in a row of its own
    close(stepped(network, groups, rewards, other, loss=form, kl=0.1, micro=2), wanted)


def test_flat_groups_may_be_left_out(network):
    """Without a KL they are skipped, with a KL of weight 0 they are kept: the gradient is the same."""
    groups, rewards = noisy_groups(network, 1.0, seed=3)
    skipped = stepped(network, groups, rewards)
    kept = stepped(network, groups, rewards, reference=network, kl=0.0)
    close(({"loss": skipped[0]["loss"]}, skipped[1]), ({"loss": kept[0]["loss"]}, kept[1]))


def test_a_step_of_flat_groups_only(network):
    groups, _ = noisy_groups(network, 1.0)
    optimizer = train.Optimizer(network, train.Args())
    before = [w.clone() for w in network.parameters()]
    figures = train.update(network, None, optimizer, groups, [[1.0] * 4] * 5, 1e-3, train.Args(), train.Ranks())
    assert (figures["loss"], figures["grad_norm"]) == (0, 0) and math.isnan(figures["nll"])
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_logprobs_do_not_depend_on_neighbours(network):
    groups, _ = noisy_groups(network, 1.0, seed=4)
    groups = [(prompt, [c.tokens for c in answers]) for prompt, answers in groups]
    with torch.no_grad():
        together = train.token_logprobs(network, train.pack(groups), 0.9)
        changed = [(p, [cs[0], *([7] * len(c) for c in cs[1:])]) for p, cs in groups]
        changed = train.token_logprobs(network, train.pack(changed), 0.9)
        alone = [train.token_logprobs(network, train.pack([(p, [c])]), 0.9) for p, cs in groups for c in cs]
        chunked = train.token_logprobs(network, train.pack(groups), 0.9, chunk=3)
    assert (together - torch.cat(alone)).abs().max() < 1e-5
    assert (together - chunked).abs().max() < 1e-5
    start = 0
    for _, cs in groups:
        assert (together - changed)[start : start + len(cs[0])].abs().max() < 1e-5
        start += sum(map(len, cs))


def test_gradient_reaches_explanations_and_nothing_else(network):
    """d loss / d logits, against -weight · A · (one-hot − p); the token that ends a turn has its share."""
    groups, rewards = noisy_groups(network, 1.0, seed=5)
    packed = train.pack([(prompt, [c.tokens for c in answers]) for prompt, answers in groups])
    with torch.no_grad():
        exact = train.token_logprobs(network, packed, 1.0).split([len(c.tokens) for _, cs in groups for c in cs])
    exact = iter(exact)
    groups = [(p, [Completion(c.tokens, next(exact).tolist(), c.ended) for c in cs]) for p, cs in groups]
    head, tapped = network.head, []

    def tap(states):
        logits = head(states)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: tapped.append((gradient, logits.detach())))
        return logits

    network.head = tap
    stepped(network, groups, rewards, loss="dr_grpo", advantage="mean")
    ((gradient, logits),) = tapped  # one pass over all live completions: prompts have no logits at all
    live = [(cs, r) for (_, cs), r in zip(groups, rewards, strict=True) if min(r) < max(r)]
    tokens = [(t, r[i] - sum(r) / 4) for cs, r in live for i, c in enumerate(cs) for t in c.tokens]
    N = 4 * len(groups)
    assert len(gradient) == len(tokens)
    targets, A = torch.tensor([t for t, _ in tokens]), torch.tensor([a for _, a in tokens])
    one_hot = torch.nn.functional.one_hot(targets, logits.shape[1])
    wanted = -A[:, None] / (N * 12) * (one_hot - logits.softmax(-1))
    assert (gradient - wanted).abs().max() < 1e-7
    ends = (targets == tiny.END) & (A != 0)
    assert ends.sum() > 8 and (gradient[ends, tiny.END].abs() > 1e-4).all()
    start, sources = 0, packed.sources.split([sum(len(c.tokens) for c in cs) for _, cs in groups])
    for (prompt, cs), at in zip(groups, sources, strict=True):  # the prompt gives its last state, once for each
        last = start + len(prompt) - 1
        assert (at >= last).all() and (at == last).sum() == len(cs)
        start += len(prompt) + sum(len(c.tokens) - 1 for c in cs)


# ---- against TRL ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_trainer(folder, other, tmp_path_factory):
    """TRL's own trainer on the tiny model, fed our tokens by its rollout hook and our rewards by its reward hook."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import transformers

    fed = {}
    config = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=20, num_generations=4, beta=0.3,
        use_cpu=True, bf16=False, report_to="none", max_completion_length=12, temperature=0.8, disable_tqdm=True,
        use_bias_correction_kl=False,  # ours is k3 as GRPO's paper has it, not multiplied by the ratio
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": str(i)} for i in range(5)]),
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": fed["prompts"],
            "completion_ids": fed["tokens"],
            "logprobs": None,
        },  # fmt: skip
        reward_funcs=lambda completions, **_: fed["rewards"],
    )
    trainer.ref_model.load_state_dict({hf_name(name): w.detach() for name, w in other.named_tensors().items()})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, fed


def hf_name(name):
    return name if name == "lm_head.weight" else "model." + name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_are_trls(network, other, trl_trainer, form, scale, beta):
    trainer, fed = trl_trainer
    groups, rewards = noisy_groups(network, 0.8, seed=6)
    answers = [(prompt, c) for prompt, cs in groups for c in cs]
    fed |= {"prompts": [p for p, _ in answers], "tokens": [c.tokens for _, c in answers],
            "rewards": [r for group in rewards for r in group]}  # fmt: skip
    trainer.loss_type, trainer.scale_rewards, trainer.beta = form, scale, beta
    trainer.epsilon_low, trainer.epsilon_high = 0.2, 0.3
    inputs = trainer._generate_and_score_completions([{"prompt": "x"} for _ in answers])
    assert inputs.get("old_per_token_logps") is None  # so the loss would take the current ones; ours are older
    old = torch.zeros(inputs["completion_ids"].shape)
    for row, (_, c) in zip(old, answers, strict=True):
        row[: len(c.logprobs)] = torch.tensor(c.logprobs)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs | {"old_per_token_logps": old})
    loss.backward()
    theirs = {name: p.grad for name, p in trainer.model.named_parameters()}
    figures, gradient = stepped(
        network, groups, rewards, other if beta else None, loss=form, advantage="std" if scale == "group" else "mean",
        kl=beta, temperature=0.8, clip_low=0.2, clip_high=0.3, micro=2,
    )  # fmt: skip
    assert figures["clipped"] > 0.05
    ours = {hf_name(name): g for name, g in gradient.items()}
    close(({"loss": figures["loss"]}, ours), ({"loss": loss.item()}, theirs))


# ---- the optimizer -------------------------------------------------------------------------------------------


def test_tiny_updates_add_up_in_bf16(folder):
    """64 steps of 1e-4 on weights near 1: bf16 alone, whose spacing there is 2^-8, would lose every one."""
    network = models.load(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for w in network.parameters():
            w.fill_(1.0)
    bare = copy.deepcopy(network)
    optimizer = train.Optimizer(network, train.Args(lr=1e-4))
    naive = torch.optim.AdamW(bare.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(64):
        for w in (*network.parameters(), *bare.parameters()):
            w.grad = torch.full_like(w, 0.01)
        optimizer.accumulate()
        optimizer.step(1e-4, 1e9, train.Ranks())
        naive.step()
    for w, master, lost in zip(network.parameters(), optimizer.masters, bare.parameters(), strict=True):
        assert master.dtype == torch.float32 and w.dtype == torch.bfloat16 and w.grad is None
        assert (master - (1 - 64e-4)).abs().max() < 1e-5
        assert torch.equal(w, master.bfloat16()) and (w < 1).all()
        assert (lost == 1).all()


def test_gradients_add_up_in_fp32(folder):
    network = models.load(folder, dtype=torch.bfloat16)
    optimizer = train.Optimizer(network, train.Args())
    for value in (256.0, 1.0, 1.0, 1.0):  # in bf16, 256 + 1 = 256
        for w in network.parameters():
            w.grad = torch.full_like(w, value)
        optimizer.accumulate()
    assert all((m.grad == 259).all() for m in optimizer.masters)


def test_optimizer_is_adamw_with_clipping(network):
    twin = copy.deepcopy(network)
    optimizer = train.Optimizer(network, train.Args(beta2=0.95, weight_decay=0.1))
    assert all(a is b for a, b in zip(optimizer.masters, network.parameters(), strict=True))  # fp32: no copies
    plain = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for a, b in zip(network.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters()))
        for p in twin.parameters():
            p.grad *= 0.5 / norm
        plain.param_groups[0]["lr"] = 0.01 * (step + 1)
        plain.step()
        optimizer.accumulate()
        assert optimizer.step(0.01 * (step + 1), 0.5, train.Ranks()) == pytest.approx(norm, rel=1e-5)
        assert all(p.grad is None for p in network.parameters())
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6


def test_bf16_step(folder):
    """A whole update in bf16: the gradient is near fp32's, and the masters move."""
    full, half = models.load(folder), models.load(folder, dtype=torch.bfloat16)
    groups, rewards = noisy_groups(full, 1.0, seed=7)
    wanted = stepped(full, groups, rewards)[0]
    optimizer = train.Optimizer(half, train.Args())
    start = [m.detach().clone() for m in optimizer.masters]
    args = train.Args(max_new_tokens=12, micro=2)
    figures = train.update(half, None, optimizer, groups, rewards, 1e-5, args, train.Ranks())
    assert figures["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.2)
    assert all(not torch.equal(a, b) for a, b in zip(start, optimizer.masters, strict=True))


# ---- labels and batches --------------------------------------------------------------------------------------


def pairs(*influences):
    return [(i, {"influence": influence}) for i, influence in enumerate(influences)]


def test_balance():
    def chosen(influences, size):
        return [i for i, _ in train.balance(pairs(*influences), size)]

    assert chosen([0, 0, 1, 0, 1, 1, 0], 4) == [2, 0, 4, 1]  # the first of either kind, alternating
    assert chosen([0, 0, 1, 0, 1, 1, 0], 5) == [2, 0, 4, 1]
    assert chosen([0, 1, 0, 0], 4) == [1, 0]  # fewer of both where one kind is short
    assert chosen([0, 0, 0], 4) == chosen([1, 1], 4) == chosen([], 4) == []


def subject_of(folder):
    return faith.Subject(Sampler(models.load(folder)), models.Tokenizer(folder))


def questions_():
    return tasks.load("esnli", DATA)


def test_draw_batch(folder):
    """Half and half by what the current model does; labels enough and no more."""
    args = train.Args(**SMALL | {"prompts": 6, "candidates": 400})
    subject, ranks = subject_of(folder), train.Ranks()
    batch, labelled = train.draw_batch(subject, train.Stream(questions_(), args), 0, args, ranks)
    assert [row["influence"] for _, row in batch] == [1, 0] * 3
    assert len(labelled) <= 100
    for case, row in batch:
        logp = faith.decide(subject, [case.question, case.edited])
        assert (row["y"], row["y_edit"]) == tuple(logp.argmax(-1).tolist())
        assert row["influence"] == (row["y"] != row["y_edit"])
    few = train.Args(**SMALL | {"prompts": 60, "candidates": 50})
    batch, labelled = train.draw_batch(subject, train.Stream(questions_(), few), 0, few, ranks)
    assert len(labelled) == 50 and 0 < len(batch) <= 50
    assert sum(row["influence"] for _, row in batch) * 2 == len(batch)


def test_labels_follow_the_model(folder, tmp_path):
    args = train.Args(**SMALL)
    cases = train.Stream(questions_(), args).take(60)
    ranks, subject = train.Ranks(), subject_of(folder)
    first, again = (train.label(subject, cases, ranks) for _ in range(2))
    assert [r for _, r in first] == [r for _, r in again] and [c for c, _ in first] == cases
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in subject.sampler.model.parameters():
            w += 0.3 * torch.randn(w.shape, generator=generator)
    moved = train.label(subject, cases, ranks)
    assert [r["influence"] for _, r in first] != [r["influence"] for _, r in moved]


def test_groups_of(folder):
    """Explanations of the prompt with the current pick, drawn anew at each step, rewarded where M = I."""
    args, subject = train.Args(**SMALL), subject_of(folder)
    batch = train.label(subject, train.Stream(questions_(), args).take(12), train.Ranks())
    groups, rewards, log = train.groups_of(subject, batch, 0, args)
    assert len(log) == 48 and [len(r) for r in rewards] == [4] * 12
    entries = iter(log)
    for (case, row), (prompt, answers), r in zip(batch, groups, rewards, strict=True):
        assert prompt == faith.explanation_prompt(subject.tokenizer, case.edited, row["y_edit"])
        for answer, value in zip(answers, r, strict=True):
            entry = next(entries)
            words = subject.tokenizer.decode(answer.tokens).split()
            assert (entry["id"], entry["text"].split()) == (case.question.id, words)
            assert value == float((case.intervention.word in words) == row["influence"])
    assert train.groups_of(subject, [], 0, args) == ([], [], [])  # a rank without work
    backwards = train.groups_of(subject, batch[::-1], 0, args)[0][::-1]
    assert [[c.tokens for c in g[1]] for g in backwards] == [[c.tokens for c in g[1]] for g in groups]
    for again in (
        train.groups_of(subject, batch, 1, args),
        train.groups_of(subject, batch, 0, train.Args(**SMALL, seed=1)),
    ):
        assert sum(a["text"] == b["text"] for a, b in zip(log, again[2], strict=True)) < 5


def test_opening(folder):
    """A forced beginning stands in the prompt, with the letter of the pick, and nowhere in what is measured."""
    args, subject = train.Args(**SMALL), subject_of(folder)
    batch = train.label(subject, train.Stream(questions_(), args).take(6), train.Ranks())
    plain = train.groups_of(subject, batch, 0, args)
    subject.opening = "the hypothesis ({letter}) is true"
    groups, _, log = train.groups_of(subject, batch, 0, args)
    for (_, row), (prompt, _), (before, _) in zip(batch, groups, plain[0], strict=True):
        opening = subject.opening.replace("{letter}", "ABC"[row["y_edit"]])
        assert prompt == before + subject.tokenizer.encode(opening)
    assert not any("hypothesis" in e["text"][:12] for e in log) and log != plain[2]


@pytest.mark.parametrize("offsets", [None, [-1.0, -2.0, -0.5]])
def test_anchor_by_hand(folder, offsets):
    """Loss and gradient of KL(initial ‖ current) over the letters of X and X', against each prompt alone."""
    subject = subject_of(folder)
    subject.offsets = None if offsets is None else np.array(offsets)
    labelled = train.label(subject, train.Stream(questions_(), train.Args(**SMALL)).take(3), train.Ranks())
    network, tokenizer = subject.sampler.model, subject.tokenizer
    for w in network.parameters():
        w.grad = None
    still = train.hold_decisions(subject, network, labelled, 2.0, train.Ranks())
    assert abs(still) < 1e-6  # nothing has moved yet
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in network.parameters():
            w += 0.3 * torch.randn(w.shape, generator=generator)
    network.zero_grad()
    figure = train.hold_decisions(subject, subject.sampler.model, labelled, 2.0, train.Ranks())
    ours = {name: g.clone() for name, g in network.named_tensors(lambda p: p.grad).items()}
    network.zero_grad()
    kl = 0.0
    for case, row in labelled:
        for question, p in ((case.question, row["p"]), (case.edited, row["p_edit"])):
            prompt = faith.decision_prompt(tokenizer, question)
            logits = network(torch.tensor([prompt]))[0, -1, faith.letter_tokens(tokenizer, 3)]
            q = (logits - torch.tensor(offsets or [0.0] * 3)).softmax(-1)
            kl = kl + (torch.tensor(p) * (torch.tensor(p).log() - q.log())).sum() / 6
    (2 * kl).backward()
    theirs = {name: g for name, g in network.named_tensors(lambda p: p.grad).items()}
    assert kl > 0.01
    close(({"kl": figure}, ours), ({"kl": kl.item()}, theirs))
    assert train.hold_decisions(subject, subject.sampler.model, [], 2.0, train.Ranks()) == 0.0


def test_stream():
    """Every question once an epoch, each epoch with a new order and new edits, only words for training."""
    args = train.Args(**SMALL)
    stream, twin = train.Stream(questions_(), args), train.Stream(questions_(), args)
    cases = stream.take(7) + stream.take(33)
    assert cases == twin.take(40) and stream.position == 40
    n = len(questions_())
    first, second = cases[:n], cases[n : 2 * n]
    assert {c.question.id for c in first} == {c.question.id for c in second} == {q.id for q in questions_()}
    assert [c.question.id for c in first] != [c.question.id for c in second]
    assert {c.edited for c in first} != {c.edited for c in second}
    assert {c.intervention.word for c in cases} <= set(reward.words("bias", held_out=False))
    assert train.Stream(questions_(), train.Args(**SMALL, seed=1)).take(40) != cases
    wordless = [tasks.Question("strategyqa", "1", ("Hm?",), ("yes", "no"), 0, "1")]
    with pytest.raises(ValueError, match="no training question has a place"):
        train.Stream(wordless, train.Args(**SMALL | {"intervention": "adverb"})).take(1)


# ---- whole runs ----------------------------------------------------------------------------------------------


def flags(folder, out, **changes):
    given = {"model": folder, "data": DATA, "out": out, **SMALL, **changes}
    named = [(f"--{k.replace('_', '-')}", v) for k, v in given.items()]
    return [x for k, v in named for x in ([k] if v is True else [] if v is None else [k, str(v)])]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs train.py's main on flags, in this process: (exit status, stdout, stderr)."""

    def run(flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        try:
            code = train.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(path):
    return [{k: v for k, v in record.items() if not k.endswith("_s")} for record in lines(path)]


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A finished run with most things on."""
    out = tmp_path_factory.mktemp("run") / "some run"
    given = flags(
        folder,
        out,
        steps=3,
        calibrate=True,
        calibration_questions=5,
        save_every=2,
        prompts=6,
        loss="grpo",
        decay="cosine",
        warmup=1,
    )
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["train.py", *given])
        assert train.main() == 0
    return out, given, printed.getvalue()


def test_files_of_a_run(done, folder):
    out, given, printed = done
    assert {p.name for p in out.iterdir()} >= {
        "args.json", "calibration.json", "metrics.jsonl", "explanations.jsonl", "before.json", "before.T0.jsonl",
        "before.T1.jsonl", "after.json", "after.T0.jsonl", "after.T1.jsonl", "difference.T0.json", "step-2", "model",
    }  # fmt: skip
    saved = json.loads((out / "args.json").read_text())
    assert train.Args(**saved) == train.parse(given)
    offsets = json.loads((out / "calibration.json").read_text())["mean_logp"]
    assert len(offsets) == 3 and max(offsets) < 0
    assert (out / "model" / "calibration.json").read_text() == (out / "calibration.json").read_text()
    assert len(re.findall(r"^step \d/3 ", printed, re.M)) == 3 and "min left" in printed
    for name in ("step-2", "model"):
        (again,) = re.findall(r"train\.py (.*)", (out / name / "README.md").read_text())
        assert train.parse(shlex.split(again)) == train.parse(given)  # the card's command is this run's
        trained = json.loads((out / name / "training.json").read_text())
        assert trained == saved | {"data": str(DATA.resolve())}


def test_metrics_of_a_run(done):
    out, given, _ = done
    args, metrics = train.parse(given), lines(out / "metrics.jsonl")
    explanations = lines(out / "explanations.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert [m["lr"] for m in metrics] == pytest.approx([train.learning_rate(s, args) for s in range(3)])
    for m in metrics:
        log = [e for e in explanations if e["step"] == m["step"]]
        assert len(log) == m["prompts"] * 4 and m["prompts"] in (2, 4, 6)
        I, M = (np.array([e[k] for e in log]) for k in ("influence", "mention"))  # noqa: E741
        assert I.mean() == 0.5
        assert m["reward"] == pytest.approx((I == M).mean())
        assert m["mention_1"] == pytest.approx(M[I == 1].mean()) and m["mention_0"] == pytest.approx(M[I == 0].mean())
        if 0 < M.mean() < 1:
            assert m["phi"] == pytest.approx(np.corrcoef(I, M)[0, 1])
        else:
            assert m["phi"] is None
        groups = (I == M).reshape(-1, 4).mean(1)
        assert m["flat_groups"] == pytest.approx(((groups == 0) | (groups == 1)).mean())
        assert m["tokens"] == pytest.approx(np.mean([e["tokens"] for e in log]))
        assert m["ended"] == pytest.approx(np.mean([e["ended"] for e in log]))
        assert all(e["mention"] == (e["word"] in e["text"].split()) for e in log)
        assert all(e["reward"] == (e["mention"] == e["influence"]) for e in log)
        assert all(e["influence"] == (e["y"] != e["y_edit"]) and e["word"] in e["text_inserted"] for e in log)
        assert sum(m["picks"]) == pytest.approx(1, abs=2e-3) and len(m["picks"]) == 3
        assert 0 < m["influence_rate"] < 1 and m["labelled"] <= 96 and m["kl"] == 0
        if m["flat_groups"] < 1:
            assert 0 <= m["sampler_gap"] <= m["sampler_gap_max"] < 1e-4 and m["clipped"] == 0
            assert m["grad_norm"] > 0 and m["nll"] > 0
        assert all(m[k] >= 0 for k in ("label_s", "rollout_s", "update_s"))
    assert any(m["flat_groups"] < 1 for m in metrics)
    assert metrics[-1]["position"] == sum(m["labelled"] for m in metrics)


def test_test_questions_are_never_trained_on(done):
    out, _, _ = done
    measured = lines(out / "before.T0.jsonl")
    test, groups = {row["id"] for row in measured}, {row["group"] for row in measured}
    trained = {e["id"] for e in lines(out / "explanations.jsonl")}
    group_of = {q.id: q.group for q in questions_()}
    assert len(test) == 5 and trained and not test & trained
    assert not groups & {group_of[id] for id in trained}
    fit = {row["id"] for row in lines(out / "before.fit.jsonl")}
    assert fit and not fit & test
    for name in ("before.T1", "after.T0", "after.T1"):
        assert [row["id"] for row in lines(out / f"{name}.jsonl")] == [row["id"] for row in measured]


def test_saved_models_load_with_transformers(done, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    out, _, _ = done
    tokens = torch.tensor([[2, 30, 40, 50, 60]])
    for saved in (out / "model", out / "step-2"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        ours = models.load(saved)
        with torch.no_grad():
            assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-4
        assert transformers.AutoTokenizer.from_pretrained(saved).chat_template == tiny.TEMPLATE
    parts = [weights(p)["model.norm.weight"] for p in (folder, out / "step-2", out / "model")]
    assert not torch.equal(parts[0], parts[1]) and not torch.equal(parts[1], parts[2])


def test_a_run_repeats(done, folder, tmp_path, call):
    out, given, _ = done
    given = [str(tmp_path / "again") if x == str(out) else x for x in given]
    assert call(given)[0] == 0
    for name in ("metrics.jsonl", "explanations.jsonl", "before.T1.jsonl", "after.T1.jsonl"):
        assert timeless(out / name) == timeless(tmp_path / "again" / name), name
    a, b = weights(out / "model"), weights(tmp_path / "again" / "model")
    assert all(torch.equal(a[name], b[name]) for name in a)
    third = tmp_path / "third"
    assert call([*given, "--out", str(third), "--seed", "1", "--steps", "1", "--no-eval-before"])[0] == 0
    assert timeless(third / "metrics.jsonl")[0] != timeless(out / "metrics.jsonl")[0]
    assert not (third / "before.json").exists() and (third / "after.json").exists() and (third / "model").exists()


def seen_labels(monkeypatch):
    """Notes each call of `label`: how many cases, and a sum of the model's weights at the time."""
    seen, label = [], train.label

    def noted(subject, cases, *rest):
        seen.append((len(cases), sum(w.detach().double().sum().item() for w in subject.sampler.model.parameters())))
        return label(subject, cases, *rest)

    monkeypatch.setattr(train, "label", noted)
    return seen


def test_frozen_labels_with_kl_and_two_updates(folder, tmp_path, call, monkeypatch):
    """Labels are taken once, whatever becomes of the model; the second update is off-policy."""
    seen = seen_labels(monkeypatch)
    code, output, error = call(
        flags(folder, tmp_path / "o", labels="frozen", kl=0.05, updates=2, lr=5e-3, steps=3, eval_questions=0,
              loss="dapo", advantage="mean", decay="linear", anchor=1.0, anchor_questions=6)
    )  # fmt: skip
    assert code == 0, error
    assert [n for n, _ in seen] == [40, 6]
    for what, n in (("labelled", 40), ("labelled for the anchor", 6)):
        assert f"\n{what}: {n}/{n} questions of this rank, 0.0 min left" in f"\n{output}"
    metrics = lines(tmp_path / "o" / "metrics.jsonl")
    assert {(m["labelled"], m["influence_rate"]) for m in metrics} == {(40, metrics[0]["influence_rate"])}
    assert {m["position"] for m in metrics} == {46}
    assert all(m["kl"] > 1e-4 and m["sampler_gap_max"] > 1e-3 for m in metrics)
    assert any(m["clipped"] > 0 for m in metrics)
    assert not (tmp_path / "o" / "before.json").exists() and (tmp_path / "o" / "model").exists()


def test_on_policy_labels_are_the_current_models(folder, tmp_path, call, monkeypatch):
    seen = seen_labels(monkeypatch)
    code, _, error = call(flags(folder, tmp_path / "o", steps=3, eval_questions=0))
    assert code == 0, error
    metrics = lines(tmp_path / "o" / "metrics.jsonl")
    assert sum(n for n, _ in seen) == sum(m["labelled"] for m in metrics)
    assert len({weights for _, weights in seen}) == 3  # each step's labels come from that step's weights


def test_a_run_without_any_mention(folder, tmp_path, call):
    """The tiny model knows no adverbs: every group is flat, there is nothing to learn, and no figure is made up."""
    given = flags(folder, tmp_path / "o", intervention="adverb", steps=1, eval_questions=0, candidates=400)
    assert call(given)[0] == 0
    (metrics,) = lines(tmp_path / "o" / "metrics.jsonl")
    assert (metrics["reward"], metrics["flat_groups"], metrics["mention_1"]) == (0.5, 1, 0)
    assert metrics["phi"] is None and metrics["nll"] is None and metrics["sampler_gap"] is None
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)
    start, end = weights(folder), weights(tmp_path / "o" / "model")
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_nothing_to_balance(folder, tmp_path, call, monkeypatch):
    for constant in (0, 1):
        monkeypatch.setattr(reward, "influence", lambda y, y_edited, constant=constant: constant)
        code, _, error = call(flags(folder, tmp_path / f"{constant}", eval_questions=0, candidates=9))
        assert code == 2 and error.count("\n") == 1 and "none or all of 9 edits moved the model" in error


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("what", ["moves nothing", "not finite"])
def test_a_run_that_cannot_go_on(folder, tmp_path, call, monkeypatch, what, when):
    """Before anything was learned it is an error; later the weights so far are good, and are kept."""
    updates, update, influence, weigh = [], train.update, reward.influence, train.token_weights

    def counted(*args):
        updates.append(update(*args))
        return updates[-1]

    monkeypatch.setattr(train, "update", counted)
    broken = lambda: len(updates) >= when  # noqa: E731
    if what == "moves nothing":
        monkeypatch.setattr(reward, "influence", lambda *ys: influence(*ys) and not broken())
        words, skipped = "nothing to balance", 0
    else:
        monkeypatch.setattr(train, "token_weights", lambda *args: weigh(*args) * (math.inf if broken() else 1))
        words, skipped = f"not finite {train.SKIPS} times in a row", train.SKIPS
    given = flags(folder, tmp_path / "o", eval_questions=0, steps=9, save_every=1, checkpoint_every=1, kl=0.1)
    code, out, error = call(given)
    metrics = lines(tmp_path / "o" / "metrics.jsonl") if when or skipped else []
    assert [m["skipped"] for m in metrics] == [0] * when + [1] * skipped
    if when == 0:
        assert code == 2 and words in error and error.count("\n") == 1 and not (tmp_path / "o" / "model").exists()
    else:
        assert code == 0 and f"stopped after step {when + skipped}: " in out and words in out
        assert not skipped or f"last good checkpoint is {tmp_path / 'o' / 'checkpoints' / 'step-'}" in out
        kept, last = weights(tmp_path / "o" / "model"), weights(tmp_path / "o" / "step-1")
        assert all(torch.equal(kept[name], last[name]) for name in kept)
        assert any(not torch.equal(kept[name], w) for name, w in weights(folder).items())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(folder, tmp_path, call, monkeypatch, where):
    """Weights and optimizer stay as they were; the run goes on, and counts it."""
    steps, update = [], train.update

    def broken(model, reference, optimizer, groups, *rest):
        steps.append({name: tensor.clone() for name, tensor in optimizer.state().items()})
        if len(steps) == 2 and where == "gradient":
            model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
        with pytest.MonkeyPatch.context() as patch:
            if len(steps) == 2 and where == "loss":
                patch.setattr(train, "policy_loss", lambda logprobs, *_: logprobs.detach() * math.nan)
            figures = update(model, reference, optimizer, groups, *rest)
        model.norm.weight._backward_hooks = None
        return figures

    monkeypatch.setattr(train, "update", broken)
    code, out, _ = call(flags(folder, tmp_path / "o", eval_questions=0, steps=4, kl=0.1))
    assert code == 0 and out.count("SKIPPED") == 1
    assert [m["skipped"] for m in lines(tmp_path / "o" / "metrics.jsonl")] == [0, 1, 0, 0]
    first, second, third, fourth = steps
    assert all(torch.equal(second[name], third[name]) for name in first)
    assert any(not torch.equal(third[name], fourth[name]) for name in first)
    assert all(torch.isfinite(tensor).all() for tensor in fourth.values())


# ---- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"nonsense": 1}, "--nonsense"), ({"steps": "many"}, "many"), ({"loss": "ppo"}, "ppo"),
        ({"steps": 0}, "--steps"), ({"prompts": 1}, "--prompts"), ({"prompts": 7}, "--prompts must be even"),
        ({"samples": 1}, "--samples"),
        ({"micro": 0}, "--micro"), ({"max_new_tokens": 0}, "--max-new-tokens"), ({"lr": 0}, "--lr"),
        ({"lr": "nan"}, "--lr"), ({"temperature": 0}, "--temperature"), ({"clip_norm": -1}, "--clip-norm"),
        ({"beta2": 1.0}, "--beta2"), ({"kl": -0.1}, "--kl"), ({"clip_low": "nan"}, "--clip-low"),
        ({"warmup": -1}, "--warmup"), ({"seed": -1}, "--seed"), ({"seed": 2**31}, "--seed"),
        ({"updates": 0}, "--updates"),
        ({"data": None}, "--data are needed"), ({"model": "toy-gpt"}, "toy-qwen3"),
        ({"model": "no/model"}, "no model at no/model"), ({"data": "no-data"}, "no-data"),
        ({"task": "comve"}, "comve"), ({"eval_questions": 500}, "too few"), ({"fit_questions": 15}, "too few"),
        ({"max_new_tokens": 500}, "context"),
    ],
)  # fmt: skip
def test_mistakes(folder, tmp_path, call, changes, words):
    code, _, error = call(flags(folder, **{"out": tmp_path / "o", **changes}))
    assert code == 2 and words in error and error.count("\n") == 1 and error.startswith("train.py: ")
    assert not (tmp_path / "o").exists()


def test_an_output_folder_that_holds_something(done, folder, tmp_path, call):
    out, given, _ = done
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    code, _, error = call(given)
    assert code == 2 and error.count("\n") == 1 and "already holds something" in error
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    (tmp_path / "file").write_text("")
    assert call(flags(folder, tmp_path / "file"))[0] == 2
    code, _, error = call(flags(folder, tmp_path / "file" / "below"))
    assert code == 2 and error.count("\n") == 1 and "file" in error
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "args.json.part").write_text('{"mo')  # of a run killed in its first moment
    assert call(flags(folder, tmp_path / "empty", steps=1, eval_questions=0))[0] == 0
    assert (tmp_path / "empty" / "model").exists() and not (tmp_path / "empty" / "args.json.part").exists()


def test_help_names_every_flag(call):
    code, out, _ = call(["--help"])
    assert code == 0
    assert all(f"--{name.replace('_', '-')}" in out for name in train.Args.__dataclass_fields__)


# ---- ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_gpus(monkeypatch, call, rank):
    """One of each machine says so, the second's here; the others wait until it has."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": 2 + rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    code, _, error = call([])
    assert code == 2 and bool(waited) == bool(rank)
    assert error == ("" if rank else "train.py: torchrun was told to start 2 processes, and there are GPUs for 1; set "
                     "--nproc-per-node to that, or CUDA_VISIBLE_DEVICES= to run on CPUs\n")  # fmt: skip


def torchrun(n, script, given, timeout=300):
    """A data-parallel run on the CPU: the finished process. A hang fails the test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tiny.ROOT)}
    return subprocess.run(
        [*command, *given], cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )  # fmt: skip


@pytest.mark.parametrize(
    "n, changes",
    [
        (2, {"prompts": 6, "candidates": 192}),  # three groups each: an odd number
        (
            3,
            {
                "prompts": 2,
                "kl": 0.05,
                "updates": 2,
                "eval_questions": 2,
                "labels": "frozen",
                "anchor": 3.0,
                "anchor_questions": 5,
                "opening": "the hypothesis",
            },
        ),  # one has none
        (2, {"prompts": 6, "candidates": 192, "parallel": "shard", "anchor": 3.0, "anchor_questions": 5}),
        (
            4,
            {
                "prompts": 6,
                "kl": 0.05,
                "updates": 2,
                "eval_questions": 2,
                "anchor": 3.0,
                "anchor_questions": 3,
                "parallel": "shard",
                "recompute": True,
                "micro": 1,
            },
        ),  # two groups, two, one and one; of the anchors the last rank has none
    ],
)
def test_ranks_change_nothing(folder, tmp_path, call, n, changes):
    one, many = tmp_path / "one", tmp_path / "many"
    assert call(flags(folder, one, **{k: v for k, v in changes.items() if k != "parallel"}))[0] == 0
    ran = torchrun(n, "train.py", flags(folder, many, **changes))
    assert ran.returncode == 0, ran.stderr[-3000:]
    for a, b in zip(timeless(one / "metrics.jsonl"), timeless(many / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        assert [k for k in a if a[k] is None] == [k for k in b if b[k] is None]
        numbers = [k for k in a if a[k] is not None]
        assert not {k: (a[k], b[k]) for k in numbers if a[k] != pytest.approx(b[k], abs=1e-5, rel=1e-5)}
        assert a["prompts"] == changes["prompts"]
    assert timeless(one / "explanations.jsonl") == timeless(many / "explanations.jsonl")
    for name in ("before", "after"):
        for a, b in zip(lines(one / f"{name}.T1.jsonl"), lines(many / f"{name}.T1.jsonl"), strict=True):
            assert {k: v for k, v in a.items() if k not in ("p", "p_edit")} == {
                k: v for k, v in b.items() if k not in ("p", "p_edit")
            }
    a, b = weights(one / "model"), weights(many / "model")
    start = weights(folder)
    assert max((a[k] - start[k]).abs().max() for k in a) > 5e-4
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


FAULTS = """
import os, sys, time
from dataclasses import replace
import train
groups_of = train.groups_of
def faulty(subject, batch, step, args):
    groups, rewards, log = groups_of(subject, batch, step, args)
    if os.environ["RANK"] == "1" and step == 0:  # one token's logprob, on one rank, is far off
        prompt, (first, *rest) = groups[-1]
        first = replace(first, logprobs=[first.logprobs[0] - 0.5, *first.logprobs[1:]])
        groups[-1], rewards[-1] = (prompt, [first, *rest]), [1.0, 0.0, 0.0, 0.0]
    if os.environ["RANK"] == "1" and step == 1:
        print("failed at", time.time(), flush=True)
        raise {error}
    if os.environ["RANK"] == "1" and step == 2:  # not finite, on one rank
        prompt, (first, *rest) = groups[-1]
        first = replace(first, logprobs=[float("nan"), *first.logprobs[1:]])
        groups[-1], rewards[-1] = (prompt, [first, *rest]), [1.0, 0.0, 0.0, 0.0]
    return groups, rewards, log
train.groups_of = faulty
sys.exit(train.main())
"""


def test_a_step_that_is_not_finite_on_one_rank(folder, tmp_path):
    """It is skipped on all, and all go on alike."""
    (tmp_path / "faults.py").write_text(FAULTS.format(error="").replace("        raise \n", "        pass\n"))
    ran = torchrun(2, tmp_path / "faults.py", flags(folder, tmp_path / "o", steps=4, eval_questions=0))
    assert ran.returncode == 0, ran.stderr[-3000:]
    metrics = lines(tmp_path / "o" / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [0, 0, 1, 0] and metrics[3]["sampler_gap_max"] < 1e-4


@pytest.mark.parametrize("error", ["ValueError('a prompt is too long')", "RuntimeError('a surprise')"])
def test_a_fault_on_one_rank(folder, tmp_path, error):
    """It is seen in the figures of all; an error ends all, in good time, with its own words."""
    (tmp_path / "faults.py").write_text(FAULTS.format(error=error))
    ran = torchrun(2, tmp_path / "faults.py", flags(folder, tmp_path / "o", steps=3, eval_questions=0))
    (moment,) = re.findall(r"^failed at (\S+)$", ran.stdout, re.MULTILINE)
    assert ran.returncode != 0 and time.time() - float(moment) < 60
    (metrics,) = lines(tmp_path / "o" / "metrics.jsonl")
    assert metrics["sampler_gap_max"] == pytest.approx(0.5, abs=1e-3)
    if "ValueError" in error:
        assert re.findall("^train.py: .*", ran.stderr, re.M) == ["train.py: a prompt is too long"]
        assert "Traceback" not in ran.stderr.split("torch/distributed")[0]
    else:
        assert "a surprise" in ran.stderr
