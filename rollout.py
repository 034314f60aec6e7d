"""The sampler: from prompts to completions with their logprobs, and from prompts to option probabilities.

Each prompt is prefilled once, its keys and values are copied to one row per sample, and all rows decode
together over a static KV cache (`model.KVCache`), each at its own position. A token is drawn by the
inverse CDF of softmax(logits / T) in fp32 at the uniform

    u = hash(seed, step, question key, sample, position) / 2^24,

so there is no generator and no state: a row depends on nothing but its own five numbers (and rounding),
whatever its neighbours, the batch or the number of ranks. The sampler knows no rewards and no tasks.

Axes: P prompts, G samples per prompt (group), R = P · G rows, T prompt tokens, N new tokens, V vocabulary.

    python rollout.py DIR "a question" …     prints one answer to each
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from model import KVCache, Tokenizer, Transformer, load


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    tokens: list[int]  # the end-of-turn token included, when there is one
    logprobs: list[float]  # of each token under the distribution it was drawn from (at T = 0: under T = 1)
    ended: bool  # it ended its turn, rather than being cut at max_new_tokens


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

    temperature (R,) fp32; rows at 0 take the argmax, and their logprobs are those at T = 1.
    """
    greedy = temperature == 0
    logprobs = (logits.float() / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    cdf = logprobs.exp().cumsum(-1)
    # The first index whose CDF exceeds u · total: never a token of probability 0, never past the end.
    drawn = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    tokens = torch.where(greedy, logprobs.argmax(-1), drawn)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def padded(prompts: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Prompts of unequal length as one (P, T) int64, padded on the right, and their lengths (P,)."""
    lengths = torch.tensor([len(p) for p in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    return tokens.to(device), lengths.to(device)


class Sampler:
    """Generates from `model`, whose weights may change between calls.

    end_of_turn: token ids that end an answer, the model's own by default. rows: how many are decoded together.
    """

    def __init__(self, model: Transformer, end_of_turn: list[int] | None = None, rows: int = 128):
        self.model, self.rows = model, rows
        self.end_of_turn = sorted(model.config.end_of_turn if end_of_turn is None else end_of_turn)
        if not self.end_of_turn:
            raise ValueError("the model names no eos_token_id; add it to generation_config.json")

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
        temperature: one for all, or one per sample; 0 takes the most probable token. ValueError for a prompt
        that does not fit the context.
        """
        if samples < 1 or max_new_tokens < 1:
            raise ValueError("samples and max_new_tokens must be at least 1")
        temperatures = temperature if isinstance(temperature, list) else [float(temperature)] * samples
        if len(temperatures) != samples or not all(t >= 0 for t in temperatures):  # NaN, too, fails
            raise ValueError(f"temperature must be one number or one per sample, none below 0, not {temperature}")
        self.check(prompts, max_new_tokens)
        keys = list(range(len(prompts))) if keys is None else keys
        # Prompts of like length share a batch, so that little is padding; the results do not depend on it.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        chunk = max(1, self.rows // samples)
        results: list = [None] * len(prompts)
        for start in range(0, len(order), chunk):
            some = order[start : start + chunk]
            answers = self.decode(
                [prompts[i] for i in some], [keys[i] for i in some], temperatures, max_new_tokens, seed, step
            )
            for i, answer in zip(some, answers, strict=True):
                results[i] = answer
        return results

    def decode(self, prompts, keys, temperatures, N, seed, step) -> list[list[Completion]]:
        """One batch of `generate`: prefill P prompts, decode R = P · G rows."""
        model, device, G = self.model, self.model.device, len(temperatures)
        tokens, lengths = padded(prompts, device)  # (P, T), (P,)
        P, T = tokens.shape
        cache = KVCache(model.config, P, T, device, model.dtype)
        states = model.hidden(tokens, cache=cache, length=T)[torch.arange(P, device=device), lengths - 1]
        logits = model.head(states).repeat_interleave(G, 0)  # (R, V)
        rows = KVCache(model.config, P * G, T + N, device, model.dtype)
        rows.k[:, :, :, :T] = cache.k.repeat_interleave(G, 1)
        rows.v[:, :, :, :T] = cache.v.repeat_interleave(G, 1)
        positions = lengths.repeat_interleave(G)  # (R,) where the next token goes
        question = torch.tensor(keys, device=device).repeat_interleave(G)
        sample = torch.arange(G, device=device).repeat(P)
        temperature = torch.tensor(temperatures, device=device).repeat(P)
        end = torch.tensor(self.end_of_turn, device=device)
        drawn = torch.zeros(P * G, N, dtype=torch.int64, device=device)
        logprobs = torch.zeros(P * G, N, device=device)
        ended = torch.zeros(P * G, dtype=torch.bool, device=device)
        counts = torch.zeros(P * G, dtype=torch.int64, device=device)
        for t in range(N):
            token, logprobs[:, t] = sample_tokens(logits, temperature, uniforms(seed, step, question, sample, t))
            drawn[:, t] = token
            counts += ~ended  # by length, not by token value: padding may equal the end-of-turn token
            ended |= torch.isin(token, end)
            if t == N - 1 or bool(ended.all()):
                break
            logits = model(token[:, None], positions[:, None], cache=rows, length=T + t + 1)[:, 0]
            positions += 1
        drawn, logprobs, counts, ended = drawn.tolist(), logprobs.tolist(), counts.tolist(), ended.tolist()
        flat = [Completion(drawn[r][:n], logprobs[r][:n], ended[r]) for r, n in enumerate(counts)]
        return [flat[i : i + G] for i in range(0, len(flat), G)]

    @torch.inference_mode()
    def option_logprobs(self, prompts: list[list[int]], options: list[int], together: int = 1) -> Tensor:
        """Log-softmax over the given option tokens (P, len(options)), fp32 on the CPU, in one prefill each.

        Every run of `together` prompts in the list is scored in one batch, so with the same numerics.
        """
        self.check(prompts, 1)
        model = self.model
        weight = model.embed_tokens.weight if model.config.tied else model.lm_head.weight
        weight = weight[torch.tensor(options, device=model.device)]  # (options, E): the rest is not needed
        results = torch.empty(len(prompts), len(options))
        runs = [list(range(i, min(i + together, len(prompts)))) for i in range(0, len(prompts), together)]
        runs.sort(key=lambda run: max(len(prompts[i]) for i in run))  # like lengths share a batch
        chunk = max(1, self.rows // 4 // together)
        for start in range(0, len(runs), chunk):
            some = [i for run in runs[start : start + chunk] for i in run]
            tokens, lengths = padded([prompts[i] for i in some], model.device)
            states = model.hidden(tokens)[torch.arange(len(some), device=model.device), lengths - 1]  # (P, E)
            # fp32 here: letters lie closer together than bf16 can tell, and a rounded pick is a wrong label.
            results[some] = (states.float() @ weight.float().T).log_softmax(-1).cpu()
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
