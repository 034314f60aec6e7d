"""A model's folder, its tokenizer, and its chat turns rendered by hand.

Every prompt goes through `Tokenizer.render`, which gives what the model's own chat template gives, and then through
`Tokenizer.encode`.
"""

import re
from pathlib import Path

import tokenizers

from run.hub import base_of, tokenizer_folder
from run.reading import read_json


class Tokenizer:
    """tokenizer.json through the `tokenizers` library, and the model's chat turns rendered by hand.

    The chat format is read from the model's own template: Llama-3 headers, or ChatML with the template's own default
    system prompt and, for Qwen3, the empty think block of the non-thinking form. ValueError for any other format.
    """

    def __init__(self, path: str | Path):
        folder = tokenizer_folder(path)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read ({error}); fetch it again") from None
        self.tokenizer.no_truncation()  # the file may carry the settings of some training run
        self.tokenizer.no_padding()
        files = folder / "tokenizer_config.json", (base_of(folder) or folder) / "config.json"
        settings, config = (read_json(file) if file.exists() else {} for file in files)
        template = folder / "chat_template.jinja"
        template = template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        template = (template or "").replace("\\n", "\n")  # in a template's strings a line end may be written \n
        self.chat = "llama3" if "<|start_header_id|>" in template else "chatml"
        bos = (settings.get("bos_token") or "") if self.chat == "llama3" else ""
        self.bos = bos["content"] if isinstance(bos, dict) else bos
        # Qwen3's template closes an empty think block when thinking is off. Its 2507 models have none.
        self.think = self.chat == "chatml" and "enable_thinking" in template
        # Qwen2.5 and SmolLM2 use a system prompt of their own when none is given. It stands as plain text in the
        # template; where the caller's prompt is inserted, a quote and a plus (or braces) follow instead.
        system = re.search(r"<\|im_start\|>system\n(?!['\"] *\+)([^<{}]+)<\|im_end\|>", template)
        self.default_system = system.group(1) if system else None
        # Llama-3.1's full template always writes a system turn with dates (see `render`).
        today = (re.findall(r'date_string = "([^"]+)"', template) or ["26 Jul 2024"])[0]
        dates = f"Cutting Knowledge Date: December 2023\nToday Date: {today}\n\n"
        self.dates = dates if "Cutting Knowledge Date" in template else ""
        size, highest = config.get("vocab_size"), max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        self.end_of_turn = self.tokenizer.token_to_id("<|eot_id|>" if self.chat == "llama3" else "<|im_end|>")
        if self.chat == "chatml" and "<|im_start|>" not in template:
            raise ValueError(f"{folder} has no Llama-3 or ChatML chat template; use an instruct model")
        if "<|im_start|>assistant\n<think>" in template:
            raise ValueError(f"{folder} always thinks before it answers, which is not implemented; use another model")
        if self.chat == "llama3" and not self.bos:
            raise ValueError(f"{files[0]} names no bos_token, which a Llama-3 chat begins with; fetch it again")
        if size is not None and highest >= size:
            raise ValueError(f"{folder}: tokenizer.json's ids reach {highest}, config.json's vocab_size is {size}; "
                             "they belong to different models, fetch both again")  # fmt: skip
        if self.end_of_turn is None:
            raise ValueError(f"{folder}: tokenizer.json lacks the chat template's end-of-turn token; fetch both again")

    def encode(self, text: str) -> list[int]:
        """Token ids of text, special tokens recognised, none added (`render` writes begin-of-text itself)."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

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

    def render(self, messages: list[dict], begin: str = "") -> str:
        """Chat text of [{"role", "content"}, …], as the model's own template gives it.

        If the last turn is the user's, an assistant turn is opened with `begin` in it. If it is the assistant's, it is
        closed, and a `begin` is a ValueError. Qwen3 is asked not to think. A template that writes today's date
        (Llama-3.2) gets the one that it falls back on, 26 Jul 2024, so that prompts stay the same.
        """
        opened = messages[-1]["role"] != "assistant"
        if begin and not opened:
            raise ValueError("render: `begin` needs messages that end with a user turn")
        turns = [(m["role"], m["content"]) for m in messages]
        if self.chat == "llama3":
            start, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
            turns = [(role, content.strip()) for role, content in turns]
            if self.dates:
                system = turns.pop(0)[1] if turns[0][0] == "system" else ""
                turns.insert(0, ("system", self.dates + system))
        else:
            start, end = "<|im_start|>{}\n", "<|im_end|>\n"
            if turns[0][0] != "system" and self.default_system is not None:
                turns.insert(0, ("system", self.default_system))
        for i, (role, content) in enumerate(turns):
            if self.think and role == "assistant":
                thoughts, block, answer = content.rpartition("</think>")
                answer = answer.lstrip("\n") if block else content  # earlier answers lose their think block
                if i == len(turns) - 1:  # the last answer always has one, even if empty
                    thoughts = thoughts.rpartition("<think>")[2].strip("\n")
                    answer = f"<think>\n{thoughts}\n</think>\n\n" + answer.lstrip("\n")
                turns[i] = (role, answer)
        text = self.bos + "".join(start.format(role) + content + end for role, content in turns)
        return text + (start.format("assistant") + "<think>\n\n</think>\n\n" * self.think + begin if opened else "")
