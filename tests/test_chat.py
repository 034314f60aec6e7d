"""Chat turns: Tokenizer.render and encode give the texts and token ids of each model's own template.

tests/data/chat_golden.json holds the templates of Llama-3.1 and Qwen3 (../shared/tokenizers) and of SmolLM2, and the
texts and token ids that transformers' apply_chat_template makes of the conversations below (Qwen3 asked not to think).
The texts are checked everywhere, the ids where the tokenizers are. This writes the file anew:

    FAITH_SMOLLM2=DIR python tests/test_chat.py
"""

import functools
import json
import os
import re
from pathlib import Path

import pytest
import tiny
from jinja2.sandbox import ImmutableSandboxedEnvironment

import model as models

GOLDEN = tiny.ROOT / "tests" / "data" / "chat_golden.json"
SHARED = tiny.ROOT.parent / "shared" / "tokenizers"
NAMES = ("llama-3.1", "qwen3", "smollm2")
BOS = {"llama-3.1": "<|begin_of_text|>", "qwen3": None, "smollm2": "<|im_start|>"}
ODD = "\n  Is 3 × 4 < 12?\n\t{no} 'so', \"or\" …  \n\n"  # whitespace to trim or keep, quotes, braces, not all ASCII
BEGIN = "The best answer is: ("


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """User and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


CONVERSATIONS = {  # name: (messages, what the answer is forced to begin with)
    "one turn": (turns("Is a whale a fish?"), ""),
    "one odd turn": (turns(ODD), ""),
    "an empty turn": (turns(""), ""),
    "system": (turns("Is a whale a fish?", system="Answer in one word."), ""),
    "odd system": (turns("Hi", system=ODD), ""),
    "empty system": (turns("Hi", system=""), ""),
    "later system": ([*turns("Hi", "Hello."), {"role": "system", "content": ODD}, *turns("Well?")], ""),
    "forced beginning": (turns("Is a whale a fish?\n(A) yes\n(B) no\nAnswer with the letter."), BEGIN),
    "forced, system": (turns("Is a whale a fish?", system="Be brief."), BEGIN),
    "second turn": (turns("Is a whale a fish?", BEGIN + "B)", "Why did you choose (B)?"), ""),
    "second turn, system": (turns("Q", "A", "Why?", system="Be brief."), ""),
    "second turn, odd": (turns(ODD, ODD, ODD), BEGIN),
    "history with thoughts": (turns("Q", "<think>\nHm. Let me see.\n</think>\n\nA fish.", "Why?"), ""),
    "ends in an answer": (turns("Is a whale a fish?", "No."), ""),
    "ends in an odd answer": (turns("Q", "A", "Q", ODD, system="Be brief."), ""),
    "ends in an empty thought": (turns("Q", "<think>\n\n</think>\n\nNo."), ""),
    "ends in a thought": (turns("Q", "<think>\nHm. Let me see.\n</think>\n\nNo."), ""),
    "two answers": ([*turns("Q", "One."), {"role": "assistant", "content": "Two."}], ""),
}


@functools.cache
def golden() -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


real = functools.cache(models.Tokenizer)  # they take seconds to open


def source(name: str, request) -> Path:
    """The folder of a real tokenizer."""
    if name == "smollm2":
        return request.getfixturevalue("smollm2")
    if not SHARED.parent.exists():
        pytest.skip(f"no {SHARED.parent}, where the real tokenizers are")
    assert (SHARED / name).is_dir(), f"{SHARED.parent} is there, but {SHARED / name} is not"
    return SHARED / name


@pytest.fixture
def small(tmp_path, byte_tokenizer):
    """small(template, bos_token=...) is a Tokenizer of bytes with this template."""
    return lambda template, **settings: models.Tokenizer(byte_tokenizer(tmp_path, template, **settings))


# ---- against the committed texts and ids ------------------------------------------------------------------


def test_golden_holds_the_conversations_above():
    assert tuple(golden()) == NAMES
    for entry in golden().values():
        assert {k: (v["messages"], v["begin"]) for k, v in entry["conversations"].items()} == CONVERSATIONS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "named"])
def test_render_is_the_templates_text(tmp_path, small, name, place):
    entry = golden()[name]
    template = entry["template"]
    named = [{"name": "tool_use", "template": "none"}, {"name": "default", "template": template}]
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(template, encoding="utf-8")
    tokenizer = small({"tokenizer_config.json": template, "named": named}.get(place), bos_token=BOS[name])
    for label, case in entry["conversations"].items():
        assert tokenizer.render(case["messages"], case["begin"]) == case["text"], label


@pytest.mark.parametrize(("name", "end"), [("llama-3.1", 128009), ("qwen3", 151645), ("smollm2", 2)])
def test_ids_are_the_real_tokenizers(request, name, end):
    tokenizer = real(source(name, request))
    for label, case in golden()[name]["conversations"].items():
        text = tokenizer.render(case["messages"], case["begin"])
        assert text == case["text"], label
        assert tokenizer.encode(text) == case["ids"], label
        assert tokenizer.decode(case["ids"]).endswith(case["begin"]) and "<|" not in tokenizer.decode(case["ids"])
    assert tokenizer.end_of_turn == end
    begin = tokenizer.render(turns("?"), BEGIN)
    assert len(set(tokenizer.ids_after(begin, "ABCDE"))) == 5
    if name == "llama-3.1":  # one begin-of-text: the template's, without the tokenizer's
        assert tokenizer.encode(begin).count(128000) == 1


@pytest.mark.parametrize("name", NAMES)
def test_golden_is_what_transformers_gives(request, name):
    assert json.loads(json.dumps(reference(name, source(name, request)))) == golden()[name]


def test_special_tokens_are_single_ids(small):
    """The same without a real tokenizer: each marker one id, begin-of-text once, the rest bytes."""
    tokenizer = small(golden()["llama-3.1"]["template"], bos_token={"content": "<|begin_of_text|>", "special": True})
    ids = tokenizer.encode(tokenizer.render(turns("Hi", "Yo", "so"), "("))
    assert [i for i in ids if i < 10] == [0, *[1, 2, 3] * 3, 1, 2] and tokenizer.end_of_turn == 3
    assert tokenizer.decode(ids) == "user\n\nHiassistant\n\nYouser\n\nsoassistant\n\n("


def test_forced_beginning_needs_an_open_turn(small):
    with pytest.raises(ValueError, match="end with a user turn"):
        small(golden()["qwen3"]["template"]).render(turns("Q", "A"), BEGIN)


def test_messages_are_left_as_they_were(small):
    messages = turns(ODD, "<think>\n\n</think>\n\nA", ODD)
    for name in NAMES:
        small(golden()[name]["template"], bos_token=BOS[name]).render(messages)
    assert messages == turns(ODD, "<think>\n\n</think>\n\nA", ODD)


# ---- other templates that the same models come with -------------------------------------------------------

# What a chat without tools uses of longer templates, in our words. Llama-3.1's own always begins with dates (the one in
# ../shared is Llama-3's), Llama-3.2's asks for today's, and Qwen2.5's holds two default system prompts, with tools and
# without.
DATES = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- set first = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}
{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + first + "<|eot_id|>" }}
{%- for m in rest %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
DATE = '    {%- set date_string = "26 Jul 2024" %}\n'
ASKED = DATE.replace('"26 Jul 2024"', 'strftime_now("%d %b %Y")')
EITHER = f"    {{%- if strftime_now is defined %}}\n    {ASKED}    {{%- else %}}\n    {DATE}    {{%- endif %}}\n"
TODAY = DATES.replace(DATE, EITHER)
TWO_SYSTEMS = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0]['content'] if messages[0]['role'] == 'system' else 'You are a model with tools.' }}
    {{- "\\n\\n# Tools\\n\\n<tools>" + tools | tojson + "</tools> in {\\"name\\": <name>}<|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a model, made by us. You do not fish.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == "user" or (m.role == "system" and not loop.first) or m.role == "assistant" %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.mark.parametrize("template", [DATES, TODAY, TWO_SYSTEMS, tiny.TEMPLATE], ids=["dates", "today", "two", "plain"])
def test_render_equals_jinja(small, template):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers sets it up
    environment.globals["strftime_now"] = lambda form: "26 Jul 2024"
    jinja = environment.from_string(template)
    tokenizer = small(template, bos_token="<|begin_of_text|>")
    for label, (messages, begin) in CONVERSATIONS.items():
        opened = messages[-1]["role"] != "assistant"
        text = jinja.render(messages=messages, add_generation_prompt=opened, bos_token="<|begin_of_text|>")
        assert tokenizer.render(messages, begin) == text + begin, label


@pytest.mark.parametrize("template", [DATES, TODAY], ids=["dates", "today"])
def test_llama_with_dates_word_for_word(small, template):
    assert small(template, bos_token="<|begin_of_text|>").render(turns(" Hi "), "(") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n("
    )


# ---- writing the golden file ------------------------------------------------------------------------------


def reference(name: str, folder: Path) -> dict:
    """The entry of one model: its template, and what transformers makes of every conversation with it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    conversations = {}
    for label, (messages, begin) in CONVERSATIONS.items():
        options = {"add_generation_prompt": messages[-1]["role"] != "assistant", "enable_thinking": False}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options) + begin
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if not begin:
            assert ids == tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"]
        conversations[label] = {"messages": messages, "begin": begin, "text": text, "ids": ids}
    return {"template": tokenizer.chat_template, "conversations": conversations}


def write_golden() -> None:
    smollm2 = os.environ.get("FAITH_SMOLLM2") or Path.home() / ".cache" / "faith" / "smollm2-135m-instruct"
    entries = {name: reference(name, smollm2 if name == "smollm2" else SHARED / name) for name in NAMES}
    text = re.sub(r"(?<=\d),\n\s+(?=\d)", ", ", json.dumps(entries, indent=1, ensure_ascii=False))  # ids in one line
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
