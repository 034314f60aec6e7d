"""What is trained: AdamW on fp32 masters, clipped; nothing changes if a figure is not finite; the reference."""

import copy
import math

import pytest
import torch

import model as models
from run import checkpoint, lora
from run.args import Args
from run.policy import Policy, learning_rate, make_policy
from run.ranks import Ranks


def test_learning_rate():
    def rates(**changes):
        args = Args(**{"lr": 2.0, "warmup": 4, "steps": 14, **changes})
        return [learning_rate(step, args) for step in range(args.steps)]

    warm = [0.5, 1.0, 1.5, 2.0]
    assert rates(decay="constant") == pytest.approx(warm + [2.0] * 10)
    assert rates(decay="linear") == pytest.approx(warm + [2 - 1.8 * i / 9 for i in range(10)])
    assert rates(decay="cosine") == pytest.approx(
        warm + [0.2 + 0.9 * (1 + math.cos(math.pi * i / 9)) for i in range(10)]
    )
    for decay in ("linear", "cosine"):
        assert rates(decay=decay, warmup=0, steps=1) == [2.0]
        assert rates(decay=decay, warmup=3, steps=2) == pytest.approx([2 / 3, 4 / 3])


def test_tiny_updates_add_up_in_bf16(folder):
    """64 steps of 1e-4 on weights near 1: bf16 alone, whose spacing there is 2^-8, would lose every one."""
    network = models.load(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for w in network.parameters():
            w.fill_(1.0)
    bare = copy.deepcopy(network)
    policy = Policy(network, Args(lr=1e-4, clip_norm=1e9), Ranks())
    naive = torch.optim.AdamW(bare.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0)
    for value in (256.0, 1.0, 1.0, 1.0):  # gradients too: in bf16, 256 + 1 = 256
        policy.backward(value * sum(w.float().sum() for w in network.parameters()))
    assert all((master.grad == 259).all() for master in policy.masters)
    policy.adam.zero_grad()
    for _ in range(64):
        for w in bare.parameters():
            w.grad = torch.full_like(w, 0.01)
        policy.backward(0.01 * sum(w.float().sum() for w in network.parameters()))
        policy.step(1e-4)
        naive.step()
    for w, master, lost in zip(network.parameters(), policy.masters, bare.parameters(), strict=True):
        assert master.dtype == torch.float32 and w.dtype == torch.bfloat16 and w.grad is None
        assert (master - (1 - 64e-4)).abs().max() < 1e-5
        assert torch.equal(w, master.bfloat16()) and (w < 1).all() and (lost == 1).all()


def test_optimizer_is_adamw_with_clipping(network):
    twin = copy.deepcopy(network)
    policy = Policy(network, Args(beta2=0.95, weight_decay=0.1, clip_norm=0.5), Ranks())
    assert all(a is b for a, b in zip(policy.masters, network.parameters(), strict=True))  # fp32: no copies
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
        assert policy.step(0.01 * (step + 1)) == (pytest.approx(norm, rel=1e-5), True)
        assert all(p.grad is None for p in network.parameters())
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(network.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("rank", [0, 4])
def test_fused_adamw_resumes(folder, monkeypatch, tmp_path, rank):
    """As on a GPU: the plain AdamW's weights up to rounding; and stopped after two updates, the same to the bit."""
    plain = torch.optim.AdamW

    def started(fused):
        network = models.load(folder, dtype=torch.bfloat16)
        monkeypatch.setattr(torch.optim, "AdamW", lambda *given, **how: plain(*given, **how | {"fused": fused}))
        return Policy(lora.attach(network, rank, 8.0) if rank else network, Args(weight_decay=0.1), Ranks())

    def updated(policy, steps):
        for n in steps:
            generator = torch.Generator().manual_seed(n)
            for master in policy.masters:
                master.grad = torch.randn(master.shape, generator=generator)
            assert policy.step(1e-3)[1]
        return policy.state()

    whole, slow, stopped, resumed = started(True), started(False), started(True), started(True)
    tensors, others = updated(whole, range(4)), updated(slow, range(4))
    assert all((tensors[name] - others[name]).abs().max() < 1e-6 for name in tensors)
    checkpoint.write(tmp_path, 2, updated(stopped, range(2)), {})
    checkpoint.read(checkpoint.newest(tmp_path), resumed.state())
    tensors, others = updated(whole, [4]), updated(resumed, range(2, 5))
    assert tensors["step." + whole.names[0]] == 5 and all(torch.equal(tensors[name], others[name]) for name in tensors)
    resumed.refresh()
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, resumed.weights, strict=True))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(network, where):
    policy, held = Policy(network, Args(), Ranks()), []
    policy.before_update = lambda: held.append(network.norm.weight.clone())  # signals are held while weights change
    before = {name: tensor.clone() for name, tensor in policy.state().items()}
    policy.backward(network.norm.weight.sum() * (math.nan if where == "gradient" else 1))
    norm, updated = policy.step(0.1, finite=where == "gradient")
    assert not updated and math.isnan(norm) == (where == "gradient")
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state().items())
    policy.backward(network.norm.weight.sum())  # nothing is left of the bad gradient
    assert policy.step(0.1)[1] and not torch.equal(network.norm.weight, before["weight.norm.weight"])
    assert len(held) == 2 and torch.equal(held[1], before["weight.norm.weight"])


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_initial_model(folder, network, rank):
    """With LoRA the model without its adapters, else a copy. Either way it stays while the policy moves."""
    score = lambda model: model(torch.tensor([[5, 6, 7]])).log_softmax(-1).sum()  # noqa: E731
    args = Args(model=str(folder), kl=0.1, lora=rank, lora_alpha=8.0)
    policy = make_policy(lora.attach(network, rank, 8.0) if rank else network, args, Ranks())
    before = policy.reference(score)
    assert not before.requires_grad and torch.allclose(policy.run(score), before)
    for _ in range(2):
        policy.backward(policy.run(score))
        policy.step(0.1)
    assert torch.equal(policy.reference(score), before) and not torch.allclose(policy.run(score), before)
    assert make_policy(models.load(folder), Args(model=str(folder)), Ranks()).initial is None
