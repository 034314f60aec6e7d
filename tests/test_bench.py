"""bench.py: prompts as asked for, operations as PyTorch's own counter has them, figures that hang together."""

import json

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import model as models
from rollout import Sampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("length", [40, 128])
def test_prompts(folder, length):
    prompts = bench.make_prompts(models.Tokenizer(folder), 8, length)
    lengths = [len(p) for p in prompts]
    assert 0.8 * length <= min(lengths) < 0.9 * length and 1.1 * length < max(lengths) <= 1.2 * length
    assert len({tuple(p) for p in prompts}) == 8


def test_operations(folder):
    """Products of prefill and decode, against PyTorch's count of the same forward passes."""
    network, tokenizer = models.load(folder), models.Tokenizer(folder)
    prompts = bench.make_prompts(tokenizer, 3, 40)
    answers = Sampler(network).generate(prompts, 4, 10)
    bound = bench.limit(network, prompts, answers, 128)
    fed = sum(len(c.tokens) - 1 for group in answers for c in group)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.hidden(torch.zeros(1, sum(map(len, prompts)), dtype=torch.int64))
    counts = counter.get_flop_counts()["Global"]
    products = counts[torch.ops.aten.mm] if torch.ops.aten.mm in counts else counts[torch.ops.aten.addmm]
    assert bound["prefill_tflop"] * 1e12 == pytest.approx(products)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(fed, 1, dtype=torch.int64))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert bound["decode_tflop"] * 1e12 == pytest.approx(products)
    assert bound["limit_s"] == max(bound["compute_s"], bound["memory_s"]) > 0
    assert bound["weights_mb"] * 1e6 == sum(p.nbytes for p in network.parameters()) - network.embed_tokens.weight.nbytes


def test_command(folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("Is a man holding a sign?\n\nIs a woman walking a dog in the park?\n")
    flags = ["rollout", "--model", folder, "--prompts", file, "--samples", 3, "--new", 8, "--repeats", 2]
    assert bench.main([str(x) for x in [*flags, "--json", tmp_path / "figures.json"]]) == 0
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "2 prompts of" in out and "share of the limit" in out and "ratio" not in figures
    assert figures["share_of_limit"] == pytest.approx(figures["limit_s"] / figures["seconds"])
    assert len(figures["natural"]["runs"]) == 2 and figures["kv_mb"] < figures["kv_unshared_mb"]


def test_against_transformers(folder, tmp_path):
    """Both draw; forced, both draw all tokens, and the tokens counted are those up to the end of a turn."""
    pytest.importorskip("transformers")
    network, tokenizer = models.load(folder), models.Tokenizer(folder)
    theirs = bench.Theirs(folder, [tiny.END, tiny.STOP], network)
    prompts = bench.make_prompts(tokenizer, 3, 40)
    assert theirs.generate(prompts, 4, 10, forced=True) == 120
    counts = {theirs.generate(prompts, 4, 10, forced=False) for _ in range(5)}
    assert 12 <= min(counts) and max(counts) < 120
    file = tmp_path / "figures.json"
    flags = ["rollout", "--model", folder, "--count", 2, "--length", 40, "--samples", 2, "--new", 6, "--repeats", 1]
    assert bench.main([str(x) for x in [*flags, "--against", "transformers", "--json", file]]) == 0
    figures = json.loads(file.read_text())
    natural = figures["natural"]
    assert figures["ratio"] == natural["ratio"] == pytest.approx(natural["runs"][0] / natural["theirs_runs"][0])


@pytest.mark.parametrize(
    "changes, words",
    [({"--samples": 0}, "--samples must be at least 1"), ({"--model": "nowhere"}, "no model at nowhere"),
     ({"--prompts": "nowhere.txt"}, "nowhere.txt"), ({"--json": "nowhere/x.json"}, "make the folder nowhere first"),
     ({"--new": 4000}, "context")],
)  # fmt: skip
def test_mistakes(folder, capsys, changes, words):
    flags = {"--model": folder, "--count": 2, "--length": 40} | changes
    assert bench.main(["rollout", *(str(x) for pair in flags.items() for x in pair)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
