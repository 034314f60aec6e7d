"""A training step asks the device for values only after the micro-batches of an update, so that a GPU need not idle.

On the meta device tensors have no values, so whatever asks for one raises. The two modes refuse copies that would wait.
"""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from launch import step_on
from test_grpo import noisy_groups
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batches
import grpo
import model as models
import rollout
import train
from batches import DecisionAnchor, Stream, label
from faith import Subject
from rollout import Sampler
from run import attention, lora
from run import ranks as processes
from run.args import Args
from run.device import send
from run.policy import Policy
from run.ranks import Ranks
from run.stats import LossStats
from run.stop import Signals


class NoWaits(TorchDispatchMode):
    """Refuses copies from one device to another that the host waits for, also those hidden in an operation."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        places = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()}
        if operation is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            places |= {args[0].device.type, (kwargs.get("device") or args[0].device).type}
        assert len(places) < 2, f"{operation} waits"
        return operation(*args, **kwargs)


class NoLists(TorchFunctionMode):
    """Refuses torch.tensor on another device. It copies and waits, which NoWaits cannot see."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = torch.device((kwargs or {}).get("device") or "cpu")
        assert function not in (torch.tensor, torch.as_tensor) or device.type == "cpu", f"{function} waits"
        return function(*args, **(kwargs or {}))


def waiting(values, device=None):
    return torch.as_tensor(values).to(device)


def listed(values, device=None):
    return torch.tensor(values, device=device) if isinstance(values, list) else send(values, device)


FAULTS = {  # what each does in place of a function of the step
    "a blocking copy": (train, "send", waiting), "a list": (grpo, "send", listed), "ends": (attention, "send", waiting),
    "letters": (rollout, "send", listed), "the initial letters": (batches, "send", waiting),
    "an index on the host": (grpo, "send", lambda values, device: send(values)),
    "a value": (train, "kl_k3", lambda logprobs, reference: logprobs * float(reference.sum())),
}  # fmt: skip


@pytest.mark.parametrize("rank, fault", [(0, ""), (4, ""), *((0, fault) for fault in FAULTS)])
def test_micro_batches_do_not_wait(network, folder, questions, monkeypatch, rank, fault):
    """Groups, KL and anchor in bf16, with the kernels of a GPU; all weights, and adapters with recomputation."""
    (groups, rewards), tokenizer = noisy_groups(network, 1.0), models.Tokenizer(folder)
    args, ranks = Args(kl=0.1, anchor=1.0, micro=2, updates=2, samples=4, intervention="bias"), Ranks()
    labelled = label(Subject(Sampler(network), tokenizer), Stream(questions, args).next_cases(5), ranks)
    ranks.device = torch.device("meta")
    with ranks.device:
        bare, reference = (models.Transformer(network.config, torch.bfloat16) for _ in range(2))
    bare.recompute = rank > 0
    policy = Policy(lora.attach(bare, rank, 8.0) if rank else bare, args, ranks, reference=bare if rank else reference)
    anchor, passes = DecisionAnchor(Subject(Sampler(bare), tokenizer), policy, labelled, args, ranks), []
    monkeypatch.setattr(LossStats, "summary", lambda self, ranks: {"loss": 0.0})
    monkeypatch.setattr(policy, "step", lambda *given: passes.append(given) or (0.0, True))
    if fault:
        monkeypatch.setattr(*FAULTS[fault])
    caught = pytest.raises((AssertionError, RuntimeError), match="waits|meta") if fault else contextlib.nullcontext()
    with caught, NoLists(), NoWaits():
        step_on(policy, groups, rewards, anchor=lambda n: anchor.backward(n) is None or 0.0)
    assert fault or len(passes) == 2
    assert {x.device.type for x in policy.state().values()} == {"meta"}  # AdamW's steps too, as fused on a GPU needs


def test_a_rank_that_noted_a_signal_does_not_wait_forever(monkeypatch):
    """Under NCCL nobody says that rank 0 has stopped."""
    rank, clock = Ranks(), itertools.count(0, 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: SimpleNamespace(is_completed=lambda: False))
    monkeypatch.setattr(processes, "time", SimpleNamespace(sleep=lambda s: None, monotonic=lambda: next(clock)))
    rank.world, rank.noted = 2, Signals(saves=False, together=False)
    rank.noted.handle(15, None)
    with pytest.raises(RuntimeError, match="rank 0 has stopped"):
        rank.meet()
    assert next(clock) == 16  # asked at 0, 4, 8 and 12


def test_a_gpu_copies_from_pinned_memory(monkeypatch):
    done, patch = [], monkeypatch.setattr
    patch(torch.Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    patch(torch.Tensor, "to", lambda self, device, non_blocking=False: done.append((str(device), non_blocking)))
    send([1, 2], "cuda"), send(torch.ones(2), torch.device("cpu"))
    assert done == ["pinned", ("cuda", True), ("cpu", True)]
