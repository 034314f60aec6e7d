"""How fast the sampler and the training step are, against this machine's limit and against transformers and TRL.

    python -m lab.bench rollout --model DIR [--against transformers]    tokens per second of the sampler
    python -m lab.bench train --model DIR [--against trl]               a training step, phase by phase
    python -m lab.bench train --model DIR --random --lora 16            with weights drawn at random

The limit is the time of the model's matrix products at the rate at which this machine does such products, or the time
to read its weights from memory. The longer of the two counts, and both rates are measured in the same run. A ratio is
measured in one process: the same prompts, threads and dtype, in turn, the median over the pairs. Tokens count up to
the end of a turn, once with natural ends and once with all tokens forced.

--random needs only config.json and the tokenizer. Speed does not depend on the weights' values, except that answers
then end at random. Peak memory is measured in a process that runs only one of the two: TRL runs in a process of its
own, which ends before our model is loaded. Both have taken a step before, so AdamW's moments count.
"""

import argparse
import concurrent.futures
import multiprocessing
import platform
import random
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import model as models
import train
from grpo import policy_loss, token_logprobs
from rollout import Sampler, Slots
from run import files, lora
from run.args import Args
from run.hub import locate
from run.policy import Policy
from run.progress import Parser, command
from run.ranks import Ranks

TEXT = """A woman in a green coat waits at the corner while two boys carry a long wooden ladder past the bakery . The
street is wet , it rained all morning , and a delivery van blocks half of the road . Somebody laughs behind an open
window . Is it true that the boys know the woman ? Say first what speaks for it , then what speaks against it ."""
GRID = [(samples, 128) for samples in (1, 4, 8, 16, 32)] + [(8, length) for length in (64, 256, 1024)]

# ---- what this machine can do --------------------------------------------------------------------------------


def timed(work, device: torch.device) -> tuple[float, object]:
    """(seconds, what work() returned)."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    started, result = now(), work()
    return now() - started, result


def seconds(work, device: torch.device) -> float:
    return timed(work, device)[0]


def pad_left(prompts: list[list[int]], end: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (P, T) of prompts, for the other libraries' generate."""
    longest = max(map(len, prompts))
    ids = [[end] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def repeatable(work, device: torch.device):
    """`work` to be run many times: on CUDA as a graph, so that the time to launch kernels does not count."""
    if device.type != "cuda":
        return work
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def product_rate(config: models.Config, rows: int, device, dtype, head: bool) -> tuple[float, float]:
    """(seconds, operations) of all layers' products with `rows` rows, and of the head's; the best of five runs."""
    E, M, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.heads * D, config.kv_heads * D
    shapes = [(H + 2 * K, E), (E, H), (2 * M, E), (E, M)]
    total, operations = 0.0, 0.0
    for n, (out, inner) in [(config.layers, s) for s in shapes] + ([(1, (config.vocab_size, E))] if head else []):
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        # Many weights in turn, as in a model: a few would stay in the processor's cache.
        some = min(n, max(1, int(2e9 / (out * inner * 4))))
        weights = [torch.randn(out, inner, device=device, dtype=dtype) for _ in range(some)]
        enough = 2e9 if device.type == "cpu" else 5e11  # operations that take a millisecond or more
        repeats = min(max(1, round(enough / (2 * rows * out * inner * len(weights)))), max(1, 2000 // len(weights)))

        def products():
            for _ in range(repeats):  # noqa: B023
                for weight in weights:  # noqa: B023
                    F.linear(x, weight)  # noqa: B023

        run = repeatable(products, device)
        best = min(seconds(run, device) for _ in range(5)) / repeats / len(weights)
        total, operations = total + n * best, operations + n * 2.0 * rows * out * inner
    return total, operations


def read_rate(device) -> float:
    """Bytes per second read from memory; the best of five runs."""
    x = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)  # 256 MiB or 1 GiB: no cache holds it
    return x.nbytes / min(seconds(x.sum, device) for _ in range(5))


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB: of this process, or on CUDA of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")  # on Linux ru_maxrss starts at what the parent process held
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def rollout_limit(network: models.Transformer, prompts, answers, rows: int) -> dict:
    """The least seconds for these prompts and answers on this machine, and the figures it is made of."""
    config, device, dtype = network.config, network.device, network.dtype
    prefilled = sum(map(len, prompts))
    lengths = [len(c.tokens) for group in answers for c in group]
    fed = sum(lengths) - len(lengths)  # a sample's last token is never fed
    prefill_rows, decode_rows = min(prefilled, 2048), min(rows, len(lengths))
    prefill_s, prefill_ops = product_rate(config, prefill_rows, device, dtype, head=False)
    decode_s, decode_ops = product_rate(config, decode_rows, device, dtype, head=True)
    per_sample = [(len(p), len(c.tokens)) for p, group in zip(prompts, answers, strict=True) for c in group]
    attention = 4.0 * config.layers * config.heads * config.head_dim
    attention *= sum(len(p) ** 2 / 2 for p in prompts) + sum(n * (p + n / 2) for p, n in per_sample)
    weights = sum(p.nbytes for p in network.parameters())
    if not config.tied:
        weights -= network.embed_tokens.weight.nbytes  # a few of its rows are read
    steps = max(lengths) * -(-len(lengths) // rows)
    bandwidth = read_rate(device)
    compute = prefill_s * prefilled / prefill_rows + decode_s * fed / decode_rows + attention / (decode_ops / decode_s)
    memory = weights * (1 + steps) / bandwidth
    return {
        "limit_s": max(compute, memory), "binds": "compute" if compute > memory else "memory", "compute_s": compute,
        "memory_s": memory, "prefill_tflop": prefill_ops * prefilled / prefill_rows / 1e12,
        "decode_tflop": decode_ops * fed / decode_rows / 1e12, "attention_tflop": attention / 1e12,
        "prefill_gflops": prefill_ops / prefill_s / 1e9, "decode_gflops": decode_ops / decode_s / 1e9,
        "read_gb_s": bandwidth / 1e9, "weights_mb": weights / 1e6,
    }  # fmt: skip


def step_limit(config: models.Config, groups, device, dtype, lora=False, recompute=False) -> dict:
    """The least seconds of forward and backward over the groups, each prompt once.

    A step takes three times the forward's products: forward, gradients of inputs, gradients of weights. LoRA leaves out
    the last, except for the adapters' own, which are not counted. Recomputed blocks run forward once more.
    """
    head_times = 2 + (not lora)
    body_times = head_times + recompute
    tokens = sum(len(prompt) + sum(len(c.tokens) - 1 for c in answers) for prompt, answers in groups)
    scored = sum(len(c.tokens) for _, answers in groups for c in answers)
    rows = min(tokens, 1024)
    body_s, body = product_rate(config, rows, device, dtype, head=False)
    both_s, both = product_rate(config, rows, device, dtype, head=True)
    head_s = max(both_s - body_s, 0.0)
    operations = (body_times * body * tokens + head_times * (both - body) * scored) / rows
    return {"limit_s": (body_times * body_s * tokens + head_times * head_s * scored) / rows, "tflop": operations / 1e12,
            "gflops": both / both_s / 1e9, "tokens_in": tokens, "tokens_scored": scored}  # fmt: skip


# ---- what is measured ----------------------------------------------------------------------------------------


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


def random_network(path: str, device: torch.device) -> models.Transformer:
    """A network of the folder's config with random weights."""
    network, generator = models.empty(locate(path), device), torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(not name.endswith("bias"))
    return network


def open_sampler(args: argparse.Namespace) -> tuple[models.Tokenizer, Sampler]:
    tokenizer, device = models.Tokenizer(args.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = random_network(args.model, device) if args.random else models.load(args.model, device)
    return tokenizer, Sampler(network, {*network.config.end_of_turn, tokenizer.end_of_turn}, rows=args.rows)


def introduce(network: models.Transformer, prompts: list[list[int]], samples: int, new: int) -> str:
    """Prints what is measured and where; returns the device's name."""
    cuda = network.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {network.dtype}")
    sizes = f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    print(f"{sizes}, {samples} samples each, at most {new} new tokens, T = 1")
    return name


class Transformers:
    """transformers' generate on the same prompts, padded on the left, with num_return_sequences samples each."""

    def __init__(self, folder: Path, end: list[int], network: models.Transformer, drawn: bool = False):
        import transformers  # not a requirement of the product

        transformers.utils.logging.set_verbosity_error()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares for every new length, so its first runs are slow
        self.version, self.end, device = transformers.__version__, end, network.device
        settings = {"dtype": network.dtype, "attn_implementation": "sdpa"}
        if drawn:
            config = transformers.AutoConfig.from_pretrained(folder)
            with device:  # drawing is fast there
                self.network = transformers.AutoModelForCausalLM.from_config(config, **settings).eval()
        else:
            self.network = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).to(device).eval()

    @torch.inference_mode()
    def generate(self, prompts, samples: int, new: int, forced: bool) -> int:
        """The number of tokens drawn, up to and including each end of turn."""
        ids, mask = pad_left(prompts, self.end[0], self.network.device)
        output = self.network.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            num_return_sequences=samples, max_new_tokens=new, min_new_tokens=new if forced else None,
            eos_token_id=self.end, pad_token_id=self.end[0],
        )[:, ids.shape[1] :]  # fmt: skip
        is_end = torch.isin(output, torch.tensor(self.end, device=output.device)).long()
        return int((is_end.cumsum(1) - is_end == 0).sum())


class Trl:
    """TRL's GRPO step on the same prompts, with its own loop and random rewards. It samples by itself or is `fed`."""

    def __init__(self, folder: Path, prompts, samples: int, new: int, micro: int, scratch: str):
        import datasets  # not requirements of the product
        import transformers
        import trl

        transformers.utils.logging.set_verbosity_error()
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in Transformers
        datasets.utils.logging.disable_progress_bar()
        self.version, self.drawn, self.fed, self.tokens = trl.__version__, random.Random(0), None, 0
        self.ids, self.samples = prompts, samples
        config = trl.GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=micro * samples, num_generations=samples, beta=0.0,
            gradient_accumulation_steps=len(prompts) // micro, max_completion_length=new, temperature=1.0,
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
        """Each prompt is the number of a list of token ids; its completion comes from generate, or from `fed`."""
        which = [int(prompt) for prompt in prompts]
        started = time.perf_counter()
        if self.fed:
            left = {i: list(self.fed[i]) for i in set(which)}
            completions = [left[i].pop() for i in which]
        else:
            model = trainer.model
            ids, mask = pad_left([self.ids[i] for i in which], self.end, model.device)
            with torch.inference_mode():
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=trainer.generation_config)
            completions = [self.until_end(row) for row in out[:, ids.shape[1] :].tolist()]
        self.rollout_s, self.tokens = time.perf_counter() - started, sum(map(len, completions))
        return {"prompt_ids": [self.ids[i] for i in which], "completion_ids": completions, "logprobs": None}

    def until_end(self, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(self.end) + 1] if self.end in tokens else tokens

    def reward(self, completions, **_) -> list[float]:
        return [float(self.drawn.random() < 0.5) for _ in completions]

    def step(self, fed=None) -> float:
        """Seconds of one optimizer step of its own training loop."""
        self.fed = fed
        return seconds(lambda: self.trainer.train(), self.trainer.model.device)


def trl_peak(folder: Path, prompts, samples: int, new: int, micro: int) -> float:
    """GB at the peak of a process that only runs TRL's step, twice: the second with AdamW's moments in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        theirs = Trl(folder, prompts, samples, new, micro, scratch)
        theirs.step()
        theirs.step()
        return peak_memory(theirs.trainer.model.device)


def alone(work, *given):
    """work(*given) in a process of its own, which shares no memory with this one. ValueError if that process dies."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(work, *given).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise ValueError("TRL's process died, perhaps because memory ran out; lower --micro") from None


# ---- the two benchmarks --------------------------------------------------------------------------------------


def tokens_per_second(sampler: Sampler, theirs: Transformers | None, prompts, samples: int, new: int, repeats: int):
    """Figures of both and their ratio, with natural and with forced ends, and the last natural answers."""
    device, ends, figures = sampler.model.device, sampler.end_of_turn, {}
    for form in ("natural", "forced"):
        sampler.end_of_turn = ends if form == "natural" else [-1]  # no token is -1, so nothing ends
        if sampler.static:  # the first call captures the graphs and loads kernels
            figures.setdefault("first_s", seconds(lambda: sampler.generate(prompts, samples, new), device))
            if theirs:
                theirs.generate(prompts, samples, new, form == "forced")
        ours_rates, their_rates = [], []
        for i in range(repeats):
            spent, answers = timed(lambda: sampler.generate(prompts, samples, new, 1.0, seed=i), device)  # noqa: B023
            ours_rates.append(sum(len(c.tokens) for group in answers for c in group) / spent)
            if theirs:
                spent, drawn = timed(lambda: theirs.generate(prompts, samples, new, form == "forced"), device)  # noqa: B023
                their_rates.append(drawn / spent)
        figures[form] = {"tokens_s": statistics.median(ours_rates), "runs": ours_rates}
        if theirs:
            ratio = statistics.median(a / b for a, b in zip(ours_rates, their_rates, strict=True))
            figures[form] |= {"theirs_tokens_s": statistics.median(their_rates), "theirs_runs": their_rates,
                              "ratio": ratio}  # fmt: skip
        if form == "natural":
            figures["answers"] = answers
    sampler.end_of_turn = ends
    return figures


def rollout(args: argparse.Namespace) -> dict:
    tokenizer, sampler = open_sampler(args)
    network, device, config = sampler.model, sampler.model.device, sampler.model.config
    prompts, theirs = make_prompts(tokenizer, args.count, args.length), None
    if args.prompts:
        lines = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [tokenizer.encode(tokenizer.render([{"role": "user", "content": line}])) for line in lines]
    if args.against:
        theirs = Transformers(locate(args.model), sampler.end_of_turn, network, args.random)
    name = introduce(network, prompts, args.samples, args.new)
    sampler.generate(prompts[:2], 1, 2)  # warm
    figures = tokens_per_second(sampler, theirs, prompts, args.samples, args.new, args.repeats)
    answers = figures.pop("answers")
    tokens, peak = sum(len(c.tokens) for group in answers for c in group), peak_memory(device)
    if sampler.static:
        print(f"the first call, which captures {len(sampler.run.graphs)} graphs: {figures['first_s']:.1f} s")
    bound = rollout_limit(network, prompts, answers, args.rows)
    # Prefill alone: the same prompts, one token each.
    prefill = min(seconds(lambda: sampler.generate(prompts, 1, 1), device) for _ in range(args.repeats))
    spent = tokens / figures["natural"]["tokens_s"]
    P, G, T = len(prompts), args.samples, max(map(len, prompts))
    shared = Slots(config, P, G, T, args.new, "meta", network.dtype).kv_bytes()
    unshared = Slots(config, P * G, 1, T, args.new, "meta", network.dtype).kv_bytes()
    figures |= bound | {
        "seconds": spent, "share_of_limit": bound["limit_s"] / spent, "tokens": tokens, "prefill_s": prefill,
        "prefill_tokens_s": sum(map(len, prompts)) / prefill, "decode_tokens_s": tokens / (spent - prefill),
        "peak_gb": peak, "kv_mb": shared / 1e6, "kv_unshared_mb": unshared / 1e6, "device": name,
    }  # fmt: skip
    print(
        f"\nprefill {figures['prefill_tokens_s']:.0f} tokens/s, decode {figures['decode_tokens_s']:.0f} tokens/s; "
        f"{tokens} tokens in {spent:.2f} s, {tokens / spent:.0f} tokens/s with prefill; forced ends "
        f"{figures['forced']['tokens_s']:.0f} tokens/s\nlimit {bound['limit_s']:.2f} s, bound by {bound['binds']}: "
        f"({bound['prefill_tflop']:.2f} prefill at {bound['prefill_gflops']:.0f} GFLOP/s + {bound['decode_tflop']:.2f} "
        f"decode + {bound['attention_tflop']:.2f} attention at {bound['decode_gflops']:.0f} GFLOP/s) TFLOP, or "
        f"{bound['weights_mb']:.0f} MB of weights a step at {bound['read_gb_s']:.1f} GB/s\nshare of the limit "
        f"{figures['share_of_limit']:.0%}; peak memory {peak:.2f} GB; KV cache {shared / 1e6:.0f} MB, unshared it "
        f"would be {unshared / 1e6:.0f} MB"
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
            cell = tokens_per_second(sampler, theirs, make_prompts(tokenizer, count, length), samples, args.new, 1)
            ratios = [cell[form].get("ratio", float("nan")) for form in ("natural", "forced")]
            figures["grid"].append({"samples": samples, "length": length, "prompts": count, "ratios": ratios})
            print(f"| {samples} | {length} | {count} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)
    return figures


def timed_step(sampler: Sampler, policy: Policy, prompts, args: argparse.Namespace, drawn: random.Random, seed: int,
               answers=None) -> tuple[dict, list]:  # fmt: skip
    """A step in train.step's parts, with random rewards: (seconds by phase, answers). With answers it samples none."""
    device, spent = sampler.model.device, {}
    if answers is None:
        pairs = [p for p in prompts for _ in range(4)]  # X and X' of two candidates for each prompt kept
        spent["labels"] = seconds(lambda: sampler.option_logprobs(pairs, [5, 6, 7], together=2), device)
        spent["rollout"], answers = timed(lambda: sampler.generate(prompts, args.samples, args.new, seed=seed), device)
    groups = list(zip(prompts, answers, strict=True))
    totals = [sum(map(len, answers)), sum(len(c.tokens) for _, group in groups for c in group)]
    spent |= {"forward": 0.0, "backward": 0.0}
    for start in range(0, len(groups), args.micro):
        part = groups[start : start + args.micro]
        rewards = [[float(drawn.random() < 0.5) for _ in group] for _, group in part]

        def forward():
            packed, old, A, weights = train.micro_batch(part, rewards, totals, policy.args, device)  # noqa: B023
            logprobs = token_logprobs(policy.model, packed, 1.0)
            return (policy_loss(logprobs, old, A, 0.2, 0.2) * weights).sum()

        elapsed, loss = timed(forward, device)
        spent["forward"] += elapsed
        spent["backward"] += seconds(lambda: policy.backward(loss), device)  # noqa: B023
    spent["optimizer"] = seconds(lambda: policy.step(1e-9), device)
    print(f"step: {', '.join(f'{phase} {value:.2f} s' for phase, value in spent.items())}", flush=True)
    return spent, answers


def training(args: argparse.Namespace) -> dict:
    if args.count % args.micro:
        raise ValueError(f"--count {args.count} must be a multiple of --micro {args.micro}, or TRL leaves some out")
    folder = locate(args.model)
    prompts = make_prompts(models.Tokenizer(args.model), args.count, args.length)
    if max(map(len, prompts)) + args.new > (context := models.read_config(folder).context):
        raise ValueError(f"--length and --new together exceed the model's context of {context} tokens; lower one")
    figures: dict = {"ours": [], "generating": [], "fed": []}
    if args.against:  # first, while this process holds no model
        figures["theirs_peak_gb"] = alone(trl_peak, folder, prompts, args.samples, args.new, args.micro)
    _, sampler = open_sampler(args)
    network, device, theirs = sampler.model, sampler.model.device, None
    if args.lora:
        lora.attach(network, args.lora, 2.0 * args.lora)
    network.recompute = args.recompute
    policy = Policy(network, Args(lr=1e-9, max_new_tokens=args.new, micro=args.micro, loss="dapo"), Ranks())
    figures["device"] = introduce(network, prompts, args.samples, args.new)
    common = sampler, policy, prompts, args, random.Random(0)
    timed_step(*common, 0)  # warm
    timed_step(*common, 0)  # with AdamW's moments
    figures["peak_gb"] = peak_memory(device)  # before anything else is in this process
    with tempfile.TemporaryDirectory() as scratch:
        if args.against:
            theirs = Trl(folder, prompts, args.samples, args.new, args.micro, scratch)
        for i in range(args.repeats):
            spent, answers = timed_step(*common, i + 1)
            figures["ours"].append(spent)
            if theirs:
                tokens, own = sum(len(c.tokens) for g in answers for c in g), sum(spent.values())
                whole = theirs.step()
                per_token = whole / theirs.tokens * tokens
                pair = {"theirs_s": whole, "theirs_rollout_s": theirs.rollout_s, "theirs_tokens": theirs.tokens,
                        "ours_s": own, "labels_s": spent["labels"], "ours_tokens": tokens, "ratio": per_token / own,
                        "ratio_without_labels": per_token / (own - spent["labels"])}  # fmt: skip
                fed = sum(timed_step(*common, 0, answers)[0].values())
                whole = theirs.step([[c.tokens for c in group] for group in answers])
                figures["generating"].append(pair)
                figures["fed"].append({"theirs_s": whole, "ours_s": fed, "ratio": whole / fed})
                print(f"pair {i + 1}: generating {pair['ratio']:.2f}, without labels {pair['ratio_without_labels']:.2f}"
                      f", same tokens {whole / fed:.2f}", flush=True)  # fmt: skip
    phases = {key: statistics.median(run[key] for run in figures["ours"]) for key in figures["ours"][0]}
    groups = list(zip(prompts, answers, strict=True))
    bound = step_limit(network.config, groups, device, network.dtype, bool(args.lora), args.recompute)
    tokens = sum(len(c.tokens) for _, group in groups for c in group)
    share = bound["limit_s"] / (phases["forward"] + phases["backward"])
    figures |= {"phases": phases, **bound, "share_of_limit": share, "tokens_s": tokens / sum(phases.values())}
    print("\n" + ", ".join(f"{phase} {value:.2f} s" for phase, value in phases.items())
          + f"; {tokens} new tokens, {figures['tokens_s']:.0f} a second, labels included\n"
          f"forward and backward: limit {bound['limit_s']:.2f} s ({bound['tflop']:.2f} TFLOP at {bound['gflops']:.0f} "
          f"GFLOP/s), share {share:.0%}; peak memory {figures['peak_gb']:.2f} GB")  # fmt: skip
    if theirs:
        for key, ratio, what in (
            ("generating", "ratio", "both generating, per new token, our labels included"),
            ("generating", "ratio_without_labels", "both generating, per new token, without labels"),
            ("fed", "ratio", "same tokens"),
        ):
            middle = figures[f"{key}_{ratio}"] = statistics.median(pair[ratio] for pair in figures[key])
            print(f"TRL {theirs.version}, {what}: ratio {middle:.2f} (median of {args.repeats} pairs)")
        print(f"TRL {theirs.version}, alone in its process: peak memory {figures['theirs_peak_gb']:.2f} GB")
    return figures


@command("lab.bench")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="lab.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("rollout", "train"))
    parser.add_argument("--model", required=True, help="Hugging Face directory, or hub id in the local cache")
    parser.add_argument("--prompts", help="a text file, one prompt per line; made up by default")
    parser.add_argument("--count", type=int, default=16, help="made-up prompts")
    parser.add_argument("--length", type=int, default=128, help="approximate tokens of a made-up prompt")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--new", type=int, default=48, help="maximum tokens of a sample")
    parser.add_argument("--rows", type=int, default=128, help="samples decoded together")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--against", choices=("transformers", "trl"), help="measure this too")
    parser.add_argument("--random", action="store_true", help="draw the weights: the folder needs none")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="with train: train adapters only")
    parser.add_argument("--recompute", action="store_true", help="with train: activation checkpointing")
    parser.add_argument("--micro", type=int, default=4, help="with train: groups per forward and backward pass")
    parser.add_argument("--grid", action="store_true", help="ratios over samples and prompt lengths as well")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(argv)
    if args.against and (args.against == "trl") != (args.what == "train"):
        raise ValueError("rollout is measured --against transformers, train --against trl")
    if args.against == "trl" and (args.random or args.lora or args.recompute):
        raise ValueError("--against trl trains all weights of a real model; leave out --random, --lora and "
                         "--recompute")  # fmt: skip
    if args.lora < 0:
        raise ValueError(f"--lora must be at least 0, not {args.lora}")
    if args.what == "rollout" and (args.lora or args.recompute):
        raise ValueError("--lora and --recompute are for train; leave them out")
    for name in ("count", "length", "samples", "new", "rows", "repeats", "micro"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1")
    files.check_writable(args.json)
    try:
        figures = {"rollout": rollout, "train": training}[args.what](args)
    except ImportError as error:
        raise ValueError(f"--against {args.against} needs a package that is missing ({error}); see "
                         "tests/requirements.txt") from None  # fmt: skip
    if args.json:
        files.write_json(args.json, {"args": vars(args), **figures})


if __name__ == "__main__":
    sys.exit(main())
