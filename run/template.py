"""A model's own chat template, found as transformers finds it and run in jinja2's sandbox as transformers runs it."""

import functools
import json
import os
import re
import typing
from pathlib import Path

import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from run.reading import Record, text_of

SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # a template may name them
TEXTS = ("user", "Query 1?\n(A) so\n(B) not so"), ("assistant", "Reply 2."), ("user", "Query 3?")
TRIAL = [{"role": role, "content": content} for role, content in TEXTS]
THOUGHT = r"[<\[](/?)(?:think|thought|reason)\w*[>\]]"


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


# As transformers sets jinja2 up, but without chance and without `strftime_now` (see chat.Tokenizer.render).
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


class Template:
    """The template of a model's folder, and `end_of_turn`, the token that ends the assistant's turn in it.

    ValueError where it cannot write the conversations of faith.py, or opens a think block although it is asked not to.
    """

    def __init__(self, folder: Path, settings: Record, special: dict[str, str], added: list[str]):
        """special: tokens by name. added: all tokens that tokenizer.json adds to the vocabulary, the longest first."""
        why = "no file names {}, set it in tokenizer_config.json"
        self.special = {name: Unnamed(why.format(name), name=name) for name in SPECIAL} | special
        source, self.file = find_template(folder, settings)
        self.template = self.attempt(ENVIRONMENT.from_string, source)
        self.end_of_turn = self.check(added)

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

    def check(self, added: list[str]) -> str:
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
            if isinstance(token, str) and token and token in explained and token not in added:
                self.refuse(f"writes {name} {token!r}, which tokenizer.json does not add", "fetch both again")
        token = next((token for token in added if end.lstrip().startswith(token)), None)
        if token is None:
            self.refuse("ends the assistant's turn without a token that tokenizer.json adds", "use an instruct model")
        return token
