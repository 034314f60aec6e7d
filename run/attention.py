"""Attention for many texts in one pass, laid end to end: prompts, prompts that share a beginning, a prompt's samples.

On a CPU each part is a call of torch's scaled_dot_product_attention. On a GPU, in bf16, all parts are one kernel. A
decode step reads caches instead (`over_slots`). The plain form is `model.plain_attention`.

Axes: T tokens in all, H heads, K kv heads, D head dim, S keys (a token counts once for each run that sees it). Those of
`over_slots` are rollout.py's.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import deterministic

from run.device import send


class Runs(NamedTuple):
    """Run i has queries q_ends[i] to q_ends[i + 1] and keys k_ends[i] to k_ends[i + 1].

    Its last query sees all its keys, and every query before it sees one key fewer than the next.
    """

    q_ends: Tensor  # (runs + 1,) int32
    k_ends: Tensor
    q_most: int  # queries of the longest run
    k_most: int
    keys: Tensor | None  # (S,): which token each key is; None: all tokens, in their order

    def gather(self, x: Tensor) -> Tensor:
        """Keys or values (S, K, D) of all runs, from those of the tokens (T, K, D)."""
        return x if self.keys is None else x[self.keys]


def kernel(q: Tensor, k: Tensor, v: Tensor, runs: Runs):
    """torch's FlashAttention: output (T, H, D), log-sums, and what else `kernel_backward` needs.

    Called directly, because torch.nn.attention.varlen's arguments differ between versions, and
    scaled_dot_product_attention uses cuDNN for bf16 on Hopper, which prepares anew for every length.
    """
    return torch.ops.aten._flash_attention_forward(q, k, v, *runs[:4], 0.0, True, False)[:4]


def kernel_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, runs: Runs, *state):
    """Gradients of q, k and v, summed in a fixed order."""
    given = (grad, q, k, v, out, log_sums, *runs[:4], 0.0, True, *state)
    with in_fixed_order():
        return torch.ops.aten._flash_attention_backward(*given)


@contextlib.contextmanager
def in_fixed_order():
    """Turns on torch's deterministic kernels inside a `with`, in the whole process."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # a waste: the kernel overwrites it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        deterministic.fill_uninitialized_memory = fill


class Flash(torch.autograd.Function):
    """Attention of runs of any lengths in one kernel (FlashAttention-2, Dao 2307.08691): q (T, H, D), k, v (T, K, D).

    Keys and values that several runs see are kept once. Their gradient is summed over the runs in fp32.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
        out, log_sums, *state = kernel(q, runs.gather(k), runs.gather(v), runs)
        ctx.save_for_backward(q, k, v, out, log_sums, *state)
        ctx.runs = runs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (q, k, v, out, log_sums, *state), runs = ctx.saved_tensors, ctx.runs
        grad_q, *grads = kernel_backward(grad, q, runs.gather(k), runs.gather(v), out, log_sums, runs, *state)
        if runs.keys is not None:
            sums = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
            grads = [s.index_put_((runs.keys,), g.float(), accumulate=True).to(g.dtype)
                     for s, g in zip(sums, grads, strict=True)]  # fmt: skip
        return grad_q, *grads, None


def flashes(q: Tensor) -> bool:
    """True if `Flash` can run on q; on the meta device, True if it could on a GPU."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return False
    if q.is_cuda:
        ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
        return ampere and torch.backends.cuda.is_flash_attention_available()
    return q.is_meta


def over_parts(parts: list[tuple[int, int, int, int, list[int]]], device=None, flash: bool = True):
    """Attention for texts laid end to end in one row (B = 1), for `Transformer.hidden`.

    A part (start, end, first, last, lengths) is one or more runs of tokens, start to end. Each run sees the tokens
    first to last, which it continues (none if first = last), and causally its own. The parts lie one after another in
    the row, so nothing is padding. What texts share is computed once. All parts are one kernel if `flashes` and flash.
    """

    @functools.cache
    def mask_of(part: int) -> Tensor | None:
        a, b, x, y, lengths = parts[part]
        if len(lengths) == 1 and x == y:
            return None  # simply causal
        counts = send(lengths, device)
        run = torch.arange(len(lengths), device=device).repeat_interleave(counts, output_size=b - a)
        own = (run[:, None] == run).tril()
        return torch.cat((own.new_ones(b - a, y - x), own), 1)

    def by_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for i, (a, b, x, y, _) in enumerate(parts):
            given = [torch.cat((c[:, :, x:y], c[:, :, a:b]), 2) if y > x else c[:, :, a:b] for c in (k, v)]
            how = {"attn_mask": mask_of(i), "is_causal": mask_of(i) is None, "enable_gqa": True}
            outs.append(F.scaled_dot_product_attention(q[:, :, a:b], *given, **how))
        return torch.cat(outs, 2)

    @functools.cache
    def runs() -> Runs:
        q_lengths, k_lengths, keys = [], [], []
        for a, _, x, y, lengths in parts:
            for n in lengths:
                q_lengths.append(n)
                k_lengths.append(y - x + n)
                keys += [torch.arange(x, y), torch.arange(a, a + n)]
                a += n
        ends = (torch.tensor([0, *some]).cumsum(0, dtype=torch.int32) for some in (q_lengths, k_lengths))
        which = None if q_lengths == k_lengths else send(torch.cat(keys), device)
        return Runs(*(send(x, device) for x in ends), max(q_lengths), max(k_lengths), which)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not (flash and flashes(q)):
            return by_parts(q, k, v)
        return Flash.apply(*(x[0].transpose(0, 1) for x in (q, k, v)), runs()).transpose(0, 1)[None]

    return attend


def passes(items: list, size: Callable[..., int], room: int) -> Iterator[list]:
    """Empties `items` from its end; yields lists of at most `room` tokens, or of one item that alone is larger."""
    while items:
        some = [items.pop()]
        while items and sum(map(size, [*some, items[-1]])) <= room:
            some.append(items.pop())
        yield some


def end_to_end(runs: list[list[list[int]]], device) -> tuple[Tensor, Tensor, list, Tensor]:
    """All prompts in one row. runs: lists of prompts; what all prompts of a list begin with is stored once.

    Returns tokens and positions (1, T), parts for `over_parts`, and the place of each prompt's last token (P,).
    """
    tokens, positions, parts, last = [], [], [], []
    for run in runs:
        # Every prompt keeps at least its last token for itself.
        shared = len(os.path.commonprefix([prompt[:-1] for prompt in run])) if len(run) > 1 else 0
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
    tokens, positions, last = (send(x, device) for x in (tokens, positions, last))
    return tokens[None], positions[None], parts, last


def over_slots(s, lanes: Tensor, P: int, T: int, N: int):
    """Attention of a decode step over the caches in rollout.Slots: over its prompt and over the row's own tokens.

    lanes (R,): the lane of each row, in the first P slots. Writes the new keys and values, and reads T prompt and N own
    positions. A prompt is stored once: one product with it for all its rows, one with each row's own tokens, and one
    softmax over both.
    """
    slot, lane, count = lanes // s.G, lanes % s.G, s.count[lanes]  # (R,)
    see = torch.arange(T, device=lanes.device) < s.length[:P, None]  # (P, T)
    see_own = torch.arange(N, device=lanes.device) < s.count.view(s.P, s.G, 1)[:P]  # (P, G, N)
    see = torch.cat((see[:, None].expand(P, s.G, T), see_own), -1)[:, None, :, None]  # (P, 1, G, 1, T + N)
    hide = torch.where(see, 0.0, -math.inf)  # added to the scores: on a CPU this is faster than a filled mask

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (R, H, 1, D), (R, K, 1, D)
        (R, H, _, D), K = q.shape, k.shape[1]
        s.own[0, layer][slot, :, lane, count - 1] = k[:, :, 0]
        s.own[1, layer][slot, :, lane, count - 1] = v[:, :, 0]
        # Rows may be in any order. In the grid (slot, lane) the rows of one prompt are adjacent.
        q = (q * D**-0.5).view(R, K, H // K, D)
        grid = q.new_zeros(P, K, s.G, H // K, D)
        grid[slot, :, lane] = q
        scores = grid.view(P, K, -1, D) @ s.prefix[0, layer, :P, :, :T].mT  # (P, K, G · r, T)
        own = grid @ s.own[0, layer, :P, :, :, :N].mT  # (P, K, G, r, N)
        scores = torch.cat((scores.view(*own.shape[:-1], T), own), -1) + hide  # fp32
        weights = scores.softmax(-1).to(q.dtype)
        out = weights[..., :T].reshape(P, K, -1, T) @ s.prefix[1, layer, :P, :, :T]  # (P, K, G · r, D)
        out = out.view(grid.shape) + weights[..., T:] @ s.own[1, layer, :P, :, :, :N]
        return out[slot, :, lane].reshape(R, H, 1, D)

    return attend
