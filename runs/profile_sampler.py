"""Where a decode step's time goes, in the plain sampler (tests/plain.py) and in rollout.py's.

    python runs/profile_sampler.py MODEL [PROMPTS [SAMPLES [TOKENS]]]

Each sampler draws 2 tokens and then TOKENS tokens, and nothing ends a turn. The difference of the profiler's times, by
operation, is what the steps between took. The prompts are lab/bench.py's.
"""

import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

import plain  # noqa: E402

import model as models  # noqa: E402
import rollout  # noqa: E402
from lab.bench import introduce, make_prompts  # noqa: E402
from run.progress import Parser, command  # noqa: E402


def times(sampler, prompts, samples: int, new: int) -> dict[str, float]:
    """Milliseconds by operation, each without the operations that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        sampler.generate(prompts, samples, new)
    return {event.key: event.self_cpu_time_total / 1e3 for event in recorded.key_averages()}


def show(folder: str, count: int, samples: int, new: int) -> None:
    network, tokenizer = models.load(folder), models.Tokenizer(folder)
    prompts = make_prompts(tokenizer, count, 128)
    introduce(network, prompts, samples, new)
    for name, kind in (("the plain sampler", plain.Sampler), ("rollout.py", rollout.Sampler)):
        sampler = kind(network)
        sampler.end_of_turn = [-1]  # no token is -1: nothing ends
        sampler.generate(prompts, samples, 2)  # warm
        few, many = (times(sampler, prompts, samples, n) for n in (2, new))
        steps = {key: (many[key] - few.get(key, 0)) / (new - 2) for key in many}
        print(f"\n{name}: {sum(steps.values()):.0f} ms a step of {count * samples} rows, own tokens 2 to {new}")
        for key, spent in sorted(steps.items(), key=lambda item: -item[1])[:12]:
            print(f"    {spent:7.1f} ms  {key}")


@command("profile_sampler.py")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="profile_sampler.py", description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory, or hub id in the local cache")
    for name, usual, what in (("prompts", 16, "made-up prompts"), ("samples", 8, "of each"), ("tokens", 26, "of each")):
        parser.add_argument(name, metavar=name.upper(), nargs="?", type=int, default=usual, help=what)
    args = parser.parse_args(argv)
    for name, least in (("prompts", 1), ("samples", 1), ("tokens", 3)):
        if getattr(args, name) < least:
            parser.error(f"{name.upper()} must be at least {least}, not {getattr(args, name)}")
    show(args.model, args.prompts, args.samples, args.tokens)


if __name__ == "__main__":
    sys.exit(main())
