"""The stages of tests/gpu.sh. Each keeps its figures in OUT/STAGE.json as they come, so a stage cut short keeps some.

    kernels   a fused decode step against the plain one, captured, in bf16, at the shapes of real models; ms of a step
    tests     tests/test_cuda.py
    rollout   the sampler at Llama-3.1-8B's shape against transformers' generate
    train     a training step at that shape, LoRA 16: seconds by phase, peak memory against lab.plan's
    toy       the toy, trained by train.py: its Phi rises; then a resumed run

Weights are drawn at random, since speed does not depend on them. With DRY=1 all is tiny and on the CPU.

    python tests/gpu.py STAGE OUT        exit status 0 if the stage passed
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

# isort: split
if os.environ.get("DRY") and importlib.util.find_spec("triton"):
    import interpreter  # noqa: F401

import kernels
import model as models
import rollout
from lab import bench, machine
from run import draw, files, lora

DRY = bool(os.environ.get("DRY"))
SCRATCH = Path(os.environ.get("SCRATCH") or tempfile.mkdtemp())
DEVICE, DTYPE = machine.device(), torch.float32 if DRY else torch.bfloat16
# Shapes whose weights need not be there. Qwen2.5-0.5B has a bias, a tied head, 7 queries per key head, D = 64.
CONFIGS = [tiny.ROOT / "configs" / f"{name}.json" for name in ("llama-3.1-8b", "qwen3-8b")]
LLAMA, QWEN3 = (json.loads(file.read_text()) for file in CONFIGS)
QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_act": "silu",
         "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True,
         "use_sliding_window": False, "eos_token_id": 151645}  # fmt: skip
SHAPES = {"Llama-3.1-8B": LLAMA, "Qwen2.5-0.5B": QWEN2, "Qwen3-8B": QWEN3}
TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "eos_token_id": [5, 6]} if DRY else {}  # fmt: skip


class Figures(dict):
    """The figures of a stage and their file; `lines` for the table, and `problems`, which fail the stage."""

    def __init__(self, file: Path):
        versions = {name: version(name) for name in ("triton", "transformers")}
        super().__init__(machine=machine.facts(DEVICE) | versions, lines=[], problems=[])
        self.file = file

    def keep(self, line: str = "", **figures) -> None:
        self.update(figures)
        if line:
            print(line, flush=True)
            self["lines"].append(line)
        files.write_json(self.file, self)

    def expect(self, holds: bool, problem: str) -> None:
        if not holds:
            print(f"PROBLEM: {problem}", flush=True)
            self["problems"].append(problem)
            self.keep()


def version(package: str) -> str | None:
    """None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


# ---- kernels -------------------------------------------------------------------------------------------------


@torch.inference_mode(False)
@torch.no_grad()
def drawn(raw: dict, rank: int = 0) -> models.Transformer:
    """A network of this config with weights drawn on the device, and with adapters if rank > 0."""
    torch.manual_seed(0)
    with DEVICE:
        network = models.Transformer(models.Config.from_json(raw), DTYPE)
    for w in network.parameters():
        w.normal_(0, 0.02) if w.dim() > 1 else w.normal_(1, 0.1)
    if rank:
        lora.stack(lora.attach(network, rank, 2.0 * rank))
    return network


def captured(step, network, slots, end, bucket):
    """The step as a CUDA graph, ready to be replayed; on a CPU the step itself. All lanes must be finished."""

    def run():
        step(network, slots, end, *bucket)

    if DEVICE.type == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def states(c: models.Config, P: int, G: int, T: int, N: int) -> dict[str, torch.Tensor]:
    """What slots hold in the middle of a generation: unequal prompts, samples of all lengths, a finished lane and slot.

    Beyond what a row may see there are numbers that would show.
    """
    with DEVICE:
        prefix = torch.randn(2, c.layers, P, c.kv_heads, T, c.head_dim, dtype=DTYPE)
        own = torch.randn(2, c.layers, P, c.kv_heads, G, N, c.head_dim, dtype=DTYPE)
        length, count = torch.randint(2, T, (P,)), torch.randint(1, N, (P * G,))
        length[:2], count[:2] = torch.tensor([T, 1]), torch.tensor([1, N - 1])
        finished = torch.zeros(P * G, dtype=torch.bool)
        finished[2], finished[-G:] = True, True
        prefix.masked_fill_((torch.arange(T) >= length[:, None])[:, None, :, None], 30)
        own.masked_fill_((torch.arange(N) >= count.view(P, 1, G, 1) - 1)[..., None], 30)
        return {
            "prefix": prefix, "own": own, "length": length, "count": count, "finished": finished,
            "tokens": torch.randint(0, c.vocab_size, (P * G, N + 1)), "sample": torch.arange(P * G) % G,
            "question": torch.randint(0, 2**62, (P * G,)), "temperature": (torch.arange(P * G) % 3).float() / 2,
        }  # fmt: skip


def one_step(step, network, state: dict, sizes: tuple, end) -> rollout.Slots:
    """The slots after one replay of the captured step from this state."""
    P, G, T, N = sizes
    slots = rollout.Slots(network.config, *sizes, DEVICE, network.dtype)
    slots.reset(1, 2, N)
    replay = captured(step, network, slots, end, (P, P * G, T, N))
    slots.reset(1, 2, N)
    for name, value in state.items():
        getattr(slots, name).copy_(value)
    replay()
    return slots


def errors(slots, exact, logits, state: dict, end) -> dict[str, float]:
    """How far the slots after a step are from those after the exact step, whose logits are (R, V); means over rows."""
    count, live, heat = state["count"], ~state["finished"], state["temperature"]
    row = torch.arange(len(count), device=DEVICE)
    slot, lane, token, logprobs = row // slots.G, row % slots.G, slots.tokens[row, count], slots.logprobs[row, count]
    scaled = (logits.double() / torch.where(heat == 0, 1, heat)[:, None]).log_softmax(-1)
    cdf = scaled.exp().cumsum(-1).gather(-1, torch.stack((token - 1, token), -1).clamp(min=0))
    u = draw.uniforms(slots.seed, slots.step, state["question"], state["sample"], count).double()
    border = torch.maximum(torch.where(token > 0, cdf[:, 0], 0) - u, u - cdf[:, 1]).clamp(min=0)
    at_most = scaled.gather(-1, token[:, None])[:, 0]
    missed = torch.where(heat == 0, scaled.max(-1).values - at_most, border)  # by which the token is another's
    new, wanted = (s.own[:, :, slot, :, lane, count - 1].double()[live] for s in (slots, exact))
    ends = (token[:, None] == end).any(-1) | (count + 1 >= slots.N)
    kept = torch.equal(slots.count, count + live) and torch.equal(slots.finished, ~live | ends)
    return {"keys and values": float((new - wanted).norm() / wanted.norm()),
            "logprob": float((logprobs - at_most).abs()[live].mean()), "token": float(missed[live].mean()),
            "state": float(not kept or int(slots.bad) != rollout.NEVER)}  # fmt: skip


def against_plain(raw: dict, sizes: tuple) -> dict:
    """{"plain": errors, "fused": errors}, each against the plain step in fp32 on the same numbers."""
    torch.manual_seed(1)
    network = drawn(raw)
    with DEVICE:
        exact = models.Transformer(network.config, torch.float32)
    for one, other in zip(exact.parameters(), network.parameters(), strict=True):
        one.copy_(other)
    state, end, logits, head = states(network.config, *sizes), torch.tensor([5, 6], device=DEVICE), [], exact.head
    exact.head = lambda x: logits.append(head(x)) or logits[-1].clone()  # the step overwrites what it gets
    reference = one_step(rollout.decode_step, exact, state, sizes, end)
    steps = {"plain": rollout.decode_step, "fused": kernels.fused_step}
    return {name: errors(one_step(step, network, state, sizes, end), reference, logits[-1], state, end)
            for name, step in steps.items()}  # fmt: skip


def profile(run) -> tuple[int, float, list]:
    """Of one run: how many kernels (0 if the profiler sees none), their milliseconds, the costliest by name."""
    activity, cuda = torch.profiler.ProfilerActivity, DEVICE.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as recorded:
        run()
        if cuda:
            torch.cuda.synchronize()
    count, spent = Counter(), Counter()
    for event in recorded.events():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == cuda:
            count[event.name] += 1
            spent[event.name] += (event.device_time if cuda else event.self_cpu_time_total) / 1e3
    return count.total(), spent.total(), [(name[:80], count[name], ms) for name, ms in spent.most_common(15)]


def time_steps(network, rows: int, steps: int, rounds: int, copied: float) -> dict:
    """Milliseconds of a plain and a fused step, captured, in turn; launches; the share of the bandwidth `copied`."""
    G, T, N, prompt = (2, 16, 8, 12) if DRY else (8, 320, 128, 300)
    P, own, end = rows // G, N // 2, torch.tensor([-1], device=DEVICE)
    s = rollout.Slots(network.config, P, G, T, N, DEVICE, network.dtype)
    s.reset(1, 1, N)
    steps_by = {"plain": rollout.decode_step, "fused": kernels.fused_step}
    runs = {name: captured(step, network, s, end, (P, P * G, T, N)) for name, step in steps_by.items()}
    s.prefix.normal_(), s.own.normal_(), s.length.fill_(prompt), s.temperature.fill_(1.0)
    spent, made = {name: [] for name in runs}, {}

    def begin() -> machine.Clock:
        s.count.fill_(own - steps // 2), s.finished.fill_(False)
        clock = machine.Clock(DEVICE)
        clock("begin")
        return clock

    for _ in range(rounds):
        for name, run in runs.items():
            clock = begin()
            for _ in range(steps):
                run()
            spent[name].append(clock("steps") / steps * 1e3)
    read = bench.bytes_read(network, 1, P * prompt + rows * own)
    for name, run in runs.items():
        begin()
        launches, busy, costliest = profile(run)
        ms = statistics.median(spent[name])
        made[name] = {"ms": ms, "all, ms": spent[name], "launches": launches, "in kernels, ms": busy,
                      "tokens/s": rows / ms * 1e3, "share of bandwidth": read / ms * 1e3 / copied,
                      "costliest": costliest}  # fmt: skip
    return made | {"bytes to read": read}


@torch.inference_mode()
def run_kernels(figures: Figures) -> None:
    if DRY and not version("triton"):
        return figures.keep("no package triton: nothing is fused")
    copied = machine.copy_rate(DEVICE)
    figures.keep(copy=copied, errors={}, steps={})
    for name, raw in SHAPES.items():
        found = against_plain(raw | {"num_hidden_layers": 2} | TINY, (3, 2, 20, 8) if DRY else (4, 8, 352, 64))
        figures["errors"][name] = found
        figures.keep()
        print(f"{name}: {json.dumps(found)}", flush=True)
        for what, plain in found["plain"].items():
            fused = found["fused"][what]
            most = 1.5 * plain + (3e-3 if what == "token" else 1e-3)  # one near-tie may cost a token 1.3e-3
            figures.expect(fused <= most, f"{name}: error of {what} {fused:.4f}, plain {plain:.4f}")
        tidy()
    if not figures["problems"]:
        figures.keep(f"as near to fp32 as the plain step at {len(SHAPES)} shapes")
    network = drawn(LLAMA | TINY)
    for rows, rank in ((4, 0), (4, 2)) if DRY else ((128, 0), (256, 0), (512, 0), (128, 16)):
        if rank:
            network = None  # its memory goes first
            network = drawn(LLAMA | TINY, rank)
        steps, rounds = (1, 1) if DRY else (20, 5)
        what = f"{rows} rows" + f", LoRA {rank}" * (rank > 0)
        made = figures["steps"][what] = time_steps(network, rows, steps, rounds, copied)
        plain, fused, share = made["plain"], made["fused"], made["fused"]["share of bandwidth"]
        shown = [f"{made[name]['ms']:.2f} ms and {made[name]['launches']} launches" for name in ("fused", "plain")]
        figures.keep(f"{what}: {shown[0]} a step ({share:.0%} of bandwidth), plain {shown[1]}")
        if not DRY:
            most = (18 if rank else 12) * network.config.layers + 20
            figures.expect(fused["launches"] <= most, f"{fused['launches']} launches with {what}, more than {most}")
            figures.expect(fused["ms"] < plain["ms"], f"the fused step is slower with {what}")
        tidy()


# ---- tests ---------------------------------------------------------------------------------------------------


class Record:
    """A plugin of pytest: keeps each test's outcome and seconds as soon as it ends, and what a failure printed."""

    def __init__(self, figures: Figures):
        self.figures = figures

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":  # a skip or an error comes before the call
            name = report.nodeid.rpartition("::")[2]
            self.figures["outcomes"][name] = report.outcome
            self.figures["durations"][name] = round(report.duration, 2)
            if report.outcome == "failed":
                self.figures["failures"][name] = report.longreprtext[-2000:]
            self.figures.keep()


def run_tests(figures: Figures) -> None:
    figures.keep(outcomes={}, durations={}, failures={})
    # Several at once, because most of a test's time is the host's. In a dry run all but one are skipped.
    several = [] if DRY or not version("pytest-xdist") else ["-n", "4", "--dist", "load"]
    given = ["tests/test_cuda.py", *["tests/test_layout.py::test_no_circles"] * DRY, *several]
    given += ["-v", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider"]
    code = pytest.main(given, plugins=[Record(figures)])
    count = Counter(figures["outcomes"].values())
    figures.keep(", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items())), count=dict(count), code=int(code))
    failed = f"pytest ends with {code:d}; failed: {' '.join(figures['failures'])}"
    figures.expect(code == 0 and count["passed"] > 0, failed)


# ---- rollout and train ---------------------------------------------------------------------------------------


def tidy() -> None:
    """Gives back what the last measurement held."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def shape_folder() -> Path:
    """A folder with a tiny tokenizer and the config of Llama-3.1-8B, without weights."""
    folder = tiny.build(SCRATCH / "shape")
    (folder / "model.safetensors").unlink()
    if not DRY:
        (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def benchmark(*given) -> dict:
    """The figures of `python -m lab.bench …`."""
    file = SCRATCH / "bench.json"
    file.unlink(missing_ok=True)
    code = bench.main([*map(str, given), "--random", "--json", str(file)])
    assert code == 0, f"lab.bench ends with {code}"
    return json.loads(file.read_text())


def run_rollout(figures: Figures) -> None:
    folder, lacks = shape_folder(), not version("transformers")
    if lacks:
        figures.keep("no package transformers: ours alone")
    for rows in (4, 8) if DRY else (128, 256):
        samples, length, new = (2, 24, 6) if DRY else (8, 300, 100)
        made = benchmark("rollout", "--model", folder, "--count", rows // samples, "--samples", samples, "--rows", rows,
                         "--length", length, "--new", new, "--repeats", 1 if DRY else 2,
                         *([] if lacks else ["--against", "transformers"]))  # fmt: skip
        rate = made["rates"]["forced ends"]
        ratio = "" if lacks else f", {rate['ratio']:.2f} times transformers"
        figures.keep(f"{rows} rows: {rate['ours']:,.0f} tokens/s{ratio}, {made['share of the limit']:.0%} of the limit",
                     **{f"{rows} rows": made})  # fmt: skip
        tidy()


def run_train(figures: Figures) -> None:
    sizes = (2, 2, 24, 6, 1) if DRY else (16, 16, 300, 200, 4)  # a quarter of the step that docs/larger.md plans
    flags = zip(("--count", "--samples", "--length", "--new", "--micro"), sizes, strict=True)
    made = benchmark("train", "--model", shape_folder(), "--lora", 2 if DRY else 16, "--recompute", "--repeats", 1,
                     *(x for pair in flags for x in pair))  # fmt: skip
    seconds, ratio = sum(made["steps"][0].values()), made["peak / planned"]
    text = f"{sizes[0]} x {sizes[1]} explanations: {seconds:.1f} s a step"
    text += f"; peak {made['peak memory, GB']:.1f} GB, {ratio:.2f} of the plan"
    figures.keep(text, **made, **{"step, s": seconds})
    figures.expect(DRY or 0.9 <= ratio <= 1.1, f"peak memory is {ratio:.2f} of the plan, not within 10 %")


# ---- the toy -------------------------------------------------------------------------------------------------


def run_toy(figures: Figures) -> None:
    out, done, more = SCRATCH / "toy", *((1, 2) if DRY else (24, 28))
    size = {"prompts": 4, "samples": 4, "candidates": 96, "max_new_tokens": 8, "lr": 1e-3, "warmup": 0} if DRY else {
        "prompts": 32, "decay": "constant", "warmup": 5}  # fmt: skip
    if DRY:
        data = tiny.ROOT / "tests" / "data" / "esnli"
        size |= {"model": tiny.build(SCRATCH / "model"), "task": "esnli", "data": data, "intervention": "bias"}
    size |= {"eval_questions": 5, "fit_questions": 5} if DRY else {"eval_questions": 50, "fit_questions": 50}
    first = [x for name, value in size.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    log = out / "metrics.jsonl"
    for given in ([*first, "--steps", str(done)], ["--resume", "--steps", str(more)]):
        try:
            code = subprocess.run([sys.executable, "train.py", "--out", str(out), *given]).returncode
        finally:  # also if this is cut short
            rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            figures.keep(phi=[row["phi"] or 0.0 for row in rows], seconds_by_phase={
                name: sum(row[name] for row in rows) for name in ("label_s", "rollout_s", "update_s")})  # fmt: skip
        assert code == 0, f"train.py ends with {code}"
    phi, measured = figures["phi"], json.loads((out / "after.json").read_text())["T=1"]
    began, ended = (statistics.mean(x) for x in (phi[:4], phi[-4:]))
    text = f"Phi {began:.2f} to {ended:.2f} in {len(phi)} steps, {more - done} of them resumed"
    figures.keep(text, measured=measured)
    figures.expect([row["step"] for row in rows] == list(range(more)), "the resumed run did not go on where it was")
    figures.expect(DRY or ended > began + 0.4, "Phi did not rise by 0.4")


STAGES = {"kernels": run_kernels, "tests": run_tests, "rollout": run_rollout, "train": run_train, "toy": run_toy}


def main(stage: str, out: str) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stage's time is up
    figures = Figures(Path(out) / f"{stage}.json")
    figures.keep()
    try:
        assert DRY or DEVICE.type == "cuda", "no CUDA device; DRY=1 runs tiny shapes on the CPU"
        STAGES[stage](figures)
    except Exception as error:
        traceback.print_exc()
        figures.expect(False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
    return int(bool(figures["problems"]))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(*sys.argv[1:]))
