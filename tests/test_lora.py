"""run/lora.py against PEFT, in both directions. Adapters are never merged, and the weights below them never move."""

import json
import shutil

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from launch import DATA, call, close, disturb, finish, flags, lines, start, timeless
from peft import LoraConfig, PeftModel, get_peft_model
from test_grpo import by_hand, noisy_groups, stepped
from test_grpo import close as agree

import faith
import grpo
import model as models
from lab import paper
from rollout import Sampler
from run import lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model"))


def tokens(*shape):
    return torch.randint(5, 200, shape, generator=torch.Generator().manual_seed(0))


def in_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def adapted(folder, **options):
    """A model with disturbed adapters of rank 4; its `named_tensors`, which test_grpo compares, are those trained."""
    network = disturb(lora.attach(models.load(folder, **options), 4, 8.0))
    network.named_tensors = lambda of: {n: of(p) for n, p in network.named_parameters() if p.requires_grad}
    return network


@pytest.mark.parametrize(
    "targets", [lora.TARGETS, ("q_proj", "v_proj"), ("k_proj", "layers.1.mlp.up_proj", "down_proj")]
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_peft_reads_what_is_saved(tmp_path, family, targets):
    """Same logits in PEFT, here before saving, and here when read again; without adapters, those of the base."""
    base = tiny.build(tmp_path / "base", family=family)
    network, ids = models.load(base), tokens(2, 30)
    plain = network(ids).detach()
    lora.attach(network, 4, 8.0, targets, seed=1)
    assert torch.equal(network(ids), plain)  # B is zero
    moved = disturb(network)(ids).detach()
    assert (moved - plain).abs().max() > 0.1
    with lora.without(network):
        assert torch.equal(network(ids), plain)
    assert torch.equal(network(ids), moved)
    models.save(network, tmp_path / "adapter", "card")
    theirs = PeftModel.from_pretrained(in_transformers(base), tmp_path / "adapter").eval()
    assert (theirs(ids).logits - moved).abs().max() < 1e-4
    assert torch.equal(models.load(tmp_path / "adapter")(ids), moved)
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="already there"):
        models.save(network, tmp_path / "adapter")


REGEX = r".*\.1\..*(q|up)_proj"
FORMS = [
    {"target_modules": "all-linear"}, {"target_modules": REGEX}, {"target_modules": ["self_attn.q_proj", "not_there"]},
    {"target_modules": ["model.layers.0.mlp.up_proj", "v_proj"]}, {"target_modules": ["q_proj"], "use_rslora": True},
    {"target_modules": "all-linear", "exclude_modules": ["layers.0.self_attn.q_proj", "down_proj"]},
    {"target_modules": ["q_proj", "o_proj"], "exclude_modules": REGEX, "init_lora_weights": "gaussian"},
]  # fmt: skip


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("settings", FORMS)
def test_what_peft_saves_is_read(tmp_path, family, settings):
    """Each form of target_modules as PEFT writes it, which is a list, and as it was given."""
    base, ids = tiny.build(tmp_path / "base", family=family), tokens(2, 30)
    config, adapter = LoraConfig(r=3, lora_alpha=12, task_type="CAUSAL_LM", **settings), tmp_path / "adapter"
    theirs = get_peft_model(in_transformers(base), config).eval()
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    theirs.save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for changes in ({}, {key: value for key, value in settings.items() if key.endswith("modules")}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        network = models.load(adapter)
        assert (network(ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16(folder, recompute):
    """bf16 weights, fp32 adapters: forward, sampler, KL and backward run. The gradient is close to fp32's."""
    gradients = []
    groups, rewards = noisy_groups(models.load(folder), 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        network = adapted(folder, dtype=dtype)
        network.recompute = recompute
        assert Sampler(network).generate([[7, 8, 9]], 2, 4)
        _, gradient = stepped(network, groups, rewards, network, kl=0.1)
        gradients.append(torch.cat([g.flatten() for g in gradient.values()]))
        assert gradients[-1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


def test_as_peft_begins(folder):
    """A uniform within 1 / √in, as PEFT draws it, another with each seed; B zero; fp32 whatever the model's dtype."""
    draws = []
    for seed, dtype in ((0, torch.bfloat16), (1, torch.bfloat16), (1, None)):
        network = lora.attach(models.load(folder, dtype=dtype), 8, 16.0, seed=seed)
        for adapter in lora.adapters(network):
            bound = adapter.base.in_features**-0.5
            for a, b in zip(adapter.A.values(), adapter.B.values(), strict=True):
                assert a.dtype == b.dtype == torch.float32 and not b.any()
                assert 0.9 * bound < a.abs().max() <= bound and abs(a.mean()) < 0.2 * bound
        draws.append(torch.cat([a.flatten() for m in lora.adapters(network) for a in m.A.values()]))
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".A." in name or ".B." in name for name in trained)
    assert torch.equal(draws[1], draws[2]) and not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("form", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients(tmp_path, family, form, kl):
    """The packed form against one completion at a time, with adapters on; the reference is the base without them."""
    folder = tiny.build(tmp_path, family=family)
    network, base = adapted(folder), models.load(folder).requires_grad_(False)
    groups, rewards = noisy_groups(network, 0.8)
    settings = {"loss": form, "kl": kl, "temperature": 0.8}
    wanted = by_hand(network, groups, rewards, base if kl else None, **settings)
    ran = []
    network.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    for micro, recompute in ((2, False), (100, False), (100, True)):  # with activation checkpointing too
        ran.clear()
        network.recompute = recompute
        agree(stepped(network, groups, rewards, network if kl else None, micro=micro, **settings), wanted)
    assert len(ran) == 2 + bool(kl)  # a block runs again in backward; the reference's pass needs none


def test_sampler_and_trainer_agree(folder):
    """The sampler runs the same adapters: its logprobs are the trainer's, and change when they do."""
    network, prompts = adapted(folder), [[7, 8, 9], [30] * 20]
    sampler = Sampler(network)
    answers = sampler.generate(prompts, 4, 10)
    groups = [(p, [c.tokens for c in group]) for p, group in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        logprobs = grpo.token_logprobs(network, grpo.pack(groups), 1.0)
    sampled = torch.tensor([lp for group in answers for c in group for lp in c.logprobs])
    assert (logprobs - sampled).abs().max() < 1e-4
    disturb(network, seed=6)
    assert sampler.generate(prompts, 4, 10) != answers


# ---- whole runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A run with adapters, and its flags."""
    out = tmp_path_factory.mktemp("run") / "o"
    given = flags(folder, out, steps=4, lora=4, lora_targets="q_proj,v_proj,up_proj", kl=0.05, lr=1e-2,
                  checkpoint_every=2)  # fmt: skip
    assert call(given)[0] == 0
    return out, given


def test_a_run(done, folder, tmp_path):
    out = done[0]
    metrics = lines(out / "metrics.jsonl")
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 1e-5  # the reference is the base
    assert {p.name for p in (out / "model").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (out / "model" / "model.safetensors").exists()
    trained = models.load(out / "model")
    weights = [w for n, w in trained.named_parameters() if ".A." not in n and ".B." not in n]
    assert all(torch.equal(a, b) for a, b in zip(weights, models.load(folder).parameters(), strict=True))
    tensors = safetensors.torch.load_file(out / "model" / "adapter_model.safetensors")
    assert sum(bool(t.any()) for t in tensors.values()) == len(tensors) == 2 * 3 * 2
    theirs = PeftModel.from_pretrained(in_transformers(folder), out / "model").eval()
    assert (theirs(tokens(1, 20)).logits - trained(tokens(1, 20))).abs().max() < 1e-4
    measured = ["--model", out / "model", "--task", "esnli", "--data", DATA, "--limit", 5, "--fit", 5,
                "--max-new-tokens", 10, "--temperature", 0, 1, "--rows", tmp_path / "rows"]  # fmt: skip
    assert faith.main([str(x) for x in measured]) == 0
    for t in (0, 1):
        mine, its = lines(tmp_path / f"rows.T{t}.jsonl"), lines(out / f"after.T{t}.jsonl")
        assert [r["text"] for r in mine] == [r["text"] for r in its]


def test_resume(done, folder, tmp_path):
    """From the checkpoint in the middle, which holds adapters alone."""
    out, copy = done[0], tmp_path / "o"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000004")
    size = sum(f.stat().st_size for f in (copy / "checkpoints").rglob("*"))
    assert size < (folder / "model.safetensors").stat().st_size * 2  # weights and both moments would be three times
    code, printed, _ = call(["--resume", "--out", copy])
    assert code == 0 and "continuing after step 2, from " in printed
    assert timeless(out / "metrics.jsonl") == timeless(copy / "metrics.jsonl")
    name = "model/adapter_model.safetensors"
    assert (out / name).read_bytes() == (copy / name).read_bytes()


def test_an_adapter_is_trained_on(done, folder, tmp_path):
    """It begins as it was, and that is the reference of the KL. What is saved has the same base."""
    out, adapter = tmp_path / "o", done[0] / "model"
    assert call([*done[1], "--model", adapter, "--out", out])[0] == 0
    assert [r["text"] for r in lines(out / "before.T1.jsonl")] == [r["text"] for r in lines(done[0] / "after.T1.jsonl")]
    metrics = lines(out / "metrics.jsonl")
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 1e-5
    first, then = (safetensors.torch.load_file(at / "adapter_model.safetensors") for at in (adapter, out / "model"))
    assert first.keys() == then.keys() and not any(torch.equal(first[name], then[name]) for name in first)
    assert (out / "model" / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    for run, model in (("base", folder), ("o", out / "model")):
        measured = ["--model", model, "--task", "esnli", "--data", DATA, "--limit", 5, "--fit", 5, "--max-new-tokens",
                    10, "--temperature", 1, "--rows", tmp_path / run / "cells" / "esnli-bias"]  # fmt: skip
        (tmp_path / run / "cells").mkdir(parents=True)
        assert faith.main([str(x) for x in measured]) == 0
    rows = lines(out / "cells" / "esnli-bias.T1.jsonl")
    assert [r["text"] for r in rows] == [r["text"] for r in lines(out / "after.T1.jsonl")]
    (table,) = paper.tables([tmp_path / "base", out])  # the base is the adapter's
    assert [*table["rows"]] == ["base", "RQ2-on-policy"]


@pytest.mark.parametrize("train_only", ["all", "explanation"])
def test_the_calibration_of_an_adapter_that_is_trained_on(folder, tmp_path, train_only, capsys):
    """It is that of what the run began with; where no adapter decides, also that of its base."""
    given, last = {"lora": 2, "calibrate": True, "train_only": train_only, "steps": 1}, folder
    for out in (tmp_path / "a", tmp_path / "b"):
        assert call(flags(last, out, **given))[0] == 0
        last = out / "model"
    for file, status in ((last, 0), (tmp_path / "b", 0), (tmp_path / "a", 0 if train_only == "explanation" else 2)):
        measured = ["--model", last, "--task", "esnli", "--data", DATA, "--limit", 5, "--fit", 5, "--max-new-tokens", 2,
                    "--calibration", file / "calibration.json"]  # fmt: skip
        capsys.readouterr()
        assert faith.main([str(x) for x in measured]) == status
        assert bool(status) == ("give that of this model, or of the run that made it" in capsys.readouterr().err)


def test_an_adapter_with_a_chat_template_of_its_own(folder, tmp_path):
    """It is trained with that template and saved with it."""
    models.save(lora.attach(models.load(folder), 2, 4.0), tmp_path / "a")
    config = tmp_path / "a" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"chat_template": "Well. " + settings["chat_template"]}))
    models.save(models.load(tmp_path / "a"), tmp_path / "b")
    turns = [{"role": "user", "content": "Is it?"}]
    own, saved, base = (models.Tokenizer(at).render(turns) for at in (tmp_path / "a", tmp_path / "b", folder))
    assert own == saved != base


def test_only_explanations(done, folder, tmp_path):
    """--train-only explanation: no decision changes by a bit, in training, after it, or when the model is measured
    again. With the same flags but for this one, decisions do change."""
    assert call([*done[1], "--train-only", "explanation", "--out", tmp_path / "o"])[0] == 0
    decided, said = [], []
    for out in (done[0], tmp_path / "o"):
        before, after = (lines(out / f"{name}.T1.jsonl") for name in ("before", "after"))
        decided.append([[(r["p"], r["p_edit"]) for r in rows] for rows in (before, after)])
        said.append([[r["text"] for r in rows] for rows in (before, after)])
    assert decided[0][0] == decided[1][0] == decided[1][1] != decided[0][1]
    assert said[0][0] == said[1][0] != said[1][1]
    measured = ["--model", tmp_path / "o" / "model", "--task", "esnli", "--data", DATA, "--limit", 5, "--fit", 5,
                "--max-new-tokens", 10, "--temperature", 0, 1, "--rows", tmp_path / "rows"]  # fmt: skip
    assert faith.main([str(x) for x in measured]) == 0
    again = lines(tmp_path / "rows.T1.jsonl")
    assert [r["text"] for r in again] == said[1][1] and [(r["p"], r["p_edit"]) for r in again] == decided[1][0]


def test_faith_notes(done, tmp_path, capsys):
    """What a run's folder tells of calibration and opening is printed for an adapter too."""
    copy = tmp_path / "m"
    shutil.copytree(done[0] / "model", copy)
    record = json.loads((copy / "training.json").read_text())
    (copy / "training.json").write_text(json.dumps(record | {"opening": "My", "why": "neutral"}))
    (copy / "calibration.json").write_text("{}")
    assert faith.main(["ask", "--model", str(copy), "Is it?", "--options", "yes", "no", "--max-new-tokens", "1"]) == 0
    printed = capsys.readouterr().out
    assert "asked --why neutral" in printed and "explanations that begin 'My'" in printed
    assert f"--calibration {copy}/calibration.json" in printed


def test_ranks(done, tmp_path):
    """Two ranks, each with all weights or each with a part, against one rank. The second has no question of the anchor.

    At lr 1e-2 AdamW would make more of rounding than rounding.
    """
    given = [*done[1], "--lr", "1e-3", "--anchor", "0.1", "--anchor-questions", "1", "--out"]
    assert call([*given, tmp_path / "one"])[0] == 0
    for parallel in ("replicate", "shard"):
        code, _, error = finish(start([*given, tmp_path / parallel, "--parallel", parallel], ranks=2))
        assert code == 0, error[-3000:]
        close(tmp_path / "one", tmp_path / parallel, 1e-5)


# ---- what is refused -----------------------------------------------------------------------------------------


def test_flags_that_are_refused(done, folder, tmp_path):
    for changes, words in (
        ({"train_only": "explanation"}, "switches adapters off for decisions; add --lora 16"),
        ({"train_only": "explanation", "lora": 4, "anchor": 1}, "--anchor keeps decisions from changing"),
        ({"lora": -1}, "--lora must be at least 0"),
        ({"lora": 10**9}, "--lora must be at most 65536"),
        ({"lora": 4, "lora_alpha": 0}, "--lora-alpha must be above 0"),
        ({"lora": 4, "lora_targets": "q_proj,w"}, "no layer is called 'w'; there are q_proj, "),
        ({"lora": 4, "lora_targets": "layers.2.mlp.up_proj"}, "no layer is called 'layers.2.mlp.up_proj'"),
        ({"model": done[0] / "model", "lora": 4}, "is an adapter; to train it on give --lora 4 --lora-alpha 32.0 "
                                                  "--lora-targets q_proj,up_proj,v_proj --train-only all, or merge it"),
    ):  # fmt: skip
        code, _, error = call(flags(folder, **{"out": tmp_path / "x", **changes}))
        assert code == 2 and words in error and error.count("\n") == 1


DEFAULTS = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
ALONE = {  # refused by their name
    "use_dora": True, "bias": "all", "init_lora_weights": "pissa", "task_type": "SEQ_CLS", "a_later_key": 1,
    "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 1}, "layers_to_transform": 0, "r": True,
    "lora_alpha": float("nan"), "target_modules": "[", "exclude_modules": 5, "base_model_name_or_path": None,
}  # fmt: skip
REFUSED = [*(({key: value}, f"{key} ") for key, value in ALONE.items()),
    ({"r": 0}, "above 0"), ({"r": 3}, r"lora_A.weight has shape \[2, 32\], its config says \[3, 32\]"),
    ({"target_modules": ["w"]}, "target_modules must be names of the base's layers"),
    ({"target_modules": ["q_proj", "lm_head"]}, "of lm_head are not"), ({"target_modules": ["k_proj"]}, "holds .*q"),
    ({"target_modules": ["q_proj", "v_proj"]}, "lacks .*v_proj.*target_mod"), ({"revision": "v2"}, "revision v2"),
    ({"base_model_name_or_path": "no/model"}, "its base is not here: no model at no/model"),
]  # fmt: skip


def test_adapters_that_are_refused(folder, tmp_path):
    adapter = tmp_path / "a"
    models.save(lora.attach(models.load(folder), 2, 4.0, ["q_proj"]), adapter)
    settings, file = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config, weights = json.loads(settings.read_text()), safetensors.torch.load_file(file)

    def refused(words):
        with pytest.raises(ValueError, match=words):
            models.load(adapter)

    for changes, words in [*REFUSED, ({"base_model_name_or_path": str(adapter)}, "is an adapter too")]:
        settings.write_text(json.dumps(config | changes))
        refused(words)
    settings.write_text(json.dumps(DEFAULTS | config, default=list))
    models.load(adapter)  # every default of PEFT is accepted
    for change, words in ((lambda w: w.to(torch.int8), "quantized"), (lambda w: w / 0, "not finite")):
        safetensors.torch.save_file({name: change(weight) for name, weight in weights.items()}, file)
        refused(words)
    file.write_bytes(b"123")
    refused("cannot be read")
    shutil.copyfile(folder / "model.safetensors", adapter / "model.safetensors")
    refused("holds an adapter and a whole model")


def test_where_the_base_is(folder, tmp_path, monkeypatch):
    """A path is made absolute. A hub id's revision is found again, and the tokenizer there if the adapter has none."""
    monkeypatch.chdir(folder.parent)
    assert lora.peft_config(lora.attach(models.load(folder.name), 2, 4.0))["base_model_name_or_path"] == str(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repo, other = tmp_path / "models--me--mini", tiny.build(tmp_path / "other", seed=3)
    (repo / "refs").mkdir(parents=True)
    for commit, source, ref in (("0123", folder, "v2"), ("4567", other, "main")):
        shutil.copytree(source, repo / "snapshots" / commit)
        (repo / "refs" / ref).write_text(commit)
    models.save(lora.attach(models.load(repo / "snapshots" / "0123"), 2, 4.0), adapter := tmp_path / "a")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/mini", "0123")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "another"))  # a path that looks so, in no cache of ours
    elsewhere = lora.peft_config(lora.attach(models.load(repo / "snapshots" / "0123"), 2, 4.0))
    assert elsewhere["base_model_name_or_path"] == str(repo / "snapshots" / "0123") and elsewhere["revision"] is None
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (adapter / "tokenizer.json").unlink()
    for revision, base in (("0123", folder), ("v2", folder), (None, other), ("main", other), ("v3", None)):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"revision": revision}))
        if base:
            assert torch.equal(models.load(adapter).embed_tokens.weight, models.load(base).embed_tokens.weight)
            assert models.Tokenizer(adapter).decode([5]) == "A"
    with pytest.raises(ValueError, match="base is not here: no revision v3 of me/mini .*--revision v3"):
        models.load(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "chat_template.jinja").write_text("x")  # of a tokenizer of its own, which is not all here
    with pytest.raises(ValueError, match=f"{adapter}/tokenizer.json is missing"):
        models.Tokenizer(adapter)
