"""How fast, against what the machine can do and against others: figures to check, not to believe.

    python bench.py rollout --model DIR                            the sampler's rates and its share of the limit
    python bench.py rollout --model DIR --against transformers     and the ratio to transformers' generate
    python bench.py train --model DIR [--against trl]              a training step, phase by phase, and against TRL's

The limit is the time that the sampler's matrix products would take at the rate at which this machine was seen, in
the same run, to do products of these shapes, or its weights at the rate at which memory was read, whichever is
longer. A ratio is measured in one process: the same prompts, threads and dtype, one after the other in turn, the
median of the runs, with natural ends and with all tokens forced; tokens count up to the end of a turn.
"""

import argparse
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import model as models
import report
from rollout import Sampler, Slots

TEXT = """A woman in a green coat waits at the corner while two boys carry a long wooden ladder past the bakery . The
street is wet , it rained all morning , and a delivery van blocks half of the road . Somebody laughs behind an open
window . Is it true that the boys know the woman ? Say first what speaks for it , then what speaks against it ."""


def make_prompts(tokenizer: models.Tokenizer, count: int, length: int) -> list[list[int]]:
    """Chat prompts of about `length` tokens each, from 16 % shorter to 16 % longer, all different."""
    words, prompts = TEXT.split(), []
    for i in range(count):
        target = round(length * (0.84 + 0.32 * i / max(1, count - 1)))
        turned, prompt = words[i % len(words) :] + words[: i % len(words)], []
        for n in range(1, target):
            text = " ".join((turned * (n // len(turned) + 1))[:n])
            longer = tokenizer.encode(tokenizer.render([{"role": "user", "content": text}]))
            if prompt and len(longer) > target:
                break
            prompt = longer
        prompts.append(prompt)
    return prompts


def seconds(work, device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    started = now()
    work()
    return now() - started


def product_rate(config: models.Config, rows: int, device, dtype, head: bool) -> tuple[float, float]:
    """(seconds, operations) of a layer's products with `rows` rows, times the layers, and the head's; best of five."""
    E, M, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.heads * D, config.kv_heads * D
    shapes = [(H + 2 * K, E), (E, H), (2 * M, E), (E, M)]
    total, operations = 0.0, 0.0
    for n, (out, inner) in [(config.layers, s) for s in shapes] + ([(1, (config.vocab_size, E))] if head else []):
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        # One weight after another, as in a model: a few alone would stay in the processor's cache.
        some = min(n, max(1, int(2e9 / (out * inner * 4))))
        weights = [torch.randn(out, inner, device=device, dtype=dtype) for _ in range(some)]
        repeats = max(1, round(2e9 / (2 * rows * out * inner * len(weights))))

        def products():
            for _ in range(repeats):  # noqa: B023
                for weight in weights:  # noqa: B023
                    F.linear(x, weight)  # noqa: B023

        best = min(seconds(products, device) for _ in range(5)) / repeats / len(weights)
        total, operations = total + n * best, operations + n * 2.0 * rows * out * inner
    return total, operations


def read_rate(device) -> float:
    """Bytes per second at which memory is read, best of five."""
    x = torch.ones(2**26, device=device)  # 256 MiB, more than caches hold
    return x.nbytes / min(seconds(x.sum, device) for _ in range(5))


def limit(network: models.Transformer, prompts, answers, rows: int) -> dict:
    """The least seconds for these prompts and answers on this machine, and what went into it."""
    config, device, dtype = network.config, network.device, network.dtype
    prefilled = sum(map(len, prompts))
    lengths = [len(c.tokens) for group in answers for c in group]
    fed = sum(lengths) - len(lengths)  # a sample's last token is never fed
    prefill_s, prefill_ops = product_rate(config, min(prefilled, 2048), device, dtype, head=False)
    decode_s, decode_ops = product_rate(config, min(rows, len(lengths)), device, dtype, head=True)
    attention = 4.0 * config.layers * config.heads * config.head_dim
    per_sample = [(len(p), len(c.tokens)) for p, group in zip(prompts, answers, strict=True) for c in group]
    attention *= sum(len(p) ** 2 / 2 for p in prompts) + sum(n * (p + n / 2) for p, n in per_sample)
    weights = sum(p.nbytes for p in network.parameters())
    if not config.tied:
        weights -= network.embed_tokens.weight.nbytes  # looked up, not read through
    steps = max(lengths) * -(-len(lengths) // rows)
    bandwidth = read_rate(device)
    compute = prefill_s * prefilled / min(prefilled, 2048) + decode_s * fed / min(rows, len(lengths))
    compute += attention / (decode_ops / decode_s)
    memory = weights * (1 + steps) / bandwidth
    return {
        "limit_s": max(compute, memory), "binds": "compute" if compute > memory else "memory", "compute_s": compute,
        "memory_s": memory, "prefill_tflop": prefill_ops * prefilled / min(prefilled, 2048) / 1e12,
        "decode_tflop": decode_ops * fed / min(rows, len(lengths)) / 1e12, "attention_tflop": attention / 1e12,
        "prefill_gflops": prefill_ops / prefill_s / 1e9, "decode_gflops": decode_ops / decode_s / 1e9,
        "read_gb_s": bandwidth / 1e9, "weights_mb": weights / 1e6,
    }  # fmt: skip


def peak_memory(device: torch.device) -> float:
    """GB: of this process since it began, on CUDA of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1) / 1e9


class Theirs:
    """transformers' generate on the same prompts, padded on the left, samples by num_return_sequences."""

    def __init__(self, folder: Path, end: list[int], network: models.Transformer):
        import transformers  # only here: not a requirement of the product

        transformers.utils.logging.set_verbosity_error()
        self.version, self.end, device = transformers.__version__, end, network.device
        self.network = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=network.dtype, attn_implementation="sdpa"
        )
        self.network = self.network.to(device).eval()

    @torch.inference_mode()
    def generate(self, prompts, samples: int, new: int, forced: bool) -> int:
        """Tokens drawn, up to and with each end of turn."""
        longest, device = max(map(len, prompts)), self.network.device
        ids = torch.tensor([[self.end[0]] * (longest - len(p)) + p for p in prompts], device=device)
        seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        output = self.network.generate(
            input_ids=ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=samples, max_new_tokens=new, min_new_tokens=new if forced else None,
            eos_token_id=self.end, pad_token_id=self.end[0],
        )[:, longest:]  # fmt: skip
        ended = torch.isin(output, torch.tensor(self.end, device=device)).cumsum(1)
        return int(((ended - torch.isin(output, torch.tensor(self.end, device=device)).long()) == 0).sum())


def measure(sampler: Sampler, theirs: Theirs | None, prompts, samples: int, new: int, repeats: int) -> dict:
    """Tokens per second of both and the ratio, with natural and with forced ends; the last natural answers."""
    device, ends, figures = sampler.model.device, sampler.end_of_turn, {}
    answers: list = []
    for forced in (False, True):
        sampler.end_of_turn = [-1] if forced else ends  # no token is -1: nothing ends
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for i in range(repeats):

            def ours():
                answers[:] = sampler.generate(prompts, samples, new, 1.0, seed=i)  # noqa: B023

            spent = seconds(ours, device)
            rates["ours"].append(sum(len(c.tokens) for g in answers for c in g) / spent)
            if theirs:
                drawn: list[int] = []
                spent = seconds(lambda: drawn.append(theirs.generate(prompts, samples, new, forced)), device)  # noqa: B023
                rates["theirs"].append(drawn[0] / spent)
        name = "forced" if forced else "natural"
        figures[name] = {"tokens_s": statistics.median(rates["ours"]), "runs": rates["ours"]}
        if theirs:
            pairs = [a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]
            figures[name] |= {"theirs_tokens_s": statistics.median(rates["theirs"]), "theirs_runs": rates["theirs"],
                              "ratio": statistics.median(pairs)}  # fmt: skip
        if not forced:
            figures["answers"] = list(answers)
    sampler.end_of_turn = ends
    return figures


GRID = [(samples, 128) for samples in (1, 4, 8, 16, 32)] + [(8, length) for length in (64, 256, 1024)]


def rollout(args: argparse.Namespace) -> None:
    tokenizer = models.Tokenizer(args.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = models.load(args.model, device)
    sampler = Sampler(network, sorted({*network.config.end_of_turn, tokenizer.end_of_turn}), rows=args.rows)
    if args.prompts:
        lines = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [tokenizer.encode(tokenizer.render([{"role": "user", "content": line}])) for line in lines]
    else:
        prompts = make_prompts(tokenizer, args.count, args.length)
    theirs = Theirs(models.locate(args.model), sampler.end_of_turn, network) if args.against else None
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {network.dtype}")
    sizes = f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    print(f"{sizes}, {args.samples} samples each, at most {args.new} new tokens, T = 1")
    sampler.generate(prompts[:2], 1, 2)  # warm
    figures = measure(sampler, theirs, prompts, args.samples, args.new, args.repeats)
    answers = figures.pop("answers")
    tokens = sum(len(c.tokens) for group in answers for c in group)
    bound = limit(network, prompts, answers, args.rows)
    # Prefill alone: the same prompts, one token each.
    prefill = min(seconds(lambda: sampler.generate(prompts, 1, 1), device) for _ in range(args.repeats))
    spent = tokens / figures["natural"]["tokens_s"]
    config, P, G = network.config, len(prompts), args.samples
    T = max(map(len, prompts))
    shared = Slots(config, P, G, T, args.new, "meta", network.dtype).kv_bytes()
    plain = Slots(config, P * G, 1, T, args.new, "meta", network.dtype).kv_bytes()
    figures |= bound | {
        "seconds": spent, "share_of_limit": bound["limit_s"] / spent, "tokens": tokens, "prefill_s": prefill,
        "prefill_tokens_s": sum(map(len, prompts)) / prefill, "decode_tokens_s": tokens / (spent - prefill),
        "peak_gb": peak_memory(device), "kv_mb": shared / 1e6, "kv_unshared_mb": plain / 1e6, "device": name,
    }  # fmt: skip
    print(f"\nprefill {figures['prefill_tokens_s']:.0f} tokens/s, decode {figures['decode_tokens_s']:.0f} tokens/s; "
          f"{tokens} tokens in {spent:.2f} s, {tokens / spent:.0f} tokens/s with prefill; forced ends "
          f"{figures['forced']['tokens_s']:.0f} tokens/s")  # fmt: skip
    print(
        f"limit {bound['limit_s']:.2f} s, bound by {bound['binds']}: ({bound['prefill_tflop']:.2f} prefill at "
        f"{bound['prefill_gflops']:.0f} GFLOP/s + {bound['decode_tflop']:.2f} decode + {bound['attention_tflop']:.2f} "
        f"attention at {bound['decode_gflops']:.0f} GFLOP/s) TFLOP, or {bound['weights_mb']:.0f} MB of weights a step "
        f"at {bound['read_gb_s']:.1f} GB/s\nshare of the limit {figures['share_of_limit']:.0%}; peak memory "
        f"{figures['peak_gb']:.2f} GB; KV cache {shared / 1e6:.0f} MB, unshared it would be {plain / 1e6:.0f} MB"
    )
    if theirs:
        figures["ratio"] = figures["natural"]["ratio"]
        for form in ("natural", "forced"):
            f = figures[form]
            print(f"{form} ends: ours {f['tokens_s']:.0f}, transformers {theirs.version} {f['theirs_tokens_s']:.0f} "
                  f"tokens/s, ratio {f['ratio']:.2f} (median of {args.repeats} pairs)")  # fmt: skip
    if args.grid:
        figures["grid"] = []
        print("\n| samples | prompt tokens | prompts | ratio, natural ends | ratio, forced |\n|---|---|---|---|---|")
        for samples, length in GRID:
            count = max(1, min(16, 128 // samples, 2048 // length))
            cell = measure(sampler, theirs, make_prompts(tokenizer, count, length), samples, args.new, 1)
            ratios = [cell[form].get("ratio", float("nan")) for form in ("natural", "forced")]
            figures["grid"].append({"samples": samples, "length": length, "prompts": count, "ratios": ratios})
            print(f"| {samples} | {length} | {count} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)
    if args.json:
        report.write_json(args.json, {"args": vars(args), **figures})


class Trl:
    """TRL's GRPO step on the same prompts: its own loop, sampling by itself or fed with `tokens`, rewards drawn."""

    def __init__(self, folder: Path, prompts, samples: int, new: int, micro: int, scratch: str):
        import datasets  # only here: not requirements of the product
        import transformers
        import trl

        transformers.utils.logging.set_verbosity_error()
        datasets.utils.logging.disable_progress_bar()
        self.version, self.drawn, self.fed, self.tokens = trl.__version__, random.Random(0), None, 0
        self.ids, self.samples = prompts, samples
        sequences = len(prompts) * samples
        config = trl.GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=micro * samples, num_generations=samples, beta=0.0,
            gradient_accumulation_steps=sequences // (micro * samples), max_completion_length=new, temperature=1.0,
            top_k=0, max_steps=1, learning_rate=1e-9, use_cpu=not torch.cuda.is_available(), report_to="none",
            bf16=torch.cuda.is_available(), disable_tqdm=True, save_strategy="no", logging_strategy="no",
            shuffle_dataset=False, gradient_checkpointing=False,
        )  # fmt: skip
        self.trainer = trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder), args=config,
            train_dataset=datasets.Dataset.from_list([{"prompt": str(i)} for i in range(len(prompts))]),
            rollout_func=self.rollout, reward_funcs=self.reward,
        )  # fmt: skip
        self.trainer.remove_callback(transformers.PrinterCallback)
        self.end = self.trainer.processing_class.eos_token_id

    def rollout(self, prompts, trainer) -> dict:
        """Prompts come as token ids by their number; what they give is sampled by generate, or what was `fed`."""
        which = [int(prompt) for prompt in prompts]
        started = time.perf_counter()
        if self.fed:
            taken = {i: list(self.fed[i]) for i in set(which)}
            completions = [taken[i].pop() for i in which]
        else:
            longest, model = max(len(self.ids[i]) for i in which), trainer.model
            rows = [[self.end] * (longest - len(self.ids[i])) + self.ids[i] for i in which]
            seen = [[0] * (longest - len(self.ids[i])) + [1] * len(self.ids[i]) for i in which]
            rows, seen = (torch.tensor(x, device=model.device) for x in (rows, seen))
            with torch.inference_mode():
                out = model.generate(input_ids=rows, attention_mask=seen, generation_config=trainer.generation_config)
            completions = [cut(row, self.end) for row in out[:, longest:].tolist()]
        self.rollout_s, self.tokens = time.perf_counter() - started, sum(map(len, completions))
        return {"prompt_ids": [self.ids[i] for i in which], "completion_ids": completions, "logprobs": None}

    def reward(self, completions, **_) -> list[float]:
        return [float(self.drawn.random() < 0.5) for _ in completions]

    def step(self, fed=None) -> float:
        """Seconds of one optimizer step of its own training loop."""
        self.fed = fed
        return seconds(lambda: self.trainer.train(), self.trainer.model.device)


def cut(tokens: list[int], end: int) -> list[int]:
    """Up to and with the first end."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def step_limit(config: models.Config, groups, device, dtype) -> dict:
    """The least seconds of forward and backward of the groups, each prompt once: three times the forward's products."""
    tokens = sum(len(prompt) + sum(len(c.tokens) - 1 for c in answers) for prompt, answers in groups)
    scored = sum(len(c.tokens) for _, answers in groups for c in answers)
    rows = min(tokens, 1024)
    body_s, body = product_rate(config, rows, device, dtype, head=False)
    both_s, both = product_rate(config, rows, device, dtype, head=True)
    ahead = max(both_s - body_s, 0.0)
    operations = 3 * (body * tokens + (both - body) * scored) / rows
    return {"limit_s": 3 * (body_s * tokens + ahead * scored) / rows, "tflop": operations / 1e12,
            "gflops": both / both_s / 1e9, "tokens_in": tokens, "tokens_scored": scored}  # fmt: skip


def train_step(args: argparse.Namespace) -> None:
    import train  # the product's own step; nothing else here needs it
    from grpo import advantages, pack, policy_loss, token_logprobs, token_weights

    if args.count % args.micro:
        raise ValueError(f"--count {args.count} must be a multiple of --micro {args.micro}, or TRL leaves some out")
    tokenizer, device = models.Tokenizer(args.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = models.load(args.model, device)
    sampler = Sampler(network, sorted({*network.config.end_of_turn, tokenizer.end_of_turn}), rows=args.rows)
    prompts = make_prompts(tokenizer, args.count, args.length)
    settings = train.Args(lr=1e-9, max_new_tokens=args.new, micro=args.micro, loss="dapo")
    optimizer, ranks, drawn = train.Optimizer(network, settings), train.Ranks(), random.Random(0)
    letters = list(range(5, 8))
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {network.dtype}")
    sizes = f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    print(f"{sizes}, {args.samples} samples each, at most {args.new} new tokens, T = 1")

    def step(seed: int, answers=None) -> tuple[dict, list]:
        """One step by hand, in train.update's parts, so that each can be timed: (seconds by phase, answers)."""
        spent = {}
        if answers is None:
            pairs = [p for p in prompts for _ in range(4)]  # X and X' of two candidates for each prompt kept
            spent["labels"] = seconds(lambda: sampler.option_logprobs(pairs, letters, together=2), device)
            answers = []
            spent["rollout"] = seconds(
                lambda: answers.extend(sampler.generate(prompts, args.samples, args.new, seed=seed)), device
            )
        groups = list(zip(prompts, answers, strict=True))
        lengths = torch.tensor([len(c.tokens) for _, group in groups for c in group])
        spent |= {"forward": 0.0, "backward": 0.0}
        for start in range(0, len(groups), args.micro):
            some = groups[start : start + args.micro]
            rewards = torch.tensor([[float(drawn.random() < 0.5) for _ in group] for _, group in some])
            mine = torch.tensor([len(c.tokens) for _, group in some for c in group])
            weights = token_weights(mine, "dapo", args.new, len(lengths), int(lengths.sum())).to(device)
            A = advantages(rewards, "std").flatten().repeat_interleave(mine).to(device)
            old = torch.tensor([lp for _, group in some for c in group for lp in c.logprobs], device=device)
            losses: list = []

            def forward():
                packed = pack([(p, [c.tokens for c in g]) for p, g in some], device)  # noqa: B023
                logprobs = token_logprobs(network, packed, 1.0)
                losses.append((policy_loss(logprobs, old, A, 0.2, 0.2) * weights).sum())  # noqa: B023

            spent["forward"] += seconds(forward, device)
            spent["backward"] += seconds(lambda: (losses[0].backward(), optimizer.accumulate()), device)  # noqa: B023
        spent["optimizer"] = seconds(lambda: optimizer.step(1e-9, 1.0, ranks), device)
        return spent, answers

    step(0)  # warm
    figures: dict = {"device": name, "args": vars(args), "ours": [], "generating": [], "fed": []}
    with tempfile.TemporaryDirectory() as scratch:
        theirs = None
        if args.against:
            theirs = Trl(models.locate(args.model), prompts, args.samples, args.new, args.micro, scratch)
        for i in range(args.repeats):
            spent, answers = step(i + 1)
            figures["ours"].append(spent)
            if theirs:
                tokens, own = sum(len(c.tokens) for g in answers for c in g), sum(spent.values()) - spent["labels"]
                whole = theirs.step()
                per_token = (whole / theirs.tokens) / (own / tokens)
                pair = {"theirs_s": whole, "theirs_rollout_s": theirs.rollout_s, "theirs_tokens": theirs.tokens}
                figures["generating"].append(pair | {"ours_s": own, "ours_tokens": tokens, "ratio": per_token})
                fed, _ = step(0, answers)
                whole = theirs.step([[c.tokens for c in group] for group in answers])
                figures["fed"].append(
                    {"theirs_s": whole, "ours_s": sum(fed.values()), "ratio": whole / sum(fed.values())}
                )
                print(
                    f"pair {i + 1}: generating {per_token:.2f}, same tokens {figures['fed'][-1]['ratio']:.2f}",
                    flush=True,
                )
    phases = {key: statistics.median(run[key] for run in figures["ours"]) for key in figures["ours"][0]}
    groups = list(zip(prompts, answers, strict=True))
    bound = step_limit(network.config, groups, device, network.dtype)
    both = phases["forward"] + phases["backward"]
    tokens = sum(len(c.tokens) for _, group in groups for c in group)
    figures |= {"phases": phases, **bound, "share_of_limit": bound["limit_s"] / both, "peak_gb": peak_memory(device),
                "tokens_s": tokens / sum(phases.values())}  # fmt: skip
    print("\n" + ", ".join(f"{key} {value:.2f} s" for key, value in phases.items())
          + f"; {tokens} new tokens, {figures['tokens_s']:.0f} a second, labels included")  # fmt: skip
    print(f"forward and backward: limit {bound['limit_s']:.2f} s ({bound['tflop']:.2f} TFLOP at {bound['gflops']:.0f} "
          f"GFLOP/s), share {figures['share_of_limit']:.0%}; peak memory {figures['peak_gb']:.2f} GB")  # fmt: skip
    for key, what in (("generating", "both generating, per new token, without labels"), ("fed", "same tokens")):
        if figures[key]:
            figures[f"{key}_ratio"] = statistics.median(pair["ratio"] for pair in figures[key])
            print(f"TRL {theirs.version}, {what}: ratio {figures[f'{key}_ratio']:.2f} (median of {args.repeats} pairs)")
    if args.json:
        report.write_json(args.json, figures)


def main(argv: list[str] | None = None) -> int:
    parser = report.Parser(prog="bench.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("rollout", "train"))
    parser.add_argument("--model", required=True, help="Hugging Face directory, or hub id in the local cache")
    parser.add_argument("--prompts", help="a text file, a prompt per line; made up by default")
    parser.add_argument("--count", type=int, default=16, help="made-up prompts")
    parser.add_argument("--length", type=int, default=128, help="tokens of a made-up prompt, about")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens of a sample at most")
    parser.add_argument("--rows", type=int, default=128, help="samples decoded together")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--against", choices=("transformers", "trl"), help="measure this too")
    parser.add_argument("--micro", type=int, default=4, help="with train: groups per forward and backward pass")
    parser.add_argument("--grid", action="store_true", help="ratios over samples and prompt lengths as well")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(argv)
    try:
        if args.against and (args.against == "trl") != (args.what == "train"):
            raise ValueError("rollout is measured --against transformers, train --against trl")
        for name in ("count", "length", "samples", "new", "rows", "repeats", "micro"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1")
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise ValueError(f"{args.json} cannot be written: make the folder {Path(args.json).parent} first")
        {"rollout": rollout, "train": train_step}[args.what](args)
    except ImportError as error:
        print(
            f"bench.py: --against {args.against} needs it installed ({error}); see tests/requirements.txt",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
