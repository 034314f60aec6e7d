"""The work of a decode step between the matrix products with the weights, as GPU kernels.

`rollout.decode_step` is the plain step: on a GPU some 36 kernels a layer. `fused_step` does the same in ten:
four products and six in Triton (Tillet, Kung & Cox 2019). Between the products with the weights lie

    add_norm        x = x + delta;  y = norm(x)
    rope            bias, norm of each head, rotation; k and v go into the row's own cache
    attend, merge   softmax attention to the prompt, read once for many samples, and to the row's own tokens, in
                    parts; then the parts' weighted sum
    swiglu          silu(gate) · up
    weigh, draw     the token: sums per block of the vocabulary, then a draw in one block

A kernel runs as a grid of programs; tl.program_id says which one this is. Programs work on blocks with sizes that are
powers of two (BLOCK_X holds X), and masks leave out what is beyond the real size. The grid depends on sizes
alone; lengths, counts, temperatures and flags are read on the device. So one CUDA graph serves all prompts. Sums are
fp32, and results are rounded where model.py rounds them, except attention scores.

Axes: P slots (prompts), G lanes per slot, R = P · G rows, T prompt tokens, N new tokens, E hidden, M inner size of the
MLP, H heads, K kv heads, r = H / K, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run.lora import LoRA

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton on the CPU, slowly, for tests
try:
    if not (torch.version.cuda or INTERPRETED):
        raise ImportError("on a CPU it would only cost time")
    import triton
    import triton.language as tl
except ImportError:  # CUDA builds of torch bring it along on Linux
    triton = None
jit = triton.jit if triton else lambda function: function


def may_fuse(kernels: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to decode by `fused_step`. kernels: fused, plain, or auto, which is fused where a GPU can run that.

    ValueError if fused is asked for and cannot run.
    """
    if kernels not in ("auto", "fused", "plain"):
        raise ValueError(f"--kernels must be auto, fused or plain, not {kernels!r}")
    cuda = device.type == "cuda"
    problems = {
        f"it needs a CUDA device, and the model is on the {device.type}": not (cuda or INTERPRETED),
        "it needs the package triton, which is not installed": not triton,
        f"it needs weights in bf16, not {dtype}": cuda and dtype != torch.bfloat16,
        "it needs an Ampere GPU or a newer one": cuda and torch.cuda.get_device_capability(device) < (8, 0),
    }
    problem = next((problem for problem, holds in problems.items() if holds), "")
    if kernels != "plain" and cuda and not problem and (problem := launch_fails(device)) and kernels == "auto":
        print(f"note: decoding with --kernels plain, because {problem}", file=sys.stderr, flush=True)
    if problem and kernels == "fused":
        raise ValueError(f"--kernels fused: {problem}; give --kernels plain, or leave it out")
    return not problem and (kernels == "fused" or (kernels == "auto" and cuda))


def launch_fails(device: torch.device) -> str:
    """Why Triton cannot compile and launch a kernel on this GPU, or an empty string."""
    try:
        probe[(1,)](torch.zeros(1, device=device))
        return ""
    except Exception as error:  # there are many kinds
        why = " ".join(str(error).split())[-200:]
        return f"Triton fails ({type(error).__name__}: {why}); it needs gcc and Python.h"


@jit
def probe(x_ptr):
    tl.store(x_ptr, 1.0)


# ---- residual and norm -----------------------------------------------------------------------------------------
@jit
def rounded(x, ptr):
    """x (fp32) as it would be read back from ptr, in fp32 again."""
    return x.to(ptr.dtype.element_ty).to(tl.float32)


@jit
def add_norm_kernel(x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, stride, eps, E: tl.constexpr,
                    BLOCK_E: tl.constexpr):  # fmt: skip
    """sum (R, E) = x (R, E) + delta (R, E, rows stride apart). y (R, E): its model.RMSNorm, with weight (E,)."""
    row, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    weight = tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * E + e, mask=e < E, other=0.0).to(tl.float32)
    x = rounded(x + tl.load(delta_ptr + row * stride + e, mask=e < E, other=0.0).to(tl.float32), sum_ptr)
    y = rounded(x * tl.rsqrt(tl.sum(x * x, 0) / E + eps), y_ptr) * weight
    tl.store(sum_ptr + row * E + e, x, mask=e < E)
    tl.store(y_ptr + row * E + e, y, mask=e < E)


# ---- q, k and v ------------------------------------------------------------------------------------------------
@jit
def load_heads(qkv_ptr, bias_ptr, row, stride, at, mask):
    """The numbers `at` of a row of qkv as fp32, plus the bias if there is one."""
    x = tl.load(qkv_ptr + row * stride + at, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = rounded(x + tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32), qkv_ptr)
    return x


@jit
def norm_heads(x, scale, q_weight_ptr, k_weight_ptr, d, of_q, of_k, ptr):
    """x · scale · the weight (D,) of q's norm or of k's; elsewhere 0."""
    weight = tl.load(q_weight_ptr + d, mask=of_q, other=0.0).to(tl.float32)
    weight += tl.load(k_weight_ptr + d, mask=of_k, other=0.0).to(tl.float32)
    return rounded(rounded(x * scale, ptr) * weight, ptr)


@jit
def rope_kernel(qkv_ptr, bias_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, length_ptr, count_ptr, q_ptr, keys_ptr,
                values_ptr, stride, N, eps, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
                HEADS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """HEADS heads of a row of qkv (R, (H + 2K) · D): q goes to q (R, H · D), k and v to place count - 1 of the row's
    keys and values (P, K, G, N, D). cos, sin (positions, D/2) fp32. The bias and the norms' weights may be None."""
    row, half = tl.program_id(0), D // 2
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # q's heads, then k's, then v's
    d = tl.arange(0, BLOCK_D)[None, :]
    mate = (d + half) % D  # is rotated together with d
    of_q, of_k, here = (h < H) & (d < D), (h >= H) & (h < H + K) & (d < D), (h < H + 2 * K) & (d < D)
    v = load_heads(qkv_ptr, bias_ptr, row, stride, h * D + d, here)
    x, y = v, load_heads(qkv_ptr, bias_ptr, row, stride, h * D + mate, here)
    if q_weight_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = norm_heads(x, scale, q_weight_ptr, k_weight_ptr, d, of_q, of_k, qkv_ptr)
        y = norm_heads(y, scale, q_weight_ptr, k_weight_ptr, mate, of_q, of_k, qkv_ptr)
    slot, lane, count = row // G, row % G, tl.load(count_ptr + row)
    angle = (tl.load(length_ptr + slot) + count - 1) * half + d % half
    cos, sin = tl.load(cos_ptr + angle, mask=d < D, other=0.0), tl.load(sin_ptr + angle, mask=d < D, other=0.0)
    x = x * cos + y * tl.where(d < half, -sin, sin)
    tl.store(q_ptr + row * H * D + h * D + d, x, mask=of_q)
    cache = (((slot * K + (h - H) % K) * G + lane) * N + count - 1) * D + d  # int64, as count is
    tl.store(keys_ptr + cache, x, mask=of_k)
    tl.store(values_ptr + cache, v, mask=here & (h >= H + K))


# ---- attention -------------------------------------------------------------------------------------------------
@jit
def attend_part(q_ptr, keys_ptr, values_ptr, out_ptr, lse_ptr, row, head, wanted, begin, end, part, scale,
                H: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                BLOCK_D: tl.constexpr):  # fmt: skip
    """Attention of the `wanted` queries, each a row and a head (QUERIES,), to keys and values (·, D) begin to end.

    Online softmax (1805.02867; FlashAttention, 2205.14135): out and total are relative to the highest score so far.
    Writes out (R, H, PARTS, D) fp32, normalised, and lse (R, H, PARTS), log2 of the sum of 2^score; 0 and -inf for no
    keys.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = wanted[:, None] & (d < D)
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
    tl.store(lse_ptr + place, highest + tl.log2(total), mask=wanted)


@jit
def attend_kernel(q_ptr, prompt_keys_ptr, prompt_values_ptr, own_keys_ptr, own_values_ptr, length_ptr, count_ptr,
                  finished_ptr, out_ptr, lse_ptr, T, N, scale, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
                  G: tl.constexpr, SPLITS: tl.constexpr, GROUPS: tl.constexpr, PROMPT_QUERIES: tl.constexpr,
                  OWN_QUERIES: tl.constexpr, BLOCK_G: tl.constexpr, KEYS: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    """Grid (P · K, SPLITS · GROUPS + G): per slot and kv head, pieces of the prompt, and each lane's own tokens.

    A piece of the prompt's keys and values (P, K, T, D) meets the queries of all lanes, or a group of them; a lane's
    own (P, K, G, N, D) meet its r queries. A lane that has finished reads nothing, and a
    prompt is not read once all its lanes have finished.
    """
    slot, k, task, r = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1), H // K
    if task < SPLITS * GROUPS:  # these take longest, so they start first
        g, part = tl.arange(0, BLOCK_G), task % SPLITS
        idle = tl.min(tl.load(finished_ptr + slot * G + g, mask=g < G, other=1).to(tl.int32), 0)
        length = tl.where(idle == 1, 0, tl.load(length_ptr + slot).to(tl.int32))
        piece = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
        begin, end = part * piece, tl.minimum(part * piece + piece, length)
        j = task // SPLITS * PROMPT_QUERIES + tl.arange(0, PROMPT_QUERIES)
        first = (slot * K + k).to(tl.int64) * T * D
        attend_part(q_ptr, prompt_keys_ptr + first, prompt_values_ptr + first, out_ptr, lse_ptr, slot * G + j // r,
                    k * r + j % r, j < G * r, begin, end, part, scale, H, D, SPLITS + 1, PROMPT_QUERIES, KEYS,
                    BLOCK_D)  # fmt: skip
    else:
        lane, i = task - SPLITS * GROUPS, tl.arange(0, OWN_QUERIES)
        row = slot * G + lane
        count = tl.where(tl.load(finished_ptr + row), 0, tl.load(count_ptr + row).to(tl.int32))
        first = ((slot * K + k) * G + lane).to(tl.int64) * N * D
        attend_part(q_ptr, own_keys_ptr + first, own_values_ptr + first, out_ptr, lse_ptr, row + i * 0, k * r + i,
                    i < r, 0, count, SPLITS, scale, H, D, SPLITS + 1, OWN_QUERIES, KEYS, BLOCK_D)  # fmt: skip


@jit
def merge_kernel(part_ptr, lse_ptr, out_ptr, heads, D: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr,
                 BLOCK_D: tl.constexpr):  # fmt: skip
    """out (heads, D): the parts (heads, PARTS, D), each by its share 2^lse of the whole softmax. heads = R · H."""
    h, d = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK_D)[None, :]
    mask = (h < heads)[:, None] & (d < D)
    highest = tl.full((HEADS,), -1e30, tl.float32)  # finite: a finished row has only -inf, and its output is 0
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
    """out (R, M) = silu(gate) · up of gate_up (R, 2M, rows stride apart)."""
    row, m = tl.program_id(0), tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    gate = tl.load(gate_up_ptr + row * stride + m, mask=m < M, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + M + m, mask=m < M, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * M + m, rounded(gate * tl.sigmoid(gate), out_ptr) * up, mask=m < M)


# ---- the token -------------------------------------------------------------------------------------------------
@jit
def mixed(x):
    """As run/draw.mix, which Triton cannot compile because its file does not import Triton."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@jit
def first_of(reached, weights, i, SIZE: tl.constexpr):
    """The first i that is reached. If rounding leaves none, the last that has a weight."""
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
def draw_kernel(logits_ptr, temperature_ptr, top_ptr, sum_ptr, seed_ptr, step_ptr, question_ptr, sample_ptr, limit_ptr,
                end_ptr, tokens_ptr, logprobs_ptr, count_ptr, finished_ptr, bad_ptr, V, width, blocks, ends,
                BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ENDS: tl.constexpr):  # fmt: skip
    """Each row's token: the first whose CDF exceeds u · total, found by block, then within it; at T = 0 the argmax.
    tokens and logprobs are (R, width), and what is written is as in rollout.decode_step."""
    row, b, i, e = tl.program_id(0), tl.arange(0, BLOCKS), tl.arange(0, BLOCK), tl.arange(0, ENDS)
    count, temperature = tl.load(count_ptr + row), tl.load(temperature_ptr + row)
    live, greedy = tl.load(finished_ptr + row) == 0, temperature == 0
    h = mixed(tl.load(seed_ptr) - 0x61C8864680B583EB)  # as in run/draw.py
    h = mixed((h ^ tl.load(step_ptr)) - 0x61C8864680B583EB)
    h = mixed((h ^ tl.load(question_ptr + row)) - 0x61C8864680B583EB)
    h = mixed((h ^ tl.load(sample_ptr + row)) - 0x61C8864680B583EB)
    h = mixed((h ^ count) - 0x61C8864680B583EB)
    u = ((h >> 40) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    # The block. A parallel sum may round so that it grows where a weight is 0, hence weights > 0.
    tops = tl.load(top_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    highest = tl.max(tops, 0)
    weights = tl.load(sum_ptr + row * blocks + b, mask=b < blocks, other=0.0) * tl.exp(tops - highest)
    cdf, total = tl.cumsum(weights, 0), tl.sum(weights, 0)
    target = u * tl.max(cdf, 0)
    block = first_of(tl.where(greedy, tops == highest, (cdf > target) & (weights > 0)), weights, b, BLOCKS)
    target -= tl.sum(tl.where(b == block, cdf - weights, 0.0), 0)
    # The token in it.
    v = block * BLOCK + i
    logits = tl.load(logits_ptr + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
    logits = logits / tl.where(greedy, 1.0, temperature)
    weights = tl.exp(logits - highest)
    reached = tl.where(greedy, logits == highest, (tl.cumsum(weights, 0) > target) & (weights > 0))
    drawn = first_of(reached, weights, i, BLOCK)
    token = block * BLOCK + drawn
    logprob = tl.sum(tl.where(i == drawn, logits, 0.0), 0) - highest - tl.log(total)
    ending = tl.max((tl.load(end_ptr + e, mask=e < ends, other=-1) == token).to(tl.int32), 0) == 1
    place = row * width + tl.where(live, count, width - 1)
    tl.store(tokens_ptr + place, token.to(tl.int64))
    tl.store(logprobs_ptr + place, logprob)
    tl.store(count_ptr + row, count + live.to(tl.int64))
    tl.store(finished_ptr + row, (live == 0) | ending | (count + 1 >= tl.load(limit_ptr)))
    tl.atomic_min(bad_ptr, count, mask=live & ((total < float("inf")) == 0))


# ---- the step --------------------------------------------------------------------------------------------------
# Each function gives a kernel its grid and block sizes. s: rollout.Slots, c: model.Config. The tensors made here belong
# to the graph of a captured step.
def block_of(size: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(size))


def add_norm(x: Tensor, delta: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    (R, E), (total, y) = x.shape, x.new_empty(2, *x.shape)  # not in place: threads may hold the same numbers
    warps = min(16, max(1, block_of(E) // 256))  # a thread has 8 numbers of a row: in bf16 one load of 16 bytes
    add_norm_kernel[(R,)](x, delta, norm.weight, total, y, delta.stride(0), norm.eps, E, block_of(E), num_warps=warps)
    return total, y


def rope(qkv: Tensor, attn: nn.Module, s, c, heads: int = 8) -> Tensor:
    """q (R, H · D). heads: of q, k and v, per program."""
    R, H, K, D = len(qkv), c.heads, c.kv_heads, c.head_dim
    q, bias = qkv.new_empty(R, H * D), getattr(attn.qkv_proj, "base", attn.qkv_proj).bias
    weights = (attn.q_norm.weight, attn.k_norm.weight) if c.qk_norm else (None, None)
    rope_kernel[(R, triton.cdiv(H + 2 * K, heads))](
        qkv, bias, *weights, s.cos, s.sin, s.length, s.count, q, *s.own[:, attn.layer], qkv.stride(0), s.N, c.norm_eps,
        H, K, D, s.G, heads, block_of(D), num_warps=4,
    )  # fmt: skip
    return q


def attend(q: Tensor, layer: int, s, c, splits: int = 0) -> Tensor:
    """(R, H · D). splits: pieces of a prompt, by default enough that a few slots, too, fill a GPU."""
    R, G, H, K, D, P = len(q), s.G, c.heads, c.kv_heads, c.head_dim, len(q) // s.G
    queries = min(block_of(G * H // K, 16), 32)  # more would need registers that the programs of own tokens lack
    groups = triton.cdiv(G * H // K, queries)
    splits = splits or max(1, min(256 // (P * K * groups), 8))  # not by T: a sum must not depend on other prompts
    parts, lse = (torch.empty(R, H, splits + 1, n, dtype=torch.float32, device=q.device) for n in (D, 1))
    # 32 keys, loaded two blocks ahead: four programs share a multiprocessor, so that its loads never pause.
    attend_kernel[(P * K, splits * groups + G)](
        q, *s.prefix[:, layer], *s.own[:, layer], s.length, s.count, s.finished, parts, lse, s.T, s.N,
        D**-0.5 * math.log2(math.e), H, K, D, G, splits, groups, queries, block_of(H // K, 16), block_of(G), 32,
        block_of(D, 16), num_warps=4, num_stages=3,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(R * H, 8),)](parts, lse, out := torch.empty_like(q), R * H, D, splits + 1, 8, block_of(D))
    return out


def swiglu(gate_up: Tensor, M: int) -> Tensor:
    out = gate_up.new_empty(len(gate_up), M)
    swiglu_kernel[(len(out), triton.cdiv(M, 1024))](gate_up, out, gate_up.stride(0), M, 1024)
    return out


def draw(logits: Tensor, s, end: Tensor, size: int = 2048) -> None:
    (R, V), size = logits.shape, min(size, block_of(logits.shape[1]))
    blocks = triton.cdiv(V, size)
    tops, sums = torch.empty(2, R, blocks, dtype=torch.float32, device=logits.device)
    weigh_kernel[(R, blocks)](logits, s.temperature, tops, sums, V, blocks, size)
    draw_kernel[(R,)](logits, s.temperature, tops, sums, s.seed, s.step, s.question, s.sample, s.limit, end, s.tokens,
                      s.logprobs, s.count, s.finished, s.bad, V, s.tokens.shape[1], blocks, len(end), size,
                      block_of(blocks), block_of(len(end)))  # fmt: skip


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) without bias. With adapters the row stride of the result is larger than its width."""
    return layer.decode(x) if isinstance(layer, LoRA) else F.linear(x, layer.weight)


def fused_step(model: nn.Module, s, end: Tensor, P: int, R: int, T: int, N: int) -> None:
    """`rollout.decode_step` for all lanes of the first P slots, in order. T and N are not needed.

    If the model has adapters, call `lora.stack` after they have changed.
    """
    assert R == P * s.G
    norms, last = [block.input_layernorm for block in model.layers] + [model.norm], s.count[:R, None] - 1
    y = norms[0](x := model.embed_tokens(s.tokens[:R].gather(1, last)[:, 0]))
    for layer, block in enumerate(model.layers):
        attn, mlp = block.self_attn, block.mlp
        q = rope(product(attn.qkv_proj, y), attn, s, model.config)
        x, y = add_norm(x, product(attn.o_proj, attend(q, layer, s, model.config)), block.post_attention_layernorm)
        inner = swiglu(product(mlp.gate_up_proj, y), model.config.intermediate_size)
        x, y = add_norm(x, product(mlp.down_proj, inner), norms[layer + 1])
    draw(model.head(y), s, end)
