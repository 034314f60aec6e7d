"""The plain sampler: every sample a row with a copy of its prompt's keys and values, all rows to the end.

The first that the loop ran with, slow and easy to see through; rollout.py must draw the same samples. Its
token from logits is the first one too, a softmax written out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from rollout import Completion, uniforms


class KVCache:
    """Keys and values of all layers, (layers, B, K, S, D), allocated once and written in place.

    Row b's token at position t lies at index t, so rows of unequal length need no common clock: what
    lies past a row's own position is stale, and masked.
    """

    def __init__(self, config, rows: int, length: int, device=None, dtype=None):
        shape = (config.layers, rows, config.kv_heads, length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v (B, K, T, D) go to positions (B, T) of their own rows."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]  # (B, 1)
        self.k[layer, rows, :, positions] = k.transpose(1, 2)  # (B, T, K, D)
        self.v[layer, rows, :, positions] = v.transpose(1, 2)

    def attend(self, positions: Tensor, length: int):
        """Attention for `Transformer.hidden`: writes at `positions` (B, T), sees `length` entries up to them."""
        mask = torch.arange(length, device=positions.device) <= positions[:, None, :, None]  # (B, 1, T, S)

        def look(layer, q, k, v):
            self.write(layer, positions, k, v)
            k, v = self.k[layer, :, :, :length], self.v[layer, :, :, :length]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        return look


def positions_of(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1]).expand(tokens.shape)


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
        states = model.hidden(tokens, attend=cache.attend(positions_of(tokens), T))[
            torch.arange(P, device=device), lengths - 1
        ]
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
            logits = model(token[:, None], positions[:, None], attend=rows.attend(positions[:, None], T + t + 1))[:, 0]
            positions += 1
        drawn, logprobs, counts, ended = drawn.tolist(), logprobs.tolist(), counts.tolist(), ended.tolist()
        flat = [Completion(drawn[r][:n], logprobs[r][:n], ended[r]) for r, n in enumerate(counts)]
        return [flat[i : i + G] for i in range(0, len(flat), G)]
