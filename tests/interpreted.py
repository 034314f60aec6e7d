"""The fused decode step against the plain one, kernel by kernel and token by token, in Triton's interpreter.

test_kernels.py runs this file in a process of its own, because the interpreter is chosen before Triton is imported.
"""

from types import SimpleNamespace

import interpreter  # noqa: F401 (before kernels)

# isort: split
import compiled
import pytest
import torch
from test_graph import adapt
from test_kernels import close
from test_rollout import FAMILIES, eager, flat, random_network, same

import kernels
import model as models
import rollout
from run import draw, lora

half = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        torch.manual_seed(0)
        yield


def normal(*shape, dtype=torch.float32, more=0):
    """Normal values; with `more` its rows are that much longer in memory, as with adapters."""
    unread = torch.full((*shape[:-1], more), float("nan"))
    return torch.cat((torch.randn(shape), unread), -1).to(dtype)[..., : shape[-1]]


def state(net, P, G, T, N, seed=0):
    """Slots as if prompts of random lengths had been prefilled and each lane had drawn from 1 to N tokens."""
    torch.manual_seed(seed)
    s = rollout.Slots(net.config, P, G, T, N, dtype=net.dtype)
    s.reset(seed + 5, seed + 2, N)
    s.prefix.normal_(), s.own.normal_()
    s.length.random_(1, T + 1)[-1] = T
    s.count.random_(1, N)[0], s.count[0], s.count[-1] = 0, 1, N
    s.tokens.random_(8, 97), s.question.random_(2**62), s.sample.random_(8)
    s.temperature.copy_(torch.tensor([1.0, 0.0, 0.7, 1.5]).repeat(P * G)[: P * G])
    s.finished.fill_(False)
    return s


@half
@pytest.mark.parametrize("E", [40, 128])
def test_norms(dtype, E):
    norm = models.RMSNorm(E, 1e-5, dtype=dtype)
    norm.weight.copy_(torch.randn(E))
    x, delta = normal(5, E, dtype=dtype), normal(5, E, dtype=dtype, more=16)
    x[0], delta[0] = x[0] / 1000, 0  # so small that eps counts
    total, y = kernels.add_norm(x, delta, norm)
    assert torch.equal(total, x + delta)
    close(y, norm(x + delta), dtype)
    if dtype == torch.bfloat16:  # rounded at the same places: nearly always the same bits
        assert (y == norm(total)).float().mean() > 0.99


@half
@pytest.mark.parametrize("family", FAMILIES)
def test_rope(family, dtype):
    """q, k and v are those of the model's own layer; k and v stand at count - 1 of the row's cache and nowhere else."""
    net = random_network(family, dtype)
    c, (P, G, N) = net.config, (2, 3, 7)
    s, attn, seen = state(net, P, G, 48, N), net.layers[1].self_attn, []
    s.own.fill_(99)
    x, position = normal(P * G, c.hidden_size, dtype=dtype), s.length.repeat_interleave(G) + s.count - 1
    x[0] /= 1000  # so small that eps counts
    tables = (t[position][:, None, None] for t in (s.cos, s.sin))
    attn(x[:, None], *tables, lambda layer, q, k, v: (seen.extend((q, k, v)), q)[1])
    qkv = torch.nn.functional.linear(x, attn.qkv_proj.weight)
    given = normal(*qkv.shape, dtype=dtype, more=16).copy_(qkv)
    q, k, v = (t[:, :, 0] for t in seen)  # (R, heads, D)
    close(kernels.rope(given, attn, s, c, heads=4).view_as(q), q, dtype, 2)  # a bias is rounded once more
    wanted = torch.full_like(s.own, 99)
    for row in range(P * G):
        for cache, new in zip(wanted[:, 1], (k, v), strict=True):
            cache[row // G, :, row % G, s.count[row] - 1] = new[row]
    assert torch.equal(s.own == 99, wanted == 99)
    close(s.own.where(s.own != 99, 0), wanted.where(wanted != 99, 0), dtype, 2)


def test_a_launch_is_tried(monkeypatch):
    assert kernels.launch_fails(torch.device("cpu")) == ""
    monkeypatch.setattr(kernels, "probe", {(1,): lambda x: (_ for _ in ()).throw(AssertionError("no libcuda\n found"))})
    assert kernels.launch_fails(torch.device("cpu")).startswith("Triton fails (AssertionError: no libcuda found)")


#         P, G, H, K, D,   T,  N, splits
SIZES = [(3, 3, 4, 2, 16, 150, 12, 2), (1, 1, 2, 2, 24, 70, 5, 3), (2, 4, 4, 1, 8, 33, 90, 1),
         (1, 5, 7, 1, 12, 40, 6, 0), (1, 3, 16, 1, 8, 40, 6, 1), (1, 2, 4, 2, 128, 130, 40, 0),
         (1, 70, 2, 2, 8, 40, 4, 0), (2, 33, 7, 1, 12, 40, 4, 0)]  # fmt: skip


@half
@pytest.mark.parametrize("P, G, H, K, D, T, N, splits", SIZES)
def test_attention(P, G, H, K, D, T, N, splits, dtype):
    """Against fp64. NaN stands wherever nothing may be read: beyond a prompt and a count, in what is finished."""
    torch.manual_seed(D)
    c, R = SimpleNamespace(heads=H, kv_heads=K, head_dim=D), P * G
    prefix, own = normal(2, 2, P, K, T, D, dtype=dtype), normal(2, 2, P, K, G, N, D, dtype=dtype)
    length, count, finished = torch.randint(1, T + 1, (P,)), torch.randint(1, N + 1, (R,)), torch.arange(R) == 1
    length[0], count[0], count[-1] = T, N, 1
    finished[2 * G :] = True  # a whole slot
    for p in range(P):
        prefix[:, :, p, :, 0 if finished[p * G : p * G + G].all() else length[p] :] = float("nan")
    for row in range(R):
        own[:, :, row // G, :, row % G, 0 if finished[row] else count[row] :] = float("nan")
    s = SimpleNamespace(prefix=prefix, own=own, length=length, count=count, finished=finished, G=G, T=T, N=N)
    q = 2 * normal(R, H * D, dtype=dtype)
    out = kernels.attend(q, 1, s, c, splits).view(R, H, D)
    assert out.isfinite().all()
    for row in (~finished).nonzero()[:, 0].tolist():
        p, g = row // G, row % G
        seen = ((prefix[i, 1, p, :, : length[p]], own[i, 1, p, :, g, : count[row]]) for i in range(2))
        keys, values = (torch.cat(x, 1).double() for x in seen)  # (K, length + count, D)
        scores = q[row].view(K, H // K, D).double() @ keys.mT * D**-0.5
        close(out[row], (scores.softmax(-1) @ values).view(H, D), dtype)
    if D == 128:  # sums do not depend on the room that there is for other prompts
        s.prefix, s.T = torch.cat((prefix, torch.full_like(prefix, float("nan"))), -2), 2 * T
        assert torch.equal(kernels.attend(q, 1, s, c, splits).view(R, H, D), out)


@half
def test_swiglu(dtype):
    for M in (48, 1500):
        gate_up = 3 * normal(3, 2 * M, dtype=dtype, more=16)
        gate, up = gate_up.chunk(2, -1)
        wanted, out = torch.nn.functional.silu(gate) * up, kernels.swiglu(gate_up, M)
        close(out, wanted, dtype)
        assert dtype == torch.float32 or (out == wanted).float().mean() > 0.99


def lanes(R, N=8):
    """What `draw` reads and writes, for rows that have drawn from 1 to N - 1 tokens."""
    return SimpleNamespace(
        tokens=torch.zeros(R, N + 1, dtype=torch.int64), logprobs=torch.zeros(R, N + 1), temperature=torch.ones(R),
        count=torch.arange(R) % (N - 1) + 1, finished=torch.zeros(R, dtype=torch.bool), sample=torch.arange(R) % 5,
        question=torch.randint(0, 2**62, (R,)), seed=torch.tensor(17), step=torch.tensor(2**40 + 3),
        limit=torch.tensor(N), bad=torch.tensor(rollout.NEVER))  # fmt: skip


def drawn(s, end, logits, size):
    """Draws; returns tokens, logprobs, and the uniforms and counts before."""
    count, u = s.count.clone(), draw.uniforms(s.seed, s.step, s.question, s.sample, s.count)
    place = (range(len(count)), torch.where(s.finished, s.tokens.shape[1] - 1, count))
    kernels.draw(logits, s, end, size)
    return s.tokens[place], s.logprobs[place], u, count


def test_the_hash_is_the_plain_one():
    tokens, _, u, _ = drawn(lanes(24), torch.tensor([5]), torch.zeros(24, 512), 128)
    assert torch.equal(tokens, (u * 512).long())  # of equal logits the token is u · V, and all sums are exact


@half
@pytest.mark.parametrize("V, size", [(300, 64), (97, 2048)])  # several blocks, the last not full; one block
def test_draw(V, size, dtype):
    s, logits, end, ties = lanes(20), 3 * normal(20, V, dtype=dtype), torch.tensor([5, 6, 7]), 0
    s.temperature.copy_(torch.tensor([1.0, 0.7, 0.0, 1.5, 0.05] * 4))
    s.finished[3::7] = True
    logits[::2, V // 3 : V // 2] = -1e9  # of no probability
    logits[2::5, 30] = logits[2::5, 60] = logits[2::5, V - 1] = 20  # a tie of greedy rows
    logits[0], logits[0, 6], was = -1e9, 0, s.finished.clone()  # row 0 ends its turn
    tokens, logprobs, u, count = drawn(s, end, logits, size)
    wanted, wanted_logprobs = draw.sample_tokens(logits.clone(), s.temperature, u)
    assert (tokens[2::5] == 30).all() and (logits[range(20), tokens] > -1e8).all() and tokens[0] == 6
    same = tokens == wanted
    close(logprobs[same], wanted_logprobs[same], scale=2)
    cdf = (logits.double() / s.temperature.double().clamp(min=1e-9)[:, None]).softmax(-1).cumsum(-1)
    for row in (~same).nonzero()[:, 0].tolist():  # u lies on the border of both
        for token in (tokens[row], wanted[row]):
            assert cdf[row, token] > u[row] - 1e-5 and (not token or cdf[row, token - 1] < u[row] + 1e-5)
        ties += 1
    assert ties <= 1
    assert torch.equal(s.count, count + ~was) and s.bad == rollout.NEVER
    assert torch.equal(s.finished, was | (tokens[:, None] == end).any(-1) | (count + 1 >= 8)) and s.finished[0]
    s.tokens[range(20), torch.where(was, 8, count)] = 0
    s.logprobs[range(20), torch.where(was, 8, count)] = 0
    assert not s.tokens.any() and not s.logprobs.any()  # nothing is written elsewhere


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(value):
    """One is seen, in a live row only, and the least count is kept."""
    s, logits = lanes(12), normal(12, 300)
    logits[3, 299] = logits[6, 0] = logits[1, 5] = value  # counts 4, 7 and 2
    s.finished[1] = True
    for _ in range(2):
        tokens, *_ = drawn(s, torch.tensor([5]), logits, 64)
        assert s.bad == 4 and (tokens >= 0).all() and (tokens < 300).all()
        s.finished[:] = True


# ---- whole steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_decodes_are_the_plain_steps(family, monkeypatch):
    """Every token and logprob, through slots that refill; Qwen2 with adapters, which change between two calls."""
    monkeypatch.setattr(rollout, "Graphs", eager)
    monkeypatch.setattr(rollout, "LOOK_EVERY", 2)
    with torch.inference_mode(False):
        net = adapt(random_network(family), 4 if family == "qwen2" else 0)
    texts = [[8 + (7 * n + i * i) % 80 for i in range(n)] for n in (30, 1, 17)]
    fused, plain = (rollout.Sampler(net, range(5, 20), rows=4, lanes=2, kernels=k) for k in ("fused", "plain"))
    for n in (3, 1) if lora.adapters(net) else (3,):
        a, b = (x.generate(texts[:n], 3, 6, [1.0, 0.0, 0.8], seed=n, step=3) for x in (fused, plain))
        same(a, b)
        assert n == 1 or len({len(x.tokens) for x in flat(a)}) > 2
        for w in (w for name, w in net.named_parameters() if ".B." in name):
            w *= 1.5


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama, one key head"])
def test_bf16_logits_are_as_exact(family):
    """In bf16 the logits of the fused step are as near to those of fp32 as the plain step's."""
    half, exact, errors, end = random_network(family, torch.bfloat16), random_network(family), [], torch.tensor([96])
    for w, rounded in zip(exact.parameters(), half.parameters(), strict=True):
        w.copy_(rounded)
    for seed in range(3):
        found = []
        for net, step in ((exact, rollout.decode_step), (half, rollout.decode_step), (half, kernels.fused_step)):
            s, head = state(net, 2, 2, 40, 8, seed), net.head
            s.prefix.copy_(s.prefix.bfloat16()), s.own.copy_(s.own.bfloat16())
            s.count.clamp_(max=7)
            net.head = lambda x, head=head: found.append(head(x)) or found[-1].clone()  # noqa: B023
            step(net, s, end, 2, 4, 40, 8)  # the clone: sample_tokens overwrites fp32 logits
            net.head = head
        wanted, *others = (x.double() for x in found)
        errors.append([((x - wanted).norm() / wanted.norm()).item() for x in others])
    plain, fused = (sum(e) / len(e) for e in zip(*errors, strict=True))
    assert fused < 1.3 * plain < 0.1, (fused, plain)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_step_can_be_captured(rank, monkeypatch):
    """At another place of another generation the launches are the same: grids, numbers, and addresses of what lasts.

    compiled.py runs the step without data, where whatever asks for a value raises.
    """
    with torch.inference_mode(False):
        net = adapt(random_network("qwen3"), rank)
    lora.stack(net)
    s, end, records = state(net, 2, 2, 40, 8), torch.tensor([96]), []
    lasting = [*vars(s).values(), *net.parameters(), *(x for a in lora.adapters(net) for x in a.stacked), end]
    lasting = {t.untyped_storage().data_ptr() for t in lasting if isinstance(t, torch.Tensor)}

    def note(a):
        if not isinstance(a, torch.Tensor):
            return a
        return a.shape, a.stride(), a.data_ptr() if a.untyped_storage().data_ptr() in lasting else "scratch"

    class Noted(compiled.Noted):
        def __getitem__(self, grid):
            def launch(*args, **options):
                records[-1].append((self.kernel, grid, [note(a) for a in args], options))
                with torch.utils._python_dispatch._disable_current_modes():  # the interpreter copies
                    self.kernel[grid](*args, **options)

            return launch

    for name in compiled.NAMES:
        monkeypatch.setattr(kernels, name, Noted(getattr(kernels, name), []))
    for place in range(2):
        records.append([])
        with compiled.Count() as count:
            kernels.fused_step(net, s, end, 2, 4, 40, 8)
        assert count.seen["linear"] == 9 and count.seen["addmm_"] == (8 if rank else 0)
        assert not count.seen.keys() & {"_local_scalar_dense", "nonzero", "_to_copy", "copy_"}
        s.reset(place, 77, 6)
        s.count.clamp_(max=8)
        s.finished[:] = torch.tensor([False, True, False, False])
        s.length.sub_(1).clamp_(min=1), s.temperature.add_(0.1), s.question.add_(1)
    assert records[0] == records[1] and len(records[0]) == 2 * 6 + 2
