"""How fast the sampler and the training step are, against this machine's limit and against transformers and TRL.

    python -m lab.bench rollout --model DIR [--against transformers]    tokens per second of the sampler
    python -m lab.bench train --model DIR [--against trl]               a training step, phase by phase
    python -m lab.bench train --model DIR --random --lora 16            with weights drawn at random

The sampler's limit is the time of the model's matrix products, timed in the same run on the model's own weights, with
as many rows as the sampler has at once. This includes the time to read the weights. Attention comes on top: on a CPU
its operations, at the rate of these products; on a GPU the bytes of the KV cache, at the rate of a copy in its memory,
which is timed too. A training step's memory stands beside what lab/plan.py plans.
Ours and theirs run in turn on the same prompts, with the same threads and dtype, and a ratio is the median over the
pairs. Tokens count up to the end of a turn. The sampler is timed with natural ends, and with all tokens forced. TRL has
a process of its own, so that each peak of memory is of one program.
--random needs only config.json and the tokenizer. Speed does not depend on the weights' values. Answers would end at
random, so all tokens are forced.
"""

import argparse
import bisect
import functools
import importlib.metadata
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import nn

import model as models
import train
from grpo import policy_loss, token_logprobs
from lab import plan
from lab.machine import Clock, copy_rate, device, facts, peak_memory, seconds_a_row
from rollout import Sampler, sized
from run import files, lora, tables
from run.args import Args
from run.hub import locate
from run.policy import Policy
from run.progress import Parser, command
from run.ranks import Ranks

TEXT = """A woman in a green coat waits at the corner while two boys carry a long wooden ladder past the bakery . The
street is wet , it rained all morning , and a delivery van blocks half of the road . Somebody laughs behind an open
window . Is it true that the boys know the woman ? Say first what speaks for it , then what speaks against it ."""

# ---- what is measured ----------------------------------------------------------------------------------------


def make_prompts(tokenizer: models.Tokenizer, count: int, length: int) -> list[list[int]]:
    """Chat prompts of about `length` tokens each, from 16 % shorter to 16 % longer, all different."""
    words = TEXT.split()

    def prompt(first: int, n: int) -> list[int]:
        text = " ".join(words[i % len(words)] for i in range(first, first + n))
        return tokenizer.encode(tokenizer.render([{"role": "user", "content": text}]))

    targets = [round(length * (0.84 + 0.32 * i / max(1, count - 1))) for i in range(count)]
    fitting = [bisect.bisect_right(range(1, target), target, key=lambda n, i=i: len(prompt(i, n)))
               for i, target in enumerate(targets)]  # fmt: skip
    return [prompt(i, max(1, n)) for i, n in enumerate(fitting)]


def random_network(path: str, device: torch.device) -> models.Transformer:
    """A network of the folder's config with random weights."""
    torch.manual_seed(0)
    network = models.empty(locate(path), device)
    for weight in network.parameters():
        nn.init.normal_(weight, 0, 0.02) if weight.dim() > 1 else nn.init.ones_(weight)
    return network


def prepare(args: argparse.Namespace) -> tuple[Sampler, list[list[int]]]:
    """The sampler and the prompts; prints what is measured and where."""
    tokenizer = models.Tokenizer(args.model)
    prompts = make_prompts(tokenizer, args.count, args.length)
    if max(map(len, prompts)) + args.new > (context := models.read_config(locate(args.model)).context):
        raise ValueError(f"--length and --new together exceed the model's context of {context} tokens; lower one")
    network = random_network(args.model, device()) if args.random else models.load(args.model, device())
    ends = {*network.config.end_of_turn, tokenizer.end_of_turn}
    sampler = Sampler(network, ends, rows=args.rows, kernels=args.kernels)
    at, lengths = facts(network.device), [*map(len, prompts)]
    print(f"{at['device']}, {at['threads']} threads, torch {at['torch']}, {network.dtype}, {at['date']}")
    print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {args.samples} samples each, "
          f"at most {args.new} new tokens, T = 1")  # fmt: skip
    return sampler, prompts


def tokens_of(answers) -> int:
    return sum(len(answer.tokens) for group in answers for answer in group)


def medians(pairs: list[tuple[float, float]]) -> dict:
    """Medians of tokens per second of ours and theirs, which ran in turn. Theirs is NaN where only ours was run."""
    columns = {"ours": [a for a, _ in pairs], "theirs": [b for _, b in pairs], "ratio": [a / b for a, b in pairs]}
    return {name: statistics.median(column) for name, column in columns.items()} | {"pairs": pairs}


def show(figures: dict, against: str) -> None:
    """Prints the figures, one a line, and the rates as a table. against: the name of what ours is compared with."""
    lines = [f"{name:34}{value:10,.2f}" for name, value in figures.items() if name != "rates"]
    shown = ("ours", "theirs", "ratio") if against else ("ours",)
    table = [[what, *(f"{rate[key]:.2f}" for key in shown)] for what, rate in figures["rates"].items()]
    head = ["tokens/s, medians", *(against if key == "theirs" else key for key in shown)]
    print("", *lines, "", tables.grid(head, table, markdown=True), sep="\n", flush=True)


# ---- the sampler, and transformers' generate -----------------------------------------------------------------


def their_model(folder: Path, dtype: torch.dtype, device: torch.device, drawn: bool):
    """transformers' model of the folder, with its weights or drawn ones."""
    import transformers  # not a requirement of the product

    transformers.utils.logging.set_verbosity_error()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it prepares for every new length, so its first runs are slow
    settings = {"dtype": dtype, "attn_implementation": "sdpa"}
    if not drawn:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).to(device).eval()
    with device:  # drawing is fast there
        config = transformers.AutoConfig.from_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_config(config, **settings).eval()


@torch.inference_mode()
def generate(network, prompts, samples: int, new: int, end: list[int], forced: bool = False) -> list[list[int]]:
    """transformers' generate: `samples` answers of each prompt in turn, each up to and with its end of turn.

    Prompts are padded on the left. forced: nothing ends before `new` tokens.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[end[0]] * (longest - len(p)) + p for p in prompts], device=network.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=network.device)
    output = network.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        num_return_sequences=samples, max_new_tokens=new, min_new_tokens=new if forced else None,
        eos_token_id=end, pad_token_id=end[0],
    )  # fmt: skip
    rows = output[:, longest:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in end), new)] for row in rows]


def draw_in_turn(sampler: Sampler, theirs, prompts, args: argparse.Namespace) -> tuple[dict, list]:
    """({"natural ends": medians, "forced ends": medians}, the last answers of the first form).

    With --random all ends are forced.
    """
    ends, rates, kept = sampler.end_of_turn, {}, []
    for form in ("natural ends", "forced ends")[args.random :]:
        forced, pairs = form == "forced ends", []
        sampler.end_of_turn = [-1] if forced else ends  # no token is -1, so nothing ends
        for i in range(-sampler.static, args.repeats):  # on CUDA the first call captures the graphs and loads kernels
            clock = Clock(sampler.model.device)
            answers = sampler.generate(prompts, args.samples, args.new, 1.0, seed=max(i, 0))
            ours = tokens_of(answers) / clock("ours")
            drawn = generate(theirs, prompts, args.samples, args.new, ends, forced) if theirs else []
            pairs.append((ours, sum(map(len, drawn)) / clock("theirs") if theirs else math.nan))
            if i < 0:
                print(f"the first call, which captures {len(sampler.run.graphs)} graphs: {clock.spent['ours']:.1f} s")
            print(f"{form}: {ours:.1f} tokens/s" + f", theirs {pairs[-1][1]:.1f}" * bool(theirs), flush=True)
        rates[form], kept = medians(pairs[-args.repeats :]), kept or answers
    sampler.end_of_turn = ends
    return rates, kept


def bytes_read(network: models.Transformer, steps: float, positions: float) -> float:
    """Bytes that decode steps must read: the weights once a step, and the keys and values of positions of the cache."""
    c, item = network.config, network.dtype.itemsize
    lookup = 0 if c.tied else network.embed_tokens.weight.nbytes  # a few rows of it are read
    weights = sum(w.nbytes for w in network.parameters()) - lookup
    return steps * weights + positions * 2 * c.layers * c.kv_heads * c.head_dim * item


def rollout_limit(network: models.Transformer, prompts, answers, rows: int, lanes: int) -> dict:
    """The least seconds for these prompts and answers on this machine, and what it can do.

    rows: samples decoded together, `lanes` of them from one prompt, whose keys and values are then read once.
    """
    c, layers = network.config, [m.weight for m in network.layers.modules() if isinstance(m, nn.Linear)]
    weights = [*layers, (network.embed_tokens if c.tied else network.lm_head).weight]
    sizes = [(len(p), len(answer.tokens)) for p, group in zip(prompts, answers, strict=True) for answer in group]
    prefilled, fed = sum(map(len, prompts)), sum(n - 1 for _, n in sizes)  # a sample's last token is never fed
    prefill, decode = (2.0 * sum(map(torch.numel, some)) for some in (layers, weights))  # operations of a row
    prefill_s, decode_s = seconds_a_row(layers, min(prefilled, 2048)), seconds_a_row(weights, min(rows, len(sizes)))
    seen = sum(len(p) ** 2 / 2 for p in prompts) + sum(n * (p + n / 2) for p, n in sizes)
    attention, copied = 4.0 * c.layers * c.heads * c.head_dim * seen, copy_rate(network.device)
    positions = sum((n - 1) * (p / lanes + n / 2) for p, n in sizes)  # of the KV cache, read once per step
    on_gpu = network.device.type == "cuda"
    attention_s = bytes_read(network, 0, positions) / copied if on_gpu else attention * decode_s / decode
    return {"limit, s": prefilled * prefill_s + fed * decode_s + attention_s,
            "operations, TFLOP": (prefilled * prefill + fed * decode + attention) / 1e12,
            "products in prefill, GFLOP/s": prefill / prefill_s / 1e9,
            "products in decode, GFLOP/s": decode / decode_s / 1e9,
            "bytes to read in decode, GB": bytes_read(network, fed / rows, positions) / 1e9,
            "bandwidth of a copy, GB/s": copied / 1e9}  # fmt: skip


def rollout(args: argparse.Namespace) -> dict:
    sampler, prompts = prepare(args)
    network, theirs, name = sampler.model, None, ""
    if args.against:
        theirs = their_model(locate(args.model), network.dtype, network.device, args.random)
        name = f"transformers {importlib.metadata.version('transformers')}"
    sampler.generate(prompts[:2], 1, 2)  # warm
    rates, answers = draw_in_turn(sampler, theirs, prompts, args)
    peak, spent = peak_memory(network.device), tokens_of(answers) / next(iter(rates.values()))["ours"]
    call = len(prompts), args.samples, 1, 1, sampler.static
    slots = sampler.slots or sized(network.config, network.dtype, args.rows, 0, *call)[1]
    limit = rollout_limit(network, prompts, answers, rows := slots.P * slots.G, slots.G)
    read = limit["bytes to read in decode, GB"] / limit["bandwidth of a copy, GB/s"]
    figures = {"tokens": tokens_of(answers), "rows": rows, "seconds": spent, **limit,
               "share of the limit": limit["limit, s"] / spent, "share of this bandwidth": read / spent,
               "peak memory, GB": peak, "rates": rates}  # fmt: skip
    show(figures, name)
    return figures


# ---- the training step, and TRL's ----------------------------------------------------------------------------


@functools.cache  # it stays open in its process
def trl_trainer(folder: Path, count: int, samples: int, new: int, micro: int, drawn: bool, scratch: str):
    """TRL's GRPO trainer with its own loop and random rewards. It trains on `trainer.fed`, which lists (prompt, its
    answers) as token ids."""
    import datasets  # not requirements of the product
    import transformers
    import trl

    datasets.utils.logging.disable_progress_bar()
    chance, cuda = random.Random(0), torch.cuda.is_available()

    def feed(numbers: list[str], trainer) -> dict:
        left = [list(answers) for _, answers in trainer.fed]
        pairs = [(trainer.fed[int(i)][0], left[int(i)].pop()) for i in numbers]
        return {"prompt_ids": [p for p, _ in pairs], "completion_ids": [a for _, a in pairs], "logprobs": None}

    config = trl.GRPOConfig(
        output_dir=scratch, per_device_train_batch_size=micro * samples, num_generations=samples, beta=0.0,
        gradient_accumulation_steps=count // micro, max_completion_length=new, temperature=1.0, top_k=0, max_steps=1,
        learning_rate=1e-9, use_cpu=not cuda, bf16=cuda, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_strategy="no", shuffle_dataset=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=their_model(folder, torch.float32, torch.device("cpu"), drawn), args=config, rollout_func=feed,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        train_dataset=datasets.Dataset.from_list([{"prompt": str(i)} for i in range(count)]),
        reward_funcs=lambda completions, **_: [float(chance.random() < 0.5) for _ in completions],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trl_step(setup: tuple, prompts: list[list[int]], fed=None) -> tuple[float, float]:
    """(tokens per second, GB at the peak so far) of one optimizer step of trl_trainer(*setup).

    fed: the answers of each prompt, as token ids; otherwise the trainer's model generates them.
    """
    trainer, clock = trl_trainer(*setup), Clock(device())
    if fed is None:
        _, _, samples, new, *_ = setup
        answers = generate(trainer.model, prompts, samples, new, [trainer.processing_class.eos_token_id])
        fed = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    trainer.fed = list(zip(prompts, fed, strict=True))
    trainer.train()
    return sum(len(answer) for group in fed for answer in group) / clock("step"), peak_memory(clock.device)


def timed_step(sampler: Sampler, policy: Policy, prompts, samples: int, seed: int) -> tuple[dict, list]:
    """A step in train.step's parts, with random rewards: (seconds by phase, answers)."""
    args, device, drawn = policy.args, sampler.model.device, random.Random(seed)
    clock = Clock(device)
    pairs = [p for p in prompts for _ in range(4)]  # X and X' of two candidates for each prompt kept
    sampler.option_logprobs(pairs, [5, 6, 7], together=2)
    clock("labels")
    answers = sampler.generate(prompts, samples, args.max_new_tokens, seed=seed)
    clock("rollout")
    print(f"labels {clock.spent['labels']:.2f} s, rollout {clock.spent['rollout']:.2f} s", flush=True)
    groups, totals = list(zip(prompts, answers, strict=True)), [len(prompts) * samples, tokens_of(answers)]
    for part in policy.passes(len(groups), args.micro):
        rewards = [[float(drawn.random() < 0.5) for _ in group] for _, group in groups[part]]
        packed, old, A, weights = train.micro_batch(groups[part], rewards, totals, args, device)
        loss = (policy_loss(token_logprobs(policy.model, packed, 1.0), old, A, 0.2, 0.2) * weights).sum()
        clock("forward")
        policy.backward(loss)
        clock("backward")
    policy.step(1e-9)
    clock("optimizer")
    print(f"step: {', '.join(f'{phase} {seconds:.2f} s' for phase, seconds in clock.spent.items())}", flush=True)
    return clock.spent, answers


def training(args: argparse.Namespace) -> dict:
    if args.against and args.count % args.micro:
        raise ValueError(f"--count {args.count} must be a multiple of --micro {args.micro}, or TRL leaves some out")
    name = f"TRL {importlib.metadata.version('trl')}" if args.against else ""
    sampler, prompts = prepare(args)
    network, longest = sampler.model, sorted(map(len, prompts))[-args.micro :]
    memory, kind = facts(network.device)["memory, GB"] or 80, "fp32" if network.dtype == torch.float32 else "bf16"
    planned = plan.plan(network.config, prompts=args.count, samples=args.samples, new=args.new, micro=args.micro,
                        prompt_tokens=sum(longest) // len(longest), lora=args.lora, recompute=args.recompute,
                        rows=args.rows, gpu_memory_bytes=memory * 1e9, dtype=kind)["total"] / 1e9  # fmt: skip
    if args.lora:
        lora.attach(network, args.lora, 2.0 * args.lora)
    network.recompute = args.recompute
    policy = Policy(network, Args(lr=1e-9, max_new_tokens=args.new, micro=args.micro, loss="dapo"), Ranks())
    steps, peaks, pairs = [], {}, {"both generating, labels included": [], "both generating": [], "same tokens": []}
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as trl:
        setup = locate(args.model), args.count, args.samples, args.new, args.micro, args.random, scratch
        for i in range(args.repeats + 1):
            spent, answers = timed_step(sampler, policy, prompts, args.samples, i)
            generating = same = math.nan
            if args.against:
                fed = [[answer.tokens for answer in group] for group in answers]
                generating, _ = trl.submit(trl_step, setup, prompts).result()
                same, peaks["TRL's peak memory, GB"] = trl.submit(trl_step, setup, prompts, fed).result()
                print(f"{name}: {generating:.1f} tokens/s generating, {same:.1f} with our tokens", flush=True)
            if i == 0:
                continue  # it gets both warm: then kernels are loaded, and AdamW's moments are there
            steps.append(spent)
            tokens, whole = tokens_of(answers), sum(spent.values())
            without = whole - spent["labels"]
            pairs["both generating, labels included"].append((tokens / whole, generating))
            pairs["both generating"].append((tokens / without, generating))
            pairs["same tokens"].append((tokens / (without - spent["rollout"]), same))
    phases = {f"{phase}, s": statistics.median(step[phase] for step in steps) for phase in steps[0]}
    peak = peak_memory(network.device)
    figures = {**phases, "peak memory, GB": peak, "planned, GB": planned, "peak / planned": peak / planned, **peaks}
    show(figures := figures | {"rates": {what: medians(runs) for what, runs in pairs.items()}}, name)
    return figures | {"steps": steps}


@command("lab.bench")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="lab.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("rollout", "train"))
    parser.add_argument("--model", required=True, help="Hugging Face directory, or hub id in the local cache")
    sizes = {"count": (16, "prompts"), "length": (128, "approximate tokens of a prompt"), "samples": (8, "per prompt"),
             "new": (48, "maximum tokens of a sample"), "rows": (0, "samples decoded together; 0: by memory"),
             "repeats": (3, "runs of each, in turn"), "micro": (4, "with train: groups per pass")}  # fmt: skip
    for name, (usual, text) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=usual, help=f"{text} (default: {usual})")
    parser.add_argument("--against", choices=("transformers", "trl"), help="measure this too")
    parser.add_argument("--kernels", choices=("auto", "fused", "plain"), default="auto", help="as in train.py")
    parser.add_argument("--random", action="store_true", help="draw the weights: the folder needs none")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="with train: train adapters only")
    parser.add_argument("--recompute", action="store_true", help="with train: activation checkpointing")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(argv)
    lowest = {"rows": 0, "count": 1 + (args.what == "train")}
    for name, least, most in (*((name, lowest.get(name, 1), 2**20) for name in sizes), ("lora", 0, 2**16)):
        if not least <= (value := getattr(args, name)) <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise ValueError(f"--{name} must be {bound}, not {value}")
    if args.against and (args.against == "trl") != (args.what == "train"):
        raise ValueError("rollout is measured --against transformers, train --against trl")
    if (args.lora or args.recompute) and (args.what == "rollout" or args.against):
        raise ValueError("--lora and --recompute are for train without --against; leave them out")
    files.check_writable(args.json)
    try:
        figures = {"rollout": rollout, "train": training}[args.what](args)
    except ImportError as error:
        raise ValueError(f"--against {args.against} needs a package that is missing ({error}); see "
                         "tests/requirements.txt") from None  # fmt: skip
    except BrokenProcessPool:
        raise ValueError("TRL's process died, perhaps because memory ran out; lower --micro") from None
    if args.json:
        files.write_json(args.json, {"args": vars(args), "machine": facts(device()), **figures})


if __name__ == "__main__":
    sys.exit(main())
