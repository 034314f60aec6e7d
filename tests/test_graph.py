"""The decode step may be captured as a CUDA graph: shown without a GPU, in three ways, and with one.

    meta         the step runs on tensors without data, so whatever asks for a value raises
    tape         the step is recorded op by op and replayed into the same storages, as a graph would; the sampler
                 on tapes must draw what it draws eagerly
    constants    the numbers among the recorded arguments do not change from one step to the next

Each is there because the others miss something; `test_faults_are_caught` puts faults in and sees who notices.
"""

import importlib.util
import sys

import pytest
import tiny
import torch
from test_lora import disturb
from test_rollout import same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import faith
import model as models
import reward
import rollout
import tasks
import train
from run import lora
from run.ranks import Ranks

SOURCE = (tiny.ROOT / "rollout.py").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(folder):
    tokenizer = models.Tokenizer(folder)
    questions = tasks.load("esnli", tiny.ROOT / "tests" / "data" / "esnli")
    cases = faith.draw_cases(questions[:9], "bias", 0, reward.words("bias"))
    return [faith.explanation_prompt(tokenizer, case.edited, i % 3) for i, case in enumerate(cases)]


class Recorder(TorchDispatchMode):
    """Keeps every operation with its arguments and results: tensors by their storage, as a graph knows addresses."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ops.append((func, *tree_map(by_storage, (args, kwargs or {})), result))
        return result


def by_storage(x):
    return x.detach() if isinstance(x, torch.Tensor) else x


def storages(tree):
    return {x.untyped_storage().data_ptr() for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)}


def state(slots):
    return {name: x.clone() for name, x in vars(slots).items() if isinstance(x, torch.Tensor)}


class Tapes:
    """What `rollout.Graphs` is, on a CPU: records a bucket once, leaving no trace, and then only replays."""

    def __init__(self, model, slots, end, buckets):
        self.step = lambda bucket: sys.modules[type(slots).__module__].decode_step(model, slots, end, *bucket)
        self.slots, self.tapes, self.replays = slots, {}, 0
        for bucket in sorted(buckets, reverse=True):
            held = {name: x for name, x in vars(slots).items() if isinstance(x, torch.Tensor)}
            before = state(slots)
            with torch.no_grad(), Recorder() as recorder:
                self.step(bucket)
            for name, tensor in held.items():
                tensor.copy_(before[name])
            self.tapes[bucket] = recorder.ops

    def __call__(self, bucket):
        self.replays += 1
        assert self.replays < 1000, "the samples never end"
        for func, args, kwargs, result in self.tapes[bucket]:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not storages(result) & storages((args, kwargs)):  # a view has nothing to write
                new = func(*args, **kwargs)
                for old, value in zip(tree_flatten(result)[0], tree_flatten(new)[0], strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(value)


def adapt(network, rank):
    """With LoRA adapters as after some training; rank 0: as it is."""
    return disturb(lora.attach(network, rank, 2.0 * rank)) if rank else network


def on_meta(module, config, rank=0):
    """Runs the step without data, in several sizes."""
    with torch.device("meta"):
        network = adapt(models.Transformer(config), rank)
    slots = module.Slots(config, 4, 3, 32, 16, "meta", torch.float32)
    for bucket in [(4, 12, 32, 16), (2, 6, 16, 8), (1, 1, 32, 16)]:
        module.decode_step(network, slots, torch.zeros(2, dtype=torch.int64, device="meta"), *bucket)


def on_tape(module, folder, prompts, rank=0):
    """Samples drawn on tapes against the plain sampler's: other seeds, prompts, temperatures, sizes and weights."""
    torch.manual_seed(0)
    network = adapt(models.load(folder), rank)
    optimizer = train.Optimizer(network, train.Args())
    eager = rollout.Sampler(network)
    taped = module.Sampler(network, rows=6, lanes=2)
    taped.static = True
    module.Graphs = Tapes
    for i in range(4):
        some = prompts[i:] if i % 2 else prompts[:7]  # seven or more prompts in three slots: refilled
        how = {"samples": 5, "max_new_tokens": 12, "temperature": [1.0, 0.0, 0.7, 2.0, 1.0] if i else 1.0}
        kept = taped.slots
        a = taped.generate(some, seed=i, step=3 * i, keys=list(range(i, i + len(some))), **how)
        b = eager.generate(some, seed=i, step=3 * i, keys=list(range(i, i + len(some))), **how)
        same(a, b)
        assert kept in (None, taped.slots) or taped.slots.T > kept.T
        for w in optimizer.weights:
            w.grad = torch.randn_like(w)
        optimizer.step(0.01, 1.0, Ranks())  # in place
    assert taped.run.replays > 10
    return taped


def constants(module, folder, prompts, rank=0):
    """The numbers in a step's operations at two places of two generations."""
    network = adapt(models.load(folder), rank)
    sampler, recorded = module.Sampler(network, rows=6, lanes=2), []
    run = sampler.allocate
    sizes = (3, 6, 112, 8)

    def allocate(*args):
        slots = run(*args)
        inner, calls = sampler.run, []

        def record(bucket):
            calls.append(bucket)
            if len(calls) in (2, 7):
                before, held = state(slots), dict(vars(slots))
                slots.lanes.copy_(torch.arange(6))
                with torch.no_grad(), Recorder() as recorder:
                    module.decode_step(network, slots, torch.tensor([3, 4]), *sizes)
                vars(slots).update(held)
                for name, x in before.items():
                    held[name].copy_(x)
                recorded.append(recorder.ops)
            inner(bucket)

        sampler.run = record
        return slots

    sampler.allocate = allocate
    for seed in (1, 2):
        sampler.generate(prompts[seed:], 4, 12, float(seed), seed=seed, step=seed + 5)
    plain = [
        [(func, [x for x in tree_flatten((a, k))[0] if not isinstance(x, torch.Tensor)]) for func, a, k, _ in ops]
        for ops in recorded
    ]
    assert len(plain) == 4 and len(plain[0]) > 100
    for other in plain[1:]:
        assert other == plain[0], next((a, b) for a, b in zip(plain[0], other, strict=False) if a != b)


RANKS = pytest.mark.parametrize("rank", [0, 4])  # of LoRA adapters; 0: none


@RANKS
def test_meta(folder, rank):
    on_meta(rollout, models.read_config(folder), rank)


@RANKS
def test_tape(folder, prompts, rank, monkeypatch):
    monkeypatch.setattr(rollout, "Graphs", rollout.Graphs)  # put back afterwards
    on_tape(rollout, folder, prompts, rank)


@RANKS
def test_constants(folder, prompts, rank):
    constants(rollout, folder, prompts, rank)


@RANKS
def test_a_weight_that_moves_is_caught(folder, prompts, rank, monkeypatch):
    """An update that puts another tensor in a weight's place, instead of writing into it."""
    monkeypatch.setattr(rollout, "Graphs", rollout.Graphs)
    step = train.Optimizer.step

    def moving(self, *rest):
        self.weights[0].data = self.weights[0].data.clone()
        return step(self, *rest)

    monkeypatch.setattr(train.Optimizer, "step", moving)
    with pytest.raises(AssertionError):
        on_tape(rollout, folder, prompts, rank)


# Faults that a capture would bake in: what to find in the source, and what to put there.
FAULTS = {
    "a baked position": ("(s.length[slot] + count - 1)[:, None]", "(s.length[slot] + clock())[:, None]"),
    "item": ("    place = torch", "    count.max().item()\n    place = torch"),
    "a branch on a tensor": ("    place = torch", "    if live.all():\n        pass\n    place = torch"),
    "a list": ("    place = torch", "    count.tolist()\n    place = torch"),
    "a rebound tensor": ("    s.count[lanes] = count + live\n",
                         "    s.count = s.count.index_put((lanes,), count + live)\n"),
    "a host's random number": ("u = uniforms(s.seed, s.step, s.question[lanes]",
                               "u = random.random() + 0 * uniforms(s.seed, s.step, s.question[lanes]"),
    "a mask index": ("    s.tokens[lanes, place] = drawn\n", "    s.tokens[lanes[live], count[live]] = drawn[live]\n"),
    "a cache allocated again": ("        self.seed.fill_(seed)",
                                "        self.prefix = self.prefix.clone()\n        self.seed.fill_(seed)"),
    "a baked temperature": ("s.temperature[lanes], u)", "torch.full_like(u, clock()), u)"),
    "the host's clock in the hash": ("uniforms(s.seed, s.step, s.question[lanes]",
                                     "uniforms(s.seed, clock(), s.question[lanes]"),
}  # fmt: skip
CLOCK = "\n\nimport itertools, random\nticks = itertools.count()\n\n\ndef clock():\n    return next(ticks) % 11\n"


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(folder, prompts, fault, tmp_path, capsys):
    old, new = FAULTS[fault]
    assert SOURCE.count(old) == 1
    file = tmp_path / "faulty_rollout.py"
    file.write_text(SOURCE.replace(old, new) + CLOCK)
    spec = importlib.util.spec_from_file_location("faulty_rollout", file)
    module = sys.modules["faulty_rollout"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    caught = []
    for name, check in (("meta", lambda: on_meta(module, models.read_config(folder))),
                        ("tape", lambda: on_tape(module, folder, prompts)),
                        ("constants", lambda: constants(module, folder, prompts))):  # fmt: skip
        try:
            check()
        except (AssertionError, RuntimeError, NotImplementedError, ValueError):
            caught.append(name)
    del sys.modules["faulty_rollout"]
    with capsys.disabled():
        print(f"\n  {fault}: {', '.join(caught)}", end="")
    assert caught
