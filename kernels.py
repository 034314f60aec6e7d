"""What a decode step consists of besides the network's matrix products: attention, norms, and the drawing of a token.

`rollout.decode_step` is the plain step, about forty small kernels a layer on a GPU. `fused_step` does the same in ten a
layer, written in Triton (Tillet, Kung & Cox 2019). Between the products lie:

    embed_norm      x = embed(token);  y = norm(x)
    add_norm        x = x + delta;     y = norm(x)
    rope            q, k, v: bias, norm of each head, rotation; k and v go into the row's cache
    attend, merge   softmax attention to the prompt, read once for all its samples, and to the row's own tokens, in
                    parts; then the parts' weighted sum
    swiglu          silu(gate) · up
    weigh, draw     the token, in two passes over the vocabulary

A program is one instance of a kernel; `tl.program_id` says which. It works on whole blocks, whose sizes are powers of
two, and masks hide what lies beyond the real size. How many programs run depends on sizes alone. Lengths, counts,
temperatures, seeds and finished flags are read on the device. So one CUDA graph serves all prompts. Sums are fp32.
Values are rounded to the model's dtype where model.py rounds them, but attention scores stay fp32.

Axes: P slots (prompts), G lanes per slot, R = P · G rows, T prompt tokens, N new tokens, E hidden, M inner size of the
MLP, H heads, K kv heads, r = H / K, D head dim, V vocabulary. BLOCK_X is the power of two that holds X.
"""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton on the CPU, slowly, for tests
triton = None
if torch.version.cuda or INTERPRETED:  # elsewhere it would cost a quarter of a second and be of no use
    try:
        import triton
        import triton.language as tl
    except ImportError:  # it comes with CUDA builds of torch on Linux
        pass
jit = triton.jit if triton else lambda function: function


def may_fuse(kernels: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to decode by `fused_step`. kernels: fused, plain, or auto, which is fused on a GPU where that can run.

    ValueError if fused is asked for and cannot run.
    """
    problem = ""
    if kernels not in ("auto", "fused", "plain"):
        raise ValueError(f"--kernels must be auto, fused or plain, not {kernels!r}")
    if device.type != "cuda" and not INTERPRETED:
        problem = f"they need a CUDA device, and the model is on the {device.type}"
    elif not triton:
        problem = "they need the package triton, which is not installed"
    elif device.type == "cuda" and dtype != torch.bfloat16:
        problem = f"they need weights in bfloat16, not {dtype}"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        problem = "they need an Ampere GPU or a newer one"
    if problem and kernels == "fused":
        raise ValueError(f"--kernels fused: {problem}; leave it out, or give --kernels plain")
    return not problem and (kernels == "fused" or (kernels == "auto" and device.type == "cuda"))


# ---- the token, plainly ----------------------------------------------------------------------------------------


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


# ---- residual and norm -----------------------------------------------------------------------------------------


@jit
def rounded(x, ptr):
    """x (fp32) as it would be read back from ptr, in fp32 again."""
    return x.to(ptr.dtype.element_ty).to(tl.float32)


@jit
def normed(x, weight, eps, ptr, E: tl.constexpr):
    """x / rms(x) · weight, for x (BLOCK_E,) fp32 with zeros beyond E. Rounded before the weight, as model.RMSNorm."""
    return rounded(x * tl.rsqrt(tl.sum(x * x, 0) / E + eps), ptr) * weight


@jit
def embed_norm_kernel(
    tokens_ptr, count_ptr, embed_ptr, weight_ptr, x_ptr, y_ptr, width, eps, E: tl.constexpr, BLOCK_E: tl.constexpr
):
    """x (R, E): the embedding, from (V, E), of each row's last token in tokens (R, width). y (R, E) = norm(x)."""
    row, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    weight = tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    token = tl.load(tokens_ptr + row * width + tl.load(count_ptr + row) - 1)  # int64, because V · E may pass 2^31
    x = tl.load(embed_ptr + token * E + e, mask=e < E, other=0.0)
    tl.store(x_ptr + row * E + e, x, mask=e < E)
    tl.store(y_ptr + row * E + e, normed(x.to(tl.float32), weight, eps, y_ptr, E), mask=e < E)


@jit
def add_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, delta_stride, eps, E: tl.constexpr, BLOCK_E: tl.constexpr
):
    """sum (R, E) = x (R, E) + delta (R, E, rows delta_stride apart). y (R, E) = norm(sum)."""
    row, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    weight = tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * E + e, mask=e < E, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + row * delta_stride + e, mask=e < E, other=0.0).to(tl.float32)
    x = rounded(x + delta, sum_ptr)
    tl.store(sum_ptr + row * E + e, x, mask=e < E)
    tl.store(y_ptr + row * E + e, normed(x, weight, eps, y_ptr, E), mask=e < E)


# ---- q, k and v ------------------------------------------------------------------------------------------------


@jit
def load_heads(qkv_ptr, bias_ptr, row, stride, at, mask):
    """The numbers `at` of a row of qkv as fp32, with the bias if there is one."""
    x = tl.load(qkv_ptr + row * stride + at, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = rounded(x + tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32), qkv_ptr)
    return x


@jit
def rope_kernel(
    qkv_ptr, bias_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, length_ptr, count_ptr, q_ptr, keys_ptr, values_ptr,
    qkv_stride, N, eps, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a row of qkv (R, (H + 2K) · D): bias, norm, rotation.

    q goes to q (R, H · D). k and v go to place count - 1 of the row's keys and values (P, K, G, N, D). cos and sin are
    (positions, D/2) fp32. bias ((H + 2K) · D,) and the norms' weights (D,) may be None.
    """
    row, half = tl.program_id(0), D // 2
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # q's heads, then k's, then v's
    d = tl.arange(0, HALF)[None, :]
    is_q, is_k, is_v = h < H, (h >= H) & (h < H + K), (h >= H + K) & (h < H + 2 * K)
    inside = d < half
    at, mask = h * D + d, (h < H + 2 * K) & inside
    a = load_heads(qkv_ptr, bias_ptr, row, qkv_stride, at, mask)  # first halves of the heads, (HEADS, HALF)
    b = load_heads(qkv_ptr, bias_ptr, row, qkv_stride, at + half, mask)  # second halves
    if q_weight_ptr is not None:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        # Of the two weights the mask of one is empty.
        weight_a = tl.load(q_weight_ptr + d, mask=inside & is_q, other=0.0).to(tl.float32)
        weight_a += tl.load(k_weight_ptr + d, mask=inside & is_k, other=0.0).to(tl.float32)
        weight_b = tl.load(q_weight_ptr + half + d, mask=inside & is_q, other=0.0).to(tl.float32)
        weight_b += tl.load(k_weight_ptr + half + d, mask=inside & is_k, other=0.0).to(tl.float32)
        a = tl.where(is_v, a, rounded(rounded(a * scale, qkv_ptr) * weight_a, qkv_ptr))
        b = tl.where(is_v, b, rounded(rounded(b * scale, qkv_ptr) * weight_b, qkv_ptr))
    slot, lane, count = row // G, row % G, tl.load(count_ptr + row)
    position = tl.load(length_ptr + slot) + count - 1
    cos = tl.load(cos_ptr + position * half + d, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + position * half + d, mask=inside, other=0.0)
    first, second = a * cos - b * sin, b * cos + a * sin
    tl.store(q_ptr + row * H * D + at, first, mask=inside & is_q)
    tl.store(q_ptr + row * H * D + at + half, second, mask=inside & is_q)
    cache = (((slot * K + (h - H) % K) * G + lane) * N + count - 1) * D + d  # int64, as count is
    tl.store(keys_ptr + cache, first, mask=inside & is_k)
    tl.store(keys_ptr + cache + half, second, mask=inside & is_k)
    tl.store(values_ptr + cache, a, mask=inside & is_v)
    tl.store(values_ptr + cache + half, b, mask=inside & is_v)


# ---- attention -------------------------------------------------------------------------------------------------


@jit
def attend_part(
    q_ptr, keys_ptr, values_ptr, out_ptr, lse_ptr, row, head, is_query, begin, end, part, scale, H: tl.constexpr,
    D: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of some queries, named by row and head (QUERIES,), to keys and values (·, D) from begin to end.

    Online softmax (Milakov & Gimelshein 1805.02867; FlashAttention, 2205.14135): `out` and `total` are relative to the
    highest score so far. Writes out (R, H, PARTS, D) fp32, normalised, and lse (R, H, PARTS) = log2 of the sum of
    2^score. No keys give 0 and -inf.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = is_query[:, None] & (d < D)
    q = tl.load(q_ptr + (row * H + head)[:, None] * D + d, mask=mask, other=0.0)
    highest, total = tl.full((QUERIES,), float("-inf"), tl.float32), tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for start in range(begin, end, KEYS):
        n = start + tl.arange(0, KEYS)
        at, inside = n[:, None] * D + d, (n < end)[:, None] & (d < D)
        keys = tl.load(keys_ptr + at, mask=inside, other=0.0)  # (KEYS, BLOCK_D)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale  # (QUERIES, KEYS)
        scores = tl.where((n < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink, weights = tl.exp2(highest - higher), tl.exp2(scores - higher[:, None])
        values = tl.load(values_ptr + at, mask=inside, other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest, total = higher, total * shrink + tl.sum(weights, 1)
    total = tl.maximum(total, 1.0)  # with keys it is at least 1, because the highest score has weight 1
    place = (row * H + head) * PARTS + part
    tl.store(out_ptr + place[:, None] * D + d, out / total[:, None], mask=mask)
    tl.store(lse_ptr + place, highest + tl.log2(total), mask=is_query)


@jit
def attend_kernel(
    q_ptr, prompt_keys_ptr, prompt_values_ptr, own_keys_ptr, own_values_ptr, length_ptr, count_ptr, finished_ptr,
    out_ptr, lse_ptr, T, N, scale, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    SPLITS: tl.constexpr, GROUPS: tl.constexpr, PROMPT_QUERIES: tl.constexpr, OWN_QUERIES: tl.constexpr,
    BLOCK_G: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (P · K, SPLITS · GROUPS + G): per slot and kv head, pieces of the prompt, and the own tokens of each lane.

    A piece of the prompt's keys and values (P, K, T, D) meets the queries of all lanes at once, or a group of them. A
    lane's own (P, K, G, N, D) meet its r queries. A finished lane reads no own tokens, and a prompt is not read if all
    its lanes are finished.
    """
    slot, k, task, r = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1), H // K
    if task < SPLITS * GROUPS:  # these take longest, so they start first
        g, part = tl.arange(0, BLOCK_G), task % SPLITS
        j = task // SPLITS * PROMPT_QUERIES + tl.arange(0, PROMPT_QUERIES)
        finished = tl.load(finished_ptr + slot * G + g, mask=g < G, other=1).to(tl.int32)
        length = tl.where(tl.min(finished, 0) == 1, 0, tl.load(length_ptr + slot).to(tl.int32))
        piece = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
        begin, end = part * piece, tl.minimum(part * piece + piece, length)
        at = (slot * K + k).to(tl.int64) * T * D
        attend_part(q_ptr, prompt_keys_ptr + at, prompt_values_ptr + at, out_ptr, lse_ptr, slot * G + j // r,
                    k * r + j % r, j < G * r, begin, end, part, scale, H, D, SPLITS + 1, PROMPT_QUERIES, KEYS,
                    BLOCK_D)  # fmt: skip
    else:
        j, lane = tl.arange(0, OWN_QUERIES), task - SPLITS * GROUPS
        row = slot * G + lane
        count = tl.where(tl.load(finished_ptr + row), 0, tl.load(count_ptr + row).to(tl.int32))
        at = ((slot * K + k) * G + lane).to(tl.int64) * N * D
        attend_part(q_ptr, own_keys_ptr + at, own_values_ptr + at, out_ptr, lse_ptr, row + j * 0, k * r + j, j < r,
                    0, count, SPLITS, scale, H, D, SPLITS + 1, OWN_QUERIES, KEYS, BLOCK_D)  # fmt: skip


@jit
def merge_kernel(
    part_ptr, lse_ptr, out_ptr, heads, D: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out (heads, D): the parts (heads, PARTS, D), each by its share 2^lse of the whole softmax. heads = R · H."""
    h, d = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK_D)[None, :]
    mask = (h < heads)[:, None] & (d < D)
    highest = tl.full((HEADS,), -1e30, tl.float32)  # finite, for a finished row has only -inf, and its output is 0
    for part in tl.static_range(PARTS):
        highest = tl.maximum(highest, tl.load(lse_ptr + h * PARTS + part, mask=h < heads, other=float("-inf")))
    out, total = tl.zeros((HEADS, BLOCK_D), tl.float32), tl.zeros((HEADS,), tl.float32)
    for part in tl.static_range(PARTS):
        share = tl.exp2(tl.load(lse_ptr + h * PARTS + part, mask=h < heads, other=float("-inf")) - highest)
        out += share[:, None] * tl.load(part_ptr + (h * PARTS + part)[:, None] * D + d, mask=mask, other=0.0)
        total += share
    tl.store(out_ptr + h[:, None] * D + d, out / tl.maximum(total, 1.0)[:, None], mask=mask)


# ---- SwiGLU ----------------------------------------------------------------------------------------------------


@jit
def swiglu_kernel(gate_up_ptr, out_ptr, stride, M: tl.constexpr, BLOCK_M: tl.constexpr):
    """out (R, M) = silu(gate) · up, where gate_up (R, 2M) has its rows `stride` apart."""
    row, m = tl.program_id(0), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    gate = tl.load(gate_up_ptr + row * stride + m, mask=m < M, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + M + m, mask=m < M, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * M + m, rounded(gate * tl.sigmoid(gate), out_ptr) * up, mask=m < M)


# ---- the token -------------------------------------------------------------------------------------------------

mixed = jit(mix)  # the same hash for Triton


@jit
def first_of(reached, weights, i, SIZE: tl.constexpr):
    """The first i that is reached. Should rounding leave none, the last that has a weight."""
    return tl.minimum(tl.min(tl.where(reached, i, SIZE), 0), tl.max(tl.where(weights > 0, i, 0), 0))


@jit
def weigh_kernel(logits_ptr, temperature_ptr, top_ptr, sum_ptr, V, blocks, BLOCK: tl.constexpr):
    """Per block of logits (R, V) / T: the highest, and the sum of exp(logit - highest); NaN if one is not finite."""
    row, block = tl.program_id(0), tl.program_id(1)
    v, temperature = block * BLOCK + tl.arange(0, BLOCK), tl.load(temperature_ptr + row)
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    finite = tl.min(((tl.abs(logits) < float("inf")) | (v >= V)).to(tl.int32), 0) == 1
    logits = logits / tl.where(temperature == 0, 1.0, temperature)
    top = tl.max(logits, 0)
    tl.store(top_ptr + row * blocks + block, top)
    tl.store(sum_ptr + row * blocks + block, tl.where(finite, tl.sum(tl.exp(logits - top), 0), float("nan")))


@jit
def draw_kernel(
    logits_ptr, temperature_ptr, top_ptr, sum_ptr, seed_ptr, step_ptr, question_ptr, sample_ptr, limit_ptr, end_ptr,
    tokens_ptr, logprobs_ptr, count_ptr, finished_ptr, bad_ptr, V, width, blocks, ends, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Each row's token: the first whose CDF exceeds u · total, found by block, then within it; at T = 0 the argmax.

    Token and logprob go to place `count` of tokens and logprobs (R, width), of a finished row to the last column.
    count, finished and bad change as in rollout.decode_step.
    """
    row, b, i, e = tl.program_id(0), tl.arange(0, BLOCKS), tl.arange(0, BLOCK), tl.arange(0, ENDS)
    count, temperature = tl.load(count_ptr + row), tl.load(temperature_ptr + row)
    live = tl.load(finished_ptr + row) == 0
    # 1. the uniform, as in `uniforms`
    h = mixed(tl.load(seed_ptr) - 0x61C8864680B583EB)
    h = mixed((h ^ tl.load(step_ptr)) - 0x61C8864680B583EB)
    h = mixed((h ^ tl.load(question_ptr + row)) - 0x61C8864680B583EB)
    h = mixed((h ^ tl.load(sample_ptr + row)) - 0x61C8864680B583EB)
    h = mixed((h ^ count) - 0x61C8864680B583EB)
    u = ((h >> 40) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    # 2. the block. A parallel sum may round so that it grows where a weight is 0, hence `weights > 0`.
    tops = tl.load(top_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    greedy, highest = temperature == 0, tl.max(tops, 0)
    weights = tl.load(sum_ptr + row * blocks + b, mask=b < blocks, other=0.0) * tl.exp(tops - highest)
    cdf, total = tl.cumsum(weights, 0), tl.sum(weights, 0)
    target = u * tl.max(cdf, 0)
    block = first_of(tl.where(greedy, tops == highest, (cdf > target) & (weights > 0)), weights, b, BLOCKS)
    target -= tl.sum(tl.where(b == block, cdf - weights, 0.0), 0)
    # 3. the token in it
    v = block * BLOCK + i
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    logits = logits / tl.where(greedy, 1.0, temperature)
    weights = tl.exp(logits - highest)
    reached = tl.where(greedy, logits == highest, (tl.cumsum(weights, 0) > target) & (weights > 0))
    drawn = first_of(reached, weights, i, BLOCK)
    logprob = tl.sum(tl.where(i == drawn, logits, 0.0), 0) - highest - tl.log(total)
    # 4. what follows from it
    token = block * BLOCK + drawn
    ends_turn = tl.max((tl.load(end_ptr + e, mask=e < ends, other=-1) == token).to(tl.int32), 0) == 1
    place = row * width + tl.where(live, count, width - 1)
    tl.store(tokens_ptr + place, token.to(tl.int64))
    tl.store(logprobs_ptr + place, logprob)
    tl.store(count_ptr + row, count + live.to(tl.int64))
    tl.store(finished_ptr + row, (live == 0) | ends_turn | (count + 1 >= tl.load(limit_ptr)))
    tl.atomic_min(bad_ptr, count, mask=live & ((total < float("inf")) == 0))


# ---- the step --------------------------------------------------------------------------------------------------
# One function per kernel chooses its grid and block sizes. s: rollout.Slots, c: model.Config. The tensors made here
# belong to the graph if the step is captured.


def block_of(size: int, least: int = 1) -> int:
    """The power of two that holds size."""
    return max(least, triton.next_power_of_2(size))


def norm_warps(E: int) -> int:
    return min(16, max(1, block_of(E) // 256))  # a thread has 8 numbers of a row: one load of 16 bytes in bf16


def embed_norm(s, R: int, embed: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    E = embed.shape[1]
    x, y = embed.new_empty(2, R, E)
    embed_norm_kernel[(R,)](s.tokens, s.count, embed, norm.weight, x, y, s.tokens.shape[1], norm.eps, E, block_of(E),
                            num_warps=norm_warps(E))  # fmt: skip
    return x, y


def add_norm(x: Tensor, delta: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    R, E = x.shape
    total, y = x.new_empty(2, R, E)
    add_norm_kernel[(R,)](x, delta, norm.weight, total, y, delta.stride(0), norm.eps, E, block_of(E),
                          num_warps=norm_warps(E))  # fmt: skip
    return total, y


def rope(qkv: Tensor, attn: nn.Module, s, c, HEADS: int = 8) -> Tensor:
    """q (R, H · D), turned; k and v are in the cache of attn's layer."""
    R, H, K, D = len(qkv), c.heads, c.kv_heads, c.head_dim
    weights = (attn.q_norm.weight, attn.k_norm.weight) if c.qk_norm else (None, None)
    bias, q, own = base_of(attn.qkv_proj).bias, qkv.new_empty(R, H * D), s.own[:, attn.layer]
    rope_kernel[(R, triton.cdiv(H + 2 * K, HEADS))](
        qkv, bias, *weights, s.cos, s.sin, s.length, s.count, q, own[0], own[1], qkv.stride(0), s.N, c.norm_eps,
        H, K, D, s.G, HEADS, block_of(D // 2), num_warps=2,
    )  # fmt: skip
    return q


def attend(q: Tensor, layer: int, s, c, splits: int = 0) -> Tensor:
    """(R, H · D). splits: pieces of a prompt; by default enough that few slots, too, fill the GPU."""
    R, G, H, K, D, P = len(q), s.G, c.heads, c.kv_heads, c.head_dim, len(q) // s.G
    queries = min(block_of(G * H // K, 16), 64)  # more would not fit into registers
    groups = triton.cdiv(G * H // K, queries)
    splits = splits or max(1, min(8, 256 // (P * K * groups)))
    parts, lse = (torch.empty(R, H, splits + 1, n, dtype=torch.float32, device=q.device) for n in (D, 1))
    out, block, half = torch.empty_like(q), block_of(D, 16), q.itemsize == 2
    attend_kernel[(P * K, splits * groups + G)](
        q, *s.prefix[:, layer], *s.own[:, layer], s.length, s.count, s.finished, parts, lse, s.T, s.N,
        D**-0.5 * math.log2(math.e), H, K, D, G, splits, groups, queries, block_of(H // K, 16), block_of(G),
        KEYS=64 if half else 16, BLOCK_D=block, num_warps=4, num_stages=2,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(R * H, 8),)](parts, lse, out, R * H, D, splits + 1, 8, block)
    return out


def swiglu(gate_up: Tensor, M: int) -> Tensor:
    out = gate_up.new_empty(len(gate_up), M)
    swiglu_kernel[(len(out), triton.cdiv(M, 1024))](gate_up, out, gate_up.stride(0), M, 1024)
    return out


def draw(logits: Tensor, s, end: Tensor, size: int = 2048) -> None:
    (R, V), size = logits.shape, min(size, block_of(logits.shape[1]))
    blocks, width = triton.cdiv(V, size), s.tokens.shape[1]
    tops, sums = torch.empty(2, R, blocks, dtype=torch.float32, device=logits.device)
    weigh_kernel[(R, blocks)](logits, s.temperature, tops, sums, V, blocks, size)
    draw_kernel[(R,)](logits, s.temperature, tops, sums, s.seed, s.step, s.question, s.sample, s.limit, end, s.tokens,
                      s.logprobs, s.count, s.finished, s.bad, V, width, blocks, len(end), size, block_of(blocks),
                      block_of(len(end)))  # fmt: skip


def base_of(layer: nn.Module) -> nn.Linear:
    return getattr(layer, "base", layer)  # of a layer with adapters (run/lora.py)


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) without bias. With adapters its rows lie further apart than they are long."""
    return layer.decode(x) if hasattr(layer, "base") else F.linear(x, layer.weight)


def fused_step(model: nn.Module, s, end: Tensor, P: int, R: int, T: int, N: int) -> None:
    """In place of `rollout.decode_step`, for all lanes of the first P slots in order. T and N are not needed.

    If the model has adapters, `lora.stack` must have been called after their last change.
    """
    assert R == P * s.G
    c, norms = model.config, [block.input_layernorm for block in model.layers] + [model.norm]
    x, y = embed_norm(s, R, model.embed_tokens.weight, norms[0])
    for layer, block in enumerate(model.layers):
        attn, mlp = block.self_attn, block.mlp
        q = rope(product(attn.qkv_proj, y), attn, s, c)
        x, y = add_norm(x, product(attn.o_proj, attend(q, layer, s, c)), block.post_attention_layernorm)
        inner = swiglu(product(mlp.gate_up_proj, y), c.intermediate_size)
        x, y = add_norm(x, product(mlp.down_proj, inner), norms[layer + 1])
    draw(model.head(y), s, end)
