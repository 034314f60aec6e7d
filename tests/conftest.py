"""What several test files need: small folders with a tokenizer in them, a tiny model, and SmolLM2-135M-Instruct.

FAITH_SMOLLM2 names SmolLM2's folder (default ~/.cache/faith/smollm2-135m-instruct). If it is missing,
`../shared/tools/fetch_smollm2.py`, beside the checkout, makes it. Without that file the tests that need it are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tokenizers
import torch

import faith
import model as models
import reward
import tasks
from rollout import Sampler

SHARED = Path(__file__).parent.parent.parent / "shared"
SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>",
           "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")  # fmt: skip


def write_tokenizer(folder: Path, template: str | None, merges=(), special=SPECIAL, **settings) -> Path:
    """Writes tokenizer.json (special tokens from id 0, then the 256 bytes, then merges) and tokenizer_config.json."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    vocabulary = {symbol: i for i, symbol in enumerate([*special, *symbols])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    # Like Llama's own tokenizer, it would put a begin-of-text before every text unless it is told not to.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    settings |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def pytest_collection_modifyitems(items):
    """The longest file first, so that pytest -n does not wait for it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_toy.py")


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(request):
    """Tests use the CPU, even if there is a GPU; only test_cuda uses the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_cuda":
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session")
def byte_tokenizer():
    return write_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny model."""
    return tiny.build(tmp_path_factory.mktemp("model"))


@pytest.fixture
def network(folder) -> models.Transformer:
    return models.load(folder)


@pytest.fixture
def subject(network, folder) -> faith.Subject:
    return faith.Subject(Sampler(network), models.Tokenizer(folder))


@pytest.fixture(scope="session")
def questions() -> list[tasks.Question]:
    return tasks.load("esnli", tiny.ROOT / "tests" / "data" / "esnli")


@pytest.fixture(scope="session")
def prompts(folder, questions) -> list[list[int]]:
    """Explanation and decision prompts of unequal length, and one of a single token."""
    tokenizer = models.Tokenizer(folder)
    cases = faith.draw_cases(questions[:9:2], "bias", 0, reward.words("bias"))
    texts = [faith.explanation_prompt(tokenizer, case.edited, i % 3) for i, case in enumerate(cases)]
    return [*texts, *(faith.decision_prompt(tokenizer, case.question) for case in cases), [tiny.START]]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct's folder, made if need be."""
    default = Path.home() / ".cache" / "faith" / "smollm2-135m-instruct"
    folder = Path(os.environ.get("FAITH_SMOLLM2") or default)
    if not folder.exists():
        tool = SHARED / "tools" / "fetch_smollm2.py"
        if not SHARED.exists():
            pytest.skip(f"no SmolLM2 in {folder}, and no ../shared to make it with; set FAITH_SMOLLM2")
        assert tool.is_file(), f"{SHARED} is there, but {tool} is not"
        partial = folder.with_name(folder.name + ".partial")  # an attempt cut off must not pass for a model
        shutil.rmtree(partial, ignore_errors=True)
        made = subprocess.run([sys.executable, tool, partial], capture_output=True, text=True)
        assert made.returncode == 0, f"{tool} {partial} failed:\n{made.stderr[-2000:]}"
        partial.rename(folder)
    return folder
