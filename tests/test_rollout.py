"""rollout.py: a sample hangs on its own five numbers alone, follows the softmax, and ends where it should."""

import random

import plain as plain_sampler
import pytest
import tiny
import torch

import faith
import model as models
import reward
import rollout
import tasks
import train
from rollout import Sampler

BITS = 2.0**-24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def network(folder):
    return models.load(folder)


@pytest.fixture(scope="module")
def sampler(network):
    return Sampler(network)


@pytest.fixture(scope="module")
def prompts(folder):
    """Decision and explanation prompts of unequal length, and one of a single token."""
    tokenizer = models.Tokenizer(folder)
    questions = tasks.load("esnli", tiny.ROOT / "tests" / "data" / "esnli")
    cases = faith.draw_cases(questions[:9:2], "bias", 0, reward.words("bias"))
    texts = [faith.explanation_prompt(tokenizer, case.edited, i % 3) for i, case in enumerate(cases)]
    return [*texts, *(faith.decision_prompt(tokenizer, case.question) for case in cases), [tiny.START]]


def same(a, b):
    """Two lists of groups hold the same samples: tokens exactly, logprobs up to rounding."""
    assert [[c.tokens for c in group] for group in a] == [[c.tokens for c in group] for group in b]
    assert [[c.ended for c in group] for group in a] == [[c.ended for c in group] for group in b]
    for x, y in zip((c for g in a for c in g), (c for g in b for c in g), strict=True):
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


def endless(network, rows=128):
    """A sampler whose answers never end."""
    sampler = Sampler(network, rows=rows)
    sampler.end_of_turn = [-1]  # a token that no sampler can draw
    return sampler


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


def test_batched_is_alone(sampler, prompts):
    together = sampler.generate(prompts, 3, 12, seed=5, step=2)
    alone = [sampler.generate([prompt], 3, 12, seed=5, step=2, keys=[i])[0] for i, prompt in enumerate(prompts)]
    same(together, alone)
    assert len({len(c.tokens) for group in together for c in group}) > 3  # ragged, or the test shows little
    assert len({tuple(c.tokens) for group in together for c in group}) == 3 * len(prompts)


@pytest.mark.parametrize("rows", [1, 7, 12, 1000])
def test_rows_and_order_change_nothing(network, sampler, prompts, rows):
    whole = sampler.generate(prompts, 3, 10, keys=list(range(50, 50 + len(prompts))))
    order = list(range(len(prompts)))
    random.Random(rows).shuffle(order)
    other = Sampler(network, rows=rows).generate(
        [prompts[i] for i in order], 3, 10, keys=[50 + i for i in order]
    )  # fmt: skip
    same([whole[i] for i in order], other)


def test_the_other_prompts_of_a_batch_change_nothing(sampler, prompts):
    first = sampler.generate([prompts[0], prompts[1]], 2, 10)
    second = sampler.generate([prompts[0], prompts[-1], *prompts[3:6], prompts[0]], 2, 10)
    same(first[:1], second[:1])


def test_more_samples_keep_those_there_were(sampler, prompts):
    few, many = (sampler.generate(prompts, n, 10, seed=3) for n in (4, 8))
    same(few, [group[:4] for group in many])


def test_max_new_tokens_only_cuts(sampler, prompts):
    short, long = (sampler.generate(prompts, 4, n) for n in (5, 20))
    for a, b in zip((c for g in short for c in g), (c for g in long for c in g), strict=True):
        assert a.tokens == b.tokens[:5]
        assert a.ended == (b.ended and len(b.tokens) <= 5)


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"keys": [8]}])
def test_seed_step_and_key_change_samples(sampler, prompts, change):
    base = {"seed": 0, "step": 0, "keys": [7]}
    a, b, again = (sampler.generate(prompts[:1], 4, 16, **kw)[0] for kw in (base, base | change, base))
    same([a], [again])
    assert all(x.tokens != y.tokens for x, y in zip(a, b, strict=True))
    assert len({tuple(c.tokens) for c in a}) == 4  # so does the sample's number


# ---- against the plain sampler -------------------------------------------------------------------------------

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "head_dim": 16}  # fmt: skip
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, "rope_theta": 1e4, "rope_scaling": SCALING},
    "llama, one key head": {"model_type": "llama", "num_key_value_heads": 1, "rope_theta": 1e4},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "rope_theta": 1e6},
}


def eager(model, slots, end, buckets):
    """In place of `rollout.Graphs`: nothing is captured."""
    return lambda bucket: rollout.decode_step(model, slots, end, *bucket)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows, lanes, static", [(128, 8, False), (6, 2, False), (10, 3, True), (12, 4, True)])
def test_equals_the_plain_sampler(family, rows, lanes, static, monkeypatch):
    """The same samples, sampled and greedy, whatever the slots, buckets and refills; two calls with the same slots."""
    torch.manual_seed(3)
    network = models.Transformer(models.Config.from_json(SHAPE | FAMILIES[family] | {"eos_token_id": [5, 6, 7]}))
    with torch.no_grad():
        for w in network.parameters():
            w.copy_(torch.randn(w.shape) * (0.3 if w.dim() > 1 else 1))
    generator = random.Random(1)
    texts = [[generator.randrange(97) for _ in range(n)] for n in (30, 1, 17, 44, 2, 30, 9, 61, 5)]
    monkeypatch.setattr(rollout, "Graphs", eager)
    moves = []
    move = rollout.Slots.move
    monkeypatch.setattr(rollout.Slots, "move", lambda *a: (moves.append(a[1:]), move(*a)))
    plain, ours = plain_sampler.Sampler(network), Sampler(network, rows=rows, lanes=lanes)
    ours.static = static
    lengths = set()
    for temperature in (1.0, [0.0, 0.8, 1.0, 1.5, 1.0]):
        a = plain.generate(texts, 5, 24, temperature, seed=9, step=2)
        same(a, ours.generate(texts, 5, 24, temperature, seed=9, step=2))
        lengths |= {len(c.tokens) for group in a for c in group}
    assert min(lengths) < 4 and max(lengths) == 24
    assert moves or rows != 6  # slots in use did move together


def test_smollm2_samples_equal_the_plain_samplers(smollm2, capsys):
    """On a real model; samples part only where the uniform falls within 1e-4 of the border between two tokens."""
    network, tokenizer = models.load(smollm2), models.Tokenizer(smollm2)
    questions = tasks.load("esnli", tiny.ROOT / "tests" / "data" / "esnli")[:6]
    texts = [faith.explanation_prompt(tokenizer, q, i % 3) for i, q in enumerate(questions)]
    temperatures = [0.0, 1.0, 0.7, 1.0]
    how = {"samples": 4, "max_new_tokens": 16, "temperature": temperatures, "seed": 4}
    ties = 0
    ours, plain = Sampler(network, rows=8).generate(texts, **how), plain_sampler.Sampler(network).generate(texts, **how)
    for i, (prompt, group, other) in enumerate(zip(texts, ours, plain, strict=True)):
        for j, (a, b) in enumerate(zip(group, other, strict=True)):
            n = next((t for t, pair in enumerate(zip(a.tokens, b.tokens, strict=False)) if pair[0] != pair[1]), None)
            if n is None:
                assert len(a.tokens) == len(b.tokens)
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
                continue
            ties += 1
            assert a.logprobs[:n] == pytest.approx(b.logprobs[:n], abs=1e-4)
            with torch.no_grad():
                logits = network(torch.tensor([prompt + a.tokens[:n]]))[0, -1]
            if temperatures[j] == 0:
                assert abs(logits[a.tokens[n]] - logits[b.tokens[n]]) < 1e-4
            else:
                cdf = (logits.double() / temperatures[j]).softmax(-1).cumsum(-1)
                u = rollout.uniforms(4, 0, torch.tensor([i]), torch.tensor([j]), n)
                for token in (a.tokens[n], b.tokens[n]):
                    assert (cdf[token - 1] if token else 0) - 1e-4 < u < cdf[token] + 1e-4
    with capsys.disabled():
        print(f" {ties} of 24 samples part at a tie", end="")
    assert ties < 8


def test_shared_keys_and_values_of_8b():
    """64 prompts of 300 tokens x 16 samples of 200, Llama-3.1-8B in bf16: what the code allocates is the arithmetic."""
    shape = SHAPE | {"num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128, "hidden_size": 4096}
    config = models.Config.from_json(shape | {"model_type": "llama", "num_key_value_heads": 8, "rope_theta": 5e5})
    token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, key heads, head dim, bytes
    shared = rollout.Slots(config, 64, 16, 300, 200, "meta", torch.bfloat16).kv_bytes()
    copied = rollout.Slots(config, 64 * 16, 1, 300, 200, "meta", torch.bfloat16).kv_bytes()
    assert shared == token * (64 * 300 + 64 * 16 * 200) == 29_360_128_000
    assert copied == token * 64 * 16 * 500 == 67_108_864_000


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
    generator = random.Random(0)
    edges = [0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -1, -(2**63)]
    rows = [[generator.choice([*edges, generator.getrandbits(63)]) for _ in range(5)] for _ in range(2000)]
    parts = torch.tensor(rows).T
    assert rollout.uniforms(*parts).tolist() == [splitmix(row) for row in rows]
    row = rows[0]  # numbers and tensors alike
    mixed = rollout.uniforms(row[0], row[1], torch.tensor([row[2]]), torch.tensor([row[3]]), row[4])
    assert mixed.tolist() == [splitmix(row)]


def test_uniforms_are_pinned():
    """A change here changes every sample of every recorded run."""
    drawn = rollout.uniforms(0, 0, torch.zeros(3, dtype=torch.int64), torch.arange(3), 0)
    other = rollout.uniforms(7, 100, torch.tensor([123456789012345]), torch.tensor([3]), 47)
    assert [round(u / BITS) for u in [*drawn.tolist(), *other.tolist()]] == GOLDEN
    # SplitMix64's published first output from state 0, through one round of `mix`.
    assert rollout.mix(torch.tensor(-0x61C8864680B583EB)).item() % 2**64 == 0xE220A8397B1DCDAF


GOLDEN = [7908954, 2975015, 3347584, 3450708]


def test_uniforms_are_uniform_and_unrelated():
    stats = pytest.importorskip("scipy.stats")
    axes = torch.meshgrid(*(torch.arange(n) for n in (3, 5, 40, 8, 48)), indexing="ij")
    u = rollout.uniforms(*(axis.flatten() for axis in axes)).view(3, 5, 40, 8, 48)
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    for bins in (2, 64, 1000):
        assert p_value((u.flatten() * bins).long().bincount(minlength=bins), torch.full((bins,), 1 / bins)) > 1e-3
    for axis in range(5):  # neighbours along every number that is hashed
        for lag in (1, 2):
            a = u.narrow(axis, 0, u.shape[axis] - lag).flatten()
            b = u.narrow(axis, lag, u.shape[axis] - lag).flatten()
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / len(a) ** 0.5
            cells = (a * 10).long() * 10 + (b * 10).long()
            assert p_value(cells.bincount(minlength=100), torch.full((100,), 0.01)) > 1e-3
    swapped = rollout.uniforms(0, 1, torch.arange(9999), torch.full((9999,), 2), 3)  # the order of the numbers counts
    plain = rollout.uniforms(0, 1, torch.full((9999,), 2), torch.arange(9999), 3)
    assert abs(torch.corrcoef(torch.stack([swapped, plain]))[0, 1]) < 0.04


# ---- from logits to a token ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_sampling_follows_the_softmax(network, sampler, temperature):
    """First and second tokens of one prompt, against their exact probabilities."""
    prompt, n = [tiny.START, 60, 70, 80], 4000
    answers = [
        c.tokens
        for group in endless(network, rows=n).generate([prompt] * 3, n, 2, temperature, keys=[3, 5, 7])
        for c in group
    ]
    with torch.no_grad():
        V = network.config.vocab_size
        pairs = torch.cat([torch.tensor(prompt).expand(V, 4), torch.arange(V)[:, None]], 1)
        p = (network(pairs)[:, 3:].double() / temperature).softmax(-1)  # (V, 2, V)
    first, second = p[0, 0], p[0, 0] @ p[:, 1]
    counts = [torch.tensor(answers)[:, i].bincount(minlength=V) for i in (0, 1)]
    assert p_value(counts[0], first) > 1e-3
    assert p_value(counts[1], second) > 1e-3
    assert p_value(counts[0], (p[0, 0] ** 1.15) / (p[0, 0] ** 1.15).sum()) < 1e-3  # the test can tell


def test_inverse_cdf_by_hand():
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([0.0, 0.1, 0.2499, 0.2501, 0.6, 0.7499, 0.7501, 1 - BITS])
    tokens, logprobs = rollout.sample_tokens(p.log().repeat(len(u), 1), torch.ones(len(u)), u)
    assert tokens.tolist() == [1, 1, 1, 3, 3, 3, 4, 4]
    assert logprobs.tolist() == pytest.approx(p[tokens].log().tolist())


def test_impossible_tokens_are_never_drawn():
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(64, 5000, generator=generator)
    banned = torch.rand(64, 5000, generator=generator) < 0.5
    banned[:, [0, -1]] = True  # where the two extremes of u would land
    logits[banned] = -torch.inf
    random_u = torch.rand(62, generator=generator)
    for u in (torch.zeros(64), torch.full((64,), 1 - BITS), torch.cat([random_u, torch.tensor([BITS, 0.5])])):
        tokens, logprobs = rollout.sample_tokens(logits.clone(), torch.ones(64), u)
        assert not banned.gather(1, tokens[:, None]).any()
        assert logprobs.isfinite().all()


@pytest.mark.parametrize("V", [1, 2, 3, 1000, 128_256])
def test_extreme_uniforms_stay_inside(V):
    logits = torch.randn(16, V, generator=torch.Generator().manual_seed(V)) * 3
    low, _ = rollout.sample_tokens(logits.clone(), torch.ones(16), torch.zeros(16))
    high, _ = rollout.sample_tokens(logits.clone(), torch.ones(16), torch.full((16,), 1 - BITS))
    assert (low == 0).all()
    assert ((0 <= high) & (high < V)).all()
    assert (logits.softmax(-1).cumsum(-1).gather(1, high[:, None]) > 1 - 1e-3).all()


def test_temperature_zero_is_argmax(network, sampler, prompts):
    answers = sampler.generate(prompts, 2, 8, temperature=0.0, seed=1)
    same(answers, sampler.generate(prompts, 2, 8, temperature=0.0, seed=2))
    for prompt, group in zip(prompts, answers, strict=True):
        assert group[0].tokens == group[1].tokens
        with torch.no_grad():
            logits = network(torch.tensor([prompt + group[0].tokens]))[0, len(prompt) - 1 : -1]
        assert group[0].tokens == logits.argmax(-1).tolist()
        chosen = logits.log_softmax(-1).max(-1).values.tolist()
        assert group[0].logprobs == pytest.approx(chosen, abs=1e-4)


def test_a_temperature_for_each_sample(sampler, prompts):
    mixed = sampler.generate(prompts, 3, 10, temperature=[0.0, 1.0, 0.5])
    for j, temperature in enumerate([0.0, 1.0, 0.5]):
        plain = sampler.generate(prompts, 3, 10, temperature=temperature)
        same([[group[j]] for group in mixed], [[group[j]] for group in plain])


# ---- against the full forward pass ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_trainers(network, sampler, prompts, temperature):
    answers = sampler.generate(prompts, 3, 14, temperature, seed=4)
    recorded = torch.tensor([lp for group in answers for c in group for lp in c.logprobs])
    packed = train.pack(
        [(prompt, [c.tokens for c in group]) for prompt, group in zip(prompts, answers, strict=True)]
    )  # fmt: skip
    with torch.no_grad():
        scored = train.token_logprobs(network, packed, temperature)
    assert (recorded - scored).abs().max() < 1e-4
    by_hand = []
    with torch.no_grad():
        for prompt, group in zip(prompts, answers, strict=True):
            for c in group:
                logits = network(torch.tensor([prompt + c.tokens]))[0, len(prompt) - 1 : -1]
                p = (logits / temperature).softmax(-1)  # over the whole vocabulary
                by_hand += p[range(len(c.tokens)), c.tokens].log().tolist()
    assert recorded.tolist() == pytest.approx(by_hand, abs=1e-4)


def test_option_logprobs(network, sampler, prompts):
    options = [5, 6, 7]
    scored = sampler.option_logprobs(prompts, options)
    assert scored.dtype == torch.float32 and scored.shape == (len(prompts), 3)
    with torch.no_grad():
        for prompt, row in zip(prompts, scored, strict=True):
            wanted = network(torch.tensor([prompt]))[0, -1, options].log_softmax(-1)
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
    shares, runs = [], [prompts[i : i + together] for i in range(0, len(prompts), together)]
    for run in runs:
        columns = list(zip(*(prompt[:-1] for prompt in run), strict=False))
        shared = next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(columns))
        shares.append(shared * (len(run) > 1))
        laid = run[0][: shares[-1]] + [token for prompt in run for token in prompt[shares[-1] :]]
        assert any(laid == p[i : i + len(laid)] for p in passes for i in range(len(p)))
    assert max(shares) > 4 or together == 50
    assert sum(map(len, passes)) == sum(map(len, prompts)) - sum(
        n * (len(r) - 1) for n, r in zip(shares, runs, strict=True)
    )


# ---- the end of a turn ---------------------------------------------------------------------------------------


def test_ends_at_any_token_of_the_set(network, prompts):
    """Against the same samples from a sampler that never ends. Token 0, among the ends, also pads prompts."""
    free = endless(network).generate(prompts, 6, 16, 2.0)
    assert not any(c.ended for group in free for c in group) and {len(c.tokens) for g in free for c in g} == {16}
    drawn = {token for group in free for c in group for token in c.tokens}
    ends = [0, tiny.END, *sorted(drawn)[10:40:3]]
    found = set()
    for group, whole in zip(Sampler(network, ends).generate(prompts, 6, 16, 2.0), free, strict=True):
        for c, long in zip(group, whole, strict=True):
            stops = [t for t, token in enumerate(long.tokens) if token in ends]
            n = stops[0] + 1 if stops else 16
            assert (c.tokens, c.ended) == (long.tokens[:n], bool(stops))  # the end token included
            assert c.logprobs == pytest.approx(long.logprobs[:n], abs=1e-4)
            found |= {c.tokens[-1]} if c.ended else set()
    assert len(found) > 3


def test_an_end_at_the_last_position_counts(network, prompts):
    (answer,) = endless(network).generate(prompts[:1], 1, 5)[0]
    (cut,) = Sampler(network, [answer.tokens[4]]).generate(prompts[:1], 1, answer.tokens.index(answer.tokens[4]) + 1)[0]
    assert cut.ended and cut.tokens[-1] == answer.tokens[4]
    (one,) = Sampler(network, [answer.tokens[0]]).generate(prompts[:1], 1, 5)[0]
    assert one.ended and one.tokens == answer.tokens[:1]


def test_the_end_of_turn_is_the_models_own_set(folder, network, sampler):
    assert sampler.end_of_turn == [tiny.END, tiny.STOP]
    bare = models.load(folder)
    bare.config = models.Config(**{**vars(network.config), "end_of_turn": ()})
    with pytest.raises(ValueError, match="eos_token_id"):
        Sampler(bare)


def test_new_weights_are_seen(folder, prompts):
    network = models.load(folder)
    sampler = Sampler(network)
    before = sampler.generate(prompts[:2], 2, 8)
    with torch.no_grad():
        network.lm_head.weight[tiny.END, 0] += 100
    after = sampler.generate(prompts[:2], 2, 8)
    assert before != after and all(c.tokens == [tiny.END] for group in after for c in group)


# ---- mistakes ------------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit(network, sampler):
    context = network.config.context
    sampler.generate([[1] * (context - 4)], 1, 4)
    with pytest.raises(ValueError, match=f"prompt 1 has {context - 3} tokens and 4 more .*context is {context}"):
        sampler.generate([[1], [1] * (context - 3)], 1, 4)
    sampler.option_logprobs([[1] * (context - 1)], [5, 6])
    with pytest.raises(ValueError, match="prompt 0 has"):
        sampler.option_logprobs([[1] * context], [5, 6])


def test_empty_prompts(sampler):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler.generate([[1], []])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        sampler.option_logprobs([[]], [5, 6])
    with pytest.raises(ValueError, match="no prompts"):
        sampler.generate([])
    assert sampler.option_logprobs([], [5, 6]).shape == (0, 2)


@pytest.mark.parametrize(
    "wrong",
    [{"samples": 0}, {"max_new_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")},
     {"temperature": float("inf")}, {"temperature": [1.0]},
     {"temperature": [1.0, -1.0]}, {"temperature": [1.0, 1.0, 1.0]}],
)  # fmt: skip
def test_bad_numbers(sampler, wrong):
    with pytest.raises(ValueError, match="temperature|at least 1"):
        sampler.generate([[1, 2]], **{"samples": 2, **wrong})


@pytest.mark.parametrize("token", [-1, 10**6])
def test_an_end_of_turn_outside_the_vocabulary(network, token):
    with pytest.raises(ValueError, match=f"end-of-turn token {token} is not in the vocabulary"):
        Sampler(network, [tiny.END, token])


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
    with torch.no_grad():
        network.embed_tokens.weight[tokens[place]] = value  # broken as soon as this token is fed
    with pytest.raises(ValueError, match=f"not finite at new token {place + 2} of sampling step 6"):
        sampler.generate(prompts[:1], 1, 8, step=6)
    with torch.no_grad():
        network.lm_head.weight[3, 0] = value
    with pytest.raises(ValueError, match="not finite at new token 1 of sampling step 6"):
        sampler.generate(prompts, 2, 8, step=6)


def test_command_line(folder, capsys):
    assert rollout.main([str(folder), "Is a man holding a sign?"]) == 0
    assert capsys.readouterr().out.startswith("> Is a man holding a sign?\n")
    for wrong in ([], [str(folder)], [str(folder / "none"), "Is it?"]):
        assert rollout.main(wrong) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1
