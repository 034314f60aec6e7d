"""How fast, against what the machine can do and against others: figures to check, not to believe.

    python bench.py rollout --model DIR                            the sampler's rates and its share of the limit
    python bench.py rollout --model DIR --against transformers     and the ratio to transformers' generate
    python bench.py train --model DIR [--against trl]              a training step, phase by phase, and against TRL's
    python bench.py train --model DIR --random --lora 16 --recompute    of a model whose weights are not here

With --random weights are drawn, and DIR needs to hold config.json and the tokenizer only: speed hangs on no value, but
for where answers end, so that "natural ends" then come as late as forced ones.

The limit is the time that the sampler's matrix products would take at the rate at which this machine was seen, in
the same run, to do products of these shapes, or its weights at the rate at which memory was read, whichever is
longer. A ratio is measured in one process: the same prompts, threads and dtype, one after the other in turn, the
median of the runs, with natural ends and with all tokens forced; tokens count up to the end of a turn.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

import model as models
from lab.bench_train import train_step
from lab.rates import introduce, make_prompts, peak_memory, product_rate, random_network, read_rate, seconds
from rollout import Sampler, Slots
from run import files
from run.progress import Parser


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


class Theirs:
    """transformers' generate on the same prompts, padded on the left, samples by num_return_sequences."""

    def __init__(self, folder: Path, end: list[int], network: models.Transformer, drawn: bool = False):
        import transformers  # only here: not a requirement of the product

        transformers.utils.logging.set_verbosity_error()
        torch.backends.cuda.enable_cudnn_sdp(False)  # which would prepare for every new length: its first runs are slow
        self.version, self.end, device = transformers.__version__, end, network.device
        how = {"dtype": network.dtype, "attn_implementation": "sdpa"}
        if drawn:
            config = transformers.AutoConfig.from_pretrained(folder)
            with device:  # where drawing them is quick
                self.network = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
        else:
            self.network = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).to(device).eval()

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
    if sampler.static:  # its graphs are captured, once for sizes that come again, and kernels are loaded
        figures["first_s"] = seconds(lambda: sampler.generate(prompts, samples, new), device)
        if theirs:
            theirs.generate(prompts, samples, new, True)
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
    network = random_network(args.model, device) if args.random else models.load(args.model, device)
    sampler = Sampler(network, sorted({*network.config.end_of_turn, tokenizer.end_of_turn}), rows=args.rows)
    if args.prompts:
        lines = [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [tokenizer.encode(tokenizer.render([{"role": "user", "content": line}])) for line in lines]
    else:
        prompts = make_prompts(tokenizer, args.count, args.length)
    theirs = None
    if args.against:
        theirs = Theirs(models.locate(args.model), sampler.end_of_turn, network, args.random)
    name = introduce(network, prompts, args.samples, args.new)
    sampler.generate(prompts[:2], 1, 2)  # warm
    figures = measure(sampler, theirs, prompts, args.samples, args.new, args.repeats)
    answers = figures.pop("answers")
    tokens, peak = sum(len(c.tokens) for group in answers for c in group), peak_memory(device)
    if sampler.static:
        print(f"the first call, which captures {len(sampler.run.graphs)} graphs: {figures['first_s']:.1f} s")
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
        "peak_gb": peak, "kv_mb": shared / 1e6, "kv_unshared_mb": plain / 1e6, "device": name,
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
        files.write_json(args.json, {"args": vars(args), **figures})


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="lab.bench", description=__doc__.split("\n")[0])
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
    parser.add_argument("--random", action="store_true", help="weights drawn: a folder without any will do")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="with train: of adapters, in place of all")
    parser.add_argument("--recompute", action="store_true", help="with train: activation checkpointing")
    parser.add_argument("--micro", type=int, default=4, help="with train: groups per forward and backward pass")
    parser.add_argument("--grid", action="store_true", help="ratios over samples and prompt lengths as well")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args(argv)
    try:
        if args.against and (args.against == "trl") != (args.what == "train"):
            raise ValueError("rollout is measured --against transformers, train --against trl")
        if args.against == "trl" and (args.random or args.lora or args.recompute):
            raise ValueError("--against trl goes with all weights, read and trained; leave out --random, --lora and "
                             "--recompute")  # fmt: skip
        if args.lora < 0:
            raise ValueError(f"--lora must be at least 0, not {args.lora}")
        if args.what == "rollout" and (args.lora or args.recompute):
            raise ValueError("--lora and --recompute are for train; leave them out")
        for name in ("count", "length", "samples", "new", "rows", "repeats", "micro"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1")
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise ValueError(f"{args.json} cannot be written: make the folder {Path(args.json).parent} first")
        {"rollout": rollout, "train": train_step}[args.what](args)
    except ImportError as error:
        print(
            f"lab.bench: --against {args.against} needs it installed ({error}); see tests/requirements.txt",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        print(f"lab.bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
