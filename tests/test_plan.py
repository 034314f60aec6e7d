"""plan.py: its bytes against those that a CPU really allocates, its rules, its flags.

What is allocated is asked of PyTorch's profiler, which sees every call of the CPU's allocator.
"""

import dataclasses
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
import train
from lab import memory, plan
from rollout import Sampler
from run import lora
from run.args import Args
from run.ranks import Ranks

ROOT = Path(__file__).parent.parent
SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
           "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
           "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_theta": 1e5, "tie_word_embeddings": True,
           "eos_token_id": 2}  # fmt: skip
GROUPS = (2, 34, 4, 20)  # prompts, their tokens, samples, theirs
BATCH = dict(zip(("micro", "prompt_tokens", "samples", "new"), GROUPS, strict=True), prompts=2, dtype="fp32")


def config(**changes) -> models.Config:
    return dataclasses.replace(models.Config.from_json(SMOLLM2), **changes)


def eight(name: str) -> models.Config:
    return plan.read(str(ROOT / "configs" / f"{name}.json"))


def allocated(work) -> tuple[int, int]:
    """Bytes that work() leaves allocated, and the most at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()  # noqa: F841 (what is kept must not be freed before the profiler has stopped)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return now, peak


def packed(count: int, prompt: int, samples: int, new: int) -> grpo.Packed:
    return grpo.pack([(list(range(5, 5 + prompt)), [list(range(7, 7 + new))] * samples)] * count)


@pytest.mark.parametrize("rank", [0, 16])
def test_bytes_of_a_cpu_run(rank):
    """All that a training step of SmolLM2's size holds, within 10 %; both with and without recomputation."""
    made = plan.plan(config(), lora=rank, **BATCH)
    planned, held = made["bytes"], {}
    network = optimizer = None

    def make():
        nonlocal network, optimizer
        network = models.Transformer(config())
        network = lora.attach(network, rank, rank) if rank else network

    def passes(*sizes):
        grpo.token_logprobs(network, packed(*(sizes or GROUPS)), 1.0).sum().backward()

    def moving(planned) -> int:
        most = max(planned["a block's backward"], planned["logits chunk"])
        return max(planned["activations"] + most, planned["end of the update"])

    held["weights"], _ = allocated(make)
    optimizer = train.Optimizer(network, Args(lora=rank))
    held["gradients"], _ = allocated(lambda: passes(1, 2, 2, 2))
    _, peak = allocated(passes)  # the gradients are there already
    network.recompute = True
    _, peak_recompute = allocated(passes)
    left, _ = allocated(lambda: optimizer.step(1e-6, 1.0, Ranks()))
    held["optimizer"] = left + held["gradients"]  # which it frees
    sampler = Sampler(network, [2])
    slots = []
    held["KV cache"], _ = allocated(lambda: slots.append(sampler.allocate(34, 2, 4, 20)))
    for name, value in held.items():
        assert planned[name] == pytest.approx(value, rel=0.1), name
    assert moving(planned) == pytest.approx(peak, rel=0.1)
    again = plan.plan(config(), lora=rank, recompute=True, **BATCH)["bytes"]
    assert moving(again) == pytest.approx(peak_recompute, rel=0.1)
    assert again["activations"] < planned["activations"] / 4
    assert made["parallel"] == "replicate" and planned["masters"] == planned["reference"] == 0
    assert made["total"] == pytest.approx(sum(held.values()) + peak, rel=0.1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("changes", [{}, {"family": "qwen3", "qk_norm": True}, {"family": "qwen2", "qkv_bias": True}])
def test_activations(fused, changes):
    """Of the hidden states alone, where nothing hides behind the logits; also with torch's fallback attention."""
    small, sizes = config(layers=3, vocab_size=300, **changes), (1, 64, 16, 32)
    network, groups = models.Transformer(small), packed(*sizes)
    first = network.embed_tokens.weight
    look = memory.over_parts(groups.parts)

    def work():
        states = network.hidden(groups.tokens, groups.positions, attend=look)[0, groups.sources]
        torch.autograd.grad(states, first, torch.ones_like(states))

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH]):
        _, peak = allocated(work)
    setup = plan.Setup(dtype="fp32")
    counted = memory.hidden_bytes(lambda **c: memory.build(small, setup, **c), small.layers, sizes, fused)
    assert sum(counted) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernels_workspace(kv_heads, monkeypatch):
    """In bf16, as on a GPU: q's gradient in fp32, runs rounded up, and those of grouped keys and values."""
    small = config(layers=3, vocab_size=300, heads=4, kv_heads=kv_heads, head_dim=16, hidden_size=64)
    tokens, keys, asked = 64 + 16 * 31, 64 + 16 * (64 + 31), []
    workspace = memory.flash_workspace
    monkeypatch.setattr(memory, "flash_workspace", lambda *args: asked.append(workspace(*args)) or 10**9)
    counted = memory.hidden_bytes(lambda **c: memory.build(small, plan.Setup(), **c), 3, (1, 64, 16, 32))
    own = 4 * (tokens + 128 * 17) * 4 * 16 + (2 * 2 * keys * 4 * 16 if kv_heads == 2 else 0)
    assert asked == [own] * 3 and sum(counted) > 10**9  # of one and of two layers


def test_the_cache_is_the_samplers(monkeypatch):
    """Prompts' positions in steps of 64 on a GPU, of 16 on a CPU."""
    for dtype, positions in (("bf16", 320), ("fp32", 304)):
        made = plan.plan(config(), dtype=dtype, prompts=2, samples=4, new=20)["bytes"]["KV cache"]
        network = models.Transformer(config())
        sampler = Sampler(network, [2])
        sampler.static = dtype == "bf16"
        monkeypatch.setattr(rollout, "Graphs", lambda *given: None)
        slots = sampler.allocate(300, 2, 4, 20)
        assert slots.T == positions and made == slots.kv_bytes() * (1 if dtype == "fp32" else 0.5)


def test_groups():
    """The groups counted are laid out as those trained on."""
    for sizes in ((2, 7, 3, 5), (1, 1, 1, 9), (3, 4, 2, 1)):
        made, real = memory.groups(*sizes), packed(*sizes)
        for name in ("tokens", "positions", "sources", "targets"):
            a, b = getattr(made, name), getattr(real, name)
            assert a.shape == b.shape and a.dtype == b.dtype
        assert made.parts == real.parts


@pytest.mark.parametrize(("name", "size"), [("llama-3.1-8b", 8_030_261_248), ("qwen3-8b", 8_190_735_360)])
def test_bytes_per_weight(name, size):
    c = eight(name)

    def per_weight(**settings) -> dict:
        made = plan.plan(c, micro=1, recompute=True, kl=True, **settings)
        assert made["parameters"] == size and sum(p.numel() for p in memory.build(c, plan.Setup()).parameters()) == size
        assert made["fits"] == (made["total"] + made["headroom"] <= settings.get("gpu_memory_bytes", 80e9))
        return {key: round(value / size, 3) for key, value in made["bytes"].items()}

    names = ("weights", "masters", "reference", "optimizer", "gradients", "inference copy")
    whole = per_weight(gpus=8, parallel="replicate")
    assert [whole[key] for key in names] == [2, 4, 2, 8, 6, 0] and whole["gather buffers"] == 0
    cut = per_weight(gpus=8, parallel="shard")
    assert [cut[key] for key in names] == [0.5, 0, 2, 1, 0.5, 2] and cut["gather buffers"] > 0
    adapters = plan.plan(c, micro=1, recompute=True, kl=True, lora=16)
    assert adapters["parallel"] == "replicate" and adapters["fits"]
    assert adapters["bytes"]["weights"] == 2 * size + 4 * adapters["trained"]
    assert adapters["bytes"]["optimizer"] == 8 * adapters["trained"] < 1e9
    assert adapters["bytes"]["gradients"] == 4 * adapters["trained"] and adapters["bytes"]["reference"] == 0


def test_choice():
    """Replicated where that fits, else cut if there are several GPUs, unless told otherwise."""
    c = config()
    small = BATCH | {"dtype": "bf16", "recompute": True}
    needs = plan.plan(c, parallel="replicate", **small)["total"] / (1 - plan.HEADROOM)
    assert plan.plan(c, gpus=2, gpu_memory_bytes=needs * 1.01, **small)["parallel"] == "replicate"
    assert plan.plan(c, gpus=2, gpu_memory_bytes=needs * 0.9, **small)["parallel"] == "shard"
    assert plan.plan(c, gpus=1, gpu_memory_bytes=needs * 0.9, **small)["parallel"] == "replicate"
    told = plan.plan(c, gpus=2, gpu_memory_bytes=needs * 0.9, parallel="replicate", **small)
    assert told["parallel"] == "replicate" and not told["fits"]


def test_sizes_grow():
    """More to hold costs more: groups, the anchor's questions, longer samples; fewer prompts a GPU cost less."""
    c, base = config(layers=2), {"dtype": "bf16", "prompts": 8, "micro": 2, "new": 16, "prompt_tokens": 64}

    def size(key, **settings):
        return plan.plan(c, **base | settings)["bytes"][key]

    assert size("activations", micro=4) == pytest.approx(2 * size("activations"), rel=0.05)
    assert size("activations", micro=1, anchor=True, samples=2) > size("activations", micro=1, samples=2)
    assert size("activations", attention="math") > size("activations")
    assert size("KV cache", gpus=4) == size("KV cache") // 4
    assert size("KV cache", new=32) > size("KV cache")
    assert size("logits chunk") > 4 * 32 * 49152


def test_advice(capsys):
    """The change named makes it fit, and is the first that does."""
    command = ["--model", str(ROOT / "configs" / "qwen3-8b.json"), "--gpus", "8", "--kl"]
    assert plan.main(command) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "it fits with --recompute: " in out
    assert plan.main([*command, "--recompute"]) == 0
    assert "\nfits, " in capsys.readouterr().out
    c = eight("llama-3.1-8b")
    flags, made = plan.advice(c, plan.Setup(gpus=1, kl=True))
    assert flags.startswith("--lora 16") and made["fits"] and made["parallel"] == "replicate"
    flags, made = plan.advice(c, plan.Setup(gpus=2, parallel="replicate", gpu_memory_bytes=120e9, recompute=True))
    assert flags == "--parallel shard" and made["parallel"] == "shard"
    assert plan.advice(c, plan.Setup(gpu_memory_bytes=8e9, lora=16)) is None


@pytest.mark.parametrize("rank", [0, 4])
def test_operations(rank):
    """Products of forward and backward, against PyTorch's count of the same pass."""
    c = config(layers=2, vocab_size=3000)
    _, prompt, samples, new = GROUPS
    network = models.Transformer(c)
    network = lora.attach(network, rank, rank) if rank else network
    with FlopCounterMode(display=False) as counter:
        grpo.token_logprobs(network, packed(*GROUPS), 1.0).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    made = plan.plan(c, gpu_tflops=1e-12, lora=rank, **BATCH)
    attention = 3 * 4 * c.layers * c.heads * c.head_dim * 2 * (prompt**2 / 2 + samples * new * (prompt + new / 2))
    assert made["seconds"]["forward, backward"] - attention == pytest.approx(products, rel=0.05)
    assert made["seconds"]["step"] > made["seconds"]["forward, backward"]


def test_communication():
    c = eight("llama-3.1-8b")
    assert plan.plan(c, lora=16)["seconds"]["communication"] == 0
    few, many = (plan.plan(c, gpus=n, parallel="shard")["seconds"]["communication"] for n in (2, 16))
    assert many > few / 8 > 0  # each of 16 makes an eighth of the passes


def test_command(tmp_path):
    """As a user runs it: a folder, and the figures as JSON."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    flags = ["--model", tmp_path, "--gpu-memory", "24", "--micro", "1", "--json", tmp_path / "plan.json"]
    command = [sys.executable, ROOT / "plan.py", *flags]
    run = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["gpu_memory_bytes"] == 24e9 and made["headroom"] == 1.2e9 and made["fits"]
    assert made["total"] <= sum(made["bytes"].values())
    for name in ("weights", "reference", "optimizer", "gradients", "inference copy", "KV cache", "activations",
                 "logits chunk", "gather buffers", "total", "headroom", "prefill", "decode", "step"):  # fmt: skip
        assert f"\n  {name} " in run.stdout, name


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--gpus", "two"], "argument --gpus"),
        (["--gpu-memory", "-80"], "--gpu-memory must be above 0"),
        (["--gpu-memory", "nan"], "--gpu-memory must be above 0"),
        (["--samples", "1"], "--samples must be at least 2"),
        (["--micro", "0"], "--micro must be at least 1"),
        (["--lora", "-1"], "--lora must be at least 0"),
        (["--parallel", "pipeline"], "argument --parallel"),
        (["--parallel", "shard"], "raise --gpus"),
        (["--prompt-tokens", "9000"], "lower one"),
        (["--gpu-tflops", "0"], "--gpu-tflops must be above 0"),
        (["--model", "/nowhere"], "no model at /nowhere"),
        (["--json", "/nowhere/plan.json"], "make the folder /nowhere first"),
        (["--steps", "3"], "unrecognized arguments"),
        ({"num_hidden_layers": 2.5}, "use the config.json of the weights"),
        ({"head_dim": 63}, "use the config.json of the weights"),
        ({"model_type": "gpt2"}, "use a llama, qwen2 or qwen3"),
        ("[1, 2", "cannot be read as JSON"),
        ("[1, 2]", "holds no JSON object"),
    ],
)
def test_mistakes(tmp_path, capsys, flags, says):
    """Each gets one line that says what to change, and exit status 2."""
    file = tmp_path / "config.json"
    changed = SMOLLM2 | flags if isinstance(flags, dict) else SMOLLM2
    file.write_text(flags if isinstance(flags, str) else json.dumps(changed))
    try:
        status = plan.main(["--model", str(file), *(flags if isinstance(flags, list) else [])])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and says in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert captured.err.startswith("plan.py: ")
