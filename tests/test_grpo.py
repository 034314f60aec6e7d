"""The GRPO loss against its definition and against TRL's, however a step is cut up; attention in one kernel."""

import itertools
import math
import os
import random
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from launch import step_on

import grpo
import model as models
import train
from rollout import Completion, Sampler
from run import attention
from run.args import Args
from run.policy import Policy
from run.ranks import Ranks

FORMS = ("grpo", "dapo", "dr_grpo")


@pytest.fixture(params=tiny.FAMILIES)
def each(request, tmp_path):
    """A network of each family."""
    return models.load(tiny.build(tmp_path, family=request.param))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same shape with other weights, as a reference."""
    return models.load(tiny.build(tmp_path_factory.mktemp("other"), seed=18)).requires_grad_(False)


def test_policy_loss():
    for ratio, A in itertools.product((0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 3.0), (-2.0, -0.5, 0.0, 0.5, 2.0)):
        x = torch.tensor([-1.0], requires_grad=True)
        loss = grpo.policy_loss(x, x.detach() - math.log(ratio), torch.tensor([A]), 0.2, 0.3)
        assert loss.item() == pytest.approx(-min(ratio * A, min(max(ratio, 0.8), 1.3) * A), abs=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        stopped = (A > 0 and ratio > 1.3) or (A < 0 and ratio < 0.8)
        assert gradient.item() == pytest.approx(0 if stopped else -ratio * A, abs=1e-5)


def test_kl_k3():
    """Its mean over samples is the KL. For a token it is exp(d) - d - 1."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    k3 = grpo.kl_k3(p.log(), q.log())
    assert (k3 >= 0).all() and grpo.kl_k3(p.log(), p.log()).abs().max() == 0
    assert (p * k3).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)
    assert k3.tolist() == pytest.approx([math.expm1(d) - d for d in (q / p).log().tolist()], abs=1e-6)


def noisy_groups(network, temperature, seed=0, P=5, G=4, longest=10):
    """P groups of G random completions of many lengths, and their rewards.

    The old logprobs carry noise, so ratios differ from 1 and some are clipped. All completions of the first group have
    length 1, and all rewards of the second are equal.
    """
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


def gradient_of(network):
    """The gradient, {name: tensor}, and its norm."""
    gradient = {name: g.clone() for name, g in network.named_tensors(lambda p: p.grad).items()}
    return gradient, math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def stepped(network, groups, rewards, reference=None, keep=True, **changes):
    """(figures, gradient) of train.step on given groups and rewards. keep: no weight changes; else no gradient is kept.

    Labels, samples and rewards are replaced by what is given; the loss and its gradient are the product's.
    """
    args = Args(**{"max_new_tokens": 12, "micro": 100, "samples": 4, **changes})
    policy, gradient = Policy(network, args, Ranks(), reference=reference), {}

    def step(lr, finite=True):
        found, norm = gradient_of(network)
        gradient.update(found)
        return norm, True

    if keep:
        policy.step = step
    network.zero_grad()
    figures = step_on(policy, groups, rewards)
    return {name: x for name, x in figures.items() if name not in ("step", "lr", "prompts")}, gradient


def by_hand(network, groups, rewards, reference=None, **changes):
    """The same from the definition: one completion at a time, every logit, no packing, no cases left out."""
    args = Args(**{"max_new_tokens": 12, **changes})
    N = sum(len(answers) for _, answers in groups)
    tokens = sum(len(c.tokens) for _, answers in groups for c in answers)
    loss = kl = clipped = nll = 0.0
    gaps = []
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
                gaps += (logp - torch.tensor(c.logprobs)).abs().tolist()
                nll -= logp.sum().item()
    network.zero_grad()
    loss.backward()
    gradient, norm = gradient_of(network)
    n = len(gaps)  # tokens of the groups that are scored
    return {"loss": loss.item(), "kl": kl, "clipped": clipped / n, "sampler_gap": sum(gaps) / n, "nll": nll / n,
            "sampler_gap_max": max(gaps), "anchor_kl": 0.0, "skipped": 0, "grad_norm": norm}, gradient  # fmt: skip


def close(a, b, tolerance=1e-5):
    """Two (figures, gradient) pairs agree, the gradient relative to its largest entry."""
    assert a[0] == pytest.approx(b[0], rel=tolerance, abs=tolerance)
    size = max(g.abs().max() for g in b[1].values())
    assert size > 1e-4 and a[1].keys() == b[1].keys()
    assert max((a[1][name] - b[1][name]).abs().max() for name in b[1]) < tolerance * size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_loss_and_gradient_by_hand(each, other, form, kl):
    settings = {"loss": form, "advantage": "std" if form != "dr_grpo" else "mean", "kl": kl, "temperature": 0.8,
                "clip_low": 0.2, "clip_high": 0.3}  # fmt: skip
    groups, rewards = noisy_groups(each, 0.8)
    reference, ran = other if kl else None, []
    wanted = by_hand(each, groups, rewards, reference, **settings)
    assert 0.05 < wanted[0]["clipped"] < 0.6
    for micro in (1, 2, 100):
        close(stepped(each, groups, rewards, reference, micro=micro, **settings), wanted)
    each.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    each.recompute = True  # activation checkpointing: each block runs again in backward, the gradient is the same
    close(stepped(each, groups, rewards, reference, micro=100, **settings), wanted)
    assert len(ran) == 2


def test_flat_groups(network, monkeypatch):
    """Without a KL groups of equal rewards are skipped. If they are kept, they change nothing in the gradient.

    The head sees one state for each token that is scored, and no prompt.
    """
    groups, rewards = noisy_groups(network, 1.0, seed=3)
    live = [answers for (_, answers), r in zip(groups, rewards, strict=True) if len({*r}) > 1]
    seen, head = [], network.head
    network.head = lambda states: seen.append(len(states)) or head(states)
    before = [w.clone() for w in network.parameters()]
    figures, _ = stepped(network, groups, [[1.0] * 4] * 5, keep=False, lr=1e-3)  # no group is left
    assert (figures["loss"], figures["grad_norm"]) == (0, 0) and math.isnan(figures["nll"])
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    skipped = stepped(network, groups, rewards)
    assert {*seen} == {sum(len(c.tokens) for answers in live for c in answers)}
    monkeypatch.setattr(train, "informative", lambda rewards: range(len(rewards)))
    kept = stepped(network, groups, rewards)
    close(({"loss": skipped[0]["loss"]}, skipped[1]), ({"loss": kept[0]["loss"]}, kept[1]))
    assert skipped[0]["nll"] != kept[0]["nll"]


def test_a_step_in_bf16(folder):
    """The gradient is near fp32's, and the masters move."""
    full, half = models.load(folder), models.load(folder, dtype=torch.bfloat16)
    groups, rewards = noisy_groups(full, 1.0, seed=7)
    before = [w.clone() for w in half.parameters()]
    wanted, figures = stepped(full, groups, rewards)[0], stepped(half, groups, rewards, keep=False, lr=1e-2)[0]
    assert figures["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.2)
    assert all(not torch.equal(a, b) for a, b in zip(before, half.parameters(), strict=True))


@torch.no_grad()
def test_logprobs_in_chunks_and_alone(network):
    groups = [(prompt, [c.tokens for c in answers]) for prompt, answers in noisy_groups(network, 1.0, seed=4)[0]]
    together, chunked = (grpo.token_logprobs(network, grpo.pack(groups), 0.9, n) for n in (256, 3))
    alone = [grpo.token_logprobs(network, grpo.pack([(p, [c])]), 0.9) for p, answers in groups for c in answers]
    assert (together - chunked).abs().max() < 1e-5 and (together - torch.cat(alone)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def trl_trainer(folder, other, tmp_path_factory):
    """TRL's own trainer on the tiny model, fed our tokens by its rollout hook and our rewards by its reward hook."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import transformers

    fed, rewarded = {}, {}
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
        rollout_func=lambda prompts, trainer: fed | {"logprobs": None},
        reward_funcs=lambda completions, **_: rewarded["rewards"],
    )
    trainer.ref_model.load_state_dict({hf_name(name): w.detach() for name, w in other.named_tensors().items()})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer, fed, rewarded


def hf_name(name):
    return name if name == "lm_head.weight" else "model." + name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_are_trls(network, other, trl_trainer, form, scale, beta):
    trainer, fed, rewarded = trl_trainer
    groups, rewards = noisy_groups(network, 0.8, seed=6)
    answers = [(prompt, c) for prompt, cs in groups for c in cs]
    fed |= {"prompt_ids": [p for p, _ in answers], "completion_ids": [c.tokens for _, c in answers]}
    rewarded["rewards"] = [r for group in rewards for r in group]
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
    settings = {"loss": form, "advantage": "std" if scale == "group" else "mean", "kl": beta, "temperature": 0.8,
                "clip_low": 0.2, "clip_high": 0.3, "micro": 2}  # fmt: skip
    figures, gradient = stepped(network, groups, rewards, other if beta else None, **settings)
    assert figures["clipped"] > 0.05
    ours = {hf_name(name): g for name, g in gradient.items()}
    close(({"loss": figures["loss"]}, ours), ({"loss": loss.item()}, theirs))


def one_by_one(q, k, v, runs):
    """What attention.kernel gives, one run at a time; no log-sums."""
    outs = []
    for (a, b), (x, y) in zip(*(itertools.pairwise(ends.tolist()) for ends in runs[:2]), strict=True):
        assert 0 < b - a <= runs.q_most and b - a <= y - x <= runs.k_most
        some = [t.transpose(0, 1)[None] for t in (q[a:b], k[x:y], v[x:y])]
        mask = torch.ones(b - a, y - x).tril(y - x - b + a).bool()
        outs.append(torch.nn.functional.scaled_dot_product_attention(*some, attn_mask=mask, enable_gqa=True))
    assert runs.q_ends.dtype == runs.k_ends.dtype == torch.int32 and (b, y) == (len(q), len(k))
    return torch.cat(outs, 2)[0].transpose(0, 1), None


def test_all_parts_at_once(each, monkeypatch):
    """As on a GPU, where one kernel computes all runs: logprobs, their gradient, options, samples."""
    groups = [(p, [c.tokens for c in g]) for p, g in noisy_groups(each, 1.0)[0]]
    prompts, calls = [prompt + [7] * (i % 2) for prompt, _ in groups for i in range(2)], Counter()
    sampler = Sampler(each)

    def forward(q, k, v, runs):
        calls["gathered" if runs.keys is not None else "plain"] += 1
        return one_by_one(q, k, v, runs)

    def backward(grad, q, k, v, out, log_sums, runs):
        calls["backward"] += 1
        with torch.enable_grad():
            given = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(one_by_one(*given, runs)[0], given, grad)

    def trained():
        each.zero_grad()
        logprobs = grpo.token_logprobs(each, grpo.pack(groups), 1.0)
        logprobs.sum().backward()
        return logprobs.detach(), {name: p.grad.clone() for name, p in each.named_parameters()}

    def computed(*calls_wanted):
        results = []
        for work, wanted in zip((trained, lambda: sampler.option_logprobs(prompts, [5, 6, 7], together=2),
                                 lambda: sampler.generate(prompts, 3, 6)), calls_wanted, strict=True):  # fmt: skip
            calls.clear()
            results.append(work())
            assert calls == wanted
        return results

    (a, c), b, d = computed({}, {}, {})
    for name, new in {"flashes": lambda q: True, "kernel": forward, "kernel_backward": backward}.items():
        monkeypatch.setattr(attention, name, new)
    (w, y), x, z = computed({"gathered": 2, "backward": 2}, {"gathered": 2}, {"plain": 2})  # there are two layers
    assert torch.allclose(a, w, atol=1e-4) and torch.allclose(b, x, atol=1e-4)
    assert all((c[name] - y[name]).abs().max() < 1e-4 * c[name].abs().max() + 1e-5 for name in c)
    for one, other in zip(sum(d, []), sum(z, []), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_samples_share_is_summed_in_fp32(monkeypatch):
    """The gradient of a prompt's keys is a sum over samples. In bf16 each of them would be lost beside the sum."""
    fakes = {"flashes": lambda q: True, "kernel": lambda q, k, v, runs: (q.clone(), None),
             "kernel_backward": lambda grad, q, k, v, *_: (grad, torch.ones_like(k), torch.ones_like(v))}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(attention, name, fake)
    q, k, v = (torch.zeros(1, 1, 2 + 900, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    attend = attention.over_parts([(0, 2, 0, 0, [2]), (2, 902, 0, 2, [3] * 300)])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attend(0, q, k, v)
    assert kept and max(len(x) for x in kept) == 902  # not once for every sample
    out.sum().backward()
    for x in (k, v):
        assert (x.grad[0, 0, :2] == torch.tensor(301.0).bfloat16()).all()  # in bf16 1 + 256 is 256
        assert (x.grad[0, 0, 2:] == 1).all()
