"""Attention for many texts in one pass, laid end to end: prompts, prompts that share a beginning, a prompt's samples.

On a CPU each part is a call of torch's scaled_dot_product_attention; on a GPU, in bf16, all parts are one kernel. The
decode step, which reads caches, has its own in rollout.py; the plain form is `model.look_back`.

Axes: T tokens in all, H heads, K kv heads, D head dim, S keys (a token once for each run that sees it).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


class Flash(torch.autograd.Function):
    """FlashAttention over runs of tokens of any lengths (Dao 2307.08691), torch's kernel: q (T, H, D), k, v (S, K, D).

    Run i is q[q_ends[i] : q_ends[i + 1]], its keys k[k_ends[i] : k_ends[i + 1]]; its last query sees its last key. The
    gradient is added up in a fixed order. (torch.nn.attention.varlen has other arguments in every version, and
    scaled_dot_product_attention hands bf16 to cuDNN on Hopper, which prepares for every new length anew.)
    """

    @staticmethod
    def forward(ctx, q, k, v, q_ends, k_ends, q_most: int, k_most: int):
        forward = torch.ops.aten._flash_attention_forward
        out, *rest, _ = forward(q, k, v, q_ends, k_ends, q_most, k_most, 0.0, True, False)
        ctx.save_for_backward(q, k, v, out, q_ends, k_ends, *rest)
        ctx.most = q_most, k_most
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, q_ends, k_ends, log_sums, *rest = ctx.saved_tensors
        was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            backward = torch.ops.aten._flash_attention_backward
            grads = backward(grad, q, k, v, out, log_sums, q_ends, k_ends, *ctx.most, 0.0, True, *rest)
        finally:
            torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        return *grads, None, None, None, None


def flashes(q: Tensor) -> bool:
    """Whether there is such a kernel; on the meta device, whether there would be."""
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and (q.is_meta or (q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)))


def over_parts(parts: list[tuple[int, int, int, int, list[int]]], device=None, flash: bool = True):
    """Attention for texts laid end to end in one row (B = 1), for `Transformer.hidden`.

    A part (start, end, first, last, lengths) is one or more runs of tokens; each sees the tokens first..last, which it
    continues (none where first = last), and itself, causally. The parts follow each other. So nothing is padding, and
    what texts share is computed once. On a GPU all parts are one kernel, unless flash is False; on a CPU, one each.
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
    def runs() -> tuple:
        """What `Flash` wants to know, and which token each of its keys is (None: all in their order)."""
        q_lengths, k_lengths, keys = [], [], []
        for a, _, x, y, lengths in parts:
            for n in lengths:
                q_lengths.append(n)
                k_lengths.append(y - x + n)
                keys += [torch.arange(x, y), torch.arange(a, a + n)]
                a += n
        ends = (torch.tensor([0, *some]).cumsum(0).to(device, torch.int32) for some in (q_lengths, k_lengths))
        which = None if q_lengths == k_lengths else torch.cat(keys).to(device)
        return *ends, max(q_lengths), max(k_lengths), which

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not (flash and flashes(q)):
            return by_parts(q, k, v)
        *about, which = runs()
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, heads, D)
        if which is not None:
            k, v = k[which], v[which]
        return Flash.apply(q, k, v, *about).transpose(0, 1)[None]

    return attend
