"""One step of the whole loop on a real instruct model: question, edit, explanation, reward, update, saved model."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model as models

ROOT = Path(__file__).parent.parent


def test_smollm2_from_question_to_trained_model(smollm2, tmp_path):
    out = tmp_path / "run"
    flags = ("--task esnli --data tests/data/esnli --intervention bias --calibrate --steps 1 --prompts 4 --samples 4 "
             "--max-new-tokens 12 --lr 1e-5 --warmup 0 --eval-questions 4 --fit-questions 6 --calibration-questions 6 "
             "--temperature 1.5")  # fmt: skip
    command = [sys.executable, "train.py", "--model", smollm2, "--out", out, *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 1/1" in done.stdout and "Phi-CCT minus the shortcut" in done.stdout
    (step,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert step["prompts"] % 2 == 0 and 2 <= step["prompts"] <= 4 and 0 <= step["reward"] <= 1
    assert step["sampler_gap_max"] is None or step["sampler_gap_max"] < 1e-3
    texts = [json.loads(line)["text"] for line in (out / "explanations.jsonl").read_text().splitlines()]
    assert len(texts) == 4 * step["prompts"] and len(set(texts)) > len(texts) / 2
    # What was saved loads elsewhere, gives the same logits and speaks the same chat.
    theirs, ours = AutoModelForCausalLM.from_pretrained(out / "model"), models.load(out / "model")
    messages = [{"role": "user", "content": "Is a whale a fish?"}]
    text = models.Tokenizer(out / "model").render(messages)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-3
    assert not torch.equal(ours.norm.weight, models.load(smollm2).norm.weight) or step["flat_groups"] == 1
