"""Where a decode step's time goes, before and after: the plain sampler (tests/plain.py) and rollout.py's.

    python runs/profile_sampler.py MODEL [PROMPTS SAMPLES TOKENS]

Each sampler draws 2 and then TOKENS tokens with none ending a turn; by operation, the difference of the profiler's own
times is what the steps between took. The prompts are bench.py's.
"""

import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

import plain  # noqa: E402

import model as models  # noqa: E402
import rollout  # noqa: E402
from rates import introduce, make_prompts  # noqa: E402


def times(sampler, prompts, samples: int, new: int) -> dict[str, float]:
    """Milliseconds by operation, each without those it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        sampler.generate(prompts, samples, new)
    return {event.key: event.self_cpu_time_total / 1e3 for event in recorded.key_averages()}


def main(folder: str, count: int = 16, samples: int = 8, new: int = 26) -> None:
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


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
