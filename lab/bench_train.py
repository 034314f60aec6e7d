"""bench.py train: a training step phase by phase, its share of the limit, and the ratio to TRL's.

Peak memory is that of a process which has one of the two in it: TRL's in a process of its own, which is gone before
our model is loaded, ours before TRL is; libraries count, and each has taken a step before, so that AdamW's moments are
there.
"""

import argparse
import concurrent.futures
import multiprocessing
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

import model as models
import train
from grpo import advantages, pack, policy_loss, token_logprobs, token_weights
from lab.rates import introduce, make_prompts, peak_memory, product_rate, random_network, seconds
from rollout import Sampler
from run import files, lora


class Trl:
    """TRL's GRPO step on the same prompts: its own loop, sampling by itself or fed with `tokens`, rewards drawn."""

    def __init__(self, folder: Path, prompts, samples: int, new: int, micro: int, scratch: str):
        import datasets  # only here: not requirements of the product
        import transformers
        import trl

        transformers.utils.logging.set_verbosity_error()
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in bench.py
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


def trl_peak(folder: Path, prompts, samples: int, new: int, micro: int) -> float:
    """GB at the peak of a process that does nothing but TRL's step: one that leaves AdamW's moments behind, and one
    with them there."""
    with tempfile.TemporaryDirectory() as scratch:
        theirs = Trl(folder, prompts, samples, new, micro, scratch)
        theirs.step()
        theirs.step()
        return peak_memory(theirs.trainer.model.device)


def alone(work, *given):
    """work(*given) in a process of its own, so that it shares no memory with this one; ValueError where that dies."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(work, *given).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise ValueError("TRL's process died, perhaps for want of memory; lower --micro") from None


def cut(tokens: list[int], end: int) -> list[int]:
    """Up to and with the first end."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def step_limit(config: models.Config, groups, device, dtype, lora=False, recompute=False) -> dict:
    """The least seconds of forward and backward of the groups, each prompt once.

    Three times the forward's products: its own, and for the gradients of inputs and of weights. No gradients of weights
    that adapters leave frozen; once more where blocks are recomputed. Adapters' own products are not counted.
    """
    head_times = 2 + (not lora)
    body_times = head_times + recompute
    tokens = sum(len(prompt) + sum(len(c.tokens) - 1 for c in answers) for prompt, answers in groups)
    scored = sum(len(c.tokens) for _, answers in groups for c in answers)
    rows = min(tokens, 1024)
    body_s, body = product_rate(config, rows, device, dtype, head=False)
    both_s, both = product_rate(config, rows, device, dtype, head=True)
    ahead = max(both_s - body_s, 0.0)
    operations = (body_times * body * tokens + head_times * (both - body) * scored) / rows
    return {"limit_s": (body_times * body_s * tokens + head_times * ahead * scored) / rows, "tflop": operations / 1e12,
            "gflops": both / both_s / 1e9, "tokens_in": tokens, "tokens_scored": scored}  # fmt: skip


def train_step(args: argparse.Namespace) -> None:

    if args.count % args.micro:
        raise ValueError(f"--count {args.count} must be a multiple of --micro {args.micro}, or TRL leaves some out")
    tokenizer, device = models.Tokenizer(args.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts, folder = make_prompts(tokenizer, args.count, args.length), models.locate(args.model)
    if max(map(len, prompts)) + args.new > (context := models.read_config(folder).context):
        raise ValueError(f"--length and --new together pass the model's context of {context} tokens; lower one")
    figures: dict = {"args": vars(args), "ours": [], "generating": [], "fed": []}
    if args.against:  # first, while this process holds no model
        figures["theirs_peak_gb"] = alone(trl_peak, folder, prompts, args.samples, args.new, args.micro)
    network = random_network(args.model, device) if args.random else models.load(args.model, device)
    if args.lora:
        lora.attach(network, args.lora, 2.0 * args.lora)
    network.recompute = args.recompute
    sampler = Sampler(network, sorted({*network.config.end_of_turn, tokenizer.end_of_turn}), rows=args.rows)
    settings = train.Args(lr=1e-9, max_new_tokens=args.new, micro=args.micro, loss="dapo")
    optimizer, ranks, drawn = train.Optimizer(network, settings), train.Ranks(), random.Random(0)
    letters = list(range(5, 8))
    figures["device"] = introduce(network, prompts, args.samples, args.new)

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
        print(f"step: {', '.join(f'{key} {value:.2f} s' for key, value in spent.items())}", flush=True)
        return spent, answers

    step(0)  # warm
    step(0)  # with AdamW's moments there
    figures["peak_gb"] = peak_memory(device)  # before anything else is in this process
    with tempfile.TemporaryDirectory() as scratch:
        theirs = None
        if args.against:
            theirs = Trl(folder, prompts, args.samples, args.new, args.micro, scratch)
        for i in range(args.repeats):
            spent, answers = step(i + 1)
            figures["ours"].append(spent)
            if theirs:
                tokens, own = sum(len(c.tokens) for g in answers for c in g), sum(spent.values())
                whole = theirs.step()
                per_token = whole / theirs.tokens * tokens
                pair = {"theirs_s": whole, "theirs_rollout_s": theirs.rollout_s, "theirs_tokens": theirs.tokens,
                        "ours_s": own, "labels_s": spent["labels"], "ours_tokens": tokens, "ratio": per_token / own,
                        "ratio_without_labels": per_token / (own - spent["labels"])}  # fmt: skip
                figures["generating"].append(pair)
                fed, _ = step(0, answers)
                whole = theirs.step([[c.tokens for c in group] for group in answers])
                figures["fed"].append(
                    {"theirs_s": whole, "ours_s": sum(fed.values()), "ratio": whole / sum(fed.values())}
                )
                print(
                    f"pair {i + 1}: generating {pair['ratio']:.2f}, without labels {pair['ratio_without_labels']:.2f}, "
                    f"same tokens {figures['fed'][-1]['ratio']:.2f}",
                    flush=True,
                )
    phases = {key: statistics.median(run[key] for run in figures["ours"]) for key in figures["ours"][0]}
    groups = list(zip(prompts, answers, strict=True))
    bound = step_limit(network.config, groups, device, network.dtype, bool(args.lora), args.recompute)
    both = phases["forward"] + phases["backward"]
    tokens = sum(len(c.tokens) for _, group in groups for c in group)
    figures |= {"phases": phases, **bound, "share_of_limit": bound["limit_s"] / both,
                "tokens_s": tokens / sum(phases.values())}  # fmt: skip
    print("\n" + ", ".join(f"{key} {value:.2f} s" for key, value in phases.items())
          + f"; {tokens} new tokens, {figures['tokens_s']:.0f} a second, labels included")  # fmt: skip
    print(f"forward and backward: limit {bound['limit_s']:.2f} s ({bound['tflop']:.2f} TFLOP at {bound['gflops']:.0f} "
          f"GFLOP/s), share {figures['share_of_limit']:.0%}; peak memory {figures['peak_gb']:.2f} GB")  # fmt: skip
    for key, ratio, what in (
        ("generating", "ratio", "both generating, per new token, our labels included"),
        ("generating", "ratio_without_labels", "both generating, per new token, without labels"),
        ("fed", "ratio", "same tokens"),
    ):
        if figures[key]:
            middle = figures[f"{key}_{ratio}"] = statistics.median(pair[ratio] for pair in figures[key])
            print(f"TRL {theirs.version}, {what}: ratio {middle:.2f} (median of {args.repeats} pairs)")
    if args.against:
        print(f"TRL {theirs.version}, alone in its process: peak memory {figures['theirs_peak_gb']:.2f} GB")
    if args.json:
        files.write_json(args.json, figures)
