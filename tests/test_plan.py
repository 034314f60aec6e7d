"""lab.plan: its bytes against those that a CPU really allocates, its rules, its flags.

PyTorch's profiler says what is allocated: it sees every call of the CPU's allocator.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import grpo
import model as models
import rollout
from lab import plan
from run import lora
from run.args import Args
from run.attention import over_parts
from run.policy import Policy
from run.ranks import Ranks

ROOT = Path(__file__).parent.parent
LLAMA, QWEN3 = (plan.read(str(ROOT / "configs" / f"{name}.json")) for name in ("llama-3.1-8b", "qwen3-8b"))
SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
           "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
           "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 1e5, "tie_word_embeddings": True,
           "eos_token_id": 2}  # fmt: skip
SIZES = (2, 34, 4, 20)  # prompts, their tokens, samples, their tokens
BATCH = dict(zip(("micro", "prompt_tokens", "samples", "new"), SIZES, strict=True), prompts=2, dtype="fp32")


def config(**changes) -> models.Config:
    return dataclasses.replace(models.Config.from_json(SMOLLM2), **changes)


def network_of(config: models.Config, rank: int) -> models.Transformer:
    network = models.Transformer(config)
    return lora.attach(network, rank, rank) if rank else network


def allocated(work) -> tuple[int, int]:
    """Bytes that work() leaves allocated, and the most at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()  # noqa: F841 (it must live until the profiler has stopped)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sums = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return sums[-1], max(sums)


def packed(count: int, prompt: int, samples: int, new: int) -> grpo.Packed:
    return grpo.pack([(list(range(5, 5 + prompt)), [list(range(7, 7 + new))] * samples)] * count)


def train_on(network: models.Transformer, *sizes: int) -> None:
    grpo.token_logprobs(network, packed(*sizes), 1.0).sum().backward()


@pytest.mark.parametrize("rank", [0, 16])
def test_bytes_of_a_cpu_run(rank):
    """All bytes of a training step of a third of SmolLM2, within 10 %, with recomputation and without."""
    c = config(layers=10)
    made, again = (plan.plan(c, lora=rank, recompute=recompute, **BATCH) for recompute in (False, True))
    planned, kept = made["bytes"], []  # kept: what must not be freed
    real = {"weights": allocated(lambda: kept.append(network_of(c, rank)))[0]}
    network = kept[0]
    policy = Policy(network, Args(lora=rank), Ranks())
    real["gradients"] = allocated(lambda: train_on(network, 1, 2, 2, 2))[0]
    peaks = []
    for recompute in (False, True):
        network.recompute = recompute
        peaks.append(allocated(lambda: train_on(network, *SIZES))[1])  # the gradients are there already
    left = allocated(lambda: policy.step(1e-6))[0]
    real["optimizer"] = left + real["gradients"]  # the step frees the gradients
    real["KV cache"] = allocated(lambda: kept.append(rollout.Sampler(network, [2]).allocate(34, 2, 4, 20)))[0]
    assert {name: planned[name] for name in real} == pytest.approx(real, rel=0.1)
    for some, peak in zip((planned, again["bytes"]), peaks, strict=True):
        pass_peak = some["activations"] + max(some["a block's backward"], some["logits chunk"])
        assert max(pass_peak, some["end of the update"]) == pytest.approx(peak, rel=0.1)
    assert again["bytes"]["activations"] < planned["activations"] / 4
    assert made["parallel"] == "replicate" and planned["masters"] == planned["reference"] == 0
    assert made["total"] == pytest.approx(sum(real.values()) + peaks[0], rel=0.1)


@pytest.mark.parametrize("attention", ["fused", "math"])
@pytest.mark.parametrize("changes", [{}, {"family": "qwen3", "qk_norm": True}, {"family": "qwen2", "qkv_bias": True}])
def test_activations(attention, changes):
    """The hidden states alone, where the logits cannot hide an error; also with torch's fallback attention."""
    small, sizes = config(layers=3, vocab_size=300, **changes), (1, 64, 16, 32)
    network, groups = models.Transformer(small), packed(*sizes)

    def work():
        attend = over_parts(groups.parts)
        states = network.hidden(groups.tokens, groups.positions, attend=attend)[0, groups.sources]
        torch.autograd.grad(states, network.embed_tokens.weight, torch.ones_like(states))

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION if attention == "fused" else SDPBackend.MATH]):
        peak = allocated(work)[1]
    counted = plan.hidden_bytes(small, plan.Setup(dtype="fp32", attention=attention), sizes)
    assert sum(counted) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("micro", [2, 6])
def test_bytes_of_the_anchor(micro):
    """X and X' of --micro questions in a pass, but of no more than half the prompts."""
    small, sizes = config(layers=3, vocab_size=300), {"prompts": 8, "prompt_tokens": 80, "samples": 2, "new": 1}
    network, text = models.Transformer(small), list(range(5, 84))
    pairs = [[text + [7], text[:41] + text[1:42]]] * min(micro, 4)  # equal up to the middle

    def work():
        scores = rollout.option_scores(network, pairs, [5, 6, 7])
        torch.autograd.grad(scores, network.embed_tokens.weight, torch.ones_like(scores))

    peak = allocated(work)[1]
    counted = plan.micro_batch_bytes(small, plan.Setup(dtype="fp32", anchor=True, micro=micro, **sizes))
    assert counted["activations"] + counted["a block's backward"] == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernels_workspace(kv_heads, monkeypatch):
    """bf16, as on a GPU: q's gradient in fp32, runs rounded up, and the gradients of grouped keys and values."""
    small = config(layers=3, vocab_size=300, heads=4, kv_heads=kv_heads, head_dim=16, hidden_size=64)
    tokens, keys, asked, workspace = 64 + 16 * 31, 64 + 16 * (64 + 31), [], plan.flash_workspace
    monkeypatch.setattr(plan, "flash_workspace", lambda *args: asked.append(workspace(*args)) or 10**9)
    counted = plan.hidden_bytes(small, plan.Setup(), (1, 64, 16, 32))
    own = 4 * (tokens + 128 * 17) * 4 * 16 + (2 * 2 * keys * 4 * 16 if kv_heads == 2 else 0)
    assert asked == [own] * 3 and sum(counted) > 10**9  # one layer, then two


def test_the_cache_is_the_samplers(monkeypatch):
    """Positions of prompts come in steps of 64 on a GPU, of 16 on a CPU."""
    monkeypatch.setattr(rollout, "Graphs", lambda *given: None)
    for dtype, positions, item in (("bf16", 320, 2), ("fp32", 304, 4)):
        made = plan.plan(config(), dtype=dtype, prompts=2, samples=4, new=20)["bytes"]["KV cache"]
        sampler = rollout.Sampler(models.Transformer(config(layers=1)), [2])
        sampler.static = dtype == "bf16"
        slots = sampler.allocate(300, 2, 4, 20)
        assert slots.T == positions and made == slots.kv_bytes() * 30 * item / 4
    sampler, there = rollout.Sampler(models.Transformer(config(layers=1), torch.bfloat16), [2]), None
    sampler.static = True
    for free, rows in ((None, 512), (200_000_000, 512), (100_000_000, 256), (30_000_000, 128)):
        monkeypatch.setattr(rollout, "free_bytes", lambda device, free=free: free or 10**11)
        memory = {"gpu_memory_bytes": there + free} if free else {}
        made = plan.plan(config(layers=1), prompts=64, samples=8, new=20, kl=True, **memory)["bytes"]
        sampler.slots, there = None, sum(made[name] for name in ("weights", "masters", "reference"))
        slots = sampler.allocate(300, 64, 8, 20)
        assert slots.P * slots.G == rows and made["KV cache"] == slots.kv_bytes()
    assert (
        plan.plan(config(layers=1), rows=16, prompts=64, samples=8, new=20)["bytes"]["KV cache"] == made["KV cache"] / 8
    )


@pytest.mark.parametrize(("c", "size"), [(LLAMA, 8_030_261_248), (QWEN3, 8_190_735_360)], ids=["llama", "qwen3"])
def test_bytes_per_weight(c, size):
    names = ("weights", "masters", "reference", "optimizer", "gradients", "inference copy")
    for parallel, bytes_each in (("replicate", [2, 4, 2, 8, 6, 0]), ("shard", [0.5, 0, 2, 1, 0.5, 2])):
        made = plan.plan(c, gpus=8, micro=1, recompute=True, kl=True, parallel=parallel)
        assert made["parameters"] == made["trained"] == size
        assert made["fits"] == (made["total"] + made["headroom"] <= 80e9)
        assert [round(made["bytes"][key] / size, 3) for key in names] == bytes_each
        assert (made["bytes"]["gather buffers"] > 0) == (parallel == "shard")
    made = plan.plan(c, micro=1, recompute=True, kl=True, lora=16)
    assert made["parallel"] == "replicate" and made["fits"]
    adapters = made["trained"]
    E, M, heads = c.hidden_size, c.intermediate_size, c.heads * c.head_dim
    qkv = heads + 2 * c.kv_heads * c.head_dim
    decoding = 2 * c.layers * (48 * (E + qkv) + 16 * (heads + E) + 32 * (E + 2 * M) + 16 * (M + E))
    own = [2 * size + 4 * adapters, 0, 0, 8 * adapters, 4 * adapters, decoding]
    assert [made["bytes"][key] for key in names] == own and 8 * adapters < 1e9


def test_choice():
    """Replicated where that fits, else sharded if there are several GPUs, unless --parallel says otherwise."""
    small = BATCH | {"dtype": "bf16", "recompute": True}
    needs = plan.plan(config(), parallel="replicate", **small)["total"] / (1 - plan.HEADROOM)
    for gpus, memory, asked, chosen, fits in (
        (2, 1.01, "auto", "replicate", True), (2, 0.9, "auto", "shard", True), (1, 0.9, "auto", "replicate", False),
        (2, 0.9, "replicate", "replicate", False), (2, 1.01, "shard", "shard", True),
    ):  # fmt: skip
        made = plan.plan(config(), gpus=gpus, gpu_memory_bytes=needs * memory, parallel=asked, **small)
        assert (made["parallel"], made["fits"]) == (chosen, fits)
    assert plan.plan(config(), gpus=2, gpu_memory_bytes=1e8, lora=16, **small)["parallel"] == "replicate"


def test_sizes_grow():
    """Larger groups, the anchor's questions, longer samples cost more; fewer prompts a GPU cost less."""
    c, base = config(layers=2), {"dtype": "bf16", "prompts": 8, "micro": 2, "new": 16, "prompt_tokens": 64}

    def size(key, **settings):
        return plan.plan(c, **base | settings)["bytes"][key]

    assert size("activations", micro=4) == pytest.approx(2 * size("activations"), rel=0.05)
    assert size("activations", micro=1, anchor=True, samples=2) > size("activations", micro=1, samples=2)
    assert 2 * size("KV cache", gpus=4) == 2 * (size("KV cache") // 4) < size("KV cache") < size("KV cache", new=32)
    assert size("logits chunk") > 4 * 32 * 49152
    step = [plan.plan(c, **base, anchor=anchor)["seconds"]["forward, backward"] for anchor in (False, True)]
    assert step[0] < step[1] < 1.5 * step[0]


def test_advice(capsys):
    """The change named makes it fit, and is the first that does."""
    command = ["--model", str(ROOT / "configs" / "qwen3-8b.json"), "--gpus", "8", "--kl"]
    assert plan.main(command) == 0 and plan.main([*command, "--recompute"]) == 0
    before, _, after = capsys.readouterr().out.partition("it fits with --recompute: ")
    assert "DOES NOT FIT" in before and "\nfits, " in after
    for setup, flags, layout in (
        (dict(kl=True), "--lora 16 --recompute --micro 1", "replicate"),
        (dict(gpus=2, parallel="replicate", gpu_memory_bytes=120e9, recompute=True), "--parallel shard", "shard"),
    ):  # fmt: skip
        found, made = plan.advice(LLAMA, plan.Setup(**setup))
        assert (found, made["parallel"], made["fits"]) == (flags, layout, True)
    assert plan.advice(LLAMA, plan.Setup(gpu_memory_bytes=8e9, lora=16)) is None
    for recompute, cheapest in ((False, "--recompute"), (True, "--micro 2")):
        room = plan.plan(QWEN3, lora=16, rows=128, micro=2, recompute=recompute)["total"] / (1 - plan.HEADROOM) * 1.001
        setup = plan.Setup(lora=16, rows=128, recompute=recompute, gpu_memory_bytes=room)
        assert plan.advice(QWEN3, setup)[0] == cheapest


@pytest.mark.parametrize("rank", [0, 4])
def test_operations(rank, monkeypatch):
    """Products of forward and backward, against PyTorch's count of the same pass."""
    c, (_, prompt, samples, new) = config(layers=2, vocab_size=3000), SIZES
    with FlopCounterMode(display=False) as counter:
        train_on(network_of(c, rank), *SIZES)
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    monkeypatch.setattr(plan, "RATE", 1.0)
    made = plan.plan(c, lora=rank, **BATCH)["seconds"]
    attention = 3 * 4 * c.layers * c.heads * c.head_dim * 2 * (prompt**2 / 2 + samples * new * (prompt + new / 2))
    assert made["forward, backward"] - attention == pytest.approx(products, rel=0.05)
    assert made["step"] > made["forward, backward"]


def test_communication():
    assert plan.plan(LLAMA, lora=16)["seconds"]["communication"] == 0
    two, sixteen = (plan.plan(LLAMA, gpus=n, parallel="shard")["seconds"]["communication"] for n in (2, 16))
    # Bytes per weight: 8 for each of 8 passes, or of one, and 4 for the copy; a GPU has 1 / N of them itself.
    assert two / sixteen == pytest.approx((8 * 8 + 4) / 2 / ((8 + 4) * 15 / 16))


def test_command(tmp_path):
    """As a user runs it: a folder, and the figures as JSON."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    flags = ["--model", tmp_path, "--gpu-memory", "24", "--micro", "1", "--json", tmp_path / "plan.json"]
    run = subprocess.run([sys.executable, "-m", "lab.plan", *flags], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and not run.stderr, run.stderr
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["gpu_memory_bytes"] == 24e9 and made["headroom"] == 1.2e9 and made["fits"]
    assert made["total"] <= sum(made["bytes"].values()) and len(made["bytes"]) == 12 and len(made["seconds"]) == 7
    for name in [*made["bytes"], "total", "headroom", *made["seconds"]]:
        assert f"\n  {name} " in run.stdout, name


BOUNDS = {"--gpus 0": "at least 1", "--samples 1": "at least 2", "--prompts 1": "at least 2", "--micro 0": "at least 1",
          "--lora -1": "at least 0", "--gpu-memory nan": "a finite number",
          "--gpu-memory -80": "a finite number of GB above 0, not -80"}  # fmt: skip
MISTAKES = [*((flags, f"{flags.split()[0]} must be {bound}") for flags, bound in BOUNDS.items()),
    ("--parallel shard", "raise --gpus"), ("--prompt-tokens 9000", "lower one"),
    ("--model /nowhere", "no model at /nowhere"), ("--json /nowhere/plan.json", "make the folder /nowhere first"),
    ({"num_hidden_layers": 2.5}, "config.json: num_hidden_layers must be a whole number"),
    ({"head_dim": 63}, "head_dim must be an even"), ({"model_type": "gpt2"}, "use a llama, qwen2 or qwen3"),
    (b"[1, 2", "not JSON"), (b"[1, 2]", "holds no JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "says"), MISTAKES)
def test_mistakes(tmp_path, capsys, given, says):
    """Each gets one line that says what to change, and exit status 2. given: flags, keys of the config, or its text."""
    file, flags = tmp_path / "config.json", given.split() if isinstance(given, str) else []
    changes = given if isinstance(given, dict) else {}
    file.write_bytes(given if isinstance(given, bytes) else json.dumps(SMOLLM2 | changes).encode())
    status = plan.main(["--model", str(file), *flags])
    captured = capsys.readouterr()
    assert status == 2 and says in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert captured.err.startswith("lab.plan: ")
