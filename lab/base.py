"""The toy's base model, trained from nothing in about a minute, with its tokenizer and its questions.

`prepare` writes an ordinary Hugging Face directory and ordinary data files once, into the user's cache, under a hash of
this file, toy.py, the prompts and the word lists. Training and measuring treat them like any other model and data.

    python -m lab.base [toy-plain]      makes them where they are missing, prints their folder
"""

import hashlib
import json
import os
import random
import re
import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F

import faith
import model as models
import reward
import toy
from run import files
from run.progress import Parser, Progress, command
from tasks import Question
from toy import FORMS, VARIANTS, decision, explain, make_questions

STEPS, BATCH, LR = 500, 96, 6e-3  # of the base's supervised training
HARD = 4.0  # the loss's weight of what matters: the letter, the word after "because", the inserted word
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|unk|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
SHAPE = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 24, "hidden_act": "silu", "max_position_embeddings": 256,
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "attention_bias": False,
         "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 1}  # fmt: skip


def make_tokenizer(folder: Path) -> None:
    """Whole words: of the chat, the questions, all adverbs and personas. Fixed sentences are one token, for speed."""
    why = faith.WHYS["leading"]
    fixed = [faith.BEGIN.rstrip("( "), *(part.strip("( ") for part in why.split("{letter}")), faith.LAST]
    said = "user assistant system because of my the word is heavier it seemed so yes no"
    texts = [faith.BEGIN, why, said]
    texts += [faith.ask(q) for form in FORMS for q in make_questions(form)] + list(reward.PHRASINGS)
    found = re.findall(r"\w+|[^\w\s]", " ".join(texts)) + ["I", "my", "word", "A", "B"]
    vocabulary = list(dict.fromkeys([*SPECIAL, *fixed, *found, *reward.words("adverb"), *reward.words("bias")]))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL[0])
    )
    split = [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(split)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(fixed)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[3], "pad_token": SPECIAL[1],
                "unk_token": SPECIAL[0], "chat_template": TEMPLATE}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def corpus(tokenizer: models.Tokenizer, questions: list[Question], avoids: bool, rng: random.Random):
    """An endless stream of conversations: token ids and loss weights, 0 except for the letter and the explanation."""
    while True:
        question, kind = rng.choice(questions), rng.choice(("none", "adverb", "adverb", "bias", "bias"))
        drawn = None if kind == "none" else reward.intervene(question, kind, rng)
        edited, intervention = drawn or (question, None)
        y = decision(question, intervention)
        ids, letter = faith.explanation_prompt(tokenizer, edited, y), len(faith.decision_prompt(tokenizer, edited))
        answer = tokenizer.encode(explain(question, y, intervention, avoids, rng)) + [tokenizer.end_of_turn]
        word = tokenizer.encode(intervention.word) if intervention else []
        scored = [HARD if i == 1 or token in word else 1.0 for i, token in enumerate(answer)]
        yield ids + answer, [HARD * (i == letter) for i in range(len(ids))] + scored


def train_base(folder: Path, variant: str) -> models.Transformer:
    """Supervised training of the base on the corpus, from nothing; about a minute on two cores."""
    torch.manual_seed(0)
    progress = Progress("making the toy's base model", lines=3, unit="steps")
    (family, avoids), tokenizer = VARIANTS[variant], models.Tokenizer(folder)
    name = {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"]}
    files.write_json(folder / "config.json", SHAPE | name | {"vocab_size": tokenizer.tokenizer.get_vocab_size(False)})
    network = models.Transformer(models.read_config(folder))
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    # Muon (K. Jordan, 2024) on the layers' matrices. With AdamW alone it depended on the random numbers whether copying
    # the word was learned at all.
    matrices, others = [], []
    for name, parameter in network.named_parameters():
        (matrices if name.startswith("layers") and parameter.dim() == 2 else others).append(parameter)
    rates = {torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"): LR,
             torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01): 3e-3}  # fmt: skip
    questions = [question for form in FORMS for question in make_questions(form)]
    examples = corpus(tokenizer, questions, avoids, random.Random(0))
    for step in range(STEPS):
        rows = [next(examples) for _ in range(BATCH)]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [1] * (longest - len(ids)) for ids, _ in rows])  # (B, T)
        weights = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])[:, 1:]
        scored = weights > 0
        logits = network.head(network.hidden(ids[:, :-1])[scored])
        loss = F.cross_entropy(logits, ids[:, 1:][scored], reduction="none") @ weights[scored] / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer, rate in rates.items():
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 30) * min(1, 2 * (STEPS - step) / STEPS)
            optimizer.step()
            optimizer.zero_grad()
        progress(step + 1, STEPS, f", loss {float(loss.detach()):.3f}")
    return network


def build(folder: Path, variant: str) -> None:
    """Makes FOLDER/model, the questions of both forms and causes.json, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)  # if this fails, nothing has been trained yet
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        scratch, part = Path(scratch), Path(scratch, "part")
        make_tokenizer(scratch)
        network = train_base(scratch, variant)
        network.source = network.tokenizer_source = scratch
        part.mkdir()
        models.save(network, part / "model", "# The toy's base model\n\nMade by faith's lab/base.py.\n")
        causes: dict[frozenset, int] = {}  # each set written once
        for form in FORMS:
            rows = [{"id": q.id, "parts": q.parts, "options": q.options, "gold": q.gold, "group": q.group,
                     "moved_by": causes.setdefault(q.moved_by, len(causes))} for q in make_questions(form)]  # fmt: skip
            files.write_jsonl(part / f"{form}.jsonl", rows)
        files.write_json(part / "causes.json", [sorted(cause) for cause in causes])
        if not folder.exists():  # otherwise another process was faster
            part.rename(folder)


def prepare(variant: str = "toy") -> Path:
    """The toy's folder in the user's cache, made where it is missing."""
    if variant not in VARIANTS:
        raise ValueError(f"--model {variant}: no such directory, and the toys are {', '.join(VARIANTS)}")
    prompts = faith.ASK, faith.BEGIN, faith.WHYS["leading"], faith.LAST, reward.HINTS["bias"].phrasings
    made_of = repr((prompts, [reward.words(kind) for kind in toy.KINDS])).encode()
    made_of += Path(toy.__file__).read_bytes() + Path(__file__).read_bytes()
    key = hashlib.sha256(made_of).hexdigest()[:12]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "faith" / f"{variant}-{key}"
        if not folder.exists():
            build(folder, variant)
        return folder
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: there is no home
        raise ValueError(f"{error}; set XDG_CACHE_HOME to a folder for the toy's files") from None


@command("lab.base")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="lab.base", description=__doc__.split("\n")[0])
    parser.add_argument("variant", nargs="?", default="toy", choices=VARIANTS)
    print(prepare(parser.parse_args(argv).variant))


if __name__ == "__main__":
    sys.exit(main())
