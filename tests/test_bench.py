"""lab.bench: prompts as asked for, operations as PyTorch's own counter has them, consistent figures."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import grpo
import model as models
from lab import bench
from rollout import Sampler
from run import lora


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
    bound = bench.rollout_limit(network, prompts, answers, 128)
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


def test_against_transformers(folder, tmp_path, monkeypatch):
    """Both draw; forced, both draw all tokens, and the tokens counted are those up to the end of a turn."""
    pytest.importorskip("transformers")
    network, tokenizer = models.load(folder), models.Tokenizer(folder)
    theirs = bench.Transformers(folder, [tiny.END, tiny.STOP], network)
    prompts = bench.make_prompts(tokenizer, 3, 40)
    assert theirs.generate(prompts, 4, 10, forced=True) == 120
    counts = {theirs.generate(prompts, 4, 10, forced=False) for _ in range(5)}
    assert 12 <= min(counts) < max(counts) <= 120
    drawn = [[7, tiny.END, tiny.END, tiny.END], [7, 7, tiny.STOP, tiny.END], [7, 7, 7, 7], [tiny.STOP, 7, 7, 7]]
    known = torch.tensor([[0] * max(map(len, prompts)) + row for row in drawn])
    with monkeypatch.context() as patch:
        patch.setattr(theirs.network, "generate", lambda **given: known)
        assert theirs.generate(prompts, 4, 4, forced=False) == 2 + 3 + 4 + 1
    file = tmp_path / "figures.json"
    flags = ["rollout", "--model", folder, "--count", 2, "--length", 40, "--samples", 2, "--new", 6, "--repeats", 1]
    assert bench.main([str(x) for x in [*flags, "--against", "transformers", "--json", file]]) == 0
    figures = json.loads(file.read_text())
    natural = figures["natural"]
    assert figures["ratio"] == natural["ratio"] == pytest.approx(natural["runs"][0] / natural["theirs_runs"][0])


def test_drawn_weights(folder, tmp_path, capsys, monkeypatch):
    """A folder without weights will do, for a step with adapters too; not where it would be measured against TRL."""
    pytest.importorskip("transformers")
    bare, file = tmp_path / "bare", tmp_path / "figures.json"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    given = ["--model", bare, "--random", "--count", 2, "--length", 40, "--samples", 3, "--new", 6, "--repeats", 1]
    assert bench.main([str(x) for x in ["rollout", *given, "--against", "transformers", "--json", file]]) == 0
    figures = json.loads(file.read_text())
    assert figures["tokens"] > 30 and figures["ratio"] > 0
    network = bench.random_network(str(bare), torch.device("cpu"))
    assert all(w.isfinite().all() for w in network.parameters()) and network.embed_tokens.weight.std() > 0.01
    assert torch.equal(network.frequencies, models.load(folder).frequencies)
    given += ["--micro", 1, "--lora", 2, "--recompute", "--json", file]
    trained = []
    with monkeypatch.context() as patch:
        policy = bench.Policy
        patch.setattr(bench, "Policy", lambda network, *rest: trained.append(network) or policy(network, *rest))
        assert bench.main([str(x) for x in ["train", *given]]) == 0
    assert len(lora.adapters(trained[0])) == 8 and trained[0].recompute  # four layers of each block
    assert list(json.loads(file.read_text())["phases"]) == ["labels", "rollout", "forward", "backward", "optimizer"]
    assert capsys.readouterr().out.count("\nstep: labels ") == 3  # two of them to get warm
    for flags in (["rollout", *given], ["train", *given, "--against", "trl"]):
        assert bench.main([str(x) for x in flags]) == 2
    assert capsys.readouterr().err.count("leave") == 2


@pytest.mark.parametrize(
    "changes, words",
    [({"--samples": 0}, "--samples must be at least 1"), ({"--model": "nowhere"}, "no model at nowhere"),
     ({"--prompts": "nowhere.txt"}, "nowhere.txt"), ({"--json": "nowhere/x.json"}, "make the folder nowhere first"),
     ({"--new": 4000}, "context"), ({"--lora": -1}, "--lora must be at least 0, not -1")],
)  # fmt: skip
def test_mistakes(folder, capsys, changes, words):
    flags = {"--model": folder, "--count": 2, "--length": 40} | changes
    assert bench.main(["rollout", *(str(x) for pair in flags.items() for x in pair)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


# ---- the training step ---------------------------------------------------------------------------------------


def test_operations_of_a_step(folder):
    """Forward and backward of packed groups, against PyTorch's count of the products in them."""
    network, tokenizer = models.load(folder), models.Tokenizer(folder)
    prompts = bench.make_prompts(tokenizer, 2, 40)
    groups = list(zip(prompts, Sampler(network).generate(prompts, 3, 10), strict=True))
    bound = bench.step_limit(network.config, groups, torch.device("cpu"), torch.float32)
    packed = grpo.pack([(p, [c.tokens for c in group]) for p, group in groups])
    assert (bound["tokens_in"], bound["tokens_scored"]) == (packed.tokens.numel(), len(packed.targets))
    with FlopCounterMode(display=False) as counter:
        network.head(network.hidden(packed.tokens)[0, packed.sources]).sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    # The first layer's input is an embedding, which needs no gradient of a product but has one: all are counted.
    assert bound["tflop"] * 1e12 == pytest.approx(products)
    lora.attach(network, 2, 4.0)
    network.recompute = True
    with FlopCounterMode(display=False) as counter:
        network.head(network.hidden(packed.tokens)[0, packed.sources]).sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    bound = bench.step_limit(network.config, groups, torch.device("cpu"), torch.float32, True, True)
    assert bound["tflop"] * 1e12 == pytest.approx(products, rel=0.25)  # the adapters' own are not counted


def test_train_command(folder, tmp_path, capsys, monkeypatch):
    """Phases that add up; the same tokens for both; figures in the file as printed; memory of each alone."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    ballast = torch.ones(500_000_000)  # 2 GB that are this process's
    order, alone, load = [], bench.alone, models.load
    monkeypatch.setattr(bench, "alone", lambda *given: order.append("theirs") or alone(*given))
    monkeypatch.setattr(models, "load", lambda *given: order.append("ours") or load(*given))
    flags = ["train", "--model", folder, "--count", 4, "--samples", 4, "--new", 12, "--length", 40, "--micro", 2,
             "--repeats", 2, "--against", "trl", "--json", tmp_path / "figures.json"]  # fmt: skip
    assert bench.main([str(x) for x in flags]) == 0
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["phases"]) == ["labels", "rollout", "forward", "backward", "optimizer"]
    assert all(seconds > 0 for seconds in figures["phases"].values())
    both = figures["phases"]["forward"] + figures["phases"]["backward"]
    assert figures["share_of_limit"] == pytest.approx(figures["limit_s"] / both)
    assert len(figures["ours"]) == len(figures["generating"]) == len(figures["fed"]) == 2
    for pair, run in zip(figures["generating"], figures["ours"], strict=True):
        assert pair["ours_s"] == pytest.approx(sum(run.values())) and pair["labels_s"] == run["labels"] > 0
        per_token = pair["theirs_s"] / pair["theirs_tokens"], pair["ours_s"] / pair["ours_tokens"]
        assert pair["ratio"] == pytest.approx(per_token[0] / per_token[1])
        without = (pair["ours_s"] - pair["labels_s"]) / pair["ours_tokens"]
        assert pair["ratio_without_labels"] == pytest.approx(per_token[0] / without)
    for pair in figures["fed"]:
        assert pair["ratio"] == pytest.approx(pair["theirs_s"] / pair["ours_s"])
    for key, what in (("generating_ratio", "per new token, our labels included"),
                      ("generating_ratio_without_labels", "per new token, without labels"),
                      ("fed_ratio", "same tokens")):  # fmt: skip
        assert f"{what}: ratio {figures[key]:.2f} (median of 2 pairs)" in out
    assert figures["generating_ratio"] < figures["generating_ratio_without_labels"]
    assert order == ["theirs", "ours"]  # TRL's peak is taken while there is room for it
    assert 0.3 < figures["theirs_peak_gb"] < ballast.nbytes / 1e9 < figures["peak_gb"]
    assert f"peak memory {figures['peak_gb']:.2f} GB\n" in out
    assert f"alone in its process: peak memory {figures['theirs_peak_gb']:.2f} GB\n" in out


PEAK = """
import torch
from lab import bench
before = bench.peak_memory(torch.device("cpu"))
torch.ones(50_000_000).sum()
print(before, bench.peak_memory(torch.device("cpu")))
"""


def test_peak_memory():
    """What was freed counts; what the process held that started this one does not."""
    ballast = torch.ones(500_000_000)
    child = subprocess.run([sys.executable, "-c", PEAK], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    before, after = map(float, child.stdout.split())
    assert after - before == pytest.approx(0.2, rel=0.1) and after < ballast.nbytes / 1e9


def test_peak_memory_without_vmhwm(monkeypatch):
    """Some kernels' /proc has no such line."""
    monkeypatch.setattr(bench.Path, "read_text", lambda self: "Name:\tpython\nVmRSS:\t   12 kB\n")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but for macOS's bytes
    peak = bench.peak_memory(torch.device("cpu"))
    assert peak == pytest.approx(most * (1 if sys.platform == "darwin" else 1024) / 1e9) and 0.05 < peak < 50


def test_a_process_that_dies():
    """As one that is killed for memory: a line says what to change."""
    with pytest.raises(ValueError, match="TRL's process died, perhaps because memory ran out; lower --micro"):
        bench.alone(signal.raise_signal, signal.SIGKILL)


def test_what_trl_is_fed(folder, tmp_path):
    """TRL trains on our tokens, all of them, each with its prompt; by itself it samples as many as it should."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    prompts = bench.make_prompts(models.Tokenizer(folder), 2, 40)
    theirs = bench.Trl(folder, prompts, 4, 12, 1, str(tmp_path))
    seen, loss = [], theirs.trainer.compute_loss

    def spied(model, inputs, *rest, **more):
        for row in range(len(inputs["prompt_ids"])):
            prompt, answer = ([i for i, m in zip(*(inputs[f"{x}_{y}"][row].tolist() for y in ("ids", "mask")),
                                                 strict=True) if m] for x in ("prompt", "completion"))  # fmt: skip
            seen.append((prompt, answer))
        return loss(model, inputs, *rest, **more)

    theirs.trainer.compute_loss = spied
    fed = [[[9 + i, 20 + j, tiny.END] for j in range(4)] for i in range(2)]
    assert theirs.step(fed) > 0 and theirs.tokens == 24
    assert sorted(seen) == sorted((prompts[i], fed[i][j]) for i in range(2) for j in range(4))
    seen.clear()
    theirs.step()
    assert len(seen) == 8 and {tuple(p) for p, _ in seen} == {tuple(p) for p in prompts}
    assert all(0 < len(answer) <= 12 and tiny.END not in answer[:-1] for _, answer in seen)


def test_train_mistakes(folder, capsys):
    assert bench.main(["train", "--model", str(folder), "--against", "transformers"]) == 2
    assert bench.main(["rollout", "--model", str(folder), "--against", "trl"]) == 2
    assert capsys.readouterr().err.count("train --against trl\n") == 2
    assert bench.main(["train", "--model", str(folder), "--new", "500", "--against", "trl"]) == 2
    error = capsys.readouterr().err
    assert "--length and --new together exceed the model's context of 512 tokens" in error and error.count("\n") == 1
