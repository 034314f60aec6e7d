"""Reading a model's config.json: which of the network's switches it sets, and what in it is not implemented.

Where a key is absent, transformers' value is taken, or the file is refused.
"""

import json

from run.reading import Record, record_of, short

LARGEST = 2**24  # of any length in a config; a greater one is a mistake

# Keys that would change the computation, with the values that do not. Null never does.
NEUTRAL = dict.fromkeys(
    "attention_bias mlp_bias use_sliding_window quantization_config is_encoder_decoder add_cross_attention auto_map "
    "rope_interleaved use_mrope use_qk_norm qk_layernorm alibi clip_qkv attention_multiplier query_pre_attn_scalar "
    "attn_logit_softcapping final_logit_softcapping num_experts num_local_experts n_routed_experts no_rope_layers "
    "no_rope_layer_interval per_layer_config".split(), (False, 0),
)  # fmt: skip
NEUTRAL |= dict.fromkeys("partial_rotary_factor pretraining_tp embedding_multiplier residual_multiplier logits_scaling "
                         "logit_scale is_causal".split(), (1,))  # fmt: skip
NEUTRAL["hidden_act"] = ("silu", "swish")

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE = {"rope_theta", "rope_type", "type", "original_max_position_embeddings"}


def switches(raw: dict, generation: dict | None, where: str) -> dict:
    """The fields of model.Config, from a parsed config.json and generation_config.json; ValueError for a fault."""
    raw = record_of(raw, where)
    family = raw.take("model_type", str)
    if family not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"{raw.where}: model_type {family!r} is not implemented; use a llama, qwen2 or qwen3 model")
    # Qwen's configs name a window that use_sliding_window turns off.
    neutral = NEUTRAL | ({} if "use_sliding_window" in raw else {"sliding_window": (None,)})
    for key, harmless in neutral.items():
        if raw.get(key) is not None and raw[key] not in harmless:
            only = json.dumps(harmless[0])
            raise ValueError(f"{raw.where}: {key} is implemented only as {only}, {short(raw[key])}; use another model")
    names = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
             "heads": "num_attention_heads", "context": "max_position_embeddings"}  # fmt: skip
    fields = {ours: raw.take(theirs, int, above=0, most=LARGEST) for ours, theirs in names.items()}
    fields["layers"] = layers = raw.take("num_hidden_layers", int, above=0, most=1000)
    width, heads = fields["hidden_size"], fields["heads"]
    kv_heads = heads if family == "llama" or "num_key_value_heads" in raw else 32
    kv_heads = raw.take("num_key_value_heads", int, kv_heads, above=0, most=heads)
    # Qwen3-4B has 128, with hidden size 2560 and 32 heads.
    head_dim = raw.take("head_dim", int, 128 if family == "qwen3" else width / heads, above=0, most=LARGEST)
    kinds, classes = raw.take("layer_types", list[str], None), raw.take("architectures", list[str], [])
    stated = [raw, record_of(generation or {}, "generation_config.json")]
    ends = [(end, file) for file in stated if (end := file.take("eos_token_id", int | list[int], None)) is not None]
    end, ends_from = ends[-1] if ends else ([], raw)  # generation_config.json counts where both name it
    end = tuple(end) if isinstance(end, list) else (end,)
    if heads % kv_heads:
        raw.refuse("num_attention_heads", f"a multiple of num_key_value_heads {kv_heads}, not {heads}")
    if head_dim % 2:
        raw.refuse("head_dim", f"an even whole number, not {head_dim:g} (by default hidden_size / num_attention_heads)")
    if kinds not in (None, ["full_attention"] * layers):
        raw.refuse("layer_types", f"full_attention {layers} times, which alone is implemented, {short(kinds)}")
    if classes and f"{family}forcausallm" not in map(str.lower, classes):
        raw.refuse("architectures", f"a {family} language model's, which alone is implemented, {short(classes)}")
    if not all(0 <= token < fields["vocab_size"] for token in end):
        ends_from.refuse("eos_token_id", f"within the vocabulary of {fields['vocab_size']} tokens, {short(end)}")
    theta, scaling = rope_of(raw)
    return fields | {
        "family": family, "kv_heads": kv_heads, "head_dim": int(head_dim), "end_of_turn": end,
        "norm_eps": raw.take("rms_norm_eps", float, above=0, most=1),
        "tied": "tie_word_embeddings" in raw and raw.take("tie_word_embeddings", bool),
        "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3", "rope_theta": theta, "rope_scaling": scaling,
        "raw": raw,
    }  # fmt: skip


def rope_of(raw: Record) -> tuple[float, dict[str, float] | None]:
    """(theta, Llama-3.1's scaling or None).

    transformers 5 writes rope_parameters; older versions write rope_scaling, and rope_theta at top level. Values given
    twice must agree.
    """
    top = {key: number for key in ("rope_theta", LLAMA3[-1]) if (number := raw.take(key, float, None)) is not None}
    places, found = [raw.take(key, dict, {}) for key in ("rope_parameters", "rope_scaling")], []
    for place in list(filter(None, places)) or [Record({}, raw.where)]:
        rope = Record(top | {key: value for key, value in place.items() if value is not None}, place.where)
        kind = rope.take("rope_type", str, rope.take("type", str, "default"))
        if rope.get("type", kind) != kind:
            rope.refuse("type", f"the same as rope_type {kind!r}, {short(rope['type'])}")
        if kind not in ("default", "llama3"):
            raise ValueError(f"{rope.where}: rope_type {kind!r} is not implemented; use a model with default or llama3")
        scaling = {key: float(rope.take(key, float, above=0)) for key in LLAMA3 if kind == "llama3"}
        if scaling and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            rope.refuse("high_freq_factor", "above low_freq_factor")
        for key, value in rope.items():
            if key not in ROPE | scaling.keys() and (key, value) != ("partial_rotary_factor", 1):
                raise ValueError(f"{rope.where}: {key} with rope_type {kind!r} is not implemented; use a model without")
            if top.get(key, value) != value:
                rope.refuse(key, f"the same as {key} at top level, {short(value)}")
        found.append((float(rope.take("rope_theta", float, above=0)), scaling or None))
    if found[0] != found[-1]:
        raise ValueError(f"{raw.where}: rope_parameters and rope_scaling differ; use the one of the model's training")
    return found[0]
