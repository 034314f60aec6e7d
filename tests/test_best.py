"""The best of N explanations by reward: which is chosen, that the usual sample is one of them, and the figures."""

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef
from test_faith import MEASURE, ran
from test_report import column

import faith
from lab import best
from run import reading, tables


def test_the_choice_against_every_sample(subject, questions):
    """A sample at a time. The first is that of a measurement at T = 1, whatever else is asked, and however many."""
    cases = faith.draw_cases(questions, "bias", 0)
    usual = faith.measure(subject, cases, (0.0, 1.0), 6, seed=3)[1.0]
    rows = best.measure(subject, list(zip(cases, usual, strict=True)), 4, 6, 3)
    fewer = best.measure(subject, list(zip(cases, usual, strict=True)), 1, 6, 3)
    assert [row | {"mentions": [row["mention"]]} for row in usual] == fewer
    for case, row, first in zip(cases, rows, usual, strict=True):
        prompt = faith.explanation_prompt(subject.tokenizer, case.edited, row["y_edit"])
        (group,) = subject.sampler.generate([prompt], 4, 6, 1.0, 3, keys=[case.key])
        told = [faith.explanation_row(subject, case, answer, 3) for answer in group]
        assert row["mentions"] == [one["mention"] for one in told] and told[0]["text"] == first["text"]
        fit = [one for one in told if one["mention"] == row["influence"]]
        assert row == first | (fit or told)[0] | {"mentions": row["mentions"]}
    right = [[m == row["influence"] for m in row["mentions"]] for row in rows]
    assert {(of[0], any(of)) for of in right} == {(True, True), (False, True), (False, False)}  # of every kind
    got = {name: figure["value"] for name, figure in best.figures(rows, usual).items()}
    assert got["reward_random"] == pytest.approx(np.mean(right)) and got["reward"] == np.mean([any(of) for of in right])
    assert got["phi"] == pytest.approx(matthews_corrcoef(column(rows, "influence"), column(rows, "mention")))


def test_the_command(folder, tmp_path):
    prefix, written = tmp_path / "rows", tmp_path / "x.json"
    words = ("--max-new-tokens", "6", "--best-of", "3", "--rows", prefix, "--json", written, "--temperature", "0", "1")
    out = ran(*MEASURE, "--model", folder, *words, "--why", "instructed", "leading")
    block = next(part for part in out.split("\n\n") if "best of 3 by reward, T=1 (an upper bound)" in part).split("\n")
    rows, usual = (reading.read_jsonl(f"{prefix}.{name}.jsonl") for name in ("best", "instructed.T1"))
    assert [row["mentions"][0] for row in rows] == column(usual, "mention").tolist()  # of the first --why
    known = reading.read_json(written)["best_of"]
    assert len(block) == 2 + len(best.BLOCK) and block[2].startswith("Phi-CCT") and "random sample" in block[6]
    assert all(line.endswith(tables.cell(known[name])) for line, name in zip(block[2:], best.BLOCK, strict=True))
    assert "reward" in ran("lab.report", f"{prefix}.best.jsonl")
