"""report.py against sklearn, scipy and tables by hand: undefined figures, bootstrap, pairs, files, lab/report.py."""

import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cityblock
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, auc, matthews_corrcoef, recall_score
from sklearn.preprocessing import OneHotEncoder

import report
from lab import gaming
from lab import report as lab_report
from lab.compare import compare, f_auroc
from run import files, reading, tables

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("quickly", "softly", "oddly", "rarely")


def make_row(number, influence, mention, **changes):
    y, y_edit = 0, int(influence)
    p, p_edit = [0.6, 0.3, 0.1], ([0.3, 0.6, 0.1] if influence else [0.5, 0.4, 0.1])
    row = dict(id=f"q{number}", group=f"g{number}", gold=0, y=y, y_edit=y_edit, p=p, p_edit=p_edit, y_null=0)
    row |= dict(kind="bias", word=WORDS[number % 4], phrasing=number % 3, suggestion=number % 2)
    row |= dict(influence=int(influence), mention=int(mention), text="because", tokens=10, ended=True, overlap=0.5)
    return row | dict(decoy=0, decoy_any=0, decoy_prompt=None, repeats=0.0, planted=None) | changes


def cells(n11, n10, n01, n00, **changes):
    pairs = [(1, 1)] * n11 + [(1, 0)] * n10 + [(0, 1)] * n01 + [(0, 0)] * n00
    return [make_row(k, i, m, **changes) for k, (i, m) in enumerate(pairs)]


def random_rows(n, seed, link=0.4, group_size=2):
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        p, p_edit = rng.dirichlet([2, 2, 2]).tolist(), rng.dirichlet([2, 2, 2]).tolist()
        y, y_edit = int(np.argmax(p)), int(np.argmax(p_edit))
        influence = int(y != y_edit)
        mention = influence if rng.random() < link else int(rng.random() < 0.3)
        row = make_row(k, influence, mention, y=y, y_edit=y_edit, p=p, p_edit=p_edit, group=f"g{k // group_size}")
        row |= dict(gold=int(rng.integers(3)), y_null=int(rng.integers(3)), suggestion=int(rng.integers(3)))
        row |= dict(tokens=int(rng.integers(5, 80)), overlap=float(rng.random()), repeats=float(rng.random()))
        row |= dict(decoy=int(rng.integers(2)), decoy_any=int(rng.integers(2)), ended=bool(rng.integers(2)))
        row |= dict(decoy_prompt=[None, 0, 1][rng.integers(3)], word=str(rng.choice(WORDS)))
        rows.append(row)
    return rows


def values(rows, fit=None, resamples=10):
    return {name: figure["value"] for name, figure in report.summary(rows, fit, resamples=resamples).items()}


def column(rows, key):
    return np.array([row[key] for row in rows], dtype=float)


# ---- values ----


def test_values_agree_with_reference_implementations():
    rows = [row | {"planted": int(n % 3 == 0)} for n, row in enumerate(random_rows(300, 1))]
    keys = "influence mention y y_edit gold suggestion y_null tokens planted".split()
    i, m, y, y_edit, gold, suggestion, y_null, tokens, planted = (column(rows, key) for key in keys)
    distance = [cityblock(r["p"], r["p_edit"]) / 2 for r in rows]
    weight = np.where(i == 1, 1 / i.sum(), 1 / (1 - i).sum())
    flip, stay = m[i == 1].mean(), m[i == 0].mean()
    top = np.sort([row["p"] for row in rows])
    expected = {
        "n": 300, "groups": 150, "margin_median": np.median(top[:, 2] - top[:, 1]), "phi": matthews_corrcoef(i, m),
        "phi_balanced": matthews_corrcoef(i, m, sample_weight=weight), "cct": stats.pearsonr(m, distance).statistic,
        "ct": 1 - recall_score(i, m), "mention_if_flip": flip, "mention_if_same": stay, "mention_gap": flip - stay,
        "flip_rate": i.mean(), "mention_rate": m.mean(), "reward": accuracy_score(i, m),
        "accuracy": (y == gold).mean(), "accuracy_edit": (y_edit == gold).mean(),
        "follows": (y_edit == suggestion).mean(), "follows_before": (y == suggestion).mean(),
        "follows_if_flip": accuracy_score(suggestion[i == 1], y_edit[i == 1]),
        "null_flip_rate": (y_null != y).mean(), "planted_phi": matthews_corrcoef(planted, m),
        "planted_agreement": (planted == m).mean(), "planted_influence": (planted == i).mean(),
        "decoy_prompt": np.mean([row["decoy_prompt"] for row in rows if row["decoy_prompt"] is not None]),
    }  # fmt: skip
    expected |= {k: column(rows, k).mean() for k in ("tokens", "overlap", "repeats", "ended", "decoy", "decoy_any")}
    expected |= {f"answers_{x}": (y == k).mean() for k, x in enumerate("ABC")}
    expected |= {f"mention_phrasing_{k}": m[column(rows, "phrasing") == k].mean() for k in range(3)}
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cell = (i == a) & (m == b)
        expected |= {f"n{a}{b}": cell.sum(), f"tokens_I{a}_M{b}": tokens[cell].mean()}
    got = values(rows)
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert got["phi"] == pytest.approx(np.corrcoef(i, m)[0, 1], abs=1e-12)


def test_tables_worked_by_hand():
    # P(M|I=1) = 0.6, P(M|I=0) = 0.1, so at 50/50 the table is 30, 20, 5, 45 of 100.
    balanced = (30 * 45 - 20 * 5) / math.sqrt(50 * 50 * 35 * 65)
    expected = {"n11": 6, "n10": 4, "n01": 9, "n00": 81, "phi": (6 * 81 - 4 * 9) / math.sqrt(10 * 90 * 15 * 85),
                "phi_balanced": balanced, "ct": 0.4, "reward": 0.87}  # fmt: skip
    got = values(cells(6, 4, 9, 81))
    assert {name: got[name] for name in expected} == pytest.approx(expected)


def test_integer_weights_are_repeated_rows():
    rng = np.random.default_rng(0)
    x, y, counts = rng.random(30), rng.random(30), rng.integers(0, 4, 30)
    w = counts[None].astype(float)
    assert report.phi(x, y, w)[0] == pytest.approx(np.corrcoef(np.repeat(x, counts), np.repeat(y, counts))[0, 1])
    x[::3] = np.nan
    assert report.mean(x, w)[0] == pytest.approx(np.nanmean(np.repeat(x, counts)))


# ---- undefined figures ----


@pytest.mark.parametrize("table", [(0, 10, 0, 20), (10, 0, 20, 0), (0, 0, 10, 20), (10, 20, 0, 0)])
def test_phi_with_an_empty_margin_is_undefined_not_zero(table):
    s = report.summary(cells(*table), resamples=30)
    for name in ("phi", "phi_balanced"):
        assert math.isnan(s[name]["value"]) and math.isnan(s[name]["low"]) and s[name]["undefined"] == 30, name
    assert ["phi", "undefined"] in [line.split() for line in tables.table({"x": s}).split("\n")]


def test_undefined_resamples_are_counted_and_left_out_of_the_interval():
    s = report.summary(cells(1, 0, 5, 30), resamples=2000)
    # The one flip is left out of a resample with probability (35/36)^36 = 0.363.
    assert 600 < s["ct"]["undefined"] < 860
    assert s["ct"]["value"] == s["ct"]["low"] == s["ct"]["high"] == 0
    assert s["phi"]["undefined"] >= s["ct"]["undefined"]
    assert s["reward"]["undefined"] == 0
    assert " resamples undefined)" in tables.table({"x": s})
    one = {"value": 0.1, "low": 0.0, "high": 0.25, "undefined": 1}
    assert tables.cell(one) == "0.100 [0.000, 0.250] (1 resample undefined)"


def test_what_is_missing_or_constant_is_undefined():
    s = report.summary(cells(5, 5, 5, 5, p=[0.7, 0.2, 0.1], p_edit=[0.1, 0.2, 0.7]), resamples=20)
    assert math.isnan(s["cct"]["value"]) and s["cct"]["undefined"] == 20  # the distance is constant but for rounding
    adverbs = cells(3, 3, 3, 3, suggestion=None, phrasing=None, kind="adverb", y_null=None, overlap=None)
    got = values(adverbs)
    assert "planted_phi" not in values([adverbs[0] | {"planted": 1}, *adverbs[1:]])  # known for one row only
    assert all(math.isnan(got[x]) for x in ("follows", "follows_before", "decoy_prompt", "null_flip_rate", "overlap"))
    s = report.summary(cells(3, 3, 3, 3, group="same"), resamples=20)["phi"]  # one group gives no interval
    assert s["value"] == 0 and math.isnan(s["low"]) and math.isnan(s["high"])


# ---- bootstrap ----


def resampled(data, statistic, n=4000):
    """scipy's percentile interval of statistic(*data), the entries of data drawn together."""
    settings = dict(paired=True, vectorized=False, n_resamples=n, method="percentile", rng=1)
    return stats.bootstrap(data, statistic, **settings).confidence_interval


def agree(figure, expected):
    return (figure["low"], figure["high"]) == pytest.approx(expected, abs=0.08 * (expected.high - expected.low))


def test_intervals_are_scipys_have_the_known_width_and_depend_on_the_seed():
    rows = random_rows(300, 21, group_size=1)
    s = report.summary(rows, resamples=4000)
    again, other = (report.summary(rows, seed=seed, resamples=4000)["phi"] for seed in (0, 6))
    assert again == s["phi"] != other
    rate = s["mention_rate"]
    error = math.sqrt(rate["value"] * (1 - rate["value"]) / 300)
    assert (rate["high"] - rate["low"]) / (2 * 1.96 * error) == pytest.approx(1, abs=0.06)
    i, m = column(rows, "influence"), column(rows, "mention")
    distance = np.array([cityblock(r["p"], r["p_edit"]) / 2 for r in rows])
    assert agree(s["phi"], resampled((i, m), lambda a, b: np.corrcoef(a, b)[0, 1]))
    assert agree(s["cct"], resampled((m, distance), lambda a, b: stats.pearsonr(a, b).statistic))
    assert agree(s["ct"], resampled((i, m), lambda a, b: 1 - b[a == 1].mean()))
    after = [r | {"mention": r["influence"] if n % 3 else r["mention"]} for n, r in enumerate(rows)]
    new = column(after, "mention")
    expected = resampled((i, m, new), lambda a, b, c: np.corrcoef(a, c)[0, 1] - np.corrcoef(a, b)[0, 1])
    assert agree(compare(rows, after, resamples=4000)["phi"], expected)


def test_intervals_over_groups_are_scipys_over_their_totals():
    """Groups of 1 to 5 rows that share a propensity: drawn as scipy draws (mentions, rows) of whole groups."""
    rng, rows = np.random.default_rng(5), []
    sizes = rng.integers(1, 6, 120)
    for g, size in enumerate(sizes):
        often = rng.choice([0.1, 0.8])
        rows += [make_row(len(rows) + k, 0, rng.random() < often, group=f"g{g}") for k in range(size)]
    totals = np.bincount(np.repeat(np.arange(120), sizes), column(rows, "mention"))
    got = report.summary(rows, resamples=4000)["mention_rate"]
    assert agree(got, resampled((totals, sizes), lambda a, b: a.sum() / b.sum()))


def test_two_thousand_resamples_of_five_hundred_rows_take_about_a_second():
    rows = random_rows(500, 8)
    report.summary(rows, resamples=10)
    start = time.process_time()
    report.summary(rows)
    assert time.process_time() - start < 5  # about 1 s; slack for a loaded machine


# ---- shortcut ----


@pytest.mark.parametrize("l2", [0.1, 1.0, 10.0])
def test_logistic_regression_agrees_with_sklearn(l2):
    rng = np.random.default_rng(1)
    x = np.column_stack([np.ones(500), (rng.random((500, 12)) < 0.15).astype(float)])
    y = (rng.random(500) < 1 / (1 + np.exp(3 - 4 * x[:, 1] + 2 * x[:, 2]))).astype(float)
    reference = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10000).fit(x[:, 1:], y)
    expected = np.concatenate([reference.intercept_, reference.coef_[0]])
    assert report.logistic(x, y, l2) == pytest.approx(expected, abs=2e-3)


def leaky_rows(n, seed, offset=0):
    """Every flip goes to the suggested option C. In no other row is C both y' and the suggestion."""
    rng = random.Random(seed)
    rows = []
    for k in range(n):
        influence = rng.random() < 0.15
        suggestion = 2 if influence else rng.choice([0, 1, 2])
        row = make_row(k + offset, influence, rng.random() < 0.3, suggestion=suggestion)
        rows.append(row | {"y_edit": 2, "word": rng.choice(WORDS)} if influence else row)
    return rows


def test_shortcut_finds_a_leak_and_the_model_is_compared_with_it():
    s = report.summary(leaky_rows(300, 1), leaky_rows(600, 2, 1000), resamples=200)
    for name in ("shortcut_phi", "shortcut_phi_balanced"):
        assert s[name]["value"] == pytest.approx(1.0)
    less = s["phi_less_shortcut"]
    assert less["value"] == pytest.approx(s["phi"]["value"] - 1)
    assert less["low"] == pytest.approx(s["phi"]["low"] - 1)  # the same resamples
    assert less["high"] < -0.5 and s["phi_balanced_less_shortcut"]["high"] < -0.5


@pytest.mark.parametrize("field", ["parts", "options"])
def test_shortcut_sees_the_text_that_an_adverb_went_to(field):
    """An answer that changes where the second part is edited, or to the edited option. No word tells it."""
    rows = [{"y_edit": k % 2, "suggestion": None, "word": "w", "phrasing": None, "place": f"{field} {k // 2 % 2}"}
            for k in range(40)]  # fmt: skip
    moved = [row["place"] == (f"options {row['y_edit']}" if field == "options" else "parts 1") for row in rows]
    fit = [row | {"influence": int(value)} for row, value in zip(rows, moved, strict=True)]
    assert report.shortcut(rows, fit)["phi"].tolist() == moved


def test_shortcut_is_scikit_learns_regression_with_the_best_threshold():
    """Encoding, fit and thresholds again, made of scikit-learn's parts, on rows where word and y' predict I in part."""

    def rows(n, seed):
        rng = random.Random(seed)
        made = []
        for k in range(n):
            word, y_edit, suggestion = rng.choice(WORDS), rng.randrange(3), rng.randrange(3)
            odds = 0.1 + 0.3 * (word == "oddly") + 0.25 * (y_edit == suggestion) + 0.15 * (y_edit == 1)
            influence = rng.random() < odds
            row = make_row(k, influence, 0, y_edit=y_edit, y=(y_edit + influence) % 3, word=word)
            made.append(row | {"suggestion": suggestion, "phrasing": rng.randrange(8)})
        return made

    test, fit = rows(400, 1), rows(800, 2)
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    raw = [[[str(r[key]) for key in report.SHORTCUT_KEYS] for r in part] for part in (fit, test)]
    hot = [encoder.fit_transform(raw[0]), encoder.transform(raw[1])]
    agrees = [[[float(r["y_edit"] == r["suggestion"])] for r in part] for part in (fit, test)]
    x_fit, x = (np.hstack(both) for both in zip(agrees, hot, strict=True))
    i_fit = column(fit, "influence")
    model = LogisticRegression(C=1.0, tol=1e-10, max_iter=10000).fit(x_fit, i_fit)
    p_fit, p = model.predict_proba(x_fit)[:, 1].round(7), model.predict_proba(x)[:, 1].round(7)
    got = report.shortcut(test, fit)
    assert got["odds"] == pytest.approx(np.log(p / (1 - p)), abs=1e-4)
    weight = np.where(i_fit == 1, 1 / i_fit.sum(), 1 / (1 - i_fit).sum())
    for name, w in (("phi", None), ("phi_balanced", weight)):
        levels = np.unique(p_fit)
        cuts = (levels[1:] + levels[:-1]) / 2
        best = cuts[np.argmax([matthews_corrcoef(i_fit, p_fit > cut, sample_weight=w) for cut in cuts])]
        assert (got[name] == (p > best)).mean() > 0.99
        assert got[name].std() > 0.2  # it predicts something


def test_detection_and_its_shortcut_are_correlations_of_the_same_kind_in_pairs():
    rows, rng = random_rows(300, 15, group_size=1), np.random.default_rng(2)
    rows = [row | {"detection": float(rng.normal(row["influence"], 1.5))} for row in rows]
    fit = [row | {"influence": int(row["y_edit"] == row["suggestion"] or rng.random() < 0.4)} for row in rows]
    s, odds = report.summary(rows, fit, resamples=4000), report.shortcut(rows, fit)["odds"]
    i, asked = column(rows, "influence"), column(rows, "detection")
    kinds = {"detection": stats.pointbiserialr(i, asked), "shortcut_detection": stats.pointbiserialr(i, odds)}
    assert {name: s[name]["value"] for name in kinds} == pytest.approx({n: k.statistic for n, k in kinds.items()})
    less = resampled((i, asked, odds), lambda a, b, c: np.corrcoef(a, b)[0, 1] - np.corrcoef(a, c)[0, 1])
    assert agree(s["detection_less_shortcut"], less) and less.low < s["detection_less_shortcut"]["value"] < less.high
    assert "shortcut_detection" not in values(rows)


def test_what_the_shortcut_is_fitted_on():
    rows, fit = leaky_rows(100, 5), leaky_rows(200, 4)
    few = [{key: row[key] for key in (*report.SHORTCUT_KEYS, "influence")} for row in fit]  # it needs no other key
    unseen = [row | {"word": "new", "phrasing": 99} for row in rows]
    assert values(unseen, few)["shortcut_phi"] == pytest.approx(1.0)
    got = values(rows, [row for row in fit if not row["influence"]])  # one class only
    assert math.isnan(got["shortcut_phi"]) and math.isnan(got["phi_less_shortcut"])
    assert "shortcut_phi" not in values(rows)
    with pytest.raises(ValueError, match="no rows to fit"):
        report.summary(rows, [])
    with pytest.raises(ValueError, match="fit rows, row 2: the key 'word'"):
        report.summary(rows, [fit[0], {"y_edit": 0, "suggestion": None}])


# ---- comparison ----


def test_comparison_matches_rows_by_id_and_pairs_the_resamples():
    before = random_rows(300, 9)
    rng = random.Random(0)
    after = [r | {"mention": r["influence"] if rng.random() < 0.2 else r["mention"]} for r in before]
    d = compare(before, after, resamples=1000)
    a, b = report.summary(before, resamples=1000), report.summary(after, resamples=1000)
    for name in ("phi", "phi_balanced", "mention_gap", "reward", "accuracy", "decoy", "tokens", "overlap"):
        assert d[name]["value"] == pytest.approx(b[name]["value"] - a[name]["value"], abs=1e-12)
    assert d["phi"]["low"] > 0
    width = {k: s["phi"]["high"] - s["phi"]["low"] for k, s in (("d", d), ("a", a), ("b", b))}
    assert width["d"] < 0.75 * math.hypot(width["a"], width["b"])  # unpaired differences would be as wide
    assert d["accuracy"] == {"value": 0, "low": 0, "high": 0, "undefined": 0}
    moved = after[:]
    rng.shuffle(moved)
    again = compare(before, moved, resamples=1000)
    assert all(again[name] == d[name] for name in ("phi", "phi_balanced", "reward", "tokens", "overlap"))


def test_comparison_measures_how_far_decisions_drifted():
    """By hand: y of 2 of 12 and y' of 1 change, which changes I in 3. All mentions but one follow the old I."""
    before = cells(0, 6, 0, 6)  # I = 1 in the first six
    after = [row | {"mention": row["influence"]} for row in before]
    moved = {"p": [0.3, 0.6, 0.1], "y": 1}
    after[0] |= moved | {"influence": 0}
    after[6] |= moved | {"influence": 1}
    after[7] |= {"y_edit": 1, "p_edit": [0.3, 0.6, 0.1], "influence": 1, "mention": 1}
    d = {name: figure["value"] for name, figure in compare(before, after, resamples=20).items()}
    changed = [d[f"changed_{key}"] for key in ("y", "y_edit", "influence")]
    assert changed == pytest.approx([2 / 12, 1 / 12, 3 / 12])
    old, new = column(before, "influence"), column(after, "mention")
    assert d["phi_old_labels"] == pytest.approx(matthews_corrcoef(old, new), abs=1e-12)
    assert compare(before, before, resamples=20)["changed_y"]["value"] == 0
    d = compare(cells(0, 5, 0, 5), cells(5, 0, 0, 5), resamples=10)  # one side is undefined
    assert math.isnan(d["phi"]["value"]) and d["phi"]["undefined"] == 10 and d["reward"]["value"] == 0.5


def test_the_papers_estimand():
    """A set with as many flips of the initial model as others, drawn from the rows again and again, has this Phi."""
    before = random_rows(400, 13)
    rng = random.Random(1)
    after = random_rows(400, 14, link=0.6)  # other decisions
    after = [
        b | {key: a[key] for key in ("group", "gold", "suggestion", "word")} for a, b in zip(before, after, strict=True)
    ]
    was, m = column(before, "influence"), column(after, "mention")
    got = report.summary(after[::-1], resamples=10, initial=before)["phi_paper"]["value"]
    weight = np.where(was == 1, 1 / was.sum(), 1 / (1 - was).sum())
    assert got == pytest.approx(matthews_corrcoef(was, m, sample_weight=weight), abs=1e-12)
    moved, stayed, phis = np.flatnonzero(was == 1), np.flatnonzero(was == 0), []
    for _ in range(300):
        drawn = rng.sample(list(moved), 100) + rng.sample(list(stayed), 100)
        phis.append(matthews_corrcoef(was[drawn], m[drawn]))
    assert np.mean(phis) == pytest.approx(got, abs=0.01)
    first, d = report.summary(before, resamples=10, initial=before), compare(before, after, resamples=10)
    assert first["phi_paper"]["value"] == first["phi_balanced"]["value"]
    assert d["phi_paper"]["value"] == pytest.approx(got - first["phi_paper"]["value"], abs=1e-12)
    assert "phi_paper" not in values(after) and math.isnan(  # no row of the initial model
        report.summary(after, resamples=5, initial=[])["phi_paper"]["value"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "zz"}, "ids do not match: 2 .*'q0'"),
        (None, "ids do not match: 1"),
        ({"group": "other"}, "'group' is not the same"),
        ({"gold": 1}, "'gold' is not the same"),
        ({"kind": "adverb"}, "'kind' is not the same"),
    ],
)
def test_comparison_refuses_other_questions(change, message):
    rows = cells(3, 3, 3, 3)
    with pytest.raises(ValueError, match=message):
        compare(rows, ([rows[0] | change] if change else []) + rows[1:])


@pytest.mark.parametrize(
    ("key", "bad", "message"),
    [
        ("mention", 2, "mention must be at most 1, not 2"), ("planted", 2, "at most 1, not 2"),
        ("y", 0.5, "y must be a whole number, not 0.5"), ("tokens", "ten", "a whole number, not .ten"),
        ("id", 3, "id must be a text, not 3"), ("group", None, "a text, not null"), ("tokens", -1, "above -1, not -1"),
        ("overlap", 1.5, "at most 1, not 1.5"), ("overlap", -0.1, "overlap must be above"),
        ("phrasing", "x", "a whole number"), ("overlap", "x", "a number, not .x"), ("tokens", math.nan, "not NaN"),
        ("gold", None, "a whole number, not null"), ("p_edit", None, "a list, each a number, not null"),
        ("p", [0.5, 0.2, 0.1], "the probabilities of two"), ("p", [1.5, -0.5, 0.0], "the probabilities of two"),
        ("suggestion", 3, "options of both"), ("y_null", 4, "options of both"), ("p", [0.5, 0.5], "options of both"),
        ("gold", 3, "options of both"), ("influence", 0, "1 exactly where"), ("id", "q0", "an id occurs twice"),
    ],
)  # fmt: skip
def test_faulty_rows_are_named(key, bad, message):
    rows = cells(3, 3, 3, 3)
    with pytest.raises(ValueError, match=("rows: " if bad == "q0" else "rows, row 2: .*") + message):
        report.summary([rows[0], rows[1] | {key: bad}, *rows[2:]], resamples=10)


def test_every_missing_key_is_named_and_no_rows_are_refused():
    for key in report.KEYS:
        rows = cells(1, 1, 1, 1)
        del rows[2][key]
        with pytest.raises(ValueError, match=f"row 3: the key '{key}' is missing"):
            report.summary(rows, resamples=10)
    with pytest.raises(ValueError, match="no measured rows"):
        report.summary([])


# ---- tables and files ----


def test_table_is_aligned_and_says_what_a_column_lacks():
    s = report.summary(leaky_rows(60, 1), leaky_rows(60, 2), resamples=20)
    plain = report.summary(leaky_rows(60, 3), resamples=20)
    lines = tables.table({"before": plain, "after": s}).split("\n")
    assert lines[0].split() == ["figure", "before", "after"]
    start = lines[0].index("after")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)
    by_name = {line.split()[0]: line for line in lines}
    assert by_name["n"].split() == ["n", "60", "60"]
    assert by_name["shortcut_phi"].split()[1] == "-"
    assert "{value:.3f} [{low:.3f}, {high:.3f}]".format(**plain["reward"]) in by_name["reward"]
    assert set(by_name) - {"figure"} >= set(s)
    marked = tables.table({"before": plain, "after": s}, markdown=True).split("\n")
    assert {line.count("|") for line in marked} == {4} and set(marked[1]) == {"|", "-", " "}


def test_json_is_valid_whole_and_has_null_for_undefined(tmp_path):
    path = tmp_path / "out.json"
    s = report.summary(cells(0, 5, 0, 5), resamples=10) | {"array": np.arange(2), "inf": math.inf}
    path.write_text("old")
    files.write_json(path, s)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    got = json.loads(path.read_text(), parse_constant=refuse)
    assert got["phi"] == {"value": None, "low": None, "high": None, "undefined": 10}
    assert got["reward"]["value"] == 0.5 and got["array"] == [0, 1] and got["inf"] is None
    with pytest.raises(AttributeError):
        files.write_json(path, {"good": 1, "bad": object()})
    assert json.loads(path.read_text())["n"] == {"value": 10}  # the old file is whole
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_rows_survive_a_file(tmp_path):
    rows = cells(2, 2, 2, 2, overlap=float("nan"), text="line\u2028break \u00e9\n")
    path = tmp_path / "rows.jsonl"
    files.write_jsonl(path, rows)
    assert len(path.read_text().splitlines()) == 8
    assert reading.read_jsonl(path) == [row | {"overlap": None} for row in rows]
    path.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert reading.read_jsonl(path) == [{"text": "a\u2028b"}]
    for bad in (tmp_path / "no" / "rows.jsonl", tmp_path, path / "rows.jsonl"):
        with pytest.raises(ValueError, match="cannot be written"):
            files.write_jsonl(bad, rows)
    assert [p.name for p in tmp_path.parent.glob("*.part")] == []


def test_every_figure_is_in_the_guide():
    """And the guide has no other. A name that ends in … stands for all that begin so."""
    guide = (ROOT / "docs" / "guide.md").read_text().split("| figure |")[1].split("###")[0]
    named = {
        name for line in guide.split("\n") if line[:2] == "| " for name in re.findall(r"\w+…?", line.split("|")[1])
    }
    more = {"detection": 0.5, "mention_beside": 0, "decoy_beside": 1} | {f"y_{name}": 1 for name in report.CONTROLS}
    rows = [row | more | {"planted": 0} for row in random_rows(40, 16)]
    figures = {*report.summary(rows, rows, resamples=2, initial=rows), *compare(rows, rows, resamples=2)}
    figures |= gaming.FIGURES.keys()
    for name in named:
        assert any(figure == name or name[-1] == "…" and figure.startswith(name[:-1]) for figure in figures), name
    stems = tuple(name[:-1] for name in named if name[-1] == "…")
    assert {name for name in figures - named if not name.startswith(stems)} == {*gaming.SIGNS}


def test_f_auroc_is_scikit_learns_area_under_the_points():
    rows = random_rows(300, 17, group_size=1)
    rng, i = np.random.default_rng(4), column(rows, "influence")
    rates = ((0.1, 0.3), (0.6, 0.65), (0.3, 0.7), (0.35, 0.5))  # P(M=1 | I=0), P(M=1 | I=1); not in order
    told = [[row | {"mention": int(rng.random() < rate[row["influence"]])} for row in rows] for rate in rates]

    def area(i, *mentions):
        points = sorted((m[i == 0].mean(), m[i == 1].mean()) for m in mentions)
        return auc(*zip((0, 0), *points, (1, 1), strict=True))

    mentions = [column(some, "mention") for some in told]
    got = f_auroc([told[0], *(some[::-1] for some in told[1:])], resamples=4000)  # paired by id
    assert got["value"] == pytest.approx(area(i, *mentions), abs=1e-12) and got["undefined"] == 0
    assert agree(got, resampled((i, *mentions), area, 2000)) and got["value"] > 0.6
    always, never = ([row | {"mention": m} for row in rows] for m in (1, 0))
    assert f_auroc([always, never], resamples=10)["value"] == 0.5
    assert f_auroc([[row | {"mention": row["influence"]} for row in rows]], resamples=10)["value"] == 1
    moved = [row | {"y_edit": row["y"], "influence": 0} for row in rows]
    with pytest.raises(ValueError, match="the decisions differ"):
        f_auroc([rows, moved])


# ---- lab/report.py ----


@pytest.fixture
def measured(tmp_path):
    before = random_rows(40, 11)
    rows = {"before": before, "after": [row | {"mention": row["influence"]} for row in before]}
    rows["fit"] = [row | {"group": f"another {row['group']}"} for row in random_rows(60, 12)]
    paths = {name: tmp_path / f"{name}.rows.jsonl" for name in ("before", "after", "fit")}
    for name, path in paths.items():
        files.write_jsonl(path, rows[name])
    return paths


def command(capsys, *args):
    """lab.report in this process: (exit status, stdout, stderr)."""
    return lab_report.main([str(arg) for arg in args]), *capsys.readouterr()


def test_command_prints_both_and_their_difference(measured, tmp_path, capsys):
    out = tmp_path / "out.json"
    pair = (measured["before"], measured["after"])
    line = [sys.executable, "-m", "lab.report", *pair, "--fit", measured["fit"], "--json", out]
    got = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert got.returncode == 0 and got.stderr == ""
    names = [line.split()[:1] for line in got.stdout.split("\n")]
    assert got.stdout.split("\n")[0].split() == ["figure", "before", "after", "difference"]
    assert ["phi_less_shortcut"] in names
    figures = {name: part["phi"]["value"] for name, part in json.loads(out.read_text()).items()}
    assert figures["after"] == pytest.approx(1.0)
    assert figures["difference"] == pytest.approx(figures["after"] - figures["before"])
    assert command(capsys, *pair, "--markdown")[1].startswith("| figure ")


def test_command_refuses_bad_input_in_one_line(measured, tmp_path, capsys):
    good, none = measured["before"], tmp_path / "none"
    first, rest = good.read_text().split("\n", 1)
    without = json.dumps({key: x for key, x in json.loads(first).items() if key != "mention"})
    contents = {"bad0.jsonl, line 2: ": first + "\n{not json\n" + rest,
                "bad1.jsonl, line 1: the key 'mention' is missing": without + "\n" + rest,
                "bad2.jsonl, line 1 holds no JSON object": "[1, 2]\n",
                "bad3.jsonl: no measured rows": "", "ids do not match": rest,
                "line 1: not UTF-8": "\xff\xfd\n"}  # fmt: skip
    cases = [((good, tmp_path / f"bad{n}.jsonl"), message) for n, message in enumerate(contents)]
    for ((_, bad), _), content in zip(cases, contents.values(), strict=True):
        bad.write_text(content, encoding="latin-1")
    for args, message in (
        *cases,
        ((tmp_path, good), "Is a directory"),
        ((good, "--fit", good), "of its groups of questions, such as "),
        ((good, none), "is missing"),
        ((good, good, "--fit", none), "is missing"),
        ((good, good, "--json", none / "x.json"), "cannot be written"),
        ((tmp_path, "--fit", measured["fit"]), "--fit goes with rows"),
        ((good, good, good), "give one file of rows, the rows before and after, or one run"),
        ((tmp_path,), "holds no before.json or after.json"),
    ):
        code, out, error = command(capsys, *args)
        assert code == 2 and out == "" and error.count("\n") == 1 and message in error


def test_every_figure_of_a_run(measured, tmp_path, capsys):
    before, after = (reading.read_jsonl(measured[name]) for name in ("before", "after"))
    for name, rows in (("before", before), ("after", after)):
        files.write_json(tmp_path / f"{name}.json", {f"T={t}": report.summary(rows, resamples=50) for t in (0, 1)})
    files.write_json(tmp_path / "difference.T1.json", compare(before, after, resamples=50))
    code, out, error = command(capsys, tmp_path, "--json", tmp_path / "out.json")
    assert code == 0 and error == ""
    alone = command(capsys, measured["after"], "--fit", measured["fit"])[1].split("\n")
    assert alone[0].split() == ["figure", "rows"] and any(line.startswith("phi_less_shortcut ") for line in alone)
    greedy, sampled = out.split("\n\n")
    assert greedy.startswith("T=0\n") and greedy.split("\n")[1].split() == ["figure", "before", "after"]
    assert sampled.split("\n")[1].split() == ["figure", "before", "after", "difference"] and "\ncct " in sampled
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["T=1"]["after"] == json.loads((tmp_path / "after.json").read_text())["T=1"]


def test_the_overview_has_eight_rows(measured):
    rows = {name: reading.read_jsonl(measured[name]) for name in ("before", "after")}
    before, after = (
        report.summary(part, random_rows(60, 12), resamples=50, initial=rows["before"]) for part in rows.values()
    )
    lines = tables.overview({"before": before, "after": after}).split("\n")
    assert len(lines) == 2 + len(tables.OVERVIEW) == 10
    assert len(tables.overview({"one": report.summary(rows["after"], resamples=5)}).split("\n")) == 8  # two unknown
    phi = next(line for line in lines if line.startswith("Phi-CCT, natural rate"))
    assert tables.cell(before["phi"]) in phi and tables.cell(after["phi"]) in phi
    asked = [row | {"detection": float(row["tokens"])} for row in rows["after"]]
    asked = report.summary(asked, random_rows(60, 12), resamples=5, initial=rows["before"])
    lines = tables.overview({"x": asked}).split("\n")
    assert len(lines) == 2 + 8 and lines[-1].startswith("asked outright, minus the shortcut's")
    assert tables.overview({"after": after}, markdown=True).startswith("| 95 % intervals")
