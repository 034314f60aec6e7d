"""model.py against transformers: logits, files, saving, and what it refuses.

Every weight of the tiny models is random, norms and biases too: with ones and zeros most mistakes would not show. All
comparisons are fp32 on the CPU unless a test says otherwise.
"""

import json
import os
import re
import runpy
import shutil
import sys
from dataclasses import replace

import pytest
import tiny
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import faith
import model as models
import tasks
from rollout import Sampler

VOCABULARY = 280
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384}  # fmt: skip


def llama3(factor: float) -> dict:
    return {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


def default(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


# One tied and one untied model of every family, with thetas, eps and head_dims that are no defaults.
FAMILIES = {
    "llama": {"rope_parameters": default(100000.0), "rms_norm_eps": 1e-5},
    "llama-3.1": {"rope_parameters": llama3(8.0), "rms_norm_eps": 1e-5, "head_dim": 12},
    "llama-3.2": {"rope_parameters": llama3(32.0), "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    "qwen2": {"rope_parameters": default(1000000.0), "rms_norm_eps": 1e-6},
    "qwen2-tied": {"rope_parameters": default(1000000.0), "tie_word_embeddings": True},
    "qwen3": {"rope_parameters": default(1000000.0), "rms_norm_eps": 1e-6, "head_dim": 24},
    "qwen3-tied": {"rope_parameters": default(5000.0), "head_dim": 16, "tie_word_embeddings": True},
}


def build(family: str, **changes):
    """A tiny transformers model of the family, every parameter random."""
    settings = {**SIZES, "eos_token_id": 6, **FAMILIES[family], **changes}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split("-")[0], **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif parameter.ndim == 2 and "embed" not in name:
                noise = 1.5 * noise / parameter.shape[1] ** 0.5  # attention that differs from token to token
            parameter.copy_(noise)
    return network


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(family) -> (transformers model, the folder that its save_pretrained wrote)."""
    made = {}

    def get(family: str):
        if family not in made:
            made[family] = build(family), tmp_path_factory.mktemp(family)
            made[family][0].save_pretrained(made[family][1])
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


def edit(path, **changes) -> None:
    """Sets keys of a JSON file; a value of None removes the key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def reweigh(folder, change) -> None:
    """Writes model.safetensors again after change(its tensors)."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def gap(ours, theirs, ids: torch.Tensor) -> torch.Tensor:
    """The largest difference of two models' logits at each position (T,)."""
    return (ours(ids) - theirs(ids).logits).abs().amax((0, 2))


# ---- logits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(saved, family):
    """Logits, rope frequencies and, where states are small so that it decides, the eps of the norm."""
    theirs, folder = saved(family)
    ours = models.load(folder)
    assert gap(ours, theirs, tokens(3, 200)).max() < 1e-4
    assert gap(ours, theirs, tokens(5, 1)).max() < 1e-4
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert torch.allclose(ours.frequencies, theirs.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    x = 1e-3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours.norm(x), theirs.model.norm(x), atol=1e-6)
    assert ours.norm.eps == ours.layers[0].input_layernorm.eps == FAMILIES[family].get("rms_norm_eps", 1e-6)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_at_long_positions(tmp_path, factor):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    theirs = build("llama", **sizes, rope_parameters=llama3(factor))
    theirs.save_pretrained(tmp_path)
    parts = gap(models.load(tmp_path), theirs, tokens(1, 8192 + 200)).split([2048, 6144, 200])
    assert [bool(part.max() < 1e-4) for part in parts] == [True] * 3  # the last is beyond the original context


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
    assert gap(models.load(tmp_path / "old"), theirs, tokens(2, 300)).max() < 1e-4


@torch.no_grad()
def test_norm_casts_before_the_weight():
    """In bf16 the order of cast and weight shows; it must be transformers' to the bit."""
    ours, theirs = models.RMSNorm(64, 1e-5, dtype=torch.bfloat16), LlamaRMSNorm(64, 1e-5).bfloat16()
    generator = torch.Generator().manual_seed(0)
    ours.weight.copy_(1 + 0.3 * torch.randn(64, generator=generator))
    theirs.weight.copy_(ours.weight)
    x = (20 * torch.randn(50, 64, generator=generator)).bfloat16()
    assert torch.equal(ours(x), theirs(x))


@torch.no_grad()
def test_bf16_keeps_frequencies_in_fp32(saved):
    _, folder = saved("llama-3.1")
    half, full, ids = models.load(folder, dtype=torch.bfloat16), models.load(folder), tokens(2, 50)
    assert half.dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert half.frequencies.dtype == torch.float32 and torch.equal(half.frequencies, full.frequencies)
    assert half(ids).dtype == torch.bfloat16 and (half(ids) - full(ids)).abs().max() < 0.5


@pytest.mark.parametrize("family", ["llama-3.2", "qwen3"])
def test_gradients_equal_transformers(saved, family):
    """Training goes through the same graph: the gradient of a loss, parameter by parameter."""
    theirs, folder = saved(family)
    ours, ids = models.load(folder), tokens(2, 20)
    theirs.zero_grad()
    for logits in (ours(ids), theirs(ids).logits):
        logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().backward()
    reference = dict(theirs.named_parameters())
    for name, gradient in ours.named_tensors(lambda parameter: parameter.grad).items():
        other = reference[name if name == "lm_head.weight" else "model." + name]
        assert torch.allclose(gradient, other.grad, atol=1e-5), name
    theirs.zero_grad()


@torch.no_grad()
def test_packed_rows_equal_separate_ones(saved):
    """Several texts in one row, by a mask and positions that start again."""
    network, ids = models.load(saved("qwen3")[1]), tokens(1, 30)
    text = torch.tensor([0] * 13 + [1] * 17)
    positions = torch.cat([torch.arange(13), torch.arange(17)])[None]
    mask = (text[:, None] == text) & torch.ones(30, 30).tril().bool()
    separate = torch.cat([network(ids[:, :13]), network(ids[:, 13:])], 1)

    def attend(layer, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], enable_gqa=True)

    assert (network(ids, positions, attend) - separate).abs().max() < 1e-5


# ---- files ------------------------------------------------------------------------------------------------


def test_shards_follow_the_index(saved, tmp_path):
    theirs, _ = saved("qwen3")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    other = {"model.norm.weight": torch.zeros(32)}
    save_file(other, tmp_path / "consolidated.safetensors")  # the index does not name it, so it is not the model's
    assert gap(models.load(tmp_path), theirs, tokens(2, 50)).max() < 1e-4
    save_file(other, tmp_path / "model.safetensors")  # transformers would take this one
    message = refusal(models.load, tmp_path)
    assert "holds model.safetensors, and model.safetensors.index.json names other files" in message


def test_old_files_may_hold_inverse_frequencies_and_a_tied_head(saved, tmp_path):
    theirs, folder = saved("llama-3.2")
    old = shutil.copytree(folder, tmp_path / "old")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    reweigh(old, lambda w: w.update(extra | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert gap(models.load(old), theirs, tokens(2, 50)).max() < 1e-4
    reweigh(old, lambda w: w["lm_head.weight"][0, 0].add_(1))
    assert "lm_head.weight differs" in refusal(models.load, old)
    reweigh(old, lambda w: w.update({"lm_head.weight": 2 * w.pop("model.embed_tokens.weight")}))  # the head alone
    assert gap(models.load(old), AutoModelForCausalLM.from_pretrained(old), tokens(2, 50)).max() < 1e-4


def test_end_of_turn_is_a_set(folder):
    assert models.load(folder).config.end_of_turn == (3, 4)  # generation_config.json's, before config.json's
    edit(folder / "generation_config.json", eos_token_id=None)
    assert models.load(folder).config.end_of_turn == (6,)
    (folder / "generation_config.json").unlink()
    assert models.load(folder).config.end_of_turn == (6,)


# Each variable counts before those after it, as in huggingface_hub; where the cache is below what it names.
CACHES = {"HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub",
          "HOME": ".cache/huggingface/hub"}  # fmt: skip


@pytest.mark.parametrize("variable", CACHES)
def test_hub_id_in_the_local_cache(folder, tmp_path, monkeypatch, variable):
    for i, name in enumerate(CACHES):
        monkeypatch.setenv(name, "/elsewhere" if i > list(CACHES).index(variable) else "")
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv(variable, "$PLACE" if variable.endswith(("CACHE", "HF_HOME")) else str(tmp_path))
    hub = tmp_path / CACHES[variable]
    repo, name = hub / "models--some-one--tiny.model", "some-one/tiny.model"
    for part in ("refs", "snapshots/0123abc", "snapshots/stale"):
        (repo / part).mkdir(parents=True)
    assert "several snapshots, 0123abc, stale" in refusal(models.load, name)
    (repo / "refs" / "main").write_text("0123abc\n")
    for file in folder.iterdir():
        (repo / "snapshots" / "0123abc" / file.name).symlink_to(file)
    assert torch.equal(models.load(name).norm.weight, models.load(folder).norm.weight)
    assert models.Tokenizer(name).end_of_turn == models.Tokenizer(folder).end_of_turn
    message = refusal(models.load, "some-one/other")
    assert "some-one/other" in message and str(hub) in message and "hf download some-one/other" in message
    (repo / "refs" / "main").write_text("4567")
    assert "refs/main names 4567" in refusal(models.load, name)
    (repo / "refs" / "main").unlink()
    (repo / "snapshots" / "stale").rmdir()
    (repo / "snapshots" / ".DS_Store").touch()
    models.load(name)  # the only snapshot
    (folder / "config.json").unlink()
    assert "config.json is a link to a file that is gone" in refusal(models.load, name)


def test_tokenizer_settings_of_a_training_run_are_dropped(folder):
    """A tokenizer.json may cut or pad every text; neither would be noticed."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = models.Tokenizer(folder)
    assert len(ours.encode("a longer text")) == 13 and ours.decode(ours.encode("a longer text")) == "a longer text"


def test_command_line(folder, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["model.py", *map(str, arguments)])
        runpy.run_path(str(tiny.ROOT / "model.py"), run_name="__main__")

    with pytest.raises(SystemExit, match="0"):
        run(folder)
    output = capsys.readouterr().out
    assert re.search(r"family +llama\n", output) and re.search(r"parameters +[\d,]+\n", output)
    for arguments in ((folder / "absent",), ()):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments)
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1


# ---- save -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
@pytest.mark.parametrize("family", ["llama-3.1", "llama-3.2", "qwen2", "qwen3"])
@torch.no_grad()
def test_saved_model_opens_in_transformers(saved, folder, tmp_path, family, shard_bytes):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(saved(family)[1] / name, folder / name)
    ours, out, ids = models.load(folder), tmp_path / "new" / "out", tokens(2, 60)
    for parameter in ours.parameters():  # "trained"
        parameter.mul_(1.01)
    models.save(ours, out, "# A card\n", shard_bytes)
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) > 2) == (shard_bytes == 20_000) == (out / "model.safetensors.index.json").exists()
    assert all(f.stat().st_size < 20_000 + VOCABULARY * 32 * 4 + 2000 for f in shards) or shard_bytes == 5e9
    names = [name for shard in shards for name in load_file(shard)]
    assert sorted(names) == sorted(load_file(saved(family)[1] / "model.safetensors"))
    theirs, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    assert gap(ours, theirs.eval(), ids).max() < 1e-5 and torch.equal(models.load(out)(ids), ours(ids))
    assert theirs.generation_config.eos_token_id == [3, 4] and theirs.generation_config.temperature == 0.6
    messages = [{"role": "user", "content": " What is 3 × 4? "}]
    reference, tokenizer = AutoTokenizer.from_pretrained(out), models.Tokenizer(out)
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.render(messages) == models.Tokenizer(folder).render(messages)
    assert reference(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (out / "README.md").read_text() == "# A card\n"
    assert not list(out.parent.glob("*.partial"))


def test_saved_dtype_is_the_models(folder, tmp_path):
    models.save(models.load(folder, dtype=torch.bfloat16), tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    edit(folder / "config.json", dtype=None, torch_dtype="float32")
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


def test_saved_settings_have_every_end_of_turn(folder, tmp_path):
    """Also the template's. The source's other settings and its further templates stay."""
    edit(folder / "generation_config.json", eos_token_id=4)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (folder / "chat_template.jinja").write_text(tiny.TEMPLATE.replace("im_end", "eot_id"))
    models.save(models.load(folder), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [4, 3] and saved["temperature"] == 0.6 and saved["do_sample"] is True
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").read_text() == "rag"


def test_save_overwrites_nothing(folder, tmp_path):
    network, note = models.load(folder), tmp_path / "full" / "note.txt"
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    for file in (note, tmp_path / "file"):
        file.write_text("mine")
    for name in ("full", "file"):
        message = refusal(models.save, network, tmp_path / name)
        assert str(tmp_path / name) in message and "another" in message
    assert note.read_text() == (tmp_path / "file").read_text() == "mine"
    models.save(network, tmp_path / "empty")
    assert models.load(tmp_path / "empty").config == network.config


def test_an_interrupted_save_leaves_nothing_under_its_name(folder, tmp_path, monkeypatch):
    network, out, calls = models.load(folder), tmp_path / "out", []

    def cut_off(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models, "save_file", cut_off)
        models.save(network, out, shard_bytes=20_000)
    assert len(calls) == 3 and not out.exists() and not list(tmp_path.glob("*.partial"))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model-00001-of-00003.safetensors").touch()
    models.save(network, out)  # files that a killed process left are not in the way, nor in the folder
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


OLD = {"rope_parameters": None, "rope_theta": 1e4}
ALONE = {  # refused by their name
    "model_type": "mistral", "partial_rotary_factor": 0.5, "sliding_window": 128, "use_sliding_window": True,
    "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "num_experts": 8, "auto_map": {"A": "b"},
    "quantization_config": {"quant_method": "gptq"}, "architectures": ["LlamaForSequenceClassification"],
    "num_attention_heads": 3, "num_key_value_heads": 8, "head_dim": 7, "num_hidden_layers": 10**9, "hidden_size": 0,
    "vocab_size": 280.0, "intermediate_size": True, "max_position_embeddings": "2", "rms_norm_eps": None,
    "tie_word_embeddings": "false", "eos_token_id": [1.0], "rope_parameters": [1],
}  # fmt: skip
CONFIGS = [*(({key: value}, f"{key} ") for key, value in ALONE.items()),
    ({"rope_parameters": {**llama3(8.0), "rope_type": "yarn"}}, "'yarn'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "low_freq_factor"),
    ({"rope_parameters": {**llama3(8.0), "high_freq_factor": 1.0}}, "high_freq_factor must be above low_freq_factor"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": None}, "rope_theta"),
    ({"rope_parameters": {"full_attention": default(1e4)}}, "full_attention"),
    ({"rope_parameters": {**default(1e4), "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_theta": 1e4}, "rope_theta must be the same as rope_theta at top level"),
    ({"rope_scaling": {**llama3(4.0)}}, "rope_parameters and rope_scaling differ"),
    ({"rope_scaling": {**llama3(8.0), "type": "linear"}}, "type must be the same as rope_type 'llama3'"),
    ({**OLD, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    ({**OLD, "rope_scaling": {"factor": 2.0}}, "rope_scaling: factor"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"model_type": "qwen2", "architectures": None, "num_key_value_heads": None}, "num_key_value_heads 32"),
    ({"model_type": "qwen3", "architectures": None, "head_dim": None}, "[256, 32]"),  # 128, transformers' default
    ({"head_dim": None, "hidden_size": 34}, "head_dim must be an even whole number, not 8.5"),
    ({"intermediate_size": 2**24, "hidden_size": 2**24}, "no memory"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), CONFIGS)
def test_configs_that_are_refused(folder, changes, named):
    edit(folder / "config.json", **changes)
    message = refusal(models.load, folder)
    assert str(folder) in message and named in message


@pytest.mark.parametrize("changes", [
    {"rope_scaling": llama3(8.0)}, {"rope_theta": 500000.0}, {"original_max_position_embeddings": 8192},
    {"hidden_act": "swish"}, {"sliding_window": 8, "use_sliding_window": False}, {"num_experts": 0},
    {"layer_types": ["full_attention"] * 2}, {"architectures": None, "partial_rotary_factor": 1.0}],
)  # fmt: skip
def test_configs_that_say_the_same_in_other_words(saved, folder, changes):
    edit(folder / "config.json", **changes)
    assert gap(models.load(folder), saved("llama-3.1")[0], tokens(2, 50)).max() < 1e-4


UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("damage", "named"),
    [(shutil.rmtree, [""]),
     (lambda f: edit(f / "generation_config.json", eos_token_id=["x"]), ["generation_config.json: eos_token_id"]),
     (lambda f: edit(f / "generation_config.json", eos_token_id=[3, VOCABULARY]), ["within the vocabulary"]),
     (lambda f: [(f / "generation_config.json").unlink(), (f / "generation_config.json").symlink_to("x")], ["a link"]),
     (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com"), ["a git-LFS pointer"]),
     (lambda f: reweigh(f, lambda weights: weights[UP][3].fill_(torch.nan)), [UP, "not finite"]),
     (lambda f: reweigh(f, lambda weights: weights.update({UP: weights[UP].to(torch.int8)})), [UP, "quantized"]),
     (lambda f: (f / "config.json").write_text("{"), ["/config.json"]),
     (lambda f: (f / "config.json").write_text("[1]"), ["/config.json"]),
     (lambda f: (f / "config.json").write_text("\x00\x01"), ["/config.json"]),
     (lambda f: (f / "config.json").unlink(), ["/config.json"]),
     (lambda f: reweigh(f, lambda weights: weights.pop(UP)), [UP[6:]]),
     (lambda f: reweigh(f, lambda weights: weights.update({BIAS: torch.zeros(48)})), [BIAS[6:]]),
     (lambda f: reweigh(f, lambda weights: weights.update({UP: weights[UP].T.contiguous()})), [UP, "[32, 48]"]),
     (lambda f: edit(f / "config.json", num_hidden_layers=1), ["layers.1."]),  # not a layer left out in silence
     (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), [".bin", "convert"])],
)  # fmt: skip
def test_files_that_are_refused(folder, damage, named):
    damage(folder)
    message = refusal(models.load, folder)
    assert str(folder) in message and all(word in message for word in named)


def test_damaged_shards(folder):
    weights, index = load_file(folder / "model.safetensors"), folder / "model.safetensors.index.json"
    (folder / "model.safetensors").unlink()
    names, (first, second) = sorted(weights), (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    for file, part in ((first, names[::2]), (second, names[1::2])):
        save_file({name: weights[name] for name in part}, file)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names[::2], first.name) | {names[1]: second.name}}))
    models.load(folder)  # whole
    whole = second.read_bytes()
    for length in (len(whole) // 2, 5):
        second.write_bytes(whole[:length])
        assert str(second) in refusal(models.load, folder)
    second.write_bytes(whole)
    save_file(load_file(second) | {names[0]: weights[names[0]]}, second)
    message = refusal(models.load, folder)
    assert str(second) in message and names[0] in message and "second time" in message
    second.unlink()
    message = refusal(models.load, folder)
    assert str(folder) in message and second.name in message
    save_file({"model.norm.weight": torch.ones(32)}, second)  # the index names tensors that no shard holds
    refusal(models.load, folder)
    for content in ({"metadata": {}}, {"weight_map": {}}, {"weight_map": {UP: 1}}, {"weight_map": {UP: "../x"}}):
        index.write_text(json.dumps(content))
        assert "index.json: weight_map must be" in refusal(models.load, folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    edit(folder / "config.json", vocab_size=265)
    message = refusal(models.Tokenizer, folder)
    assert str(folder) in message and "265" in message


def test_tokenizer_files_that_are_damaged_or_missing(folder):
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text((folder / name).read_text()[:100])
        assert str(folder / name) in refusal(models.Tokenizer, folder)
    for path in (folder / "tokenizer.json", folder):
        path.unlink() if path.is_file() else shutil.rmtree(path)
        assert str(path) in refusal(models.Tokenizer, folder)


def test_letter_that_is_not_one_token(folder, byte_tokenizer):
    tokenizer = models.Tokenizer(folder)
    assert tokenizer.ids_after("is: (", "ABC") == [tokenizer.tokenizer.token_to_id(letter) for letter in "ABC"]
    byte_tokenizer(folder, tiny.TEMPLATE, merges=[("(", "B")])
    merged = models.Tokenizer(folder)
    assert merged.ids_after("is: (", "A")  # A still is
    message = refusal(merged.ids_after, "is: (", "ABC")
    assert "'B'" in message and "is: (" in message


# ---- a real model -----------------------------------------------------------------------------------------


def test_smollm2_writes_what_transformers_writes(smollm2):
    """64 greedy tokens to 16 real prompts of unequal length, in one batch.

    Two correct programs may differ where the two best logits are closer than 1e-4; such rows are counted apart.
    """
    tokenizer, new = models.Tokenizer(smollm2), 64
    questions = tasks.load("esnli", tiny.ROOT / "tests" / "data" / "esnli")[:8]
    prompts = [faith.decision_prompt(tokenizer, q) for q in questions]
    prompts += [faith.explanation_prompt(tokenizer, q, i % 3) for i, q in enumerate(questions)]
    assert len(prompts) == 16 and len({len(p) for p in prompts}) > 8
    sampler = Sampler(models.load(smollm2))
    sampler.end_of_turn = [-1]  # on both sides no token ends an answer, so that all 64 are compared
    answers = sampler.generate(prompts, 1, new, temperature=0.0)
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    reference.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    longest, ties = max(map(len, prompts)), 0
    output = reference.generate(
        torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i, (answer,) in enumerate(answers):
        theirs = output.sequences[i, longest:].tolist()
        assert len(answer.tokens) == len(theirs) == new
        if answer.tokens != theirs:
            at = next(t for t in range(new) if answer.tokens[t] != theirs[t])
            best = output.logits[at][i].topk(2).values
            assert best[0] - best[1] < 1e-4, f"prompt {i} differs from token {at} on: {tokenizer.decode(theirs)!r}"
            ties += 1
    print(f"{16 - ties} of 16 answers equal, {ties} differ from a tie on")
    assert ties <= 2
