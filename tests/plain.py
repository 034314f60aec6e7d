"""The plain sampler: every sample is a row with a copy of its prompt's keys and values, and all rows run to the end.

It is slow and easy to see through; rollout.py must draw the same samples. Its token from logits is a softmax written
out. Axes: P prompts, G samples of each, R = P · G rows, T prompt tokens, N new tokens, S cache positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from rollout import Completion, uniforms


class KVCache:
    """Keys and values of all layers, (layers, R, K, S, D), allocated once and written in place.

    A row's token at position t lies at index t, so rows of unequal length need no common clock. What lies past a row's
    own position is stale, and masked.
    """

    def __init__(self, model: Transformer, rows: int, length: int):
        config = model.config
        shape = (config.layers, rows, config.kv_heads, length, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=model.device, dtype=model.dtype) for _ in range(2))

    def attention(self, positions: Tensor, length: int):
        """Attention for `Transformer.hidden`: writes at `positions` (R, T), sees `length` entries up to them."""
        mask = torch.arange(length, device=positions.device) <= positions[:, None, :, None]  # (R, 1, T, S)
        rows = torch.arange(len(positions), device=positions.device)[:, None]  # (R, 1)

        def attend(layer, q, k, v):  # k, v (R, K, T, D)
            self.k[layer, rows, :, positions], self.v[layer, rows, :, positions] = k.transpose(1, 2), v.transpose(1, 2)
            k, v = self.k[layer, :, :, :length], self.v[layer, :, :, :length]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        return attend


def sample_tokens(logits: Tensor, temperature: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (R,) drawn from softmax(logits (R, V) / T) at uniforms u (R,), and their logprobs (R,) fp32.

    temperature (R,) fp32. Rows at 0 take the argmax, and their logprobs are those at T = 1.
    """
    greedy = temperature == 0
    logprobs = (logits.float() / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    cdf = logprobs.exp().cumsum(-1)
    # The first index whose CDF exceeds u · total: never a token of probability 0, never past the end.
    drawn = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    tokens = torch.where(greedy, logprobs.argmax(-1), drawn)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Sampler:
    """Generates from `model`. rows: how many samples are decoded together."""

    def __init__(self, model: Transformer, rows: int = 128):
        self.model, self.rows, self.end_of_turn = model, rows, sorted(model.config.end_of_turn)

    @torch.inference_mode()
    def generate(self, prompts, samples=1, max_new_tokens=64, temperature=1.0, seed=0, step=0) -> list:
        """As rollout.Sampler.generate; a question's key is its index."""
        temperatures = temperature if isinstance(temperature, list) else [float(temperature)] * samples
        # Prompts of like length share a batch, so that little is padding. The results do not depend on it.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        chunk, results = max(1, self.rows // samples), {}
        for some in (order[i : i + chunk] for i in range(0, len(order), chunk)):
            answers = self.decode([prompts[i] for i in some], some, temperatures, max_new_tokens, seed, step)
            results |= zip(some, answers, strict=True)
        return [results[i] for i in range(len(prompts))]

    def decode(self, prompts, keys, temperatures, N, seed, step) -> list[list[Completion]]:
        """One batch of `generate`: prefills P prompts, then decodes R rows."""
        model, device, P, G = self.model, self.model.device, len(prompts), len(temperatures)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (P,)
        T = int(lengths.max())
        tokens = torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in prompts], device=device)  # (P, T)
        cache, rows = KVCache(model, P, T), KVCache(model, P * G, T + N)
        states = model.hidden(tokens, attend=cache.attention(torch.arange(T, device=device).expand(P, T), T))
        logits = model.head(states[torch.arange(P), lengths - 1]).repeat_interleave(G, 0)  # (R, V)
        rows.k[:, :, :, :T], rows.v[:, :, :, :T] = (x.repeat_interleave(G, 1) for x in (cache.k, cache.v))
        positions = lengths.repeat_interleave(G)  # (R,) where the next token goes
        question = torch.tensor(keys, device=device).repeat_interleave(G)
        numbers = [temperatures[:j].count(t) for j, t in enumerate(temperatures)]  # among those of its temperature
        sample = torch.tensor(numbers, device=device).repeat(P)
        temperature, end = torch.tensor(temperatures, device=device).repeat(P), torch.tensor(self.end_of_turn)
        drawn, logprobs = torch.zeros(P * G, N, dtype=torch.int64), torch.zeros(P * G, N)
        ended, counts = torch.zeros(P * G, dtype=torch.bool), torch.zeros(P * G, dtype=torch.int64)
        for t in range(N):
            token, logprobs[:, t] = sample_tokens(logits, temperature, uniforms(seed, step, question, sample, t))
            drawn[:, t] = token
            counts += ~ended  # by length, not by token value: padding may equal the end-of-turn token
            ended |= torch.isin(drawn[:, t], end)
            if t == N - 1 or bool(ended.all()):
                break
            attend = rows.attention(positions[:, None], T + t + 1)
            logits = model(token[:, None], positions[:, None], attend=attend)[:, 0]
            positions += 1
        flat = [Completion(drawn[r, :n].tolist(), logprobs[r, :n].tolist(), bool(ended[r]))
                for r, n in enumerate(counts.tolist())]  # fmt: skip
        return [flat[i : i + G] for i in range(0, len(flat), G)]
