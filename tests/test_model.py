"""model.py against transformers: logits, files, KV cache, saving, and what it refuses.

Every weight of the tiny models is drawn at random, norms and biases too: at their usual ones and zeros most
mistakes would not show. All comparisons are fp32 on the CPU unless a test says otherwise.
"""

import json
import os
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import faith
import model as models
import tasks
from rollout import Sampler

ROOT = Path(__file__).parent.parent
VOCABULARY = 280
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384}  # fmt: skip


def llama3(factor: float) -> dict:
    return {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


def default(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


LLAMA, QWEN2, QWEN3 = (LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM)
# Of every family one tied and one not; thetas, eps and head_dims that no default would guess.
FAMILIES = {
    "llama": (*LLAMA, {"rope_parameters": default(100000.0), "rms_norm_eps": 1e-5}),
    "llama-3.1": (*LLAMA, {"rope_parameters": llama3(8.0), "rms_norm_eps": 1e-5, "head_dim": 12}),
    "llama-3.2": (*LLAMA, {"rope_parameters": llama3(32.0), "rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "qwen2": (*QWEN2, {"rope_parameters": default(1000000.0), "rms_norm_eps": 1e-6}),
    "qwen2-tied": (*QWEN2, {"rope_parameters": default(1000000.0), "tie_word_embeddings": True}),
    "qwen3": (*QWEN3, {"rope_parameters": default(1000000.0), "rms_norm_eps": 1e-6, "head_dim": 24}),
    "qwen3-tied": (*QWEN3, {"rope_parameters": default(5000.0), "head_dim": 16, "tie_word_embeddings": True}),
}


def build(family: str, **changes):
    """A tiny transformers model of the family, every parameter random."""
    make_config, make_model, settings = FAMILIES[family]
    network = make_model(make_config(**{**SIZES, "eos_token_id": 6, **settings, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif parameter.ndim == 2 and "embed" not in name:
                noise = 1.5 * noise / parameter.shape[1] ** 0.5  # attention that looks somewhere in particular
            parameter.copy_(noise)
    return network


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(family) -> (transformers model, the folder that its save_pretrained wrote)."""
    made = {}

    def get(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = build(family), folder
            made[family][0].save_pretrained(folder)
        return made[family]

    return get


@pytest.fixture
def folder(saved, tmp_path, byte_tokenizer):
    """A writable, complete chat model (Llama-3.1's shape, Llama-3's turns) to damage."""
    template = (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    copy = tmp_path / "tiny"
    shutil.copytree(saved("llama-3.1")[1], copy)
    byte_tokenizer(copy, template, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    edit(copy / "generation_config.json", eos_token_id=[3, 4], temperature=0.6, do_sample=True)
    return copy


def edit(path: Path, **changes) -> None:
    """Sets keys of a JSON file; a value of None removes the key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def gap(ours, theirs, ids: torch.Tensor) -> float:
    """The largest difference of two models' logits."""
    return (ours(ids) - theirs(ids).logits).abs().max().item()


# ---- logits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(saved, family):
    theirs, folder = saved(family)
    ours = models.load(folder)
    assert gap(ours, theirs, tokens(3, 200)) < 1e-4
    assert gap(ours, theirs, tokens(5, 1)) < 1e-4
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_at_long_positions(tmp_path, factor):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    theirs = build("llama", **sizes, rope_parameters=llama3(factor))
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    ids = tokens(1, 8192 + 200)
    with torch.no_grad():
        difference = (ours(ids) - theirs(ids).logits).abs().amax((0, 2))  # (T,)
    assert difference[:2048].max() < 1e-4
    assert difference[2048:8192].max() < 1e-4
    assert difference[8192:].max() < 1e-4


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize("family", ["llama", "llama-3.1", "llama-3.2", "qwen2", "qwen3"])
def test_older_config_form(saved, tmp_path, family, spelling):
    theirs, folder = saved(family)
    shutil.copytree(folder, tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    rope = json.loads(config.read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    edit(config, rope_parameters=None, rope_theta=theta, torch_dtype="float32", dtype=None)
    if kind != "default":
        edit(config, rope_scaling={spelling: kind, **rope})
    elif spelling == "type":
        config.write_text(config.read_text().replace('"rope_theta"', '"rope_scaling": null, "rope_theta"'))
    assert gap(models.load(tmp_path / "old"), theirs, tokens(2, 300)) < 1e-4


def test_rope_frequencies_equal_transformers(saved):
    for family in FAMILIES:
        theirs, folder = saved(family)
        frequencies = models.rope_frequencies(models.read_config(folder))
        assert torch.allclose(frequencies, theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0), family


def test_norm_casts_before_the_weight():
    """In bf16 the order of cast and weight shows; it must be transformers' to the bit."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = models.RMSNorm(64, 1e-5, dtype=torch.bfloat16), LlamaRMSNorm(64, 1e-5).bfloat16()
    generator = torch.Generator().manual_seed(0)
    weight = (1 + 0.3 * torch.randn(64, generator=generator)).bfloat16()
    x = (20 * torch.randn(50, 64, generator=generator)).bfloat16()
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
        assert torch.equal(ours(x), theirs(x))


def test_norm_eps_is_used(saved):
    """Where states are small the eps decides; at ordinary size it cannot be seen."""
    for family, eps in (("llama", 1e-5), ("qwen2", 1e-6)):
        theirs, folder = saved(family)
        ours = models.load(folder)
        x = 1e-3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.allclose(ours.norm(x), theirs.model.norm(x), atol=1e-6)
        assert ours.norm.eps == ours.layers[0].input_layernorm.eps == eps


def test_bf16_keeps_frequencies_in_fp32(saved):
    _, folder = saved("llama-3.1")
    half, full = models.load(folder, dtype=torch.bfloat16), models.load(folder)
    assert half.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert half.frequencies.dtype == torch.float32 and torch.equal(half.frequencies, full.frequencies)
    ids = tokens(2, 50)
    with torch.no_grad():
        assert half(ids).dtype == torch.bfloat16
        assert (half(ids) - full(ids)).abs().max() < 0.5


def test_gradients_equal_transformers(saved):
    """Training goes through the same graph: the gradient of a loss, parameter by parameter."""
    for family in ("llama-3.2", "qwen3"):
        theirs, folder = saved(family)
        ours, ids = models.load(folder), tokens(2, 20)
        for network, logits in ((ours, ours(ids)), (theirs, theirs(ids).logits)):
            network.zero_grad()
            logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().backward()
        reference = dict(theirs.named_parameters())
        for name, gradient in ours.named_tensors(lambda parameter: parameter.grad).items():
            other = reference[name if name == "lm_head.weight" else "model." + name]
            assert torch.allclose(gradient, other.grad, atol=1e-5), (family, name)
        theirs.zero_grad()


# ---- files ------------------------------------------------------------------------------------------------


def test_shards_follow_the_index(saved, tmp_path):
    theirs, _ = saved("qwen3")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    # What the index does not name is not the model's: an older download, another copy.
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "consolidated.safetensors")
    assert gap(models.load(tmp_path), theirs, tokens(2, 50)) < 1e-4


def test_old_files_may_hold_inverse_frequencies_and_a_tied_head(saved, tmp_path):
    theirs, folder = saved("llama-3.2")
    shutil.copytree(folder, tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "old" / "model.safetensors")
    assert gap(models.load(tmp_path / "old"), theirs, tokens(2, 50)) < 1e-4
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "old" / "model.safetensors")
    assert "lm_head.weight differs" in refusal(models.load, tmp_path / "old")


def test_end_of_turn_is_a_set(folder):
    assert models.load(folder).config.end_of_turn == (3, 4)  # generation_config.json's, before config.json's
    edit(folder / "generation_config.json", eos_token_id=None)
    assert models.load(folder).config.end_of_turn == (6,)
    (folder / "generation_config.json").unlink()
    assert models.load(folder).config.end_of_turn == (6,)


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_hub_id_in_the_local_cache(folder, tmp_path, monkeypatch, variable):
    hub = tmp_path / "home" / "hub"
    repo = hub / "models--some-one--tiny.model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abc")
    (repo / "snapshots" / "0123abc").mkdir(parents=True)
    (repo / "snapshots" / "stale").mkdir()
    for file in folder.iterdir():
        (repo / "snapshots" / "0123abc" / file.name).symlink_to(file)
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(hub.parent if variable == "HF_HOME" else hub))
    assert torch.equal(models.load("some-one/tiny.model").norm.weight, models.load(folder).norm.weight)
    assert models.Tokenizer("some-one/tiny.model").chat == "llama3"
    message = refusal(models.load, "some-one/other")
    assert "some-one/other" in message and str(hub) in message and "hf download some-one/other" in message


def test_tokenizer_settings_of_a_training_run_are_dropped(folder):
    """A tokenizer.json may cut or pad every text; both would go unseen."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = models.Tokenizer(folder)
    assert len(ours.encode("a longer text")) == 13 and ours.decode(ours.encode("a longer text")) == "a longer text"


def test_command_line(folder, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["model.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "model.py"), run_name="__main__")
        except SystemExit as exit:
            return exit.code, capsys.readouterr()
        return 0, capsys.readouterr()

    code, output = run(folder)
    assert code == 0 and re.search(r"family +llama\n", output.out) and re.search(r"parameters +[\d,]+\n", output.out)
    for arguments in ((folder / "absent",), ()):
        code, output = run(*arguments)
        assert code == 2 and output.out == "" and output.err.count("\n") == 1


# ---- attention over other things ---------------------------------------------------------------------------


@torch.no_grad()
def test_packed_rows_equal_separate_ones(saved):
    """Several texts in one row, by a mask and positions that start again."""
    network, ids = models.load(saved("qwen3")[1]), tokens(1, 30)
    text = torch.tensor([0] * 13 + [1] * 17)
    positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
    mask = (text[:, None] == text) & torch.ones(30, 30).tril().bool()
    packed = network(ids, positions, mask[None, None])
    separate = torch.cat([network(ids[:, :13]), network(ids[:, 13:])], 1)
    assert (packed - separate).abs().max() < 1e-5


# ---- save -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
@pytest.mark.parametrize("family", ["llama-3.1", "llama-3.2", "qwen2", "qwen3"])
@torch.no_grad()
def test_saved_model_opens_in_transformers(saved, folder, tmp_path, family, shard_bytes):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(saved(family)[1] / name, folder / name)
    ours = models.load(folder)
    for parameter in ours.parameters():  # "trained"
        parameter.mul_(1.01)
    models.save(ours, tmp_path / "new" / "out", "# A card\n", shard_bytes)
    out = tmp_path / "new" / "out"
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) > 2) == (shard_bytes == 20_000) == (out / "model.safetensors.index.json").exists()
    assert all(f.stat().st_size < 20_000 + VOCABULARY * 32 * 4 + 2000 for f in shards) or shard_bytes == 5e9
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(load_file(saved(family)[1] / "model.safetensors"))
    theirs, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    ids = tokens(2, 60)
    assert gap(ours, theirs.eval(), ids) < 1e-5 and torch.equal(models.load(out)(ids), ours(ids))
    assert theirs.generation_config.eos_token_id == [3, 4] and theirs.generation_config.temperature == 0.6
    messages = [{"role": "user", "content": " What is 3 × 4? "}]
    reference = AutoTokenizer.from_pretrained(out)
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer = models.Tokenizer(out)
    assert text == tokenizer.render(messages) == models.Tokenizer(folder).render(messages)
    assert reference(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (out / "README.md").read_text() == "# A card\n"
    assert not list(out.parent.glob("*.partial"))


def test_saved_dtype_is_the_models(folder, tmp_path):
    models.save(models.load(folder, dtype=torch.bfloat16), tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    old = folder / "config.json"
    edit(old, dtype=None, torch_dtype="float32")
    models.save(models.load(folder, dtype=torch.bfloat16), tmp_path / "older")
    config = json.loads((tmp_path / "older" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_saved_weights_can_be_read_by_whom_the_umask_says(folder, tmp_path, mask):
    before = os.umask(mask)
    try:
        models.save(models.load(folder), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").glob("model*")}
    assert modes == {"model.safetensors": 0o666 & ~mask}


def test_a_model_from_no_files_can_be_saved(folder, tmp_path):
    fresh = models.Transformer(replace(models.read_config(folder), end_of_turn=(3, 5)))
    models.save(fresh, tmp_path / "fresh")
    again = models.load(tmp_path / "fresh")
    assert again.config.end_of_turn == (3, 5) and torch.equal(again.norm.weight, fresh.norm.weight)


def test_save_overwrites_nothing(folder, tmp_path):
    network = models.load(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        message = refusal(models.save, network, tmp_path / name)
        assert str(tmp_path / name) in message and "another" in message
    assert (tmp_path / "full" / "note.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    models.save(network, tmp_path / "empty")
    assert models.load(tmp_path / "empty").config == network.config


def test_an_interrupted_save_leaves_nothing_under_its_name(folder, tmp_path, monkeypatch):
    network, out = models.load(folder), tmp_path / "out"
    calls = []

    def cut_off(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(models, "save_file", cut_off)
        with pytest.raises(KeyboardInterrupt):
            models.save(network, out, shard_bytes=20_000)
    assert len(calls) == 3 and not out.exists() and not list(tmp_path.glob("*.partial"))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model-00001-of-00003.safetensors").touch()
    models.save(network, out)  # and what a kill has left over is not in the way, nor in the folder
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not (out / "model.safetensors.index.json").exists() and not list(tmp_path.glob("*.partial"))


# ---- what is refused --------------------------------------------------------------------------------------


def refusal(call, *arguments) -> str:
    """The message of a ValueError: one line that says what is wrong and, after a semicolon, what to do."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r"; .*\b(use|fetch|hf download|choose)\b", message), message
    return message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "'mistral'"),
        ({"model_type": None}, "None"),
        ({"rope_parameters": {**llama3(8.0), "rope_type": "yarn"}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": None}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": None}, "rope_theta"),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {**default(1e4), "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": None, "rms_norm_eps": None}, "num_hidden_layers, rms_norm_eps"),
        ({"num_hidden_layers": "2", "hidden_size": 0}, "hidden_size, num_hidden_layers"),
        ({"rope_parameters": [1]}, "rope_theta"),
        ({"rope_parameters": None, "rope_scaling": "x"}, "rope_theta"),
    ],
)
def test_configs_that_are_refused(folder, changes, named):
    edit(folder / "config.json", **changes)
    message = refusal(models.load, folder)
    assert str(folder / "config.json") in message and named in message


def test_an_end_of_turn_that_is_no_id_is_refused(folder):
    edit(folder / "generation_config.json", eos_token_id=["x"])
    assert "eos_token_id" in refusal(models.load, folder)


def test_missing_folder(tmp_path):
    assert str(tmp_path / "absent") in refusal(models.load, tmp_path / "absent")
    assert str(tmp_path / "absent") in refusal(models.Tokenizer, tmp_path / "absent")


@pytest.mark.parametrize("content", ["{", "[1]", "\x00\x01", None])
def test_config_that_is_no_json(folder, content):
    file = folder / "config.json"
    file.unlink() if content is None else file.write_text(content)
    assert str(file) in refusal(models.load, folder)


def reshard(folder: Path, **moves) -> dict:
    """The one file of weights as two shards with an index; returns the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return index


def test_damaged_shards(folder):
    reshard(folder)
    models.load(folder)  # whole
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    assert str(second) in refusal(models.load, folder)
    second.write_bytes(whole[:5])
    assert str(second) in refusal(models.load, folder)
    second.unlink()
    message = refusal(models.load, folder)
    assert str(folder) in message and second.name in message
    # The index names tensors that no shard holds.
    save_file({"model.norm.weight": torch.ones(32)}, second)
    refusal(models.load, folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "index.json" in refusal(models.load, folder)


def test_tensor_in_two_shards(folder):
    reshard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    twice = next(iter(load_file(folder / "model-00001-of-00002.safetensors").items()))
    save_file({**load_file(second), twice[0]: twice[1]}, second)
    message = refusal(models.load, folder)
    assert str(second) in message and twice[0] in message and "second time" in message


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen"])
def test_tensors_that_do_not_fit(folder, fault):
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(folder / "model.safetensors")
    if fault == "missing":
        del weights[name]
    elif fault == "extra":
        name = "model.layers.1.self_attn.q_proj.bias"
        weights[name] = torch.zeros(48)
    else:
        weights[name] = weights[name].T.contiguous()
    save_file(weights, folder / "model.safetensors")
    message = refusal(models.load, folder)
    assert str(folder) in message and name.removeprefix("model.") in message
    assert "(32, 48)" in message or fault != "misshapen"


def test_weights_of_another_config(folder):
    edit(folder / "config.json", num_hidden_layers=1)  # else a layer would be left out in silence
    assert "layers.1." in refusal(models.load, folder)


def test_only_pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(models.load, folder)
    assert str(folder) in message and ".bin" in message and "convert" in message


def test_tokenizers_that_are_refused(folder, byte_tokenizer):
    def refused(template, message, **changes):
        byte_tokenizer(folder, template, **{"bos_token": "<|begin_of_text|>", **changes})
        said = refusal(models.Tokenizer, folder)
        assert str(folder) in said and message in said

    llama, chatml = "<|start_header_id|>", "<|im_start|>"
    refused(None, "chat template")
    refused("{{ messages[0]['content'] }}", "chat template")
    refused([{"name": "tool_use", "template": llama}], "chat template")
    refused("{{ '<|im_start|>assistant\\n<think>\\n' }}", "thinks")
    refused(llama, "bos_token", bos_token=None)
    refused(chatml, "end-of-turn", special=("<|im_start|>",))
    edit(folder / "config.json", vocab_size=265)
    refused(llama, "265")
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in refusal(models.Tokenizer, folder)
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[:300])
    assert str(folder / "tokenizer.json") in refusal(models.Tokenizer, folder)
    (folder / "tokenizer.json").unlink()
    assert str(folder / "tokenizer.json") in refusal(models.Tokenizer, folder)


def test_letter_that_is_not_one_token(folder, byte_tokenizer):
    tokenizer = models.Tokenizer(folder)
    assert tokenizer.letter_ids("is: (", 3) == [tokenizer.tokenizer.token_to_id(letter) for letter in "ABC"]
    byte_tokenizer(folder, "<|start_header_id|>", merges=[("(", "B")], bos_token="<|begin_of_text|>")
    merged = models.Tokenizer(folder)
    assert merged.letter_ids("is: (", 1)  # A still is
    message = refusal(merged.letter_ids, "is: (", 3)
    assert "'B'" in message and "is: (" in message


# ---- a real model -----------------------------------------------------------------------------------------


def test_smollm2_writes_what_transformers_writes(smollm2):
    """64 greedy tokens to 16 real prompts of unequal length, in one batch.

    Two right programs may part where the two best logits are closer than 1e-4; such rows are counted apart.
    """
    tokenizer, new = models.Tokenizer(smollm2), 64
    questions = tasks.load("esnli", ROOT / "tests" / "data" / "esnli")[:8]
    prompts = [faith.decision_prompt(tokenizer, q) for q in questions]
    prompts += [faith.explanation_prompt(tokenizer, q, i % 3) for i, q in enumerate(questions)]
    assert len(prompts) == 16 and len({len(p) for p in prompts}) > 8
    # No token ends an answer here, on either side, so that all 64 are compared.
    sampler = Sampler(models.load(smollm2))
    sampler.end_of_turn = [-1]
    answers = sampler.generate(prompts, 1, new, temperature=0.0)

    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    reference.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    output = reference.generate(
        ids, attention_mask=seen, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ties = 0
    for i, (answer,) in enumerate(answers):
        theirs = output.sequences[i, longest:].tolist()
        assert len(answer.tokens) == len(theirs) == new
        parted = next((t for t in range(new) if answer.tokens[t] != theirs[t]), None)
        if parted is not None:
            best = output.logits[parted][i].topk(2).values
            assert best[0] - best[1] < 1e-4, f"prompt {i} parts at token {parted}: {tokenizer.decode(theirs)!r}"
            ties += 1
    print(f"{16 - ties} of 16 answers equal, {ties} parted at a tie")
    assert ties <= 2
