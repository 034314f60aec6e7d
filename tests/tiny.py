"""A tiny chat model in a folder, for tests: random weights in the shape of a family, whole words as tokens.

It picks options and writes explanations without sense. Its decisions depend on every word of the question, so edits
often change them. Its explanations are mostly names of personas, so some mention the cause and some do not. It has
everything that a run needs, and a run of two steps takes seconds.

    python tests/tiny.py FOLDER      builds one
"""

import json
import re
import sys
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import faith  # noqa: E402
import reward  # noqa: E402
import tasks  # noqa: E402

SPECIAL = ("<|unk|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
UNKNOWN, PAD, START, END, STOP = range(5)
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, letters, personas, then the words of the prompts, the bias sentences and the e-SNLI sample."""
    texts = [faith.BEGIN, faith.WHYS["leading"], "user assistant system", *faith.ASK.values(), *reward.PHRASINGS]
    texts += [faith.ask(q) for q in tasks.load("esnli", ROOT / "tests" / "data" / "esnli")]
    words = re.findall(r"\w+|[^\w\s]", " ".join(texts))
    return list(dict.fromkeys([*SPECIAL, "A", "B", "C", *reward.words("bias"), *words]))


def build(folder: Path, seed=17, context=512, dtype: torch.dtype = torch.float32, family="llama") -> Path:
    """Writes config, weights, tokenizer and chat template into `folder`, and returns it.

    With seed 17 about a third of the bias edits change Llama's answer, and answers are of all lengths.
    """
    folder, words = Path(folder), vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=SPECIAL[UNKNOWN]))
    split = [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(split)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    E, M, H, K, D, V = 32, 48, 4, 2, 8, len(words) + 3  # rows that no token names, as real models have
    shapes = {"model.embed_tokens": (V, E), "lm_head": (V, E), "model.norm": (E,)}
    block = {"self_attn.q_proj": (H * D, E), "self_attn.k_proj": (K * D, E), "self_attn.v_proj": (K * D, E),
             "self_attn.o_proj": (E, H * D), "mlp.gate_proj": (M, E), "mlp.up_proj": (M, E),
             "mlp.down_proj": (E, M), "input_layernorm": (E,), "post_attention_layernorm": (E,)}  # fmt: skip
    own = {"qwen2": {"self_attn.q_proj.bias": (H * D,), "self_attn.k_proj.bias": (K * D,),
                     "self_attn.v_proj.bias": (K * D,)},
           "qwen3": {"self_attn.q_norm": (D,), "self_attn.k_norm": (D,)}}.get(family, {})  # fmt: skip
    for part in (block, own):  # what a family has of its own comes last, so that the rest is the same in each
        shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in part.items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        middle = 0 if name.endswith("bias") else 1
        weights[name] = middle + 0.1 * noise if len(shape) == 1 else 1.4 * noise / shape[1] ** 0.5
    # One axis that every state shares. On it personas and the two ends of a turn score highest.
    personas = slice(words.index("C") + 1, words.index("C") + 1 + len(reward.words("bias")))
    weights["model.embed_tokens"][:, 0], weights["lm_head"][:, 0] = 2, 0
    weights["lm_head"][personas, 0] = weights["lm_head"][[END, STOP], 0] = 9
    for i in range(2):  # much attention to the rest of the text, so that an edit has an effect
        weights[f"model.layers.{i}.self_attn.o_proj"] *= 3
        weights[f"model.layers.{i}.self_attn.q_proj"] *= 2
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{i}.{name}"][0] = 0  # leaves the shared axis as it is
    named = {name if name.endswith("bias") else f"{name}.weight": w.to(dtype) for name, w in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": [FAMILIES[family]], "model_type": family, "vocab_size": V, "hidden_size": E,
        "intermediate_size": M, "num_hidden_layers": 2, "num_attention_heads": H, "num_key_value_heads": K,
        "head_dim": D, "hidden_act": "silu", "max_position_embeddings": context, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[END], "pad_token": SPECIAL[PAD],
                "unk_token": SPECIAL[UNKNOWN], "chat_template": TEMPLATE}  # fmt: skip
    generation = {"eos_token_id": [END, STOP], "pad_token_id": PAD}
    for name, value in (("config", config), ("tokenizer_config", settings), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1))
    return folder


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
