"""Attention for many texts in one pass, laid end to end: prompts, prompts that share a beginning, a prompt's samples.

On a CPU each part is a call of torch's scaled_dot_product_attention; on a GPU, in bf16, all parts are one kernel. The
decode step, which reads caches, has its own in rollout.py; the plain form is `model.plain_attention`.

Axes: T tokens in all, H heads, K kv heads, D head dim, S keys (a token once for each run that sees it).
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import deterministic


class Runs(NamedTuple):
    """Run i has queries q_ends[i] to q_ends[i + 1] and keys k_ends[i] to k_ends[i + 1]; its last query sees them all,
    each one before it one fewer."""

    q_ends: Tensor  # (runs + 1,) int32
    k_ends: Tensor
    q_most: int  # tokens of the longest
    k_most: int
    keys: Tensor | None  # (S,): which token each key is; None: all of them, in their order


def kernel(q: Tensor, k: Tensor, v: Tensor, runs: Runs):
    """FlashAttention, as torch has it: output (T, H, D), log-sums, and what `kernel_backward` wants beside them.

    torch.nn.attention.varlen has other arguments in every version, and scaled_dot_product_attention hands bf16 to cuDNN
    on Hopper, which prepares anew for every length.
    """
    return torch.ops.aten._flash_attention_forward(q, k, v, *runs[:4], 0.0, True, False)[:4]


def kernel_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, runs: Runs, *state):
    """Gradients of q, k and v, added up in a fixed order."""
    with in_fixed_order():
        backward = torch.ops.aten._flash_attention_backward
        return backward(grad, q, k, v, out, log_sums, *runs[:4], 0.0, True, *state)


@contextlib.contextmanager
def in_fixed_order():
    """Kernels that ask torch whether to be deterministic are. For the whole process, as long as it lasts."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # it would fill what the kernel overwrites
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        deterministic.fill_uninitialized_memory = fill


class Flash(torch.autograd.Function):
    """Attention of runs of any lengths in one kernel (FlashAttention-2, Dao 2307.08691): q (T, H, D), k, v (T, K, D).

    What several runs see is kept once, and its gradient summed over them in fp32.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
        given = (k, v) if runs.keys is None else (k[runs.keys], v[runs.keys])
        out, log_sums, *state = kernel(q, *given, runs)
        ctx.save_for_backward(q, k, v, out, log_sums, *state)
        ctx.runs = runs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (q, k, v, out, log_sums, *state), runs = ctx.saved_tensors, ctx.runs
        if runs.keys is None:
            return *kernel_backward(grad, q, k, v, out, log_sums, runs, *state), None
        grad_q, *grads = kernel_backward(grad, q, k[runs.keys], v[runs.keys], out, log_sums, runs, *state)
        sums = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in grads)
        k, v = (
            s.index_put_((runs.keys,), g.float(), accumulate=True).to(g.dtype) for s, g in zip(sums, grads, strict=True)
        )
        return grad_q, k, v, None


def flashes(q: Tensor) -> bool:
    """Whether there is such a kernel; on the meta device, whether there would be."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return False
    if q.is_cuda:
        here = torch.cuda.get_device_capability(q.device) >= (8, 0)
        return here and torch.backends.cuda.is_flash_attention_available()
    return q.is_meta


def over_parts(parts: list[tuple[int, int, int, int, list[int]]], device=None, flash: bool = True):
    """Attention for texts laid end to end in one row (B = 1), for `Transformer.hidden`.

    A part (start, end, first, last, lengths) is one or more runs of tokens; each sees the tokens first..last, which it
    continues (none where first = last), and itself, causally. The parts follow each other. So nothing is padding, and
    what texts share is computed once. All parts are one kernel where there is one (`flashes`), unless flash is False.
    """

    @functools.cache
    def mask_of(part: int) -> Tensor | None:
        a, b, x, y, lengths = parts[part]
        if len(lengths) == 1 and x == y:
            return None  # causal, and no more
        counts = torch.tensor(lengths, device=device)
        run = torch.arange(len(lengths), device=device).repeat_interleave(counts, output_size=b - a)
        own = (run[:, None] == run).tril()
        return torch.cat((own.new_ones(b - a, y - x), own), 1)

    def by_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for i, (a, b, x, y, _) in enumerate(parts):
            keys, values = (torch.cat((c[:, :, x:y], c[:, :, a:b]), 2) if y > x else c[:, :, a:b] for c in (k, v))
            mask = mask_of(i)
            out = F.scaled_dot_product_attention(
                q[:, :, a:b], keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            outs.append(out)
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
        ends = (torch.tensor([0, *some]).cumsum(0).to(device, torch.int32) for some in (q_lengths, k_lengths))
        which = None if q_lengths == k_lengths else torch.cat(keys).to(device)
        return Runs(*ends, max(q_lengths), max(k_lengths), which)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not (flash and flashes(q)):
            return by_parts(q, k, v)
        return Flash.apply(*(x[0].transpose(0, 1) for x in (q, k, v)), runs()).transpose(0, 1)[None]

    return attend
