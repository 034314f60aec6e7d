"""What only a GPU can show: that it computes what a CPU does, the captured decode step what the eager one does, bf16,
FSDP2 over NCCL, and runs of train.py there."""

import copy
import random

import pytest
import tiny
import torch
from test_lora import disturb
from test_rollout import FAMILIES, SHAPE, eager, same
from test_train import timeless

import kernels
import model as models
import rollout
import train
from rollout import Completion, Sampler
from run import lora, shard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_network(family, dtype=torch.float32):
    torch.manual_seed(3)
    config = models.Config.from_json(SHAPE | FAMILIES[family] | {"eos_token_id": [5, 6, 7]})
    network = models.Transformer(config, dtype)
    with torch.no_grad():
        for w in network.parameters():
            w.copy_(torch.randn(w.shape) * (0.3 if w.dim() > 1 else 1))
    return network.to("cuda")


def both(family):
    """The same fp32 network on the GPU and on the CPU."""
    network = random_network(family)
    return network, copy.deepcopy(network).to("cpu")


def random_texts():
    generator = random.Random(1)
    return [[generator.randrange(8, 97) for _ in range(n)] for n in (30, 1, 17, 44, 2, 30, 9, 61, 5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_and_options_are_the_cpus(family):
    """In fp32: every token, as its uniform is a hash; every logprob up to rounding."""
    texts, one, other = random_texts(), *(Sampler(network) for network in both(family))
    heat = [1.0, 0.0, 0.8, 1.0, 1.5]
    same(one.generate(texts, 5, 40, heat, seed=2, step=3), other.generate(texts, 5, 40, heat, seed=2, step=3))
    a, b = (s.option_logprobs([*texts[:6], *texts[:6]], [5, 6, 7], together=2) for s in (one, other))
    assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_an_update_is_the_cpus(family, recompute):
    """In fp32: loss, KL, gradient norm and new weights, of packed groups of ragged answers with a reference."""
    generator, groups, networks, results = random.Random(4), [], both(family), []
    for text in random_texts():
        drawn = [[generator.randrange(8, 97) for _ in range(generator.randint(1, 12))] for _ in range(4)]
        groups.append((text, [Completion(tokens, [-4.0] * len(tokens), True) for tokens in drawn]))
    rewards = [[float(generator.random() < 0.5) for _ in range(4)] for _ in groups]
    args = train.Args(kl=0.3, lr=1e-3, max_new_tokens=12)
    for network in networks:
        ranks = train.Ranks()
        ranks.device, network.recompute = network.device, recompute
        reference = copy.deepcopy(network).requires_grad_(False)
        with torch.no_grad():
            reference.norm.weight *= 1.1
        optimizer = train.Optimizer(network, args)
        results.append(train.update(network, reference, optimizer, groups, rewards, args.lr, args, ranks))
    assert results[0] == pytest.approx(results[1], rel=1e-3, abs=1e-5) and results[1]["kl"] > 0
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        # The mean: where a gradient is nothing but rounding, AdamW makes a full step of it.
        assert (a.cpu() - b).abs().mean() < 1e-5


@pytest.mark.parametrize("family, rank", [*((family, 0) for family in FAMILIES), ("llama", 4), ("qwen2", 4)])
@pytest.mark.parametrize("rows, lanes", [(128, 8), (12, 4)])
def test_graphs_equal_eager(family, rank, rows, lanes, monkeypatch, capsys):
    """Other seeds, prompts, temperatures, buckets and refills; weights that change in place, without recapture."""
    network = random_network(family)
    if rank:
        disturb(lora.attach(network, rank, 2.0 * rank).to("cuda"))
    graphed, plain = Sampler(network, rows=rows, lanes=lanes), Sampler(network, rows=rows, lanes=lanes)
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


def test_no_synchronisation_in_the_step():
    network = random_network("llama")
    slots, end = rollout.Slots(network.config, 2, 3, 16, 8, "cuda", torch.float32), torch.tensor([5], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            rollout.decode_step(network, slots, end, 2, 6, 16, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_logprobs_are_the_trainers_in_bf16():
    network = random_network("qwen3", torch.bfloat16)
    texts = [list(range(1, 20)), list(range(30, 34))]
    answers = Sampler(network).generate(texts, 8, 20)
    recorded = torch.tensor([lp for group in answers for c in group for lp in c.logprobs])
    packed = train.pack([(t, [c.tokens for c in g]) for t, g in zip(texts, answers, strict=True)], "cuda")
    with torch.no_grad():
        scored = train.token_logprobs(network, packed, 1.0).cpu()
    assert (recorded - scored).abs().mean() < 0.05


def run(folder, out, **changes):
    """train.py's run in this process."""
    given = {"task": "esnli", "intervention": "bias", "model": folder, "data": tiny.ROOT / "tests" / "data" / "esnli",
             "out": out, "prompts": 4, "samples": 4, "steps": 3, "eval-questions": 2, "fit-questions": 2,
             "max-new-tokens": 8, "checkpoint-every": 1} | changes  # fmt: skip
    args = train.parse([str(x) for name, value in given.items() for x in (f"--{name}", value) if x != ""])
    ranks = train.Ranks()
    train.run(args, ranks, *train.prepare(args, ranks))
    return out


CHANGES = [{}, {"lora": 4}, {"kl": 0.1, "anchor": 1, "recompute": "", "calibrate": ""}, {"objective": "detection"},
           {"labels": "frozen", "frozen-questions": 12, "lora": 4, "kl": 0.1, "recompute": ""}]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=[" ".join(c) for c in CHANGES])
def test_a_run(tmp_path, changes):
    """All weights trained, or LoRA's adapters; twice the same; cut off after two steps and gone on with, the same."""
    folder = tiny.build(tmp_path / "model")
    whole, again = (run(folder, tmp_path / name, **changes) for name in ("whole", "again"))
    trained = models.load(whole / "model", "cuda")
    assert trained.dtype == torch.bfloat16 and bool(lora.adapters(trained)) == ("lora" in changes)
    seen = timeless(whole / "metrics.jsonl")
    assert len(seen) == 3 and not any(step["skipped"] for step in seen)
    assert timeless(again / "metrics.jsonl") == seen
    parts = run(folder, tmp_path / "parts", **changes, **{"steps": 2})
    run(folder, parts, **changes, **{"steps": 3, "resume": ""})
    assert timeless(parts / "metrics.jsonl") == seen


@pytest.mark.parametrize("H, K, D", [(32, 8, 128), (9, 3, 64), (4, 4, 16)])
def test_one_kernel_for_all_parts(H, K, D):
    """Against a kernel for each part, in fp32, forward and backward; the gradient to the bit the same again."""
    parts = [(0, 30, 0, 0, [30]), (30, 75, 0, 30, [1, 20, 24]), (75, 76, 75, 75, [1]), (76, 80, 75, 76, [4]),
             (80, 380, 80, 80, [300]), (380, 980, 80, 380, [10] * 40 + [199, 1])]  # fmt: skip
    torch.manual_seed(0)
    qkv = [torch.randn(1, heads, 980, D, device="cuda") for heads in (H, K, K)]
    weight, results = torch.randn(1, H, 980, D, device="cuda") + 0.5, []
    for dtype, flash in ((torch.float32, False), (torch.bfloat16, True), (torch.bfloat16, True)):
        given = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
        assert kernels.flashes(given[0]) == flash
        out = kernels.over_parts(parts, "cuda")(0, *given)
        (out.float() * weight).sum().backward()
        results.append([out.detach().float(), *(x.grad.float() for x in given)])
    for exact, once, again in zip(*results, strict=True):
        assert (once - exact).norm() < 0.01 * exact.norm() and torch.equal(once, again)


def test_a_cut_model_over_nccl():
    """An update of masters cut by FSDP2, on the one GPU that is there, is that of the whole model in fp32."""
    whole, sampled = random_network("llama"), random_network("llama")
    with torch.device("meta"):
        like = models.Transformer(whole.config, torch.float32)
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ranks, args, results = train.Ranks(), train.Args(lr=1e-3, max_new_tokens=8), []
        texts = random_texts()
        groups = list(zip(texts, Sampler(whole).generate(texts, 4, 8), strict=True))
        rewards = [[0.0, 1.0, 1.0, 0.0]] * len(texts)
        cut = shard.cut(sampled, like, 1)
        for trained, copied in ((whole, None), (cut, cut)):
            optimizer = train.Optimizer(sampled if copied else whole, args, copied)
            results.append(train.update(trained, None, optimizer, groups, rewards, args.lr, args, ranks))
        assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-6)
        for a, b in zip(whole.parameters(), sampled.parameters(), strict=True):
            assert (a - b).abs().mean() < 1e-5
    finally:
        torch.distributed.destroy_process_group()


def test_decisions_do_not_depend_on_the_batch():
    """Null edits on the GPU: the letters' figures move by rounding only."""
    network = random_network("llama", torch.bfloat16)
    texts = [list(range(1, n)) for n in range(5, 45)]
    sampler = Sampler(network)
    together = sampler.option_logprobs(texts, [5, 6, 7])
    alone = torch.cat([sampler.option_logprobs([t], [5, 6, 7]) for t in texts])
    assert (together - alone).abs().max() < 0.1
