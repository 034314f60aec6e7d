"""What only a GPU can show: the captured decode step against the eager one, bf16, and a run of train.py there."""

import pytest
import tiny
import torch
from test_rollout import FAMILIES, SHAPE, eager, same

import lora
import model as models
import rollout
import train
from rollout import Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_network(family, dtype=torch.float32):
    torch.manual_seed(3)
    config = models.Config.from_json(SHAPE | FAMILIES[family] | {"eos_token_id": [5, 6, 7]})
    network = models.Transformer(config, dtype)
    with torch.no_grad():
        for w in network.parameters():
            w.copy_(torch.randn(w.shape) * (0.3 if w.dim() > 1 else 1))
    return network.to("cuda")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows, lanes", [(128, 8), (12, 4)])
def test_graphs_equal_eager(family, rows, lanes, monkeypatch, capsys):
    """Other seeds, prompts, temperatures, buckets and refills; weights that change in place, without recapture."""
    network = random_network(family)
    graphed, plain = Sampler(network, rows=rows, lanes=lanes), Sampler(network, rows=rows, lanes=lanes)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(97, (n,), generator=generator).tolist() for n in (30, 1, 17, 44, 2, 30, 9, 61, 5)]
    runs = []
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
    slots = rollout.Slots(network.config, 2, 3, 16, 8, "cuda", torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            rollout.decode_step(network, slots, torch.tensor([5], device="cuda"), 2, 6, 16, 8)
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


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run(tmp_path, rank):
    """All weights trained, or LoRA's adapters."""
    folder = tiny.build(tmp_path / "model")
    given = {"task": "esnli", "intervention": "bias", "model": folder,
             "data": tiny.ROOT / "tests" / "data" / "esnli", "out": tmp_path / "out", "prompts": 4,
             "samples": 4, "steps": 2, "eval-questions": 2, "fit-questions": 2, "max-new-tokens": 8,
             "lora": rank}  # fmt: skip
    args = train.parse([str(x) for name, value in given.items() for x in (f"--{name}", value)])
    ranks = train.Ranks()
    train.run(args, ranks, *train.prepare(args, ranks))
    trained = models.load(tmp_path / "out" / "model", "cuda")
    assert trained.dtype == torch.bfloat16 and bool(lora.adapters(trained)) == bool(rank)


def test_decisions_do_not_depend_on_the_batch():
    """Null edits on the GPU: the letters' figures move by rounding only."""
    network = random_network("llama", torch.bfloat16)
    texts = [list(range(1, n)) for n in range(5, 45)]
    sampler = Sampler(network)
    together = sampler.option_logprobs(texts, [5, 6, 7])
    alone = torch.cat([sampler.option_logprobs([t], [5, 6, 7]) for t in texts])
    assert (together - alone).abs().max() < 0.1
