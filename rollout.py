"""The sampler: from prompts to completions with their logprobs, and from prompts to option probabilities.

Three ideas make it fast, and none changes a sample:

    shared prompts    a prompt is prefilled once; its keys and values are stored once, and all its samples
                      attend to them: one product against the prompt, one against a sample's own tokens,
                      one softmax over both
    no idle rows      samples live in lanes, G lanes to a slot, a slot to a prompt. A lane whose sample ended
                      takes the prompt's next sample, a slot without samples the next prompt; what then is
                      left idle is dropped from the products (buckets of rows and of cache length)
    a static step     `decode_step` reads and writes tensors at fixed addresses and asks the host nothing, so
                      that on a GPU it is captured once per bucket as a CUDA graph, and replayed

A token is drawn by the inverse CDF of softmax(logits / T) in fp32 at the uniform

    u = hash(seed, step, question key, sample, position) / 2^24,

so there is no generator and no state: a sample depends on nothing but its own five numbers (and rounding),
whatever its neighbours, lane, bucket, order of refill or number of ranks. The sampler knows no rewards.

Axes: P slots (prompts), G lanes per slot (group), R rows decoded together, T prompt tokens, N new tokens,
H heads, K kv heads, r = H / K, D head dim, V vocabulary.

    python rollout.py DIR "a question" …     prints one answer to each
"""

import itertools
import math
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import over_parts
from model import Config, Tokenizer, Transformer, load

PREFILL = 1024  # tokens laid end to end in one forward pass: enough for fast products, little enough for caches
PREFILL_CUDA = 4096  # there the host must keep ahead of the device


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    tokens: list[int]  # the end-of-turn token included, when there is one
    logprobs: list[float]  # of each token under the distribution it was drawn from (at T = 0: under T = 1)
    ended: bool  # it ended its turn, rather than being cut at max_new_tokens


# ---- one token -----------------------------------------------------------------------------------------------


def mix(x: Tensor) -> Tensor:
    """Steele & Vigna's splitmix64 finaliser on int64 (wrapping; the shifts are made logical by a mask)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniforms(seed, step, question: Tensor, sample: Tensor, position) -> Tensor:
    """Uniforms in [0, 1), (R,) fp32, hashed from five integers; each may be a number or an int64 tensor."""
    h = torch.zeros_like(question)
    for part in (seed, step, question, sample, position):
        h = mix((h ^ part) - 0x61C8864680B583EB)
    return ((h >> 40) & 0xFFFFFF).float() * 2.0**-24  # 24 bits: exact in fp32


def sample_tokens(logits: Tensor, temperature: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (R,) drawn from softmax(logits (R, V) / T) at uniforms u (R,), and their logprobs (R,) fp32.

    temperature (R,) fp32; rows at 0 take the argmax, and their logprobs are those at T = 1. Overwrites fp32 logits:
    over a whole vocabulary, each new tensor costs as much as the arithmetic.
    """
    greedy = temperature == 0
    logits = logits.float().div_(torch.where(greedy, 1.0, temperature)[:, None])
    highest, argmax = logits.max(-1)
    weights = logits.sub_(highest[:, None]).exp()
    total = weights.sum(-1).log()  # not the CDF's end: of the two, this is the more exact
    cdf = weights.cumsum_(-1)
    # The first index whose CDF exceeds u · total: never a token of probability 0. Past the end only for NaN.
    drawn = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    tokens = torch.where(greedy, argmax, drawn)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - total


# ---- many texts in one pass ----------------------------------------------------------------------------------


def option_scores(model: Transformer, runs: list[list[list[int]]], options: list[int]) -> Tensor:
    """Log-softmax over the option tokens after each prompt of all runs (P, len(options)), fp32, in one pass.

    What the prompts of a run have in common from their beginning is computed once.
    """
    tokens, positions, parts, last = [], [], [], []
    for run in runs:
        # Every prompt keeps a token of its own, after which it is scored.
        same = [len(set(column)) == 1 for column in zip(*(prompt[:-1] for prompt in run), strict=False)]
        shared = [*same, False].index(False) if len(run) > 1 else 0
        first, after = len(tokens), len(tokens) + shared
        parts += [(first, after, 0, 0, [shared])] if shared else []
        tokens += run[0][:shared]
        positions += range(shared)
        for prompt in run:
            own = len(prompt) - shared
            parts.append((len(tokens), len(tokens) + own, first, after, [own]))
            tokens += prompt[shared:]
            positions += range(shared, len(prompt))
            last.append(len(tokens) - 1)
    tokens, positions, last = (torch.tensor(x, device=model.device) for x in (tokens, positions, last))
    states = model.hidden(tokens[None], positions[None], attend=over_parts(parts, model.device))[0, last]  # (P, E)
    weight = model.embed_tokens.weight if model.config.tied else model.lm_head.weight
    weight = weight[torch.tensor(options, device=model.device)]  # (options, E): the rest is not needed
    # fp32 here: letters lie closer together than bf16 can tell, and a rounded pick is a wrong label.
    return (states.float() @ weight.float().T).log_softmax(-1)


# ---- the decode step -----------------------------------------------------------------------------------------


class Slots:
    """P prompts with G lanes each: all that a decode step reads and writes, at fixed addresses.

    Keys and values of a prompt are stored once (`prefix`), those of a lane's own new tokens beside it (`own`);
    [0] holds keys and [1] values. Lane l belongs to slot l // G.
    """

    def __init__(self, config: Config, P: int, G: int, T: int, N: int, device=None, dtype=None, ordered=False):
        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.P, self.G, self.T, self.N = P, G, T, N
        self.prefix = zeros(2, config.layers, P, config.kv_heads, T, config.head_dim, dtype=dtype)
        self.own = zeros(2, config.layers, P, config.kv_heads, G, N, config.head_dim, dtype=dtype)
        self.length = zeros(P)  # tokens of the prompt
        self.tokens = zeros(P * G, N + 1)  # drawn so far; column N takes what finished lanes still write
        self.logprobs = zeros(P * G, N + 1, dtype=torch.float32)
        self.count = zeros(P * G) + 1  # tokens drawn so far; the last of them is fed next
        self.finished = zeros(P * G, dtype=torch.bool) | True
        self.question, self.sample = zeros(P * G), zeros(P * G)
        self.temperature = zeros(P * G, dtype=torch.float32)
        self.lanes = torch.arange(P * G, device=device)  # the rows of the step, the first R of them
        self.ordered = ordered  # they always are, and R is P · G
        self.seed, self.step = zeros(), zeros()
        self.limit = zeros() + N  # tokens per sample
        self.bad = zeros() + 2**62  # the first token whose logits were not finite

    def kv_bytes(self) -> int:
        return self.prefix.nbytes + self.own.nbytes

    def reset(self, seed: int, step: int, limit: int) -> None:
        """Empties all lanes for another call of `generate`."""
        self.seed.fill_(seed), self.step.fill_(step), self.limit.fill_(limit)
        self.bad.fill_(2**62), self.finished.fill_(True)

    def begin(self, begun: dict[int, "Sample"], keys: list[int], heat: Tensor) -> None:
        """Puts samples, whose first token is known, into lanes. heat (samples,): each sample's temperature."""
        device, samples = self.length.device, begun.values()
        lane, number = (torch.tensor(x, device=device) for x in (list(begun), [x.number for x in samples]))
        self.tokens[lane, 0] = torch.tensor([x.token for x in samples], device=device)
        self.logprobs[lane, 0] = torch.tensor([x.logprob for x in samples], device=device)
        self.question[lane] = torch.tensor([keys[x.prompt] for x in samples], device=device)
        self.sample[lane], self.temperature[lane] = number, heat[number]
        self.count[lane], self.finished[lane] = 1, False

    def move(self, source: int, target: int) -> None:
        """Slot `source` now lives in slot `target`."""
        G = self.G
        self.prefix[:, :, target], self.own[:, :, target] = self.prefix[:, :, source], self.own[:, :, source]
        self.length[target] = self.length[source]
        for x in (self.tokens, self.logprobs, self.count, self.finished, self.question, self.sample, self.temperature):
            x[target * G : target * G + G] = x[source * G : source * G + G]
        self.finished[source * G : source * G + G] = True


def decode_step(model: Transformer, s: Slots, end: Tensor, P: int, R: int, T: int, N: int) -> None:
    """Draws the next token of the lanes s.lanes[:R], all in the first P slots. Changes `s` in place, nothing else.

    end (n,): tokens that end a turn. Of the cache, T prompt and N own positions are read: no prompt and no
    sample in these slots may be longer. Sizes are the only numbers; all that changes from step to step is in `s`.
    """
    lanes = s.lanes[:R]
    slot, lane, count = lanes // s.G, lanes % s.G, s.count[lanes]  # (R,)
    see = torch.arange(T, device=lanes.device) < s.length[:P, None]  # (P, T)
    see_own = torch.arange(N, device=lanes.device) < s.count.view(s.P, s.G, 1)[:P]  # (P, G, N)
    see = torch.cat((see[:, None].expand(P, s.G, T), see_own), -1)[:, None, :, None]  # (P, 1, G, 1, T + N)
    hide = torch.where(see, 0.0, -math.inf)  # added to the scores: on a CPU faster than filling by a mask

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (R, H, 1, D), (R, K, 1, D)
        (R, H, _, D), K = q.shape, k.shape[1]
        s.own[0, layer][slot, :, lane, count - 1] = k[:, :, 0]
        s.own[1, layer][slot, :, lane, count - 1] = v[:, :, 0]
        # Rows may come in any order; on the grid of slots and lanes, those of a prompt lie side by side.
        q = (q * D**-0.5).view(R, K, H // K, D)
        if s.ordered:
            grid = q.view(P, s.G, K, H // K, D).transpose(1, 2).contiguous()
        else:
            grid = q.new_zeros(P, K, s.G, H // K, D)
            grid[slot, :, lane] = q
        scores = grid.view(P, K, -1, D) @ s.prefix[0, layer, :P, :, :T].mT  # (P, K, G · r, T)
        own = grid @ s.own[0, layer, :P, :, :, :N].mT  # (P, K, G, r, N)
        scores = torch.cat((scores.view(*own.shape[:-1], T), own), -1) + hide  # fp32
        weights = scores.softmax(-1).to(q.dtype)
        out = weights[..., :T].reshape(P, K, -1, T) @ s.prefix[1, layer, :P, :, :T]  # (P, K, G · r, D)
        out = out.view(grid.shape) + weights[..., T:] @ s.own[1, layer, :P, :, :, :N]
        return (out.transpose(1, 2) if s.ordered else out[slot, :, lane]).reshape(R, H, 1, D)

    tokens = s.tokens[lanes, count - 1]
    states = model.hidden(tokens[:, None], (s.length[slot] + count - 1)[:, None], attend=attend)
    logits = model.head(states[:, 0])  # (R, V)
    live = ~s.finished[lanes]
    broken = live & ~logits.sum(-1).isfinite()  # one infinity or NaN is enough to spoil the sum
    u = uniforms(s.seed, s.step, s.question[lanes], s.sample[lanes], count)
    drawn, logprobs = sample_tokens(logits, s.temperature[lanes], u)
    s.bad.copy_(torch.minimum(s.bad, torch.where(broken, count, 2**62).min()))
    place = torch.where(live, count, s.N)
    s.tokens[lanes, place] = drawn
    s.logprobs[lanes, place] = logprobs
    s.count[lanes] = count + live
    # By length and by what was drawn, never by the value of padding.
    ends = (drawn[:, None] == end).any(-1) | (count + 1 >= s.limit)
    s.finished[lanes] = ~live | ends


class Graphs:
    """`decode_step` as CUDA graphs, one per bucket; where they cannot be had, the same step runs eagerly.

    A graph replays kernels at the addresses they were captured with. So all of `Slots` and the weights are
    changed in place only, and whoever needs other sizes makes a new one.
    """

    def __init__(self, model: Transformer, slots: Slots, end: Tensor, buckets: list[tuple[int, int, int, int]]):
        self.run, self.graphs = lambda bucket: decode_step(model, slots, end, *bucket), {}
        try:
            pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            for bucket in sorted(buckets, reverse=True):  # the largest first: the others fit into its memory
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):  # warm-up; all lanes are finished, so it writes nothing that counts
                    self.run(bucket)
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self.run(bucket)
                self.graphs[bucket] = graph
        except RuntimeError as error:
            print(f"no CUDA graphs ({str(error).splitlines()[0]}); decoding eagerly", file=sys.stderr, flush=True)
            torch.cuda.synchronize()

    def __call__(self, bucket: tuple[int, int, int, int]) -> None:
        self.graphs[bucket].replay() if bucket in self.graphs else self.run(bucket)


# ---- the sampler ---------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """A sample under way, as the host knows it."""

    prompt: int  # index in the list given to `generate`
    number: int  # which of the prompt's samples
    count: int  # tokens drawn, at least
    token: int  # its first
    logprob: float


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated, in bytes."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cache_length(longest: int, static: bool) -> int:
    """Positions for prompts up to so long. On CUDA few sizes, for a prompt that does not fit means other graphs."""
    step = 64 if static else 16
    return -(-longest // step) * step


class Sampler:
    """Generates from `model`, whose weights may change between calls, in place.

    end_of_turn: token ids that end an answer, the model's own by default. rows: how many are decoded together.
    lanes: how many samples of one prompt are decoded at once.
    """

    def __init__(self, model: Transformer, end_of_turn: list[int] | None = None, rows: int = 128, lanes: int = 8):
        self.model, self.rows, self.lanes = model, rows, lanes
        self.end_of_turn = sorted(model.config.end_of_turn if end_of_turn is None else end_of_turn)
        if not self.end_of_turn:
            raise ValueError("the model names no eos_token_id; add it to generation_config.json")
        V = model.config.vocab_size
        if outside := [token for token in self.end_of_turn if not 0 <= token < V]:
            raise ValueError(f"end-of-turn token {outside[0]} is not in the vocabulary of {V}; mend eos_token_id")
        # On CUDA the step is captured, for few sizes, and the host looks at its results now and then. On a CPU
        # looking costs nothing, and the sizes may follow the samples closely.
        self.static = model.device.type == "cuda"
        self.room = PREFILL_CUDA if self.static else PREFILL
        self.slots = self.run = None  # kept between calls where static: graphs know them by address

    def check(self, prompts: list[list[int]], new: int) -> None:
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty")
            if len(prompt) + new > self.model.config.context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens and {new} more are asked for, but the model's context "
                    f"is {self.model.config.context}; shorten the question or lower --max-new-tokens"
                )

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        samples: int = 1,
        max_new_tokens: int = 64,
        temperature: float | list[float] = 1.0,
        seed: int = 0,
        step: int = 0,
        keys: list[int] | None = None,
    ) -> list[list[Completion]]:
        """Per prompt (token ids), `samples` completions of at most `max_new_tokens` tokens.

        keys: an integer (below 2^63) that names each prompt's question in the hash, its index by default.
        temperature: one for all, or one per sample; 0 takes the most probable token. ValueError, before
        anything is generated, for what cannot be, and as soon as logits are not finite.
        """
        if not prompts:
            raise ValueError("no prompts to generate from")
        if samples < 1 or max_new_tokens < 1:
            raise ValueError("samples and max_new_tokens must be at least 1")
        temperatures = temperature if isinstance(temperature, list) else [float(temperature)] * samples
        if len(temperatures) != samples or not all(0 <= t < math.inf for t in temperatures):
            raise ValueError(f"temperature must be one number or one per sample, finite and not below 0: {temperature}")
        self.check(prompts, max_new_tokens)
        s = self.allocate(max(map(len, prompts)), len(prompts), samples, max_new_tokens)
        s.reset(seed, step, max_new_tokens)
        keys = list(range(len(prompts))) if keys is None else keys
        heat = torch.tensor(temperatures, device=s.length.device)
        every = 8 if self.static else 1  # steps between two looks
        results: list[list] = [[None] * samples for _ in prompts]
        todo = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # the longest is taken first
        waiting: dict[int, list] = {}  # of each slot in use, the samples not yet begun
        busy: dict[int, Sample] = {}  # of each lane in use, its sample
        while True:
            # Prompts into free slots, samples into idle lanes. What its first token ends never takes a lane.
            free = [p for p in range(s.P) if p not in waiting][: len(todo)]
            placed = {p: todo.pop() for p in free}
            for p, firsts in self.prefill(s, placed, prompts, keys, heat).items():
                waiting[p] = []
                for j, (token, logprob) in reversed(list(enumerate(firsts))):
                    sample = Sample(placed[p], j, 1, token, logprob)
                    if token in self.end_of_turn or max_new_tokens == 1:
                        results[placed[p]][j] = Completion([token], [logprob], token in self.end_of_turn)
                    else:
                        waiting[p].append(sample)
            begun = {}
            for p in list(waiting):
                lanes = range(p * s.G, p * s.G + s.G)
                begun |= {lane: waiting[p].pop() for lane in lanes if waiting[p] and lane not in busy}
                busy |= begun
                if not any(lane in busy for lane in lanes):
                    del waiting[p]
            if begun:
                s.begin(begun, keys, heat)
            # With nothing left to come, the slots in use move together, so that the step can leave out the rest.
            while not todo and waiting and (p := next(p for p in range(s.P + 1) if p not in waiting)) < max(waiting):
                q = max(waiting)
                s.move(q, p)
                waiting[p] = waiting.pop(q)
                busy |= {lane + (p - q) * s.G: busy.pop(lane) for lane in list(busy) if lane // s.G == q}
            if not busy and not todo:
                return results
            if not busy:
                continue
            # Decode; then see who has ended.
            bucket = self.bucket(s, busy, prompts, every)
            for _ in range(every):
                self.run(bucket)
            if (bad := int(s.bad)) < 2**62:
                raise ValueError(f"the logits are not finite at new token {bad + 1} of sampling step {step}; "
                                 "the weights are broken, perhaps by too high a learning rate")  # fmt: skip
            ended = s.finished.tolist()
            for lane, sample in list(busy.items()):
                sample.count += every
                if ended[lane]:
                    n = int(s.count[lane])
                    tokens, logprobs = s.tokens[lane, :n].tolist(), s.logprobs[lane, :n].tolist()
                    results[sample.prompt][sample.number] = Completion(tokens, logprobs, tokens[-1] in self.end_of_turn)
                    del busy[lane]

    def allocate(self, longest: int, prompts: int, samples: int, new: int) -> Slots:
        """Slots for these prompts and samples: those of the last call where they fit, on CUDA; else new ones."""
        model, device = self.model, self.model.device
        G = min(samples, self.lanes, self.rows)
        P = min(prompts, self.rows // G)
        if self.slots and (self.slots.P, self.slots.G, self.slots.N) == (P, G, new) and self.slots.T >= longest:
            return self.slots
        self.slots = self.run = None  # frees their memory first
        sizes = (G, cache_length(longest, self.static), new)
        needed, free = Slots(model.config, P, *sizes, "meta", model.dtype).kv_bytes(), free_bytes(device)
        if needed > free:
            raise ValueError(f"the KV cache of {P} prompts x {G} samples takes {needed / 1e9:.1f} GB, and "
                             f"{free / 1e9:.1f} GB are free, enough for {free * P // needed} prompts at a time; "
                             "lower the sampler's rows, --samples or --max-new-tokens")  # fmt: skip
        slots = Slots(model.config, P, *sizes, device, model.dtype, ordered=self.static)
        end = torch.tensor(self.end_of_turn, device=device)
        if not self.static:
            self.run = lambda bucket: decode_step(model, slots, end, *bucket)
            return slots
        self.slots, self.run = slots, Graphs(model, slots, end, self.buckets(slots))
        return slots

    def buckets(self, s: Slots) -> list[tuple[int, int, int, int]]:
        """On CUDA: slots and new tokens halve; all lanes of the slots are rows, idle ones too, for there the
        products wait for the weights and not for the rows."""
        P = [-(-s.P // 2**i) for i in range(s.P.bit_length()) if s.P >= 2**i]
        N = [-(-s.N // 2**i) for i in range(s.N.bit_length()) if s.N >= 32 * 2**i] or [s.N]
        return [(p, p * s.G, s.T, n) for p in P for n in N]

    def bucket(self, s: Slots, busy: dict, prompts: list[list[int]], every: int) -> tuple[int, int, int, int]:
        """The smallest sizes of `decode_step` that hold the busy lanes for the next steps; orders the rows."""
        P = max(busy) // s.G + 1
        N = min(s.N, max(sample.count for sample in busy.values()) + every - 1)
        if self.static:
            return min(b for b in self.buckets(s) if b[0] >= P and b[3] >= N)
        R = min(-(-len(busy) // 4) * 4, P * s.G)  # few products are as fast for any number of rows
        T = max(len(prompts[sample.prompt]) for sample in busy.values())
        idle = [lane for lane in range(P * s.G) if lane not in busy]
        s.lanes[:R] = torch.tensor([*busy, *idle[: R - len(busy)]])
        return P, R, min(-(-T // 16) * 16, s.T), min(-(-N // 8) * 8, s.N)

    def prefill(self, s: Slots, placed: dict[int, int], prompts, keys, heat: Tensor) -> dict[int, list]:
        """Runs prompts {slot: prompt index} once; {slot: (first token, its logprob) of every sample}."""
        model, device, firsts, todo = self.model, self.model.device, {}, list(placed.items())
        while todo:
            some = [todo.pop()]
            while todo and sum(len(prompts[i]) for _, i in some) + len(prompts[todo[-1][1]]) <= self.room:
                some.append(todo.pop())
            lengths = [len(prompts[i]) for _, i in some]
            ends = list(itertools.accumulate(lengths))
            parts = [(end - n, end, 0, 0, [n]) for end, n in zip(ends, lengths, strict=True)]
            look = over_parts(parts, device)

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                for (a, b, *_), (p, _) in zip(parts, some, strict=True):  # noqa: B023
                    s.prefix[0, layer, p, :, : b - a], s.prefix[1, layer, p, :, : b - a] = k[0, :, a:b], v[0, :, a:b]
                return look(layer, q, k, v)  # noqa: B023

            tokens = torch.tensor([[token for _, i in some for token in prompts[i]]], device=device)
            positions = torch.tensor([[t for _, i in some for t in range(len(prompts[i]))]], device=device)
            states = model.hidden(tokens, positions, attend=attend)[0, torch.tensor(ends, device=device) - 1]
            number = torch.arange(len(heat), device=device)
            for (p, i), logits in zip(some, model.head(states), strict=True):
                if not logits.isfinite().all():
                    raise ValueError(f"the logits are not finite at new token 1 of sampling step {int(s.step)}; "
                                     "the weights are broken, perhaps by too high a learning rate")  # fmt: skip
                u = uniforms(s.seed, s.step, torch.full_like(number, keys[i]), number, 0)
                token, logprob = sample_tokens(logits.repeat(len(heat), 1), heat, u)
                firsts[p] = list(zip(token.tolist(), logprob.tolist(), strict=True))
                s.length[p] = len(prompts[i])
        return firsts

    @torch.inference_mode()
    def option_logprobs(self, prompts: list[list[int]], options: list[int], together: int = 1) -> Tensor:
        """Log-softmax over the given option tokens (P, len(options)), fp32 on the CPU, in one prefill each.

        Every run of `together` prompts in the list is scored in one pass, so with the same numerics, and what
        they have in common from their beginning is computed once.
        """
        self.check(prompts, 1)
        results = torch.empty(len(prompts), len(options))
        runs = [list(range(i, min(i + together, len(prompts)))) for i in range(0, len(prompts), together)]
        while runs:
            some = [runs.pop()]
            while runs and sum(len(prompts[i]) for run in [*some, runs[-1]] for i in run) <= self.room:
                some.append(runs.pop())
            scores = option_scores(self.model, [[prompts[i] for i in run] for run in some], options)
            results[[i for run in some for i in run]] = scores.cpu()
        return results


def main(argv: list[str]) -> int:
    try:
        if len(argv) < 2:
            raise ValueError('usage: python rollout.py MODEL_DIR "a question" ...')
        tokenizer, sampler = Tokenizer(argv[0]), Sampler(load(argv[0]))
        prompts = [tokenizer.encode(tokenizer.render([{"role": "user", "content": q}])) for q in argv[1:]]
        answers = sampler.generate(prompts, max_new_tokens=64, temperature=0.0)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for question, (answer,) in zip(argv[1:], answers, strict=True):
        print(f"> {question}\n{tokenizer.decode(answer.tokens)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
