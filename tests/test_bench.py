"""lab.bench and lab.machine: prompts as asked for, operations as PyTorch counts them, figures that agree, TRL."""

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

import model as models
from lab import bench, machine, plan
from rollout import Sampler
from run import lora


def call(*given) -> int:
    return bench.main([str(x) for x in given])


def table(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.split("\n")]


@pytest.mark.parametrize("length", [40, 128])
def test_prompts(folder, length):
    prompts = bench.make_prompts(models.Tokenizer(folder), 8, length)
    lengths = [len(p) for p in prompts]
    assert 0.8 * length <= min(lengths) < 0.9 * length and 1.1 * length < max(lengths) <= 1.2 * length
    assert len({tuple(p) for p in prompts}) == 8


def test_the_limit(network, folder, monkeypatch):
    """Operations of prefill and decode, against PyTorch's count of the same passes, in the seconds of their rows."""
    prompts, asked, counts = bench.make_prompts(models.Tokenizer(folder), 3, 40), [], []
    answers = Sampler(network).generate(prompts, 4, 10)
    monkeypatch.setattr(bench, "seconds_a_row", lambda weights, rows: asked.append(rows) or 0.001 * len(asked))
    monkeypatch.setattr(bench, "copy_rate", lambda device: 5e6)
    prefilled, fed = sum(map(len, prompts)), sum(len(c.tokens) - 1 for group in answers for c in group)
    for work, sizes in ((network.hidden, (1, prefilled)), (network, (fed, 1))):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work(torch.zeros(sizes, dtype=torch.int64))
        products = counter.get_flop_counts()["Global"]
        counts.append(sum(products.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)))
    limit = bench.rollout_limit(network, prompts, answers, 5, 2)
    assert asked == [prefilled, 5]
    for products, phase, seconds in zip(counts, ("prefill", "decode"), (0.001 * prefilled, 0.002 * fed), strict=True):
        assert limit[f"products in {phase}, GFLOP/s"] == pytest.approx(products / seconds / 1e9)
    pairs = sum(len(p) ** 2 / 2 + sum(len(c.tokens) * (len(p) + len(c.tokens) / 2) for c in group)
                for p, group in zip(prompts, answers, strict=True))  # fmt: skip
    attention = pairs * 4 * 2 * 4 * 8  # layers, heads, head_dim
    assert limit["operations, TFLOP"] == pytest.approx((sum(counts) + attention) / 1e12)
    by_products = 0.001 * prefilled + 0.002 * fed
    assert limit["limit, s"] == pytest.approx(by_products + 0.002 * fed * attention / counts[1])
    # What decode reads: all weights but the embedding, once per five rows; the cache, a prompt's once per two rows.
    weights = sum(w.nbytes for name, w in network.named_parameters() if name != "embed_tokens.weight")
    seen = sum(sum(len(p) / 2 + i for i in range(1, len(c.tokens))) for p, group in zip(prompts, answers, strict=True)
               for c in group)  # fmt: skip
    cache = seen * 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head_dim, bytes
    assert limit["bytes to read in decode, GB"] == pytest.approx((fed / 5 * weights + cache) / 1e9)
    monkeypatch.setattr(type(network), "device", torch.device("cuda"))  # there attention costs what its bytes cost
    asked.clear()
    limit = bench.rollout_limit(network, prompts, answers, 5, 2)
    assert limit["limit, s"] == pytest.approx(by_products + cache / 5e6)


def test_products_are_timed(network):
    layers = [layer.mlp.down_proj.weight for layer in network.layers]
    few, many = (machine.seconds_a_row(layers * times, 64) for times in (1, 100))
    assert 0 < few < many / 20


def test_a_clock_that_stands_still(monkeypatch):
    """Rates are finite all the same, because bench divides by what a clock says."""
    monkeypatch.setattr(machine.time, "perf_counter", lambda: 1.0)
    assert 0 < machine.seconds_a_row([torch.ones(2, 2)], 3) < 1e-6 and machine.copy_rate(torch.device("cpu")) > 1e12


def test_rollout(folder, tmp_path, capsys):
    """Ours alone; then both in turn, in the same words."""
    flags = ["rollout", "--model", folder, "--count", 2, "--length", 40, "--samples", 3, "--new", 8, "--repeats", 2]
    assert call(*flags, "--json", tmp_path / "alone.json") == 0
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "alone.json").read_text())
    assert "2 prompts of" in out and "| ratio" not in out and figures["rates"]["natural ends"]["theirs"] is None
    assert figures["share of the limit"] == pytest.approx(figures["limit, s"] / figures["seconds"])
    read = figures["bytes to read in decode, GB"] / figures["bandwidth of a copy, GB/s"]
    assert figures["share of this bandwidth"] == pytest.approx(read / figures["seconds"]) and figures["rows"] == 6
    assert figures["machine"]["torch"] == torch.__version__ and figures["machine"]["date"].startswith("20")
    pytest.importorskip("transformers")
    assert call(*flags, "--against", "transformers", "--json", tmp_path / "both.json") == 0
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "both.json").read_text())
    for form in ("natural ends", "forced ends"):
        rate = figures["rates"][form]
        assert len(rate["pairs"]) == 2 and all(a > 0 and b > 0 for a, b in rate["pairs"])
        assert rate["ratio"] == pytest.approx(sum(a / b for a, b in rate["pairs"]) / 2)
        assert [form, *(f"{rate[key]:.2f}" for key in ("ours", "theirs", "ratio"))] in table(out)
    assert figures["tokens"] / figures["seconds"] == pytest.approx(figures["rates"]["natural ends"]["ours"])


def test_answers_of_transformers(folder, monkeypatch):
    """Forced, all tokens are drawn; otherwise those up to the end of a turn count."""
    pytest.importorskip("transformers")
    prompts, ends = bench.make_prompts(models.Tokenizer(folder), 3, 40), [tiny.END, tiny.STOP]
    theirs = bench.their_model(folder, torch.float32, torch.device("cpu"), drawn=False)
    assert [len(answer) for answer in bench.generate(theirs, prompts, 4, 10, ends, forced=True)] == [10] * 12
    counts = {sum(map(len, bench.generate(theirs, prompts, 4, 10, ends))) for _ in range(5)}
    assert 12 <= min(counts) < max(counts) <= 120
    drawn = [[7, tiny.END, tiny.END, tiny.END], [7, 7, tiny.STOP, tiny.END], [7, 7, 7, 7], [tiny.STOP, 7, 7, 7]]
    known = torch.tensor([[0] * max(map(len, prompts)) + row for row in drawn])
    monkeypatch.setattr(theirs, "generate", lambda **given: known)
    assert list(map(len, bench.generate(theirs, prompts, 4, 4, ends))) == [2, 3, 4, 1]


def test_drawn_weights(folder, tmp_path, monkeypatch):
    """A folder without weights will do, also for a step with adapters; all tokens are forced."""
    pytest.importorskip("transformers")
    bare, file = tmp_path / "bare", tmp_path / "figures.json"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    given = ["--model", bare, "--random", "--count", 2, "--length", 40, "--samples", 3, "--new", 6, "--repeats", 1]
    assert call("rollout", *given, "--against", "transformers", "--json", file) == 0
    figures = json.loads(file.read_text())
    assert figures["tokens"] == 2 * 3 * 6 and [*figures["rates"]] == ["forced ends"]
    assert figures["rates"]["forced ends"]["ratio"] > 0
    network = bench.random_network(str(bare), torch.device("cpu"))
    assert all(w.isfinite().all() for w in network.parameters()) and network.embed_tokens.weight.std() > 0.01
    assert torch.equal(network.frequencies, models.load(folder).frequencies)
    trained, policy = [], bench.Policy
    monkeypatch.setattr(bench, "Policy", lambda network, *rest: trained.append(network) or policy(network, *rest))
    assert call("train", *given, "--micro", 1, "--lora", 2, "--recompute", "--json", file) == 0
    assert len(lora.adapters(trained[0])) == 8 and trained[0].recompute  # four layers of each block
    figures, network = json.loads(file.read_text()), trained[0]
    lengths = [len(p) for p in bench.make_prompts(models.Tokenizer(folder), 2, 40)]
    planned = plan.plan(network.config, prompts=2, samples=3, new=6, micro=1, lora=2, recompute=True, dtype="fp32",
                        prompt_tokens=max(lengths))["total"]  # fmt: skip
    assert figures["planned, GB"] == planned / 1e9
    assert figures["peak / planned"] == pytest.approx(figures["peak memory, GB"] / figures["planned, GB"])


@pytest.mark.parametrize(
    "what, changes, words",
    [("rollout", {"--samples": 0}, "--samples must be at least 1"), ("rollout", {"--model": "nowhere"}, "no model at"),
     ("rollout", {"--json": "nowhere/x.json"}, "make the folder nowhere first"),
     ("rollout", {"--new": 4000}, "--length and --new together exceed the model's context of 512 tokens"),
     ("train", {"--lora": -1}, "--lora must be at least 0, not -1"),
     ("train", {"--count": 1}, "must be at least 2, not 1"),
     ("train", {"--micro": 3, "--against": "trl"}, "a multiple of"),
     ("train", {"--new": 2**40}, "--new must be at most"),
     ("train", {"--against": "transformers"}, "train --against trl"), ("rollout", {"--lora": 2}, "leave them out"),
     ("train", {"--against": "trl", "--lora": 2}, "leave them out"),
     ("rollout", {"--rows": -1}, "--rows must be at least 0, not -1"),
     ("rollout", {"--kernels": "fused"}, "it needs a CUDA device")],
)  # fmt: skip
def test_mistakes(folder, capsys, what, changes, words):
    flags = {"--model": folder, "--count": 2, "--micro": 1, "--length": 40} | changes
    assert call(what, *(x for pair in flags.items() for x in pair if x is not None)) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""


# ---- the training step ---------------------------------------------------------------------------------------


def test_train(folder, tmp_path, capsys):
    """Phases that add up; rates made of them; figures in the file as printed; memory of each alone."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    ballast = torch.ones(500_000_000)  # 2 GB that are this process's
    assert call("train", "--model", folder, "--count", 4, "--samples", 4, "--new", 12, "--length", 40, "--micro", 2,
                "--repeats", 2, "--against", "trl", "--json", tmp_path / "figures.json") == 0  # fmt: skip
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    steps, rates = figures["steps"], figures["rates"]
    assert out.count("step: labels ") == 3 and len(steps) == 2  # one of them to get warm
    assert all(list(step) == ["labels", "rollout", "forward", "backward", "optimizer"] for step in steps)
    assert all(min(step.values()) > 0 for step in steps)
    assert figures["backward, s"] == pytest.approx(sum(step["backward"] for step in steps) / 2)
    for left_out, (what, rate) in zip(((), ("labels",), ("labels", "rollout")), rates.items(), strict=True):
        own = [sum(seconds for phase, seconds in step.items() if phase not in left_out) for step in steps]
        tokens = [round(seconds * ours, 3) for seconds, (ours, _) in zip(own, rate["pairs"], strict=True)]
        assert all(n == round(n) and 16 <= n <= 4 * 4 * 12 for n in tokens)
        assert [what, *(f"{rate[key]:.2f}" for key in ("ours", "theirs", "ratio"))] in table(out)
        assert rate["ratio"] == pytest.approx(sum(a / b for a, b in rate["pairs"]) / 2)
    labelled, unlabelled, same = rates.values()
    assert labelled["theirs"] == unlabelled["theirs"] != same["theirs"] > 0
    assert 0.3 < figures["TRL's peak memory, GB"] < ballast.nbytes / 1e9 < figures["peak memory, GB"]


PEAK = """
import torch
from lab import machine
before = machine.peak_memory(torch.device("cpu"))
torch.ones(50_000_000).sum()
print(before, machine.peak_memory(torch.device("cpu")))
"""


def test_peak_memory(monkeypatch):
    """What was freed counts; what the process held that started this one does not. Some kernels' /proc has no VmHWM."""
    ballast = torch.ones(500_000_000)
    child = subprocess.run([sys.executable, "-c", PEAK], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    before, after = map(float, child.stdout.split())
    assert after - before == pytest.approx(0.2, rel=0.1) and after < ballast.nbytes / 1e9
    monkeypatch.setattr(machine.Path, "read_text", lambda self: "Name:\tpython\nVmRSS:\t   12 kB\n")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but for macOS's bytes
    peak = machine.peak_memory(torch.device("cpu"))
    assert peak == pytest.approx(most * (1 if sys.platform == "darwin" else 1024) / 1e9) and 0.05 < peak < 50


def killed(*given):
    signal.raise_signal(signal.SIGKILL)


def test_a_process_that_dies(folder, monkeypatch, capsys):
    """As one that is killed for memory: a line says what to change."""
    monkeypatch.setattr(bench, "trl_step", killed)
    assert call("train", "--model", folder, "--count", 2, "--micro", 1, "--new", 4, "--against", "trl") == 2
    assert "TRL's process died, perhaps because memory ran out; lower --micro\n" in capsys.readouterr().err


def test_what_trl_is_fed(folder, tmp_path):
    """TRL trains on our tokens, all of them, each with its prompt; by itself it samples as many as it should."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    prompts = bench.make_prompts(models.Tokenizer(folder), 2, 40)
    setup = folder, 2, 4, 12, 1, False, str(tmp_path)
    seen, trainer = [], bench.trl_trainer(*setup)
    loss = trainer.compute_loss

    def spied(model, inputs, *rest, **more):
        for row in range(len(inputs["prompt_ids"])):
            prompt, answer = ([i for i, m in zip(*(inputs[f"{x}_{y}"][row].tolist() for y in ("ids", "mask")),
                                                 strict=True) if m] for x in ("prompt", "completion"))  # fmt: skip
            seen.append((prompt, answer))
        return loss(model, inputs, *rest, **more)

    trainer.compute_loss = spied
    fed = [[[9 + i, 20 + j, tiny.END] for j in range(4)] for i in range(2)]
    rate, peak = bench.trl_step(setup, prompts, fed)
    assert rate > 0 and peak > 0.3
    assert sorted(seen) == sorted((prompts[i], fed[i][j]) for i in range(2) for j in range(4))
    seen.clear()
    bench.trl_step(setup, prompts)
    assert len(seen) == 8 and {tuple(p) for p, _ in seen} == {tuple(p) for p in prompts}
    assert all(0 < len(answer) <= 12 and tiny.END not in answer[:-1] for _, answer in seen)
