"""rollout.py: a sample depends on its own five numbers alone, follows the softmax, and ends where it should."""

import random
from collections import Counter

import plain as plain_sampler
import pytest
import tiny
import torch

import faith
import grpo
import model as models
import rollout
from rollout import Sampler
from run import draw

BITS = 2.0**-24


@pytest.fixture
def sampler(network):
    return Sampler(network)


def flat(groups):
    return [answer for group in groups for answer in group]


def same(a, b):
    """Two lists of groups hold the same samples: tokens exactly, logprobs up to rounding."""
    assert list(map(len, a)) == list(map(len, b))
    assert [(c.tokens, c.ended) for c in flat(a)] == [(c.tokens, c.ended) for c in flat(b)]
    for x, y in zip(flat(a), flat(b), strict=True):
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


def endless(network, rows=128):
    """A sampler whose answers never end."""
    sampler = Sampler(network, rows=rows)
    sampler.end_of_turn = [-1]  # a token that no sampler can draw
    return sampler


@torch.no_grad()
def logits_of(network, prompt, tokens):
    """The logits (len(tokens), V) that draw `tokens` after `prompt`, from one plain forward pass."""
    return network(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]


def p_value(counts, probabilities):
    """Of a chi-square test; bins that expect fewer than 5 are taken together."""
    stats = pytest.importorskip("scipy.stats")
    expected = probabilities.double() * counts.sum()
    small = expected < 5
    seen, expected = (torch.cat([x[~small], x[small].sum()[None]]) for x in (counts.double(), expected))
    if expected[-1] < 5:
        seen, expected = seen[:-1], expected[:-1]
    return stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue


# ---- what a sample depends on --------------------------------------------------------------------------------


def test_nothing_else_changes_a_sample(network, sampler, prompts):
    """Not the other prompts and samples, nor how many tokens may come, nor the rows, nor the order."""
    how, keys = {"seed": 4, "step": 2}, list(range(50, 50 + len(prompts)))
    whole = sampler.generate(prompts, 3, 12, keys=keys, **how)
    assert len({len(c.tokens) for c in flat(whole)}) > 3  # ragged, or the test shows little
    assert len({tuple(c.tokens) for c in flat(whole)}) == 3 * len(prompts)
    same(whole, [sampler.generate([p], 3, 12, keys=[key], **how)[0] for p, key in zip(prompts, keys, strict=True)])
    same(whole[:2], [group[:3] for group in sampler.generate(prompts[:2], 20, 12, keys=keys[:2], **how)])
    for a, b in zip(flat(sampler.generate(prompts, 3, 5, keys=keys, **how)), flat(whole), strict=True):
        assert (a.tokens, a.ended) == (b.tokens[:5], b.ended and len(b.tokens) <= 5)
    for temperatures in ([0.0, 1.0], [0.7, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.5]):  # what else is asked
        mixed = sampler.generate(prompts, len(temperatures), 12, temperatures, **how, keys=keys)
        ours = [[c for c, t in zip(group, temperatures, strict=True) if t == 1] for group in mixed]
        same(ours, [group[: temperatures.count(1.0)] for group in whole])
    for rows in (1, 7, 12, 1000):
        order = random.Random(rows).sample(range(len(prompts)), len(prompts))
        given = [[x[i] for i in order] for x in (prompts, keys, whole)]
        same(given[2], Sampler(network, rows=rows).generate(given[0], 3, 12, keys=given[1], **how))


# ---- against the plain sampler -------------------------------------------------------------------------------

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "head_dim": 16,
         "eos_token_id": [5, 6, 7]}  # fmt: skip
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "rope_theta": 1e4, "rope_scaling": SCALING},
    "llama, one key head": {"model_type": "llama", "num_key_value_heads": 1, "rope_theta": 1e4},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "rope_theta": 1e6},
}


def random_network(family, dtype=torch.float32):
    torch.manual_seed(3)
    network = models.Transformer(models.Config.from_json(SHAPE | FAMILIES[family]), dtype)
    with torch.no_grad():
        for w in network.parameters():
            w.copy_(torch.randn(w.shape) * (0.3 if w.dim() > 1 else 1))
    return network


def random_texts():
    generator = random.Random(1)
    return [[generator.randrange(97) for _ in range(n)] for n in (30, 1, 17, 44, 2, 30, 9, 61, 5)]


def eager(run, buckets):
    """In place of `rollout.Graphs`: nothing is captured."""
    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows, lanes, static", [(128, 8, False), (6, 2, False), (10, 3, True), (12, 4, True)])
def test_equals_the_plain_sampler(family, rows, lanes, static, monkeypatch):
    """The same samples, sampled and greedy, whatever the slots, buckets and refills; two calls with the same slots."""
    network, texts, moves, move = random_network(family), random_texts(), [], rollout.Slots.move
    monkeypatch.setattr(rollout, "Graphs", eager)
    monkeypatch.setattr(rollout.Slots, "move", lambda *a: (moves.append(a[1:]), move(*a)))
    plain, ours = plain_sampler.Sampler(network), Sampler(network, rows=rows, lanes=lanes)
    ours.static = static
    lengths = set()
    for temperature in (1.0, [0.0, 0.8, 1.0, 1.5, 1.0]):
        a = plain.generate(texts, 5, 24, temperature, seed=9, step=2)
        same(a, ours.generate(texts, 5, 24, temperature, seed=9, step=2))
        lengths |= {len(c.tokens) for c in flat(a)}
    assert min(lengths) < 4 and max(lengths) == 24
    assert moves or rows != 6  # slots in use did move together


def test_smollm2_samples_equal_the_plain_samplers(smollm2, questions):
    """On a real model; samples part only where the uniform falls within 1e-4 of the border between two tokens."""
    network, tokenizer = models.load(smollm2), models.Tokenizer(smollm2)
    texts = [faith.explanation_prompt(tokenizer, q, i % 3) for i, q in enumerate(questions[:6])]
    temperatures, ties = [0.0, 1.0, 0.7, 1.0], 0
    ours, plain = (s.generate(texts, 4, 16, temperatures, seed=4)
                   for s in (Sampler(network, rows=8), plain_sampler.Sampler(network)))  # fmt: skip
    for k, (a, b) in enumerate(zip(flat(ours), flat(plain), strict=True)):
        i, j = divmod(k, 4)
        n = next((t for t, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), None)
        assert a.logprobs[:n] == pytest.approx(b.logprobs[:n], abs=1e-4)  # of all tokens, unless they part at n
        if n is None:
            continue
        ties += 1
        logits = logits_of(network, texts[i], a.tokens[: n + 1])[-1]
        cdf = (logits.double() / (temperatures[j] or 1)).softmax(-1).cumsum(-1)
        u = draw.uniforms(4, 0, torch.tensor([i]), torch.tensor([j]), n)
        for token in (a.tokens[n], b.tokens[n]):
            if temperatures[j]:
                assert (cdf[token - 1] if token else 0) - 1e-4 < u < cdf[token] + 1e-4
            else:
                assert logits.max() - logits[token] < 1e-4
    assert ties < 8


def test_shared_keys_and_values_of_8b():
    """64 prompts of 300 tokens x 16 samples of 200, Llama-3.1-8B in bf16: 29 GB; 67 with a copy for each sample."""
    shape = SHAPE | {"num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128, "hidden_size": 4096}
    config = models.Config.from_json(shape | {"model_type": "llama", "num_key_value_heads": 8, "rope_theta": 5e5})
    for P, G, size in ((64, 16, 29_360_128_000), (64 * 16, 1, 67_108_864_000)):
        assert rollout.Slots(config, P, G, 300, 200, "meta", torch.bfloat16).kv_bytes() == size


# ---- the uniforms --------------------------------------------------------------------------------------------


def splitmix(parts):
    """The same chain in Python's unbounded integers, written from Steele, Lea & Flood 2014 (SplitMix64)."""
    word, h = 2**64, 0
    for part in parts:
        h = ((h ^ part % word) + 0x9E3779B97F4A7C15) % word
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % word
        h = (h ^ h >> 27) * 0x94D049BB133111EB % word
        h ^= h >> 31
    return (h >> 40) * 2.0**-24


def test_uniforms_equal_big_integers():
    """A change of the hash changes every sample of every recorded run."""
    generator = random.Random(0)
    edges = [0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -1, -(2**63)]
    rows = [[generator.choice([*edges, generator.getrandbits(63)]) for _ in range(5)] for _ in range(2000)]
    assert draw.uniforms(*torch.tensor(rows).T).tolist() == [splitmix(row) for row in rows]
    seed, step, question, sample, position = rows[0]  # numbers and tensors alike
    mixed = draw.uniforms(seed, step, torch.tensor([question]), torch.tensor([sample]), position)
    assert mixed.tolist() == [splitmix(rows[0])]
    # SplitMix64's published first output from state 0.
    assert draw.mix(torch.tensor(-0x61C8864680B583EB)).item() % 2**64 == 0xE220A8397B1DCDAF


# ---- from logits to a token ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_sampling_follows_the_softmax(network, temperature):
    """First and second tokens of one prompt, against their exact probabilities."""
    prompt, n, V = [tiny.START, 60, 70, 80], 4000, network.config.vocab_size
    answers = flat(endless(network, rows=n).generate([prompt] * 3, n, 2, temperature, keys=[3, 5, 7]))
    with torch.no_grad():
        pairs = torch.cat([torch.tensor(prompt).expand(V, 4), torch.arange(V)[:, None]], 1)
        p = (network(pairs)[:, 3:].double() / temperature).softmax(-1)  # (V, 2, V)
    first, second = p[0, 0], p[0, 0] @ p[:, 1]
    counts = [torch.tensor([c.tokens[i] for c in answers]).bincount(minlength=V) for i in (0, 1)]
    assert p_value(counts[0], first) > 1e-3
    assert p_value(counts[1], second) > 1e-3
    assert p_value(counts[0], first**1.15 / (first**1.15).sum()) < 1e-3  # the test can tell


def test_inverse_cdf_by_hand():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.1, 0.2499, 0.2501, 0.6, 0.7499, 0.7501, 1 - BITS])
    tokens, logprobs = draw.sample_tokens(p.log().repeat(len(u), 1), torch.ones(len(u)), u)
    assert tokens.tolist() == [1, 1, 1, 3, 3, 3, 4, 4]
    assert logprobs.tolist() == pytest.approx(p[tokens].log().tolist())


@pytest.mark.parametrize("V", [1, 2, 3, 1000, 128_256])
def test_extreme_uniforms_and_impossible_tokens(V):
    """Draws stay inside the vocabulary. A token of probability 0 is never drawn, nor is it at either end."""
    generator = torch.Generator().manual_seed(V)
    logits = 5 * torch.randn(16, V, generator=generator)
    banned = torch.rand(16, V, generator=generator) < 0.5
    banned[:, [0, -1]], banned[:, V // 2] = V > 2, False
    logits[banned] = -torch.inf
    for u in (torch.zeros(16), torch.full((16,), 1 - BITS), torch.rand(16, generator=generator)):
        tokens, logprobs = draw.sample_tokens(logits.clone(), torch.ones(16), u)
        assert not banned.gather(1, tokens[:, None]).any() and logprobs.isfinite().all()
        cdf = logits.double().softmax(-1).cumsum(-1).gather(1, tokens[:, None])[:, 0]
        assert (cdf > u - 1e-3).all()


# ---- against the full forward pass ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers(network, sampler, prompts, temperature):
    answers = sampler.generate(prompts, 3, 14, temperature, seed=4)
    recorded = [logprob for c in flat(answers) for logprob in c.logprobs]
    packed = grpo.pack([(p, [c.tokens for c in group]) for p, group in zip(prompts, answers, strict=True)])
    with torch.no_grad():
        assert recorded == pytest.approx(grpo.token_logprobs(network, packed, temperature).tolist(), abs=1e-4)


def test_option_logprobs(network, sampler, prompts):
    options = [5, 6, 7]
    scored = sampler.option_logprobs(prompts, options)
    assert scored.dtype == torch.float32 and scored.shape == (len(prompts), 3)
    for prompt, row in zip(prompts, scored, strict=True):
        wanted = logits_of(network, prompt, [0])[0, options].log_softmax(-1)
        assert row.tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    backwards = sampler.option_logprobs(prompts[::-1], options[::-1])
    assert (backwards.flip(0, 1) - scored).abs().max() < 1e-4


@pytest.mark.parametrize("together", [2, 3, 50])
def test_option_logprobs_in_runs(network, prompts, together, monkeypatch):
    """The figures are the same; each run of prompts is scored in one pass, and what it shares is computed once."""
    passes = []

    class Watching(models.Transformer):
        def hidden(self, tokens, *rest, **more):
            passes.append(tokens[0].tolist())
            return super().hidden(tokens, *rest, **more)

    monkeypatch.setattr(rollout, "PREFILL", 300)  # so that there are several passes
    prompts = [*prompts, *(prompt[:-4] + [90 + i] for i, prompt in enumerate(prompts[:-1])), prompts[0], prompts[0]]
    watched = Watching(network.config)
    watched.load_state_dict(network.state_dict())
    scored = Sampler(watched).option_logprobs(prompts, [5, 6], together)
    alone = torch.cat([Sampler(network).option_logprobs([prompt], [5, 6]) for prompt in prompts])
    assert (scored - alone).abs().max() < 1e-4
    shares, saved = [], 0
    for run in [prompts[i : i + together] for i in range(0, len(prompts), together)]:
        columns = list(zip(*(prompt[:-1] for prompt in run), strict=False))
        shared = next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(columns))
        shares.append(shared * (len(run) > 1))
        saved += shares[-1] * (len(run) - 1)
        laid = run[0][: shares[-1]] + [token for prompt in run for token in prompt[shares[-1] :]]
        assert any(laid == p[i : i + len(laid)] for p in passes for i in range(len(p)))
    assert max(shares) > 4 or together == 50
    assert sum(map(len, passes)) == sum(map(len, prompts)) - saved


# ---- the end of a turn ---------------------------------------------------------------------------------------


def test_ends_at_any_token_of_the_set(network, prompts):
    """Against the same samples from a sampler that never ends. Token 0, among the ends, also pads prompts."""
    free = flat(endless(network).generate(prompts, 6, 16, 2.0))
    assert {(len(c.tokens), c.ended) for c in free} == {(16, False)}
    late = next(c.tokens[-1] for c in free if c.tokens[-1] not in c.tokens[:-1])
    ends, found = {0, tiny.END, late, *sorted({token for c in free for token in c.tokens})[10:40:3]}, set()
    for c, long in zip(flat(Sampler(network, ends).generate(prompts, 6, 16, 2.0)), free, strict=True):
        stops = [t for t, token in enumerate(long.tokens) if token in ends]
        n = stops[0] + 1 if stops else 16
        assert (c.tokens, c.ended) == (long.tokens[:n], bool(stops))  # the end token included
        assert c.logprobs == pytest.approx(long.logprobs[:n], abs=1e-4)
        found |= {(c.tokens[-1], n)} if c.ended else set()
    assert len({token for token, _ in found}) > 3 and {1, 16} <= {n for _, n in found}  # first and last place


def test_the_end_of_turn_is_the_models_own_set(network, sampler):
    assert sampler.end_of_turn == [tiny.END, tiny.STOP]
    assert Sampler(network, {7, 5}).end_of_turn == [5, 7]


@pytest.fixture
def static(network, monkeypatch):
    """A sampler that works as on CUDA, except that it captures nothing."""
    monkeypatch.setattr(rollout, "Graphs", eager)
    sampler = Sampler(network, rows=40)
    sampler.static = True
    return sampler


def test_slots_are_kept(network, static, prompts):
    """By a call with fewer or shorter prompts or shorter samples; not with more, with another group or other ends."""
    shortest, kept = sorted(prompts, key=len)[:2], None
    for some, samples, new, keeps in [
        (prompts[1:], 3, 10, False), (prompts[:1], 3, 10, True), (shortest, 3, 10, True), (prompts[1:], 3, 4, True),
        (prompts[3:], 3, 1, True), (prompts, 3, 11, False), (prompts, 2, 11, False), (prompts[:3], 2, 11, True),
        (prompts[:3], 9, 11, False), (prompts, 9, 11, False), (prompts[:3], 9, 11, True),
    ]:  # fmt: skip
        same(static.generate(some, samples, new), Sampler(network).generate(some, samples, new))
        assert (static.slots is kept) == keeps
        kept = static.slots
    many, longest = shortest * 3, [max(prompts, key=len)]
    for some, keeps in (
        (many, False),
        (longest, False),
        (many, True),
        (longest, True),
        (many * 2, False),
        (longest, True),
    ):
        same(static.generate(some, 2, 5), Sampler(network).generate(some, 2, 5))
        assert (static.slots is kept) == keeps, (len(some), len(some[0]))
        kept = static.slots
    static.end_of_turn = [-1]  # what was captured knows the ends
    same(static.generate(prompts[:3], 9, 11), endless(network).generate(prompts[:3], 9, 11))


def test_transfers_between_host_and_device(static, prompts, monkeypatch):
    """A few for a pass of prompts and for each look at the device, however many prompts and samples there are."""
    calls, transfers = Counter(), Counter()

    def counted(owner, name, counter):
        was = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (counter.update([name]), was(*a, **k))[1])

    for name in ("prefill", "begin_samples", "collect"):
        counted(rollout.Schedule, name, calls)
    for name in ("tolist", "item", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__"):
        counted(torch.Tensor, name, transfers)
    for name in ("tensor", "as_tensor"):
        counted(torch, name, transfers)
    static.lanes = 4
    samples = static.generate([*prompts, *prompts], 8, 20)
    assert len(flat(samples)) > 150 and calls["prefill"] < 15 and calls["collect"] < 25
    # to_host: one copy and one list for each of at most three tensors.
    assert transfers.pop("cpu") <= calls["prefill"] + 2 * calls["collect"]
    assert transfers.pop("tolist") <= 3 * calls["prefill"] + 5 * calls["collect"]
    # send: 4 for a pass, the temperatures with their numbers, and the ends.
    assert transfers.pop("as_tensor") <= 4 * calls["prefill"] + calls["begin_samples"] + calls["collect"] + 3
    assert not transfers


@pytest.mark.parametrize(
    "rows, prompts, samples, static, gigabytes, sizes",
    [(None, 64, 16, False, 900, (16, 8, 304, 200)), (0, 64, 16, True, 64, (32, 8, 320, 200)),
     (None, 64, 16, True, 160, (64, 8, 320, 200)), (None, 64, 16, True, 10, (16, 8, 320, 200)),
     (512, 64, 16, True, 10, (64, 8, 320, 200)), (7, 64, 16, True, 10, (1, 7, 320, 200)),
     (None, 4, 16, True, 64, (4, 16, 320, 200)), (None, 3, 2, True, 64, (4, 2, 320, 200))],
)  # fmt: skip
def test_rows_by_memory(rows, prompts, samples, static, gigabytes, sizes):
    """At the sizes of Llama-3.1-8B: 256 rows take 8 GB. Few prompts may have more lanes each."""
    shape = SHAPE | {"num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128, "hidden_size": 4096}
    config = models.Config.from_json(shape | {"model_type": "llama", "num_key_value_heads": 8, "rope_theta": 5e5})
    _, slots = rollout.sized(config, torch.bfloat16, rows, gigabytes * 10**9, prompts, samples, 300, 200, static)
    assert slots.sizes == sizes


# ---- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts, changes, words",
    [([[1], [1] * 509], {"max_new_tokens": 4}, "prompt 1 has 509 tokens and 4 more .*context is 512"),
     ([[1], []], {}, "prompt 1 is empty"), ([], {}, "there must be a prompt"),
     ([[1]], {"samples": 0}, "at least 1"), ([[1]], {"max_new_tokens": 0}, "at least 1"),
     *(([[1]], {"temperature": t}, "temperature must be one number or one per sample")
       for t in (-0.1, float("nan"), float("inf"), [1.0], [1.0, -1.0], [1.0, 1.0, 1.0]))],
)  # fmt: skip
def test_bad_arguments(sampler, prompts, changes, words):
    with pytest.raises(ValueError, match=words):
        sampler.generate(prompts, **{"samples": 2, **changes})


def test_the_longest_prompts(sampler):
    assert len(sampler.generate([[1] * 508], 1, 4)) == len(sampler.option_logprobs([[1] * 511], [5, 6])) == 1
    assert sampler.option_logprobs([], [5, 6]).shape == (0, 2)
    for prompt, words in (([1] * 512, "prompt 0 has"), ([], "prompt 0 is empty")):
        with pytest.raises(ValueError, match=words):
            sampler.option_logprobs([prompt], [5, 6])


def test_no_memory_for_the_cache(sampler, prompts, monkeypatch):
    config = sampler.model.config
    one = rollout.Slots(config, 1, 4, -(-max(map(len, prompts)) // 16) * 16, 10, "meta").kv_bytes()
    monkeypatch.setattr(rollout, "free_bytes", lambda device: 3 * one + one // 2)
    with pytest.raises(ValueError, match=r"KV cache of \d+ prompts x 4 samples .* enough for 3 prompts"):
        sampler.generate(prompts, 4, 10)
    assert len(sampler.generate(prompts[:3], 4, 10)) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_stop_the_run(folder, prompts, value):
    network = models.load(folder)
    sampler = endless(network)
    tokens = sampler.generate(prompts[:1], 1, 8, step=6)[0][0].tokens
    place = next(i for i, token in enumerate(tokens) if i > 1 and token not in prompts[0] + tokens[:i])
    # Broken as soon as this token is fed; then from the first token on.
    for weight, number in ((network.embed_tokens.weight[tokens[place]], place + 2), (network.lm_head.weight[3, :1], 1)):
        weight.data.fill_(value)
        with pytest.raises(ValueError, match=f"not finite at new token {number} of sampling step 6"):
            sampler.generate(prompts[:1], 1, 8, step=6)
