"""A model's folder, its tokenizer, and its chat turns rendered by hand.

Whatever a model is asked goes through `Tokenizer.render`, which must give what the model's own chat template gives,
and `Tokenizer.encode`. model.py offers all of this too, as model.Tokenizer.
"""

import os
import re
from pathlib import Path

import tokenizers

from run.files import read_json


def locate(path: str | Path) -> Path:
    """The directory of a model: `path` itself, or the snapshot of a hub id in the local hub cache."""
    if Path(path).is_dir():
        return Path(path)
    home = os.environ.get("HF_HOME", os.path.join(os.path.expanduser("~"), ".cache", "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub")))
    repo = hub / ("models--" + str(path).replace("/", "--"))
    ref = repo / "refs" / "main"
    if ref.is_file() and (snapshot := repo / "snapshots" / ref.read_text().strip()).is_dir():
        return snapshot
    raise ValueError(f"no model at {path}: no such directory, nor a hub id in {hub}; hf download {path} fetches one")


class Tokenizer:
    """tokenizer.json through the `tokenizers` library, and the model's chat turns rendered by hand.

    The chat format is recognised from the model's own template: Llama-3 headers, or ChatML with the
    template's own default system prompt and, for Qwen3, the empty think block of the non-thinking form.
    """

    def __init__(self, path: str | Path):
        folder = locate(path)
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read ({error}); fetch it again") from None
        self.tokenizer.no_truncation()  # the file may carry the habits of some training run
        self.tokenizer.no_padding()
        settings_file = folder / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.exists() else {}
        template = folder / "chat_template.jinja"
        template = template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        template = (template or "").replace("\\n", "\n")  # in a template's strings a line end may be written \n
        self.chat = "llama3" if "<|start_header_id|>" in template else "chatml"
        if self.chat == "chatml" and "<|im_start|>" not in template:
            raise ValueError(f"{folder} has no Llama-3 or ChatML chat template; use an instruct model")
        if "<|im_start|>assistant\n<think>" in template:
            raise ValueError(f"{folder} always thinks before it answers, which is not implemented; use another model")
        bos = settings.get("bos_token") or ""
        self.bos = bos["content"] if isinstance(bos, dict) else bos
        if self.chat == "llama3" and not self.bos:
            raise ValueError(f"{settings_file} names no bos_token, which a Llama-3 chat begins with; fetch it again")
        # Qwen3's template closes an empty think block when thinking is off; its 2507 models have none.
        self.think = "enable_thinking" in template
        # Qwen2.5 and SmolLM2 speak a system prompt of their own when given none. It stands in the template as
        # plain text; where a caller's own is written, a quote and a plus (or braces) follow instead.
        system = re.search(r"<\|im_start\|>system\n(?!['\"] *\+)([^<{}]+)<\|im_end\|>", template)
        self.default_system = system.group(1) if system else None
        # Llama-3.1's full template always writes a system turn with dates (`render`).
        today = re.findall(r'date_string = "([^"]+)"', template) or ["26 Jul 2024"]
        dates = f"Cutting Knowledge Date: December 2023\nToday Date: {today[0]}\n\n"
        self.dates = dates if "Cutting Knowledge Date" in template else ""
        config = folder / "config.json"
        size = read_json(config).get("vocab_size") if config.exists() else None
        highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if size is not None and highest >= size:
            raise ValueError(f"{folder}: tokenizer.json's ids reach {highest}, config.json's vocab_size is {size}; "
                             "they belong to different models, fetch both again")  # fmt: skip
        self.end_of_turn = self.tokenizer.token_to_id("<|eot_id|>" if self.chat == "llama3" else "<|im_end|>")
        if self.end_of_turn is None:
            raise ValueError(f"{folder}: tokenizer.json lacks the chat template's end-of-turn token; fetch both again")

    def encode(self, text: str) -> list[int]:
        """Token ids of text, special tokens recognised, none added (`render` writes begin-of-text itself)."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def letter_ids(self, begin: str, count: int) -> list[int]:
        """Ids of the letters A, B, … (count of them) as they follow `begin`."""
        return self.ids_after(begin, "ABCDEFGHIJ"[:count])

    def ids_after(self, begin: str, answers) -> list[int]:
        """Ids of the answers as they follow `begin`; ValueError where one is not a token of its own."""
        ids = []
        for answer in answers:
            *before, last = self.encode(begin + answer)
            if before != self.encode(begin):
                raise ValueError(f"the answer {answer!r} is not one token after {begin!r}; use another model")
            ids.append(last)
        if len(set(ids)) < len(ids):
            raise ValueError(f"the answers {', '.join(answers)} are one token after {begin!r}; use another model")
        return ids

    def render(self, messages: list[dict], begin: str = "") -> str:
        """Chat text of [{"role", "content"}, …], as the model's own template gives it.

        After a last user turn an assistant turn is opened, and `begin` is what its answer is forced to
        begin with; after a last assistant turn that turn is closed (and `begin` must be empty). Qwen3 is
        asked not to think. Where a template writes today's date (Llama-3.2) we write the one it falls back
        on, 26 Jul 2024, so that a prompt is the same tomorrow.
        """
        opened = messages[-1]["role"] != "assistant"
        if begin and not opened:
            raise ValueError("render: `begin` needs messages that end with a user turn")
        turns = [(m["role"], m["content"]) for m in messages]
        if self.chat == "llama3":
            turns = [(role, content.strip()) for role, content in turns]
            if self.dates:
                system = turns.pop(0)[1] if turns[0][0] == "system" else ""
                turns.insert(0, ("system", self.dates + system))
            header = "<|start_header_id|>{}<|end_header_id|>\n\n"
            text = self.bos + "".join(header.format(role) + content + "<|eot_id|>" for role, content in turns)
            return text + (header.format("assistant") + begin if opened else "")
        if turns[0][0] != "system" and self.default_system is not None:
            turns.insert(0, ("system", self.default_system))
        for i, (role, content) in enumerate(turns):
            if self.think and role == "assistant":
                thoughts, block, answer = content.rpartition("</think>")
                answer = answer.lstrip("\n") if block else content  # history loses its think block,
                if i == len(turns) - 1:  # a closing answer has one, if an empty one
                    thoughts = thoughts.rpartition("<think>")[2].strip("\n")
                    answer = f"<think>\n{thoughts}\n</think>\n\n" + answer.lstrip("\n")
                turns[i] = (role, answer)
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        return text + ("<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * self.think + begin if opened else "")
