"""A model's tokenizer, and its own chat template run in jinja2's sandbox as transformers runs it.

Every prompt goes through `Tokenizer.render` and then through `Tokenizer.encode`.
"""

import functools
import json
import os
import re
import typing
from pathlib import Path

import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from run.hub import base_of, tokenizer_folder
from run.reading import Record, check_start, read_json, text_of

SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # a template may name them
TEXTS = ("user", "Query 1?\n(A) so\n(B) not so"), ("assistant", "Reply 2."), ("user", "Query 3?")
TRIAL = [{"role": role, "content": content} for role, content in TEXTS]
THOUGHT = r"[<\[](/?)(?:think|thought|reason)\w*[>\]]"


class Prompt(str):
    """Chat text. pieces: the same text, cut inside every control token that a user wrote."""

    pieces: list[str]


class Generation(jinja2.ext.Extension):
    """The tag that some templates put around the assistant's words: {% generation %} … {% endgeneration %}."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("same"), [], [], body).set_lineno(line)

    def same(self, caller):
        return caller()


class Unnamed(jinja2.Undefined):
    """A special token that no file names. A template may ask whether it is defined, but not write it."""

    __str__ = jinja2.Undefined._fail_with_undefined_error


def raise_exception(message):
    raise jinja2.TemplateError(message)  # templates call this for messages that they do not take


# As transformers sets jinja2 up, but without chance and without `strftime_now` (see `Tokenizer.render`).
EXTENSIONS = [Generation, jinja2.ext.loopcontrols]
ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=EXTENSIONS)
ENVIRONMENT.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
ENVIRONMENT.globals["raise_exception"] = raise_exception
del ENVIRONMENT.filters["random"], ENVIRONMENT.globals["lipsum"]


def find_template(folder: Path, settings: Record) -> tuple[str, Path]:
    """The model's template and the file that it is in. As in transformers, .jinja files come before the settings."""
    files = {"default": folder / "chat_template.jinja"} if os.path.lexists(folder / "chat_template.jinja") else {}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    named = settings.take("chat_template", str | list[dict[str, str]], "")
    named = {t.get("name"): t.get("template") for t in named} if isinstance(named, list) else {"default": named}
    if not (files or named).get("default"):
        raise ValueError(f"{folder} has no chat template, or none that is named default; use an instruct model")
    return (text_of(files["default"]), files["default"]) if files else (named["default"], Path(settings.where))


def named_tokens(record: Record) -> dict[str, str]:
    """The special tokens by name, as a template writes them: bos_token, eos_token and others."""
    others = [name for name, value in record.items() if name.endswith("_token") and isinstance(value, str)]
    values = {name: record.take(name, str | dict, None) for name in [*SPECIAL, *others]}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(more := record.take(key, dict | list, None), Record):
            values |= {name: more.take(name, str | dict, None) for name in more}
    tokens = {k: value.take("content", str) if isinstance(value, Record) else value for k, value in values.items()}
    return {name: token for name, token in tokens.items() if token is not None}


class Tokenizer:
    """tokenizer.json through the `tokenizers` library, and the model's own chat template.

    ValueError for a template that cannot write the conversations of faith.py, or that opens a think block although it
    is asked not to.
    """

    def __init__(self, path: str | Path):
        folder = tokenizer_folder(path)
        check_start(folder / "tokenizer.json")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read ({error}); fetch it again") from None
        self.tokenizer.no_truncation()  # the file may carry the settings of some training run
        self.tokenizer.no_padding()
        files = [folder / f"{name}.json" for name in ("tokenizer_config", "special_tokens_map")]
        files.append((base_of(folder) or folder) / "config.json")
        settings, more, config = (read_json(file) if os.path.lexists(file) else Record({}, str(file)) for file in files)
        size = config.take("vocab_size", int, None)
        highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if size is not None and highest >= size:
            raise ValueError(f"{folder}: tokenizer.json's ids reach {highest}, config.json's vocab_size is {size}; "
                             "they belong to different models, fetch both again")  # fmt: skip
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.added = sorted((token.content for token in added), key=len, reverse=True)
        control = {t.content for t in added if t.special or re.fullmatch("<.+>", t.content)}  # also Qwen3's <think>
        self.control = re.compile("|".join(re.escape(text) for text in self.added if text in control) or "(?!)")
        # special_tokens_map.json comes first where the settings are of an older form, without the added tokens.
        tokens, others = named_tokens(settings), named_tokens(more)
        self.special = others | tokens if "added_tokens_decoder" in settings else tokens | others
        first = self.tokenizer.encode("a").ids[:1]
        if "bos_token" not in self.special and first != self.encode("a")[:1]:  # what tokenizer.json begins a text with
            self.special["bos_token"] = self.tokenizer.id_to_token(first[0])
        why = "no file names {}, set it in tokenizer_config.json"
        self.special = {name: Unnamed(why.format(name), name=name) for name in SPECIAL} | self.special
        source, self.file = find_template(folder, settings)
        self.template = self.attempt(ENVIRONMENT.from_string, source)
        self.end_of_turn = self.check_template()

    def encode(self, text: str) -> list[int]:
        """Token ids of text, none added (`render` writes begin-of-text itself).

        Special tokens are recognised, except those that `render` cut in a user's words.
        """
        text, *rest = getattr(text, "pieces", [text])
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        before = len(self.encode("\n")) if rest else 0  # no tokenizer puts a space of its own after a line end
        return ids + [i for piece in rest for i in self.encode("\n" + piece)[before:]]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def ids_after(self, begin: str, answers) -> list[int]:
        """Ids of the answers as they follow `begin`; ValueError where one is not a token of its own."""
        before, encoded = self.encode(begin), [self.encode(begin + answer) for answer in answers]
        for answer, (*start, _) in zip(answers, encoded, strict=True):
            if start != before:
                raise ValueError(f"the answer {answer!r} is not one token after {begin!r}; use another model")
        ids = [tokens[-1] for tokens in encoded]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{', '.join(answers)} are not different tokens after {begin!r}; use another model")
        return ids

    def render(self, messages: list[dict], begin: str = "") -> Prompt:
        """Chat text of [{"role", "content"}, …] and an opened turn of the assistant's, which begins with `begin`.

        It is what transformers' apply_chat_template gives with add_generation_prompt and without thinking. No prompt
        holds today's date, or it would be another one tomorrow: a template that would write it (Llama-3.2) falls back
        on its own fixed date, 26 Jul 2024, and is refused if it has none. A control token that a user wrote is text.
        """
        written = "".join([begin, *(m["content"] for m in messages)])
        mark = next(c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in written)  # noncharacters, no text has them
        cut = functools.partial(self.control.sub, lambda found: found[0][0] + mark + found[0][1:])
        turns = [m if m["role"] == "assistant" else m | {"content": cut(m["content"])} for m in messages]
        pieces = (self.fill(turns) + begin).split(mark)
        prompt = Prompt("".join(pieces))
        prompt.pieces = pieces
        return prompt

    def fill(self, messages: list[dict]) -> str:
        """The template's text of the messages and of an opened turn of the assistant's."""
        options = {"add_generation_prompt": True, "enable_thinking": False, "tools": None, "documents": None}
        return self.attempt(self.template.render, self.special | options | {"messages": messages})

    def attempt(self, call, *args):
        try:
            return call(*args)
        except Exception as error:  # a template can raise whatever Python can
            why = " ".join(str(error).split()) or type(error).__name__
            self.refuse(f"fails ({why})")

    def refuse(self, why: str, change: str = "use another model") -> typing.NoReturn:
        raise ValueError(f"{self.file}: the chat template {why}; {change}") from None

    def check_template(self) -> int:
        """Writes the two conversations of faith.py. Returns the token that ends the assistant's turn."""
        asked, explained = self.fill(TRIAL[:1]), self.fill(TRIAL)
        query, reply, why = (re.escape(turn["content"]) for turn in TRIAL)
        one = re.search(f"{query}(.*)", asked, re.DOTALL)
        two = re.search(f"{query}(.*?){reply}(.*?){why}(.*)", explained, re.DOTALL)
        if not (one and two):
            self.refuse("changes or leaves out what the user or the assistant says")
        start, end, last = two.groups()
        for opened in (one[1], last):
            if re.findall(THOUGHT, opened)[-1:] == [""]:
                self.refuse("opens a think block although it is asked not to, which is not implemented")
            if "".join(start.split()) not in "".join(opened.split()):
                self.refuse("does not open the assistant's turn where an answer is asked for")
        for name in SPECIAL:
            token = self.special.get(name)
            if isinstance(token, str) and token and token in explained and token not in self.added:
                self.refuse(f"writes {name} {token!r}, which tokenizer.json does not add", "fetch both again")
        token = next((token for token in self.added if end.lstrip().startswith(token)), None)
        if token is None:
            self.refuse("ends the assistant's turn without a token that tokenizer.json adds", "use an instruct model")
        return self.tokenizer.token_to_id(token)
