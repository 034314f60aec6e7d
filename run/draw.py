"""Draws a token by the inverse CDF at a hashed uniform, without a generator. kernels.py has the same for a GPU.

Axes: R rows decoded together, V vocabulary.
"""

import torch
from torch import Tensor


def mix(x):
    """The splitmix64 finaliser (Steele, Lea & Flood 2014) on int64, which wraps; masks make the shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniforms(seed, step, question: Tensor, sample: Tensor, position) -> Tensor:
    """Uniforms in [0, 1), (R,) fp32, hashed from five integers. Each may be a number or an int64 tensor."""
    h = torch.zeros_like(question)
    for part in (seed, step, question, sample, position):
        h = mix((h ^ part) - 0x61C8864680B583EB)
    return ((h >> 40) & 0xFFFFFF).float() * 2.0**-24  # 24 bits: exact in fp32


def sample_tokens(logits: Tensor, temperature: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (R,) drawn from softmax(logits (R, V) / T) at uniforms u (R,), and their logprobs (R,) fp32.

    temperature (R,) fp32. Rows at 0 take the argmax, and their logprobs are those at T = 1. Overwrites fp32 logits,
    because a second (R, V) tensor would cost as much time as the arithmetic.
    """
    greedy = temperature == 0
    logits = logits.float().div_(torch.where(greedy, 1.0, temperature)[:, None])
    highest, argmax = logits.max(-1)
    weights = logits.sub_(highest[:, None]).exp()
    total = weights.sum(-1).log()  # more exact than the end of the CDF
    cdf = weights.cumsum_(-1)
    # The first index whose CDF exceeds u · total, so never a token of probability 0. Only NaN gives an index past the
    # end, hence the clamp.
    drawn = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    tokens = torch.where(greedy, argmax, drawn)
    return tokens, logits.gather(-1, tokens[:, None])[:, 0] - total
