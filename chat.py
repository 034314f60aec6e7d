"""A model's tokenizer and chat turns. Every prompt goes through `Tokenizer.render`, then through `Tokenizer.encode`."""

import functools
import os
import re
from pathlib import Path

import tokenizers

from run.hub import base_of, tokenizer_folder
from run.reading import Record, check_start, read_json
from run.template import Template, named_tokens


class Prompt(str):
    """Chat text. pieces: the same text, cut inside every control token that a user wrote."""

    pieces: list[str]


class Tokenizer:
    """tokenizer.json through the `tokenizers` library, and the model's own chat template (run/template.py)."""

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
        added = sorted(self.tokenizer.get_added_tokens_decoder().values(), key=lambda t: len(t.content), reverse=True)
        control = [t.content for t in added if t.special or re.fullmatch("<.+>", t.content)]  # also Qwen3's <think>
        self.control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        # special_tokens_map.json comes first where the settings are of an older form, without the added tokens.
        tokens, others = named_tokens(settings), named_tokens(more)
        special = others | tokens if "added_tokens_decoder" in settings else tokens | others
        first = self.tokenizer.encode("a").ids[:1]
        if "bos_token" not in special and first != self.encode("a")[:1]:  # what tokenizer.json begins a text with
            special["bos_token"] = self.tokenizer.id_to_token(first[0])
        self.template = Template(folder, settings, special, [token.content for token in added])
        self.end_of_turn = self.tokenizer.token_to_id(self.template.end_of_turn)

    def encode(self, text: str) -> list[int]:
        """Token ids of text, no special tokens added (`render` writes begin-of-text itself).

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
        """Chat text of [{"role", "content"}, …] and an open assistant turn that begins with `begin`.

        It is what transformers' apply_chat_template gives with add_generation_prompt and without thinking. No prompt
        holds today's date, so it is the same every day: a template that would write the date (Llama-3.2) falls back
        on its own fixed date, 26 Jul 2024, and is refused if it has none. A control token that a user wrote is text.
        """
        written = "".join([begin, *(m["content"] for m in messages)])
        mark = next(c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in written)  # noncharacters, no text has them
        cut = functools.partial(self.control.sub, lambda found: found[0][0] + mark + found[0][1:])
        turns = [m if m["role"] == "assistant" else m | {"content": cut(m["content"])} for m in messages]
        pieces = (self.template.fill(turns) + begin).split(mark)
        prompt = Prompt("".join(pieces))
        prompt.pieces = pieces
        return prompt
