"""The sampler: from prompts to completions with their logprobs, and from prompts to option probabilities.

Three ideas make it fast, and none changes a sample:

    shared prompts    A prompt is prefilled once and its keys and values are stored once. All its samples attend to
                      them: one product with the prompt, one with a sample's own tokens, one softmax over both.
    no idle rows      A prompt takes a slot, and its samples take the G lanes of the slot. A lane whose sample ended
                      takes the prompt's next sample; a slot without samples takes the next prompt. On a CPU the
                      products skip idle lanes; on a GPU idle slots, in buckets of rows and of cache length.
    a static step     `decode_step` reads and writes tensors at fixed addresses and never asks the host. So on a GPU
                      it is captured as a CUDA graph, once per bucket, and replayed.

A token is drawn by the inverse CDF of softmax(logits / T) in fp32 at u = hash(seed, step, question key, sample,
position) / 2^24, without a generator. Each T has its own sample numbers. Up to rounding, a sample depends on these and
T alone: not on other prompts, lane, bucket, order of refill or number of ranks. The sampler knows no rewards.

Axes: P slots (prompts), G lanes per slot (group), R rows decoded together, T prompt tokens, N new tokens,
H heads, K kv heads, r = H / K, D head dim, E hidden size, V vocabulary.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import fused_step, may_fuse
from model import Config, Transformer, rope_frequencies
from run import lora
from run.attention import end_to_end, over_parts, over_slots, passes
from run.device import send, to_host
from run.draw import sample_tokens, uniforms
from run.graphs import Graphs
from run.memory import free_bytes

PREFILL, PREFILL_CUDA = 1024, 4096  # tokens per forward pass; on a GPU more, so that the host stays ahead of it
FIRST_ROWS = 64  # first tokens drawn at a time, because each row is a whole vocabulary in fp32
LANES = 8  # samples of one prompt that are decoded together; more if prompts are few
LOOK_EVERY = 8  # on CUDA: decode steps between two checks for finished samples; each check waits for the device
COLDEST = 1e-3  # the smallest temperature above 0: below it, rounding of the logits decides, and they may overflow
NEVER = 2**62  # a position that no token has


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    tokens: list[int]  # with the end-of-turn token, if there is one
    logprobs: list[float]  # of each token, at the temperature it was drawn with (T = 1 for greedy tokens)
    ended: bool  # True: it ended its turn; False: it was cut at max_new_tokens


# ---- the decode step -----------------------------------------------------------------------------------------


class Slots:
    """P prompts with G lanes each: all that a decode step reads and writes. Lane l belongs to slot l // G."""

    def __init__(self, config: Config, P: int, G: int, T: int, N: int, device=None, dtype=None):
        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.sizes = self.P, self.G, self.T, self.N = P, G, T, N
        # Index 0: keys, 1: values. prefix: each prompt, once. own: each lane's new tokens.
        self.prefix = zeros(2, config.layers, P, config.kv_heads, T, config.head_dim, dtype=dtype)
        self.own = zeros(2, config.layers, P, config.kv_heads, G, N, config.head_dim, dtype=dtype)
        self.length = zeros(P)  # tokens of the prompt
        self.tokens = zeros(P * G, N + 1)  # drawn so far; finished lanes still write, into column N
        self.logprobs = zeros(P * G, N + 1, dtype=torch.float32)
        self.count = zeros(P * G) + 1  # tokens drawn so far; the step feeds the last of them
        self.finished = zeros(P * G, dtype=torch.bool) | True
        self.question, self.sample = zeros(P * G), zeros(P * G)
        self.temperature = zeros(P * G, dtype=torch.float32)
        self.lanes = torch.arange(P * G, device=device)  # its first R are the rows of the step
        angles = torch.arange(T + N, device=device)[:, None].float() * rope_frequencies(config).to(self.length.device)
        self.cos, self.sin = angles.cos(), angles.sin()  # (T + N, D/2) fp32, which `fused_step` reads
        self.seed, self.step = zeros(), zeros()
        self.limit = zeros() + N  # tokens per sample
        self.bad = zeros() + NEVER  # the first position whose logits were not finite

    def kv_bytes(self) -> int:
        return self.prefix.nbytes + self.own.nbytes

    def reset(self, seed: int, step: int, limit: int) -> None:
        """Empties all lanes for another call of `generate`."""
        self.seed.fill_(seed), self.step.fill_(step), self.limit.fill_(limit)
        self.bad.fill_(NEVER), self.finished.fill_(True)

    def begin(self, begun: dict[int, "Sample"], keys: list[int], temperatures: Tensor, hashed: Tensor) -> None:
        """Puts samples, whose first token is drawn already, into lanes. temperatures, hashed (samples,): by number."""
        rows = [(lane, keys[x.prompt], x.number, x.token) for lane, x in begun.items()]
        lane, key, number, token = send(rows, self.length.device).T
        self.tokens[lane, 0], self.count[lane], self.finished[lane] = token, 1, False
        self.question[lane], self.sample[lane], self.temperature[lane] = key, hashed[number], temperatures[number]

    def move(self, source: int, target: int) -> None:
        """Moves the prompt and the lanes of slot `source` into slot `target`."""
        old, new = (slice(p * self.G, (p + 1) * self.G) for p in (source, target))
        self.prefix[:, :, target], self.own[:, :, target] = self.prefix[:, :, source], self.own[:, :, source]
        self.length[target] = self.length[source]
        for x in (self.tokens, self.logprobs, self.count, self.finished, self.question, self.sample, self.temperature):
            x[new] = x[old]
        self.finished[old] = True


def decode_step(model: Transformer, s: Slots, end: Tensor, P: int, R: int, T: int, N: int) -> None:
    """Draws the next token of the lanes s.lanes[:R], all in the first P slots. Changes `s` in place and nothing else.

    end (n,): tokens that end a turn. The step reads T prompt and N own positions of the cache, so no prompt and no
    sample in these slots may be longer. P, R, T and N are fixed numbers; everything that changes between steps is in
    `s`, so a CUDA graph can replay the step.
    """
    lanes = s.lanes[:R]
    slot, count = lanes // s.G, s.count[lanes]  # (R,)
    attend = over_slots(s, lanes, P, T, N)
    tokens = s.tokens[lanes, count - 1]
    states = model.hidden(tokens[:, None], (s.length[slot] + count - 1)[:, None], attend=attend)
    logits = model.head(states[:, 0])  # (R, V)
    live = ~s.finished[lanes]
    broken = live & ~logits.sum(-1).isfinite()  # one infinity or NaN spoils the sum
    u = uniforms(s.seed, s.step, s.question[lanes], s.sample[lanes], count)
    drawn, logprobs = sample_tokens(logits, s.temperature[lanes], u)
    s.bad.copy_(torch.minimum(s.bad, torch.where(broken, count, NEVER).min()))
    place = torch.where(live, count, s.N)
    s.tokens[lanes, place] = drawn
    s.logprobs[lanes, place] = logprobs
    s.count[lanes] = count + live
    # A sample ends by its length or by the token just drawn.
    ends = (drawn[:, None] == end).any(-1) | (count + 1 >= s.limit)
    s.finished[lanes] = ~live | ends


# ---- the sampler ---------------------------------------------------------------------------------------------


def sized(
    config: Config, dtype: torch.dtype, rows: int | None, free: int,
    prompts: int, samples: int, longest: int, new: int, static: bool, lanes: int = LANES,
) -> tuple[int, Slots]:  # fmt: skip
    """The rows and, on the meta device, the slots for a call whose longest prompt has `longest` tokens.

    rows: how many samples are decoded together. None or 0: 128; on CUDA 512 or 256 if the cache then takes at most a
    sixth of the `free` bytes, because a training step still needs moments, gradients and activations beside it.
    """
    if static:  # few sizes, so that calls in turn share slots, graphs and rounding
        prompts = 1 << (prompts - 1).bit_length()
    for rows in [rows] if rows else [512, 256, 128] if static else [128]:  # noqa: B020
        G = min(samples, rows, max(lanes, rows // prompts))
        step = 64 if static else 16  # on CUDA coarsely, because each size is captured
        slots = Slots(config, min(prompts, rows // G), G, -(-longest // step) * step, new, "meta", dtype)
        if slots.kv_bytes() <= free / 6:
            break
    return rows, slots


def option_scores(model: Transformer, runs: list[list[list[int]]], options: list[int]) -> Tensor:
    """Log-softmax over the option tokens after each prompt of all runs (P, len(options)), fp32, in one pass."""
    tokens, positions, parts, last = end_to_end(runs, model.device)
    states = model.hidden(tokens, positions, attend=over_parts(parts, model.device))[0, last]  # (P, E)
    weight = model.embed_tokens.weight if model.config.tied else model.lm_head.weight
    weight = weight[send(options, model.device)]  # (options, E): the rest is not needed
    # In fp32: two letters' logits may differ by less than bf16 resolves, and a rounded pick is a wrong label.
    return (states.float() @ weight.float().T).log_softmax(-1)


class Sampler:
    """Generates from `model`, whose weights may change in place between calls.

    end_of_turn: token ids that end an answer, by default the model's own. rows: how many samples are decoded together;
    None or 0: by memory. lanes: how many of one prompt; more if prompts are few. kernels: see `kernels.may_fuse`.
    """

    def __init__(self, model: Transformer, end_of_turn: Iterable[int] | None = None, rows: int | None = None,
                 lanes: int = LANES, kernels: str = "auto"):  # fmt: skip
        self.model, self.rows, self.lanes = model, rows, lanes
        self.end_of_turn = sorted(model.config.end_of_turn if end_of_turn is None else end_of_turn)
        # On CUDA the step is captured for a few sizes. On a CPU the sizes follow the samples.
        self.fused = may_fuse(kernels, model.device, model.dtype)
        self.static = self.fused or model.device.type == "cuda"
        self.room = PREFILL_CUDA if self.static else PREFILL
        # If static, kept between calls: graphs use their addresses. `captured`: the rows, prompts and end tokens.
        self.slots = self.run = self.captured = None

    def check(self, prompts: list[list[int]], new: int) -> None:
        """ValueError for an empty prompt, and for one that leaves no room for `new` tokens."""
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty")
            if len(prompt) + new > self.model.config.context:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens and {new} more are asked for, but the model's "
                                 f"context is {self.model.config.context}; shorten the question or lower "
                                 "--max-new-tokens")  # fmt: skip

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], samples: int = 1, max_new_tokens: int = 64,
                 temperature: float | list[float] = 1.0, seed: int = 0, step: int = 0,
                 keys: list[int] | None = None) -> list[list[Completion]]:  # fmt: skip
        """Per prompt (token ids), `samples` completions of at most `max_new_tokens` tokens.

        temperature: one for all, or one per sample; 0 takes the most probable token. keys: one integer below 2^63 per
        prompt that identifies its question in the hash; default: its index. ValueError for wrong arguments
        (before anything is generated), and as soon as logits are not finite.
        """
        if not prompts or samples < 1 or max_new_tokens < 1:
            raise ValueError("there must be a prompt, and samples and max_new_tokens must be at least 1")
        temperatures = temperature if isinstance(temperature, list) else [float(temperature)] * samples
        if len(temperatures) != samples or not all(t == 0 or COLDEST <= t < math.inf for t in temperatures):
            raise ValueError(f"temperature must be one number or one per sample, 0 or >= {COLDEST}: {temperature}")
        self.check(prompts, max_new_tokens)
        if self.fused:
            lora.stack(self.model)
        slots = self.allocate(max(map(len, prompts)), len(prompts), samples, max_new_tokens)
        slots.reset(seed, step, max_new_tokens)
        work = Schedule(self, slots, prompts, keys or range(len(prompts)), temperatures, max_new_tokens)
        while True:
            work.fill_free_slots()
            work.begin_samples()
            work.compact()
            if work.busy:
                work.decode()
                work.collect()
            elif not work.todo:
                return work.results

    def allocate(self, longest: int, prompts: int, samples: int, new: int) -> Slots:
        """Slots for these prompts and samples: on CUDA those of the last call, if they are large enough."""
        model, device, kept = self.model, self.model.device, self.slots
        calls, how = [(prompts, samples, longest, new)], (self.static, self.lanes)
        if kept and self.captured[2] == self.end_of_turn:
            rows, most, _ = self.captured
            both = max(prompts, most), samples, max(longest, kept.T), max(new, kept.N)
            _, wanted = sized(model.config, model.dtype, rows, 0, *both, *how)
            # Larger slots cost no time, because `Schedule.bucket` goes by the call.
            if wanted.sizes == kept.sizes:
                return kept
            if wanted.G == kept.G:  # large enough for both, or alternating calls would rebuild them each time
                calls.insert(0, both)
        self.slots = self.run = kept = None  # frees their memory first
        free = free_bytes(device)
        for prompts, *call in calls:
            rows, least = sized(model.config, model.dtype, self.rows, free, prompts, *call, *how)
            if (needed := least.kv_bytes()) <= free:
                break
        else:
            raise ValueError(f"the KV cache of {least.P} prompts x {least.G} samples takes {needed / 1e9:.1f} GB, and "
                             f"{free / 1e9:.1f} GB are free, enough for {free * least.P // needed} prompts at a time; "
                             "lower train.py's --rows, --samples or --max-new-tokens")  # fmt: skip
        slots = Slots(model.config, *least.sizes, device, model.dtype)
        step, end = fused_step if self.fused else decode_step, send(self.end_of_turn, device)
        step = functools.partial(step, model, slots, end)
        self.run = Graphs(step, self.buckets(slots)) if self.static else step
        if self.static:
            self.slots, self.captured = slots, (rows, prompts, list(self.end_of_turn))
        return slots

    def buckets(self, s: Slots) -> list[tuple[int, int, int, int]]:
        """The (P, R, T, N) captured on CUDA: P and N are halved repeatedly, R is all lanes of the P slots."""
        # Idle lanes are included: a step spends most of its time reading the weights.
        P = [-(-s.P // 2**i) for i in range(s.P.bit_length())]
        # The fused step reads each row's length, so it needs no smaller N.
        N = [-(-s.N // 2**i) for i in range(s.N.bit_length()) if s.N >= 32 * 2**i and not self.fused] or [s.N]
        return [(p, p * s.G, s.T, n) for p in P for n in N]

    @torch.inference_mode()
    def option_logprobs(self, prompts: list[list[int]], options: list[int], together: int = 1) -> Tensor:
        """Log-softmax over the given option tokens (P, len(options)), fp32 on the CPU, from one prefill of each prompt.

        Every `together` prompts in a row are scored in one pass, so they are rounded alike. Their common beginning is
        computed once.
        """
        self.check(prompts, 1)
        results = torch.empty(len(prompts), len(options))
        runs = [range(len(prompts))[i : i + together] for i in range(0, len(prompts), together)]
        for some in passes(runs, lambda run: sum(len(prompts[i]) for i in run), self.room):
            scores = option_scores(self.model, [[prompts[i] for i in run] for run in some], options)
            results[[i for run in some for i in run]] = scores.cpu()
        return results


@dataclass
class Sample:
    """A sample under way, as the host knows it."""

    prompt: int  # index in the list given to `generate`
    number: int  # which of the prompt's samples
    token: int  # its first
    logprob: float
    count: int = 1  # tokens drawn so far


class Schedule:
    """One call of `Sampler.generate`: which samples are where. `generate` calls its methods in the order below."""

    def __init__(self, sampler: Sampler, slots: Slots, prompts: list, keys: Sequence, temperatures: list, limit: int):
        self.sampler, self.slots, self.prompts, self.keys, self.limit = sampler, slots, prompts, keys, limit
        numbers = [temperatures[:j].count(t) for j, t in enumerate(temperatures)]  # each among those of its temperature
        self.temperatures, self.hashed = (send(x, slots.length.device) for x in (temperatures, numbers))  # (samples,)
        self.results: list[list] = [[None] * len(temperatures) for _ in prompts]
        self.todo = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts; the longest is taken first
        self.waiting: dict[int, list[Sample]] = {}  # {slot in use: its samples that have not begun, the next one last}
        self.busy: dict[int, Sample] = {}  # {lane in use: its sample}

    def fill_free_slots(self) -> None:
        """Puts prompts into free slots and prefills them."""
        free = [p for p in range(self.slots.P) if p not in self.waiting]
        placed = [(p, self.todo.pop()) for p in free[: len(self.todo)]]
        for some in passes(placed, lambda pair: len(self.prompts[pair[1]]), self.sampler.room):
            self.prefill(some)

    def prefill(self, some: list[tuple[int, int]]) -> None:
        """Runs the prompts of (slot, prompt) pairs in one pass, and draws the first token of all their samples."""
        s, model, samples = self.slots, self.sampler.model, len(self.temperatures)
        tokens, positions, parts, last = end_to_end([[self.prompts[i]] for _, i in some], model.device)
        slots, keys = send([(p, self.keys[i]) for p, i in some], model.device).T
        s.length[slots] = positions[0, last] + 1
        slot = slots.repeat_interleave(s.length[slots], output_size=tokens.shape[1])  # of each token
        over = over_parts(parts, model.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (1, H, T, D), (1, K, T, D)
            for cache, new in zip(s.prefix[:, layer], (k, v), strict=True):
                cache[slot, :, positions[0]] = new[0].transpose(0, 1)
            return over(layer, q, k, v)

        logits, drawn = model.head(model.hidden(tokens, positions, attend=attend)[0, last]), []  # (P, V)
        for row in torch.arange(len(some) * samples, device=model.device).split(FIRST_ROWS):
            prompt, number = row // samples, row % samples
            u = uniforms(s.seed, s.step, keys[prompt], self.hashed[number], 0)
            drawn.append(sample_tokens(logits[prompt], self.temperatures[number], u))
        drawn = (torch.cat(x).view(-1, samples) for x in zip(*drawn, strict=True))
        finite, *drawn = to_host(logits.isfinite().all(), *drawn)
        if not finite:
            raise self.not_finite(0)
        for (p, i), *first in zip(some, *drawn, strict=True):
            begun = [Sample(i, j, *pair) for j, pair in enumerate(zip(*first, strict=True))]
            # A sample that ends with its first token never takes a lane.
            self.waiting[p] = [x for x in reversed(begun) if not self.finish(x, [x.token], [x.logprob])]

    def begin_samples(self) -> None:
        """Puts waiting samples into idle lanes of their prompt's slot. A slot without samples becomes free."""
        begun, G = {}, self.slots.G
        for p, samples in list(self.waiting.items()):
            lanes = range(p * G, p * G + G)
            begun |= {lane: samples.pop() for lane in lanes if samples and lane not in self.busy}
            self.busy |= begun
            if not any(lane in self.busy for lane in lanes):
                del self.waiting[p]
        if begun:
            self.slots.begin(begun, self.keys, self.temperatures, self.hashed)

    def compact(self) -> None:
        """Once all prompts have a slot, moves the last used slots into free ones, so that a step covers fewer slots."""
        G = self.slots.G
        while not self.todo and len(self.waiting) < (used := max(self.waiting, default=-1) + 1):
            source, target = used - 1, min(set(range(used)) - self.waiting.keys())
            self.slots.move(source, target)
            self.waiting[target] = self.waiting.pop(source)
            moved = [lane for lane in self.busy if lane // G == source]
            self.busy |= {lane + (target - source) * G: self.busy.pop(lane) for lane in moved}

    def decode(self) -> None:
        """Draws the next token of every busy lane; on CUDA, the next few."""
        steps = LOOK_EVERY if self.sampler.static else 1
        bucket = self.bucket(steps)
        for _ in range(steps):
            self.sampler.run(*bucket)
        for sample in self.busy.values():
            sample.count += steps

    def bucket(self, steps: int) -> tuple[int, int, int, int]:
        """The smallest (P, R, T, N) for `steps` steps of the busy lanes. On a CPU it also puts these lanes first."""
        s, busy = self.slots, self.busy
        P = max(busy) // s.G + 1
        N = min(self.limit, max(sample.count for sample in busy.values()) + steps - 1)
        if self.sampler.static:
            return min(b for b in self.sampler.buckets(s) if b[0] >= P and b[3] >= N)
        R = min(-(-len(busy) // 4) * 4, P * s.G)  # a multiple of 4: products are slower for some numbers of rows
        T = max(len(self.prompts[sample.prompt]) for sample in busy.values())
        idle = [lane for lane in range(P * s.G) if lane not in busy]
        s.lanes[:R] = torch.tensor([*busy, *idle[: R - len(busy)]])
        return P, R, min(-(-T // 16) * 16, s.T), min(-(-N // 8) * 8, s.N)

    def collect(self) -> None:
        """Looks at the device: takes the samples that ended out of their lanes."""
        s = self.slots
        bad, finished, count = to_host(s.bad, s.finished, s.count)
        if bad < NEVER:
            raise self.not_finite(bad)
        if ended := [lane for lane in self.busy if finished[lane]]:
            lanes = send(ended, s.count.device)
            for lane, tokens, logprobs in zip(ended, *to_host(s.tokens[lanes], s.logprobs[lanes]), strict=True):
                sample, n = self.busy.pop(lane), count[lane]
                self.finish(sample, tokens[:n], [sample.logprob, *logprobs[1:n]])

    def finish(self, sample: Sample, tokens: list[int], logprobs: list[float]) -> bool:
        """Records the sample if it is complete; returns whether it is."""
        ended = tokens[-1] in self.sampler.end_of_turn
        done = ended or len(tokens) == self.limit
        if done:
            self.results[sample.prompt][sample.number] = Completion(tokens, logprobs, ended)
        return done

    def not_finite(self, n: int) -> ValueError:
        return ValueError(f"the logits are not finite at new token {n + 1} of sampling step {int(self.slots.step)}; "
                          "the weights are broken, perhaps by too high a learning rate")  # fmt: skip
