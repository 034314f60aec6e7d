"""train.py: what a run writes, refuses and repeats; ranks change nothing. The loss: test_grpo."""

import json
import math
import re
import shlex
import time

import numpy as np
import pytest
import tiny
import torch
from launch import DATA, call, close, finish, flags, lines, ran, refused, same, script, start, timeless, weights

import batches
import faith
import model as models
import reward
import tasks
import toy
import train
from lab import experiment
from run.args import Args, parse
from run.policy import learning_rate
from run.ranks import Ranks


def parse_(given):
    return parse(given, {}, toy.SETTINGS)


def equal(one, other):
    """Two folders hold the same weights."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A finished run with most things on."""
    out = tmp_path_factory.mktemp("run") / "some run"
    given = flags(folder, out, steps=3, calibrate=True, calibration_questions=5, save_every=1, prompts=6, loss="grpo",
                  decay="cosine", warmup=1)  # fmt: skip
    return out, given, ran(given)


def test_files_of_a_run(done, folder):
    out, given, printed = done
    assert {p.name for p in out.iterdir()} >= {
        "args.json", "calibration.json", "metrics.jsonl", "explanations.jsonl", "before.json", "before.T0.jsonl",
        "before.T1.jsonl", "after.json", "after.T0.jsonl", "after.T1.jsonl", "difference.T0.json", "step-2", "model",
    }  # fmt: skip
    assert equal(out / "step-3", out / "model") and not equal(out / "step-2", out / "model")
    saved = json.loads((out / "args.json").read_text())
    assert Args(**saved) == parse_(given)
    offsets = json.loads((out / "calibration.json").read_text())["mean_logp"]
    assert len(offsets) == 3 and max(offsets) < 0
    assert (out / "model" / "calibration.json").read_text() == (out / "calibration.json").read_text()
    assert len(re.findall(r"^step \d/3 ", printed, re.M)) == 3 and "min left" in printed
    for name in ("step-2", "model"):
        (again,) = re.findall(r"train\.py (.*)", (out / name / "README.md").read_text())
        assert parse_(shlex.split(again)) == parse_(given)  # the card's command is this run's
        trained = json.loads((out / name / "training.json").read_text())
        made_of = json.loads((out / "identity.json").read_text())["made_of"]
        assert trained == saved | {"data": str(DATA.resolve()), "made_of": made_of}


def test_metrics_of_a_run(done):
    out, given, _ = done
    args, metrics = parse_(given), lines(out / "metrics.jsonl")
    explanations = lines(out / "explanations.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert [m["lr"] for m in metrics] == pytest.approx([learning_rate(s, args) for s in range(3)])
    for m in metrics:
        log = [e for e in explanations if e["step"] == m["step"]]
        assert len(log) == m["prompts"] * 4 and m["prompts"] in (2, 4, 6)
        I, M = (np.array([e[k] for e in log]) for k in ("influence", "mention"))  # noqa: E741
        assert I.mean() == 0.5 and m["reward"] == pytest.approx((I == M).mean())
        assert m["mention_1"] == pytest.approx(M[I == 1].mean()) and m["mention_0"] == pytest.approx(M[I == 0].mean())
        assert m["phi"] == (pytest.approx(np.corrcoef(I, M)[0, 1]) if 0 < M.mean() < 1 else None)
        groups = (I == M).reshape(-1, 4).mean(1)
        assert m["flat_groups"] == pytest.approx(((groups == 0) | (groups == 1)).mean())
        for name in ("tokens", "ended"):
            assert m[name] == pytest.approx(np.mean([e[name] for e in log]))
        assert all(e["mention"] == (e["word"] in e["text"].split()) for e in log)
        assert all(e["reward"] == (e["mention"] == e["influence"]) for e in log)
        assert all(e["influence"] == (e["y"] != e["y_edit"]) and e["word"] in e["text_inserted"] for e in log)
        assert sum(m["picks"]) == pytest.approx(1, abs=2e-3) and len(m["picks"]) == 3
        assert 0 < m["influence_rate"] < 1 and m["labelled"] <= 96 and m["kl"] == 0
        if m["flat_groups"] < 1:
            assert 0 <= m["sampler_gap"] <= m["sampler_gap_max"] < 1e-4 and m["clipped"] == 0
            assert m["grad_norm"] > 0 and m["nll"] > 0
        assert all(m[k] >= 0 for k in ("label_s", "rollout_s", "update_s"))
    assert any(m["flat_groups"] < 1 for m in metrics)
    assert metrics[-1]["position"] == sum(m["labelled"] for m in metrics)


def test_test_questions_are_never_trained_on(done):
    out, _, _ = done
    measured, fit = lines(out / "before.T0.jsonl"), lines(out / "before.fit.jsonl")
    test, trained = {row["id"] for row in measured}, {e["id"] for e in lines(out / "explanations.jsonl")}
    group_of = {q.id: q.group for q in tasks.load("esnli", DATA)}
    assert len(test) == 5 and trained and not test & trained
    assert not {row["group"] for row in measured} & {group_of[id] for id in trained}
    assert fit and not test & {row["id"] for row in fit}
    assert {row["word"] for row in fit} <= set(reward.words("bias", held_out=False))
    for name in ("before.T1", "after.T0", "after.T1"):
        assert [row["id"] for row in lines(out / f"{name}.jsonl")] == [row["id"] for row in measured]


def test_the_shortcut_is_fitted_on_training_words(folder, tmp_path):
    """Test questions get any word; the cases that fit the shortcut baseline get no held-out word."""
    tested, fitted, training = set(), set(), set(reward.words("bias", held_out=False))
    for seed in range(4):
        args = parse_(flags(folder, tmp_path / "none", seed=seed, fit_questions=8))
        args.why = "neutral"
        subject, test, fit, _ = experiment.prepare(args, Ranks())
        assert subject.why == "neutral" and not subject.only_explains
        tested |= {case.intervention.word for case in test}
        fitted |= {case.intervention.word for case in fit}
    assert fitted <= training and not tested <= training


def test_saved_models_load_with_transformers(done, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    out, _, _ = done
    tokens, folders = torch.tensor([[2, 30, 40, 50, 60]]), (folder, out / "step-2", out / "model")
    for saved in folders[1:]:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        ours = models.load(saved)
        with torch.no_grad():
            assert (theirs(tokens).logits - ours(tokens)).abs().max() < 1e-4
        assert transformers.AutoTokenizer.from_pretrained(saved).chat_template == tiny.TEMPLATE
    parts = [weights(p)["model.norm.weight"] for p in folders]
    assert not torch.equal(parts[0], parts[1]) and not torch.equal(parts[1], parts[2])


def test_a_run_repeats(done, folder, tmp_path):
    out, given, _ = done
    again, third = tmp_path / "again", tmp_path / "third"
    given = [str(again) if x == str(out) else x for x in given]
    ran(given)
    same(out, again)
    ran([*given, "--out", str(third), "--seed", "1", "--steps", "1", "--no-eval-before"])
    assert timeless(third / "metrics.jsonl")[0] != timeless(out / "metrics.jsonl")[0]
    assert not (third / "before.json").exists() and (third / "after.json").exists() and (third / "model").exists()


def test_frozen_labels_with_kl_and_two_updates(folder, tmp_path, monkeypatch):
    """Labels are taken once, however the model changes. The second update is off-policy."""
    seen, label = [], batches.label
    for module in (experiment, batches):
        monkeypatch.setattr(module, "label", lambda s, cases, *rest: seen.append(len(cases)) or label(s, cases, *rest))
    output = ran(flags(folder, tmp_path / "o", labels="frozen", kl=0.05, updates=2, lr=5e-3, steps=3, eval_questions=0,
                       loss="dapo", advantage="mean", decay="linear", anchor=1.0, anchor_questions=6))  # fmt: skip
    assert seen == [40, 6]
    for what, n in (("labelled", 40), ("labelled for the anchor", 6)):
        assert f"\n{what}: {n}/{n} questions, 0.0 min left" in f"\n{output}"
    metrics = lines(tmp_path / "o" / "metrics.jsonl")
    assert {(m["labelled"], m["influence_rate"]) for m in metrics} == {(40, metrics[0]["influence_rate"])}
    assert {m["position"] for m in metrics} == {46}
    assert all(m["kl"] > 1e-4 and m["sampler_gap_max"] > 1e-3 for m in metrics)
    assert any(m["clipped"] > 0 for m in metrics)
    assert not (tmp_path / "o" / "before.json").exists() and (tmp_path / "o" / "model").exists()


def test_weights_in_bf16(folder, tmp_path, monkeypatch):
    """--dtype bf16 on a CPU: the trained model and the KL's reference compute in bf16; masters keep small updates."""
    seen, load = [], models.load
    for module in (faith, models):
        monkeypatch.setattr(module, "load", lambda *given: seen.append(load(*given)) or seen[-1])
    ran(flags(folder, tmp_path / "o", dtype="bf16", kl=0.05, lr=1e-5, steps=2, eval_questions=0))
    assert [network.dtype for network in seen] == [torch.bfloat16, torch.bfloat16]
    assert {w.dtype for w in weights(tmp_path / "o" / "model").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "o" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    metrics = lines(tmp_path / "o" / "metrics.jsonl")
    assert all(0 < m["sampler_gap_max"] < 0.1 and m["grad_norm"] > 0 and not m["skipped"] for m in metrics)


def test_a_run_without_any_mention(folder, tmp_path):
    """The tiny model knows no adverbs: every group is flat, there is nothing to learn, and no figure is made up."""
    ran(flags(folder, tmp_path / "o", intervention="adverb", steps=1, eval_questions=0, candidates=400))
    (metrics,) = lines(tmp_path / "o" / "metrics.jsonl")
    assert (metrics["reward"], metrics["flat_groups"], metrics["mention_1"]) == (0.5, 1, 0)
    assert metrics["phi"] is None and metrics["nll"] is None and metrics["sampler_gap"] is None
    assert (metrics["loss"], metrics["grad_norm"]) == (0, 0)
    assert equal(folder, tmp_path / "o" / "model")


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("what", ["moves nothing", "moves all", "weights not finite", "loss not finite"])
def test_a_run_that_cannot_go_on(folder, tmp_path, monkeypatch, what, when):
    """Before anything was learned it is an error; later the weights so far are good, and are kept."""
    steps, step, influence, out = [], train.step, reward.influence, tmp_path / "o"
    weigh, loss = train.token_weights, train.policy_loss
    monkeypatch.setattr(train, "step", lambda *args: [step(*args), steps.append(1)][0])
    broken = lambda: len(steps) >= when  # noqa: E731
    if what == "weights not finite":
        monkeypatch.setattr(train, "token_weights", lambda *args: weigh(*args) * (math.inf if broken() else 1))
    elif what == "loss not finite":  # its gradient is: it is the KL's
        monkeypatch.setattr(
            train, "policy_loss", lambda *args: loss(*args).detach() * math.nan if broken() else loss(*args)
        )
    if "not finite" in what:
        words, skipped = f"not finite {train.SKIPS} times in a row", train.SKIPS
    else:
        monkeypatch.setattr(reward, "influence", lambda *ys: what == "moves all" if broken() else influence(*ys))
        words, skipped = "none or all of 96 edits moved the model, so there is nothing to balance", 0
    given = flags(folder, out, eval_questions=0, steps=9, save_every=1, checkpoint_every=1, kl=0.1)
    if when == 0:
        assert words in refused(given) and not (out / "model").exists()
    else:
        printed = ran(given)
        assert f"stopped after step {when + skipped}: " in printed and words in printed
        assert not skipped or f"last good checkpoint is {out / 'checkpoints' / 'step-'}" in printed
        assert equal(out / "model", out / "step-1") and not equal(out / "model", folder)
    assert [m["skipped"] for m in lines(out / "metrics.jsonl")] == [0] * when + [1] * skipped


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"nonsense": 1}, "--nonsense"), ({"steps": "many"}, "many"), ({"loss": "ppo"}, "ppo"),
        ({"steps": 0}, "--steps"), ({"prompts": 1}, "--prompts"), ({"prompts": 7}, "--prompts must be even"),
        ({"samples": 1}, "--samples"),
        ({"micro": 0}, "--micro"), ({"max_new_tokens": 0}, "--max-new-tokens"), ({"lr": 0}, "--lr"),
        ({"lr": "nan"}, "--lr"), ({"temperature": 0}, "--temperature"), ({"clip_norm": -1}, "--clip-norm"),
        ({"samples": 2**40}, "--samples"), ({"frozen_questions": 2**40}, "--frozen"), ({"beta2": 1.0}, "--beta2"),
        ({"kl": -0.1}, "--kl"), ({"clip_low": "nan"}, "--clip-low"),
        ({"anchor": "inf"}, "--anchor must be a finite number"), ({"lora_alpha": "inf"}, "--lora-alpha"),
        ({"steps": 10**30}, "--steps"), ({"temperature": 1e-8}, "--temperature"),
        ({"warmup": -1}, "--warmup"), ({"seed": -1}, "--seed"), ({"seed": 2**31}, "--seed"),
        ({"updates": 0}, "--updates"),
        ({"data": None}, "--data are needed"), ({"model": "toy-gpt"}, "toy-qwen3"),
        ({"model": "no/model"}, "no model at no/model"), ({"data": "no-data"}, "no-data"),
        ({"task": "comve"}, "comve"), ({"eval_questions": 500}, "too few"), ({"fit_questions": 15}, "too few"),
        ({"max_new_tokens": 500}, "context"),
    ],
)  # fmt: skip
def test_mistakes(folder, tmp_path, changes, words):
    assert words in refused(flags(folder, tmp_path / "o", **changes))
    assert not (tmp_path / "o").exists()


def test_an_output_folder_that_holds_something(done, folder, tmp_path):
    out, given, _ = done
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert "already holds something" in refused(given)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "file" in refused(flags(folder, path))
    (empty := tmp_path / "empty").mkdir()
    (empty / "args.json.part").write_text('{"mo')  # of a run killed in its first moment
    ran(flags(folder, empty, steps=1, eval_questions=0))
    assert (empty / "model").exists() and not (empty / "args.json.part").exists()


def test_help_names_every_flag():
    code, out, _ = call(["--help"])
    assert code == 0
    assert all(f"--{name.replace('_', '-')}" in out for name in Args.__dataclass_fields__)


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_gpus(monkeypatch, rank):
    """One process of each machine says so, here of the second machine. The others wait until it has."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": 2 + rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2,
                        "MASTER_ADDR": "other", "MASTER_PORT": 1}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    code, _, error = call([])
    assert code == 2 and bool(waited) == bool(rank)
    assert error == ("" if rank else "train.py: torchrun was told to start 2 processes, and there are GPUs for 1; set "
                     "--nproc-per-node to that, or CUDA_VISIBLE_DEVICES= to run on CPUs\n")  # fmt: skip


RANKS = [
    # Three groups each: an odd number. Of two tasks.
    (2, {"prompts": 6, "candidates": 192, "task": "esnli,strategyqa", "data": f"{DATA},{DATA.parent}/strategyqa"}),
    # One rank has no group.
    (3, {"prompts": 2, "kl": 0.05, "updates": 2, "labels": "frozen", "opening": "the hypothesis", "anchor": 3.0,
         "anchor_questions": 5}),
    # Two groups, two, one and one; the last rank has no question of the anchor.
    (4, {"prompts": 6, "kl": 0.05, "updates": 2, "parallel": "shard", "recompute": True, "micro": 1, "anchor": 3.0,
         "anchor_questions": 3}),
]  # fmt: skip


@pytest.mark.parametrize("n, changes", RANKS)
def test_ranks_change_nothing(folder, tmp_path, n, changes):
    one, many = tmp_path / "one", tmp_path / "many"
    changes = {"eval_questions": 2} | changes
    ran(flags(folder, one, **changes | {"parallel": None}))
    ran(flags(folder, many, **changes), n)
    close(one, many, 1e-5)
    assert {m["prompts"] for m in lines(one / "metrics.jsonl")} == {changes["prompts"]}
    assert timeless(one / "explanations.jsonl") == timeless(many / "explanations.jsonl")
    for name in ("before", "after"):
        rows = [[{k: v for k, v in row.items() if k not in ("p", "p_edit")} for row in lines(out / f"{name}.T1.jsonl")]
                for out in (one, many)]  # fmt: skip
        assert rows[0] == rows[1]
    a, b, first = weights(one / "model"), weights(many / "model"), weights(folder)
    assert max((a[k] - first[k]).abs().max() for k in a) > 5e-4
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


FAULTS = """
from dataclasses import replace
sample = train.sample
def faulty(subject, prompts, keys, n, args):
    groups = sample(subject, prompts, keys, n, args)
    if os.environ["RANK"] == "1" and n == 3:
        print("failed at", time.time(), flush=True)
        raise {error}
    if os.environ["RANK"] == "1" and n < 2:  # on one rank one token's logprob is far off, or no number
        first, *rest = groups[-1]
        wrong = first.logprobs[0] - 0.5 if n == 0 else float("nan")
        groups[-1] = [replace(first, logprobs=[wrong, *first.logprobs[1:]]), *rest]
    return groups
train.sample = faulty
train.informative = lambda rewards: range(len(rewards))  # so that a group of equal rewards counts too
"""


@pytest.mark.parametrize("error", ["ValueError('a prompt is too long')", "RuntimeError('a surprise')"])
def test_a_fault_on_one_rank(folder, tmp_path, error):
    """All ranks' figures show it, and all skip a step that is not finite. An error ends all soon, in its own words."""
    file = script(tmp_path / "faults.py", FAULTS.format(error=error))
    code, out, printed = finish(start(flags(folder, tmp_path / "o", steps=5, eval_questions=0), 2, file))
    (moment,) = re.findall(r"^failed at (\S+)$", out, re.MULTILINE)
    assert code != 0 and time.time() - float(moment) < 60
    metrics = lines(tmp_path / "o" / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [0, 1, 0] and out.count("SKIPPED") == 1
    assert metrics[0]["sampler_gap_max"] == pytest.approx(0.5, abs=1e-3) and metrics[2]["sampler_gap_max"] < 1e-4
    if "ValueError" in error:
        assert re.findall("^train.py: .*", printed, re.M) == ["train.py: a prompt is too long"]
        assert "Traceback" not in printed.split("torch/distributed")[0]
    else:
        assert "a surprise" in printed
