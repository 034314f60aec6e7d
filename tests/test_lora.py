"""lora.py against PEFT, which reads what it writes; adapters unmerged, over weights that never move."""

import json
import shutil
import sys

import command
import pytest
import safetensors.torch
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from test_train import DATA, by_hand, close, flags, lines, noisy_groups, timeless, torchrun

import faith
import model as models
import train
from rollout import Sampler
from run import lora

SHAPE = dict(vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, eos_token_id=3, pad_token_id=1)  # fmt: skip
FAMILIES = {"llama": dict(head_dim=16), "qwen2": {}, "qwen3": dict(head_dim=20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("model"))


def random_model(folder, family):
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **SHAPE, **FAMILIES[family])
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    return theirs


def disturb(network, seed=5):
    """Adapters as after some training: B no longer zero."""
    torch.manual_seed(seed)
    for adapter in lora.adapters(network):
        for b in adapter.B.values():
            b.data.normal_(std=0.1)
    return network


@pytest.mark.parametrize("targets", [lora.TARGETS, ("q_proj", "v_proj"), ("k_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_is_saved(tmp_path, family, targets):
    """Same logits there, here before saving, and here when read again; without adapters, those of the base."""
    base = random_model(tmp_path / "base", family)
    network, tokens = models.load(tmp_path / "base"), torch.randint(5, 300, (2, 30))
    plain = network(tokens).detach()
    lora.attach(network, 4, 8.0, targets, seed=1)
    assert torch.equal(network(tokens), plain)  # B is zero
    moved = disturb(network)(tokens).detach()
    assert (moved - plain).abs().max() > 0.1
    with lora.without(network):
        assert torch.equal(network(tokens), plain)
    assert torch.equal(network(tokens), moved)
    lora.save(network, tmp_path / "adapter", "card")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (theirs(tokens).logits - moved).abs().max() < 1e-4
    assert torch.equal(models.load(tmp_path / "adapter")(tokens), moved)
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(ValueError, match="already there"):
        lora.save(network, tmp_path / "adapter")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_saves_is_read(tmp_path, family):
    base = random_model(tmp_path / "base", family)
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=12, target_modules=list(lora.TARGETS)))
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = torch.randint(5, 300, (2, 30))
    assert (models.load(tmp_path / "adapter")(tokens) - theirs.eval()(tokens).logits).abs().max() < 1e-4


def test_where_the_base_is(folder, tmp_path, monkeypatch):
    """A relative path is made absolute; a snapshot in the hub's cache is told by its id."""
    monkeypatch.chdir(folder.parent)
    lora.save(lora.attach(models.load(folder.name), 2, 4.0), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder.resolve())
    hub = tmp_path / "hub" / "models--some--model" / "snapshots" / "0123"
    assert lora.name_of(hub) == "some/model"


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16(folder, recompute):
    """bf16 weights, fp32 adapters: forward, sampler, KL and backward run; the gradient is close to fp32's."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        network = disturb(lora.attach(models.load(folder, dtype=dtype), 4, 8.0))
        network.recompute = recompute
        groups, rewards = noisy_groups(lora.attach(models.load(folder), 4, 8.0), 1.0)
        optimizer, kept = train.Optimizer(network, train.Args()), []
        optimizer.step = lambda *_, o=optimizer, kept=kept: kept.extend(m.grad.flatten() for m in o.masters) or 1.0
        assert Sampler(network).generate([[7, 8, 9]], 2, 4)
        train.update(network, network, optimizer, groups, rewards, 0.0, train.Args(kl=0.1), train.Ranks())
        gradients.append(torch.cat(kept))
        assert gradients[-1].dtype == torch.float32
    a, b = gradients
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_as_peft_begins(folder):
    """A uniform within 1 / √in, as PEFT draws it, another with each seed; B zero; fp32 whatever the model's dtype."""
    for seed in (0, 1):
        network = lora.attach(models.load(folder, dtype=torch.bfloat16), 8, 16.0, seed=seed)
        for adapter in lora.adapters(network):
            bound = adapter.base.in_features**-0.5
            for a, b in zip(adapter.A.values(), adapter.B.values(), strict=True):
                assert a.dtype == b.dtype == torch.float32 and not b.any()
                assert 0.9 * bound < a.abs().max() <= bound and abs(a.mean()) < 0.2 * bound
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all(".A." in name or ".B." in name for name in trained)
    again = lora.attach(models.load(folder), 8, 16.0, seed=1)
    other = lora.attach(models.load(folder), 8, 16.0, seed=2)
    draws = [torch.cat([a.flatten() for m in lora.adapters(n) for a in m.A.values()]) for n in (network, again, other)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


@pytest.mark.parametrize("form", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients(tmp_path, family, form, kl):
    """The packed form against one completion at a time, with adapters on; the reference is the base without them."""
    folder = tiny.build(tmp_path, family=family)
    network = disturb(lora.attach(models.load(folder), 4, 8.0))
    reference = models.load(folder).requires_grad_(False)
    groups, rewards = noisy_groups(network, 0.8)
    settings = {"loss": form, "kl": kl, "temperature": 0.8}

    def gradient():
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}

    class Keep:
        def accumulate(self):
            pass

        def step(self, *_):
            self.gradient = gradient()
            return sum(float(g.square().sum()) for g in self.gradient.values()) ** 0.5

    for parameter in network.parameters():
        assert not parameter.requires_grad or parameter.dtype == torch.float32
    network.named_tensors = lambda of: {n: of(p) for n, p in network.named_parameters() if p.requires_grad}
    wanted = by_hand(network, groups, rewards, reference if kl else None, **settings)
    ran = []
    network.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    for micro, recompute in ((2, False), (100, False), (100, True)):  # with activation checkpointing too
        ran.clear()
        network.recompute = recompute
        keep, args = Keep(), train.Args(max_new_tokens=12, micro=micro, **settings)
        network.zero_grad()
        figures = train.update(network, network if kl else None, keep, groups, rewards, 0.0, args, train.Ranks())
        close((figures, keep.gradient), wanted)
    assert len(ran) == 2 + bool(kl)  # a block runs again in backward; the reference's pass needs none


def test_sampler_and_trainer_agree(folder):
    """The sampler runs the same adapters: its logprobs are the trainer's, and change when they do."""
    network = disturb(lora.attach(models.load(folder), 4, 8.0))
    sampler = Sampler(network)
    prompts = [[7, 8, 9], [30] * 20]
    answers = sampler.generate(prompts, 4, 10)
    groups = [(p, [c.tokens for c in group]) for p, group in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        logprobs = train.token_logprobs(network, train.pack(groups), 1.0)
    sampled = torch.tensor([lp for group in answers for c in group for lp in c.logprobs])
    assert (logprobs - sampled).abs().max() < 1e-4
    disturb(network, seed=6)
    assert sampler.generate(prompts, 4, 10) != answers


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A run with adapters, and what it was given."""
    out = tmp_path_factory.mktemp("run") / "o"
    given = flags(folder, out, steps=4, lora=4, lora_targets="q_proj,v_proj,up_proj", kl=0.05, lr=1e-2,
                  checkpoint_every=2)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *given])
        assert train.main() == 0
    return out, given


def test_a_run(done, folder, tmp_path):
    out, given = done
    metrics = lines(out / "metrics.jsonl")
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 1e-5  # the reference is the base
    assert {p.name for p in (out / "model").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (out / "model" / "model.safetensors").exists()
    trained, base = models.load(out / "model"), models.load(folder)
    for (name, mine), (_, old) in zip(
        ((n, w) for n, w in trained.named_parameters() if ".A." not in n and ".B." not in n),
        base.named_parameters(), strict=True,
    ):  # fmt: skip
        assert torch.equal(mine, old), name
    tensors = safetensors.torch.load_file(out / "model" / "adapter_model.safetensors")
    assert sum(bool(t.any()) for t in tensors.values()) == len(tensors) == 2 * 3 * 2
    theirs = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), out / "model")
    tokens = torch.randint(5, 200, (1, 20))
    assert (theirs.eval()(tokens).logits - trained(tokens)).abs().max() < 1e-4
    measured = ["--model", out / "model", "--task", "esnli", "--data", DATA, "--limit", 5, "--fit", 5,
                "--max-new-tokens", 10, "--temperature", 0, 1, "--rows", tmp_path / "rows"]  # fmt: skip
    assert command.main([str(x) for x in measured]) == 0
    for t in (0, 1):
        mine, its = lines(tmp_path / f"rows.T{t}.jsonl"), lines(out / f"after.T{t}.jsonl")
        assert [r["text"] for r in mine] == [r["text"] for r in its]


def test_resume(done, folder, tmp_path, monkeypatch, capsys):
    """From the checkpoint in the middle, which holds adapters alone."""
    out, _ = done
    shutil.copytree(out, tmp_path / "o")
    shutil.rmtree(tmp_path / "o" / "checkpoints" / "step-00000004")
    size = sum(f.stat().st_size for f in (tmp_path / "o" / "checkpoints").rglob("*"))
    assert size < (folder / "model.safetensors").stat().st_size * 2  # weights and both moments would be three times
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(tmp_path / "o")])
    assert train.main() == 0
    assert "going on after step 2, from " in capsys.readouterr().out
    assert timeless(out / "metrics.jsonl") == timeless(tmp_path / "o" / "metrics.jsonl")
    name = "model/adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "o" / name).read_bytes()


def test_faith_notes(done, folder, tmp_path, capsys):
    """What the run's folder tells of calibration and opening is told of an adapter too."""
    shutil.copytree(done[0] / "model", tmp_path / "m")
    record = json.loads((tmp_path / "m" / "training.json").read_text())
    (tmp_path / "m" / "training.json").write_text(json.dumps(record | {"opening": "My"}))
    (tmp_path / "m" / "calibration.json").write_text("{}")
    faith.open_subject(str(tmp_path / "m"), "none", "", 3)
    printed = capsys.readouterr().out
    assert "explanations that begin 'My'" in printed and f"--calibration {tmp_path / 'm'}/calibration.json" in printed


def test_ranks(done, folder, tmp_path, monkeypatch):
    """Two ranks, each with all or each with a part, against one. At lr 1e-2 AdamW makes rounding more than rounding."""
    given = [*done[1], "--lr", "1e-3", "--out"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given, str(tmp_path / "one")])
    assert train.main() == 0
    for parallel in ("replicate", "shard"):
        ran = torchrun(2, "train.py", [*given, str(tmp_path / parallel), "--parallel", parallel])
        assert ran.returncode == 0, ran.stderr[-3000:]
        runs = (timeless(tmp_path / name / "metrics.jsonl") for name in ("one", parallel))
        for a, b in zip(*runs, strict=True):
            numbers = [k for k in a if a[k] is not None]
            assert not {k: (a[k], b[k]) for k in numbers if a[k] != pytest.approx(b[k], abs=1e-5, rel=1e-5)}


def test_mistakes(done, folder, tmp_path, monkeypatch, capsys):
    out, given = done
    for changes, words in (
        ({"lora": -1}, "--lora must be at least 0"),
        ({"lora": 4, "lora_alpha": 0}, "--lora-alpha must be above 0"),
        ({"lora": 4, "lora_targets": "q_proj,w"}, "no layer is called 'w'; there are q_proj, "),
        ({"model": out / "model"}, "is an adapter; merge it"),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags(folder, **{"out": tmp_path / "x", **changes})])
        assert train.main() == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    lora.save(lora.attach(models.load(folder), 2, 4.0, ["q_proj"]), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for changes, words in (
        ({"use_dora": True}, "asks for use_dora True"), ({"bias": "all"}, "asks for bias 'all'"),
        ({"r": None}, "r cannot be None"), ({"r": 0}, "r cannot be 0"), ({"lora_alpha": float("nan")}, "cannot be nan"),
        ({"base_model_name_or_path": None}, "cannot be None"), ({"target_modules": ".*q_proj"}, "cannot be '"),
        ({"target_modules": [["q_proj"]]}, "cannot be"), ({"init_lora_weights": "pissa"}, "asks for init_lora_weights"),
        ({"base_model_name_or_path": str(tmp_path / "a")}, "is an adapter too"),
        ({"r": 3}, r"lora_A.weight has shape \(2, 32\), not \(3, 32\)"), ({"target_modules": ["k_proj"]}, "k_proj"),
        ({"base_model_name_or_path": "no/model"}, "no model at no/model"),
    ):  # fmt: skip
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=words):
            models.load(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": []}))
    models.load(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="cannot be read"):
        models.load(tmp_path / "a")
