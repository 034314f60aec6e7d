"""What only a GPU can show: its results are the CPU's, the captured decode step is the eager one, the fused step is the
plain one, and bf16, FSDP2 over NCCL and runs of train.py work there."""

import copy
import random

import pytest
import tiny
import torch
from launch import call, flags, step_on, timeless
from test_graph import adapt
from test_rollout import FAMILIES, eager, flat, random_network, random_texts, same

import grpo
import kernels
import model as models
import rollout
from rollout import Completion, Sampler
from run import attention, lora, shard
from run.args import Args
from run.policy import Policy
from run.ranks import Ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_and_options_are_the_cpus(family):
    """In fp32: every token, because its uniform is a hash; every logprob up to rounding."""
    texts, temperatures = random_texts(), [1.0, 0.0, 0.8, 1.0, 1.5]
    one, other = (Sampler(random_network(family).to(device)) for device in ("cuda", "cpu"))
    same(*(s.generate(texts, 5, 40, temperatures, seed=2, step=3) for s in (one, other)))
    a, b = (s.option_logprobs([*texts[:6], *texts[:6]], [5, 6, 7], together=2) for s in (one, other))
    assert (a - b).abs().max() < 1e-4


def update(policy, groups, rewards):
    record = step_on(policy, groups, rewards)
    assert not record["skipped"]
    return record


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_an_update_is_the_cpus(family, recompute):
    """In fp32: loss, KL, gradient norm and new weights, of packed groups of ragged answers with a reference."""
    generator, groups, args = random.Random(4), [], Args(kl=0.3, lr=1e-3, warmup=0, max_new_tokens=12)
    for text in random_texts():
        drawn = [[generator.randrange(8, 97) for _ in range(generator.randint(1, 12))] for _ in range(4)]
        groups.append((text, [Completion(tokens, [-4.0] * len(tokens), True) for tokens in drawn]))
    rewards = [[float(generator.random() < 0.5) for _ in range(4)] for _ in groups]
    figures, networks = [], [random_network(family).to(device) for device in ("cuda", "cpu")]
    for network in networks:
        ranks = Ranks()
        ranks.device, network.recompute = network.device, recompute
        reference = copy.deepcopy(network).requires_grad_(False)
        reference.norm.weight *= 1.1
        figures.append(update(Policy(network, args, ranks, reference=reference), groups, rewards))
    assert figures[0] == pytest.approx(figures[1], rel=1e-3, abs=1e-5) and figures[1]["kl"] > 0
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        # The mean: where a gradient is nothing but rounding, AdamW makes a full step of it.
        assert (a.cpu() - b).abs().mean() < 1e-5


def test_rows_by_memory():
    """The default decodes 512 rows of a small model together, and its samples are those of 16 rows."""
    network, texts = random_network("llama").to("cuda"), random_texts()
    many, few = Sampler(network), Sampler(network, rows=16)
    same(many.generate(texts, 64, 12), few.generate(texts, 64, 12))
    assert many.slots.P * many.slots.G > 256 >= 16 >= few.slots.P * few.slots.G


ADAPTED = [*((family, 0) for family in FAMILIES), ("llama", 4), ("qwen2", 4)]  # family, rank of LoRA adapters or 0


@pytest.mark.parametrize("family, rank", ADAPTED)
@pytest.mark.parametrize("rows, lanes, kernels", [(128, 8, "plain"), (12, 4, "plain"), (12, 4, "fused")])
def test_graphs_equal_eager(family, rank, rows, lanes, kernels, monkeypatch, capsys):
    """Other seeds, prompts, temperatures, buckets and refills; weights that change in place, without a new capture."""
    network = adapt(random_network(family, torch.bfloat16 if kernels == "fused" else torch.float32), rank).to("cuda")
    graphed, plain = (Sampler(network, rows=rows, lanes=lanes, kernels=kernels) for _ in range(2))
    texts, runs = random_texts(), []
    for i, temperature in enumerate((1.0, [0.0, 0.8, 1.0, 1.5, 1.0], 0.7)):
        some = texts if i < 2 else texts[::-1]
        a = graphed.generate(some, 5, 40, temperature, seed=i, step=3 * i)
        runs.append(graphed.run)
        assert set(graphed.run.graphs) == set(graphed.buckets(graphed.slots))
        with monkeypatch.context() as patch:
            patch.setattr(rollout, "Graphs", eager)
            plain.slots = None
            same(a, plain.generate(some, 5, 40, temperature, seed=i, step=3 * i))
        with torch.no_grad():
            for w in network.parameters():
                w *= 1.02
    assert runs[0] is runs[1] is runs[2]
    assert "no CUDA graphs" not in capsys.readouterr().err


@pytest.mark.parametrize("family, rank", ADAPTED)
def test_fused_samples_are_the_plain_ones(family, rank, monkeypatch):
    """In fp32, which only this test allows: every token of whole decodes. tests/gpu.py does the like in bf16."""
    monkeypatch.setattr(rollout, "may_fuse", lambda kernels, *_: kernels == "fused")
    network, texts, temperatures = adapt(random_network(family), rank).to("cuda"), random_texts(), [1.0, 0.0, 0.8]
    one, other = (Sampler(network, rows=12, lanes=2, kernels=kernels) for kernels in ("fused", "plain"))
    same(*(s.generate(texts, 3, 40, temperatures, seed=2, step=3) for s in (one, other)))


@pytest.mark.parametrize("step", [rollout.decode_step, kernels.fused_step])
def test_no_synchronisation_in_the_step(step):
    network, end = random_network("llama", torch.bfloat16).to("cuda"), torch.tensor([5], device="cuda")
    slots = rollout.Slots(network.config, 2, 3, 16, 8, "cuda", torch.bfloat16)
    with torch.inference_mode():
        step(network, slots, end, 2, 6, 16, 8)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(network, slots, end, 2, 6, 16, 8)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_logprobs_are_the_trainers_in_bf16(kernels):
    network, texts = random_network("qwen3", torch.bfloat16).to("cuda"), [list(range(1, 20)), list(range(30, 34))]
    answers = Sampler(network, kernels=kernels).generate(texts, 8, 20)
    recorded = torch.tensor([lp for c in flat(answers) for lp in c.logprobs])
    packed = grpo.pack([(t, [c.tokens for c in g]) for t, g in zip(texts, answers, strict=True)], "cuda")
    with torch.no_grad():
        scored = grpo.token_logprobs(network, packed, 1.0).cpu()
    assert (recorded - scored).abs().mean() < 0.05


CHANGES = [{"kernels": "fused"}, {"kernels": "plain"}, {"lora": 4},
           {"kl": 0.1, "anchor": 1, "recompute": True, "calibrate": True}, {"objective": "detection"},
           {"labels": "frozen", "frozen_questions": 12, "lora": 4, "kl": 0.1, "recompute": True}]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=[" ".join(f"{k}={v}" for k, v in c.items()) for c in CHANGES])
def test_a_run(tmp_path, changes):
    """All weights trained, or LoRA's adapters; a second run is the same, and so is one stopped after two steps."""
    folder = tiny.build(tmp_path / "model")
    small = {"steps": 3, "eval_questions": 2, "fit_questions": 2, "max_new_tokens": 8, "checkpoint_every": 1}

    def run(name, **more):
        code, _, error = call(flags(folder, tmp_path / name, **small | changes | more))
        assert code == 0, error
        return timeless(tmp_path / name / "metrics.jsonl")

    seen = run("whole")
    trained = models.load(tmp_path / "whole" / "model", "cuda")
    assert trained.dtype == torch.bfloat16 and bool(lora.adapters(trained)) == ("lora" in changes)
    assert len(seen) == 3 and not any(step["skipped"] for step in seen)
    assert run("again") == seen
    run("parts", steps=2)
    assert run("parts", resume=True) == seen


@pytest.mark.parametrize("H, K, D", [(32, 8, 128), (9, 3, 64), (4, 4, 16)])
def test_one_kernel_for_all_parts(H, K, D):
    """Against a kernel for each part, in fp32, forward and backward; a second time the gradient is the same bits."""
    parts = [(0, 30, 0, 0, [30]), (30, 75, 0, 30, [1, 20, 24]), (75, 76, 75, 75, [1]), (76, 80, 75, 76, [4]),
             (80, 380, 80, 80, [300]), (380, 980, 80, 380, [10] * 40 + [199, 1])]  # fmt: skip
    torch.manual_seed(0)
    qkv = [torch.randn(1, heads, 980, D, device="cuda") for heads in (H, K, K)]
    weight, results = torch.randn(1, H, 980, D, device="cuda") + 0.5, []
    for dtype, flash in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, True)):
        given = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
        assert attention.flashes(given[0]) == flash
        out = attention.over_parts(parts, "cuda")(0, *given)
        (out.float() * weight).sum().backward()
        results.append([out.detach().float(), *(x.grad.float() for x in given)])
    for exact, once, again in zip(*results, strict=True):
        assert (once - exact).norm() < 0.01 * exact.norm() and torch.equal(once, again)


def test_a_sharded_model_over_nccl():
    """An update of masters in shards (FSDP2), on the one GPU that is there, is that of the whole model in fp32."""
    whole, sampled = (random_network("llama").to("cuda") for _ in range(2))
    with torch.device("meta"):
        like = models.Transformer(whole.config, torch.float32)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ranks, args, texts = Ranks(), Args(lr=1e-3, warmup=0, max_new_tokens=8), random_texts()
        groups = list(zip(texts, Sampler(whole).generate(texts, 4, 8), strict=True))
        rewards = [[0.0, 1.0, 1.0, 0.0]] * len(texts)
        policies = Policy(whole, args, ranks), Policy(sampled, args, ranks, shard.shard(sampled, like, 1))
        one, other = (update(policy, groups, rewards) for policy in policies)
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
        for a, b in zip(whole.parameters(), sampled.parameters(), strict=True):
            assert (a - b).abs().mean() < 1e-5
    finally:
        torch.distributed.destroy_process_group()


def test_decisions_do_not_depend_on_the_batch():
    """Null edits on the GPU: the letters' figures move by rounding only."""
    sampler = Sampler(random_network("llama", torch.bfloat16).to("cuda"))
    texts = [list(range(1, n)) for n in range(5, 45)]
    together = sampler.option_logprobs(texts, [5, 6, 7])
    alone = torch.cat([sampler.option_logprobs([t], [5, 6, 7]) for t in texts])
    assert (together - alone).abs().max() < 0.1


@pytest.mark.parametrize("rank", [0, 4])
def test_no_synchronisation_in_a_micro_batch(rank):
    """From packing to the figures, with a KL, in bf16. test_waits.py shows as much on the CPU, and more."""
    network, texts = random_network("llama", torch.bfloat16).to("cuda"), random_texts()
    groups = list(zip(texts, Sampler(network).generate(texts, 4, 8), strict=True))
    reference = copy.deepcopy(network).requires_grad_(False)
    network = lora.attach(network, rank, 8.0) if rank else network
    network.recompute, (ranks := Ranks()).device = rank > 0, network.device
    policy = Policy(network, Args(kl=0.1, micro=2, max_new_tokens=8), ranks, reference=network if rank else reference)
    passes, seen = policy.passes, []

    def guarded(*given):
        for part in passes(*given):
            torch.cuda.set_sync_debug_mode("error" if seen else "default")  # the first step loads kernels
            yield part
        torch.cuda.set_sync_debug_mode("default")

    policy.passes = guarded
    try:
        for _ in range(2):
            seen.append(update(policy, groups, [[0.0, 1.0, 1.0, 0.0]] * len(groups)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
