"""The decode step may be captured as a CUDA graph. Three checks show it without a GPU; test_cuda.py captures it on one.

    meta         the step runs on tensors without data, so whatever asks for a value raises
    tape         the step is recorded op by op and replayed into the same storages, as a graph would; the sampler
                 on tapes must draw what it draws eagerly
    constants    the numbers among the recorded arguments do not change from one step to the next

Each catches what the others miss: `test_faults_are_caught` puts faults in.
"""

import contextlib
import importlib.util
import sys

import pytest
import tiny
import torch
from launch import disturb
from test_rollout import same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import model as models
import rollout
from run import lora
from run.args import Args
from run.policy import Policy
from run.ranks import Ranks

SOURCE = (tiny.ROOT / "rollout.py").read_text()


@pytest.fixture(autouse=True)
def graphs_put_back(monkeypatch):
    monkeypatch.setattr(rollout, "Graphs", rollout.Graphs)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Keeps every operation with its arguments and results: tensors by their storage, as a graph knows addresses."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, given = func(*args, **(kwargs or {})), (args, kwargs or {})
        self.ops.append((func, *tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, given), result))
        return result


@contextlib.contextmanager
def recorded(slots):
    """The operations of one step, which leaves no trace in the slots."""
    held = {name: x for name, x in vars(slots).items() if isinstance(x, torch.Tensor)}
    before = {name: x.clone() for name, x in held.items()}
    with torch.no_grad(), Recorder() as recorder:
        yield recorder.ops
    vars(slots).update(held)
    for name, x in before.items():
        held[name].copy_(x)


class Tapes:
    """In place of `rollout.Graphs` on a CPU: records each bucket once and then only replays."""

    def __init__(self, run, buckets):
        self.tapes, self.replays, slots = {}, 0, run.args[1]
        for bucket in sorted(buckets, reverse=True):
            with recorded(slots) as self.tapes[bucket]:
                run(*bucket)

    def __call__(self, *bucket):
        self.replays += 1
        assert self.replays < 1000, "the samples never end"
        for func, args, kwargs, result in self.tapes[bucket]:
            read, written = ({x.untyped_storage().data_ptr() for x in tensors(t)} for t in ((args, kwargs), result))
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not read & written:  # a view has nothing to write
                for old, new in zip(tensors(result), tensors(func(*args, **kwargs)), strict=True):
                    old.copy_(new)


def adapt(network, rank):
    """The network with LoRA adapters as after some training; as it is for rank 0."""
    return disturb(lora.attach(network, rank, 2.0 * rank)) if rank else network


def on_meta(module, folder, prompts, rank=0):
    """Runs the step without data, in several sizes."""
    config = models.read_config(folder)
    with torch.device("meta"):
        network, end = adapt(models.Transformer(config), rank), torch.zeros(2, dtype=torch.int64)
    slots = module.Slots(config, 4, 3, 32, 16, "meta", torch.float32)
    for bucket in [(4, 12, 32, 16), (2, 6, 16, 8), (1, 1, 32, 16)]:
        module.decode_step(network, slots, end, *bucket)


def on_tape(module, folder, prompts, rank=0):
    """Samples drawn on tapes and eagerly are the same: with other seeds, prompts, temperatures, sizes and weights."""
    torch.manual_seed(0)
    network = adapt(models.load(folder), rank)
    policy, eager = Policy(network, Args(), Ranks()), rollout.Sampler(network)
    taped = module.Sampler(network, rows=6, lanes=2)
    taped.static, module.Graphs = True, Tapes
    for i in range(4):
        some = prompts[i:] if i % 2 else prompts[:7]  # seven or more prompts in three slots: refilled
        how = {"samples": 5, "max_new_tokens": 12, "temperature": [1.0, 0.0, 0.7, 2.0, 1.0] if i else 1.0,
               "seed": i, "step": 3 * i, "keys": list(range(i, i + len(some)))}  # fmt: skip
        kept = taped.slots
        same(taped.generate(some, **how), eager.generate(some, **how))
        assert kept in (None, taped.slots) or taped.slots.T > kept.T
        for w in policy.weights:
            w.grad = torch.randn_like(w)
        policy.step(0.01)  # in place
    assert taped.run.replays > 10


def constants(module, folder, prompts, rank=0):
    """The numbers in a step's operations are the same at two places of two generations."""
    sampler, numbers = module.Sampler(adapt(models.load(folder), rank), rows=6, lanes=2), []
    allocate = sampler.allocate

    def allocate_and_record(*sizes):
        slots, calls = allocate(*sizes), []
        run = sampler.run

        def record(*bucket):
            calls.append(bucket)
            if len(calls) in (2, 7):
                with recorded(slots) as ops:
                    slots.lanes.copy_(torch.arange(6))
                    module.decode_step(sampler.model, slots, torch.tensor([3, 4]), 3, 6, 112, 8)
                numbers.append([(func, [x for x in tree_leaves((args, kwargs)) if not isinstance(x, torch.Tensor)])
                                for func, args, kwargs, _ in ops])  # fmt: skip
            run(*bucket)

        sampler.run = record
        return slots

    sampler.allocate = allocate_and_record
    for seed in (1, 2):
        sampler.generate(prompts[seed:], 4, 12, float(seed), seed=seed, step=seed + 5)
    assert len(numbers) == 4 and len(numbers[0]) > 100
    for other in numbers[1:]:
        assert other == numbers[0], next((a, b) for a, b in zip(numbers[0], other, strict=False) if a != b)


CHECKS = [on_meta, on_tape, constants]
RANKS = pytest.mark.parametrize("rank", [0, 4])  # of LoRA adapters; 0: none


@RANKS
@pytest.mark.parametrize("check", CHECKS)
def test_the_step_can_be_captured(folder, prompts, check, rank):
    check(rollout, folder, prompts, rank)


@RANKS
def test_a_weight_that_moves_is_caught(folder, prompts, rank, monkeypatch):
    """An update that puts another tensor in a weight's place, instead of writing into it."""
    step = Policy.step

    def moving(self, lr):
        self.weights[0].data = self.weights[0].data.clone()
        return step(self, lr)

    monkeypatch.setattr(Policy, "step", moving)
    with pytest.raises(AssertionError):
        on_tape(rollout, folder, prompts, rank)


# Faults that a capture would bake in: what to find in the source, and what to put there.
PLACE, HASH = "    place = torch", "uniforms(s.seed, s.step, s.question[lanes]"
FAULTS = {
    "a baked position": ("(s.length[slot] + count - 1)[:, None]", "(s.length[slot] + clock())[:, None]"),
    "item": (PLACE, f"    count.max().item()\n{PLACE}"),
    "a branch on a tensor": (PLACE, f"    if live.all():\n        pass\n{PLACE}"),
    "a list": (PLACE, f"    count.tolist()\n{PLACE}"),
    "a rebound tensor": ("    s.count[lanes] = count + live\n",
                         "    s.count = s.count.index_put((lanes,), count + live)\n"),
    "a host's random number": (f"u = {HASH}", f"u = random.random() + 0 * {HASH}"),
    "a mask index": ("    s.tokens[lanes, place] = drawn\n", "    s.tokens[lanes[live], count[live]] = drawn[live]\n"),
    "a cache allocated again": ("        self.seed.fill_(seed)",
                                "        self.prefix = self.prefix.clone()\n        self.seed.fill_(seed)"),
    "a baked temperature": ("s.temperature[lanes], u)", "torch.full_like(u, clock()), u)"),
    "the host's clock in the hash": (HASH, "uniforms(s.seed, clock(), s.question[lanes]"),
}  # fmt: skip
CLOCK = "\n\nimport itertools, random\nticks = itertools.count()\n\n\ndef clock():\n    return next(ticks) % 11\n"


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(folder, prompts, fault, tmp_path, monkeypatch):
    old, new = FAULTS[fault]
    assert SOURCE.count(old) == 1
    file = tmp_path / "faulty_rollout.py"
    file.write_text(SOURCE.replace(old, new) + CLOCK)
    spec = importlib.util.spec_from_file_location("faulty_rollout", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "faulty_rollout", module)
    spec.loader.exec_module(module)
    caught = []
    for check in CHECKS:
        with contextlib.suppress(AssertionError, RuntimeError, NotImplementedError, ValueError):
            check(module, folder, prompts)
            continue
        caught.append(check)
    assert caught
