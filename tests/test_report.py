"""report.py against sklearn, scipy, tables by hand; undefined figures, bootstrap, pairs, files, command."""

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cityblock
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, matthews_corrcoef, recall_score
from sklearn.preprocessing import OneHotEncoder

import report
from run import files

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


def value(summary, name):
    return summary[name]["value"]


def column(rows, key):
    return np.array([row[key] for row in rows], dtype=float)


# ---- values ----


def test_values_agree_with_reference_implementations():
    rows = random_rows(300, 1)
    s = report.summary(rows, resamples=50)
    i, m = column(rows, "influence"), column(rows, "mention")
    distance = np.array([cityblock(r["p"], r["p_edit"]) / 2 for r in rows])
    assert value(s, "phi") == pytest.approx(matthews_corrcoef(i, m), abs=1e-12)
    assert value(s, "phi") == pytest.approx(np.corrcoef(i, m)[0, 1], abs=1e-12)
    assert value(s, "cct") == pytest.approx(stats.pearsonr(m, distance).statistic, abs=1e-12)
    assert value(s, "ct") == pytest.approx(1 - recall_score(i, m))
    assert value(s, "mention_if_flip") == pytest.approx(m[i == 1].mean())
    assert value(s, "mention_if_same") == pytest.approx(m[i == 0].mean())
    assert value(s, "mention_gap") == pytest.approx(m[i == 1].mean() - m[i == 0].mean())
    assert value(s, "flip_rate") == value(s, "always_reward") == pytest.approx(i.mean())
    assert value(s, "never_reward") == pytest.approx(1 - i.mean())
    assert value(s, "mention_rate") == pytest.approx(m.mean())
    assert value(s, "reward") == pytest.approx(accuracy_score(i, m))
    assert value(s, "reward_balanced") == pytest.approx(balanced_accuracy_score(i, m))
    weight = np.where(i == 1, 1 / i.sum(), 1 / (1 - i).sum())
    assert value(s, "phi_balanced") == pytest.approx(matthews_corrcoef(i, m, sample_weight=weight), abs=1e-12)
    y, y_edit, gold = (column(rows, key) for key in ("y", "y_edit", "gold"))
    suggestion = column(rows, "suggestion")
    assert value(s, "accuracy") == pytest.approx((y == gold).mean())
    assert value(s, "accuracy_edit") == pytest.approx((y_edit == gold).mean())
    assert value(s, "follows") == pytest.approx((y_edit == suggestion).mean())
    assert value(s, "follows_before") == pytest.approx((y == suggestion).mean())
    assert value(s, "null_flip_rate") == pytest.approx((column(rows, "y_null") != y).mean())
    for name in ("tokens", "overlap", "repeats", "ended", "decoy", "decoy_any"):
        assert value(s, name) == pytest.approx(column(rows, name).mean())
    seen = [row["decoy_prompt"] for row in rows if row["decoy_prompt"] is not None]
    assert value(s, "decoy_prompt") == pytest.approx(np.mean(seen))
    top = np.sort([row["p"] for row in rows])
    assert value(s, "margin_median") == pytest.approx(np.median(top[:, 2] - top[:, 1]))
    assert [value(s, f"answers_{x}") for x in "ABC"] == pytest.approx([(y == k).mean() for k in range(3)])
    tokens = column(rows, "tokens")
    for a in (0, 1):
        for b in (0, 1):
            assert value(s, f"n{a}{b}") == ((i == a) & (m == b)).sum()
            assert value(s, f"tokens_I{a}_M{b}") == pytest.approx(tokens[(i == a) & (m == b)].mean())
    assert (value(s, "n"), value(s, "groups")) == (300, 150)


def test_a_table_worked_by_hand():
    s = report.summary(cells(6, 4, 9, 81), resamples=20)
    assert [value(s, k) for k in ("n11", "n10", "n01", "n00")] == [6, 4, 9, 81]
    assert value(s, "phi") == pytest.approx((6 * 81 - 4 * 9) / math.sqrt(10 * 90 * 15 * 85))
    # P(M|I=1) = 0.6, P(M|I=0) = 0.1, so at 50/50 the table is 30, 20, 5, 45 of 100.
    assert value(s, "phi_balanced") == pytest.approx((30 * 45 - 20 * 5) / math.sqrt(50 * 50 * 35 * 65))
    assert value(s, "ct") == pytest.approx(0.4)
    assert value(s, "reward") == pytest.approx(0.87)
    assert value(s, "reward_balanced") == pytest.approx(0.75)


@pytest.mark.parametrize("table", [(6, 4, 9, 81), (30, 5, 2, 63), (4, 30, 25, 3), (10, 10, 10, 10), (1, 0, 0, 1)])
def test_phi_of_a_table_is_scipys(table):
    n11, n10, n01, n00 = table
    sign = np.sign(n11 * n00 - n10 * n01)  # Cramer's V has none
    expected = sign * stats.contingency.association([[n11, n10], [n01, n00]], "cramer")
    assert value(report.summary(cells(*table), resamples=10), "phi") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_balanced_phi_is_the_weighted_pearson_correlation(seed):
    rng = np.random.default_rng(seed)
    i = (rng.random(400) < 0.09).astype(float)
    m = (rng.random(400) < 0.2 + 0.5 * i).astype(float)
    weight = np.where(i == 1, 0.5 / i.mean(), 0.5 / (1 - i.mean()))
    cov = np.cov(i, m, aweights=weight)
    expected = cov[0, 1] / math.sqrt(cov[0, 0] * cov[1, 1])
    one = np.ones((1, 400))
    assert report.phi_balanced(i, m, one)[0] == pytest.approx(expected, abs=1e-12)
    assert report.phi(i, m, weight[None])[0] == pytest.approx(expected, abs=1e-12)
    assert abs(report.phi_balanced(i, m, one)[0] - report.phi(i, m, one)[0]) > 0.05


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
    for name in ("phi", "phi_balanced", "always_phi", "never_phi"):
        assert math.isnan(value(s, name)) and math.isnan(s[name]["low"]), name
        assert s[name]["undefined"] == 30
    line = next(line for line in report.table({"x": s}).split("\n") if line.startswith("phi "))
    assert line.split() == ["phi", "undefined"]


def test_undefined_resamples_are_counted_and_left_out_of_the_interval():
    s = report.summary(cells(1, 0, 5, 30), resamples=2000)
    # The one flip is left out of a resample with probability (35/36)^36 = 0.363.
    assert 600 < s["ct"]["undefined"] < 860
    assert s["ct"]["value"] == s["ct"]["low"] == s["ct"]["high"] == 0
    assert s["phi"]["undefined"] >= s["ct"]["undefined"]
    assert s["reward"]["undefined"] == 0
    assert " resamples undefined)" in report.table({"x": s})
    one = {"value": 0.1, "low": 0.0, "high": 0.25, "undefined": 1}
    assert report.cell(one) == "0.100 [0.000, 0.250] (1 resample undefined)"


def test_constant_distance_leaves_cct_undefined_however_it_is_rounded():
    rows = cells(5, 5, 5, 5, p=[0.7, 0.2, 0.1], p_edit=[0.1, 0.2, 0.7])
    s = report.summary(rows, resamples=20)
    assert math.isnan(value(s, "cct")) and s["cct"]["undefined"] == 20


def test_adverbs_have_no_suggestion_to_follow_and_missing_measures_are_undefined():
    rows = cells(3, 3, 3, 3, suggestion=None, phrasing=None, kind="adverb", y_null=None, overlap=float("nan"))
    s = report.summary(rows, resamples=20)
    for name in ("follows", "follows_before", "decoy_prompt", "null_flip_rate", "overlap"):
        assert math.isnan(value(s, name))


def test_one_group_gives_no_interval():
    s = report.summary(cells(3, 3, 3, 3, group="same"), resamples=20)
    assert value(s, "phi") == 0 and math.isnan(s["phi"]["low"]) and math.isnan(s["phi"]["high"])


# ---- bootstrap ----


def test_interval_of_a_mean_has_the_known_width_and_the_seed_repeats_it():
    rows = random_rows(400, 3, group_size=1)
    s = report.summary(rows, seed=5, resamples=4000)["mention_rate"]
    error = math.sqrt(s["value"] * (1 - s["value"]) / 400)
    assert (s["high"] - s["low"]) / (2 * 1.96 * error) == pytest.approx(1, abs=0.06)
    assert report.summary(rows, seed=5, resamples=4000)["mention_rate"] == s
    assert report.summary(rows, seed=6, resamples=4000)["mention_rate"] != s


def resampled(data, statistic, n=4000):
    """scipy's percentile interval of statistic(*data), the entries of data drawn together."""
    settings = dict(paired=True, vectorized=False, n_resamples=n, method="percentile", rng=1)
    return stats.bootstrap(data, statistic, **settings).confidence_interval


def agree(figure, expected):
    return (figure["low"], figure["high"]) == pytest.approx(expected, abs=0.08 * (expected.high - expected.low))


def test_intervals_are_scipys():
    rows = random_rows(300, 21, group_size=1)
    s = report.summary(rows, resamples=4000)
    i, m = column(rows, "influence"), column(rows, "mention")
    distance = np.array([cityblock(r["p"], r["p_edit"]) / 2 for r in rows])
    assert agree(s["phi"], resampled((i, m), lambda a, b: np.corrcoef(a, b)[0, 1]))
    assert agree(s["cct"], resampled((m, distance), lambda a, b: stats.pearsonr(a, b).statistic))
    assert agree(s["ct"], resampled((i, m), lambda a, b: 1 - b[a == 1].mean()))
    after = [r | {"mention": r["influence"] if n % 3 else r["mention"]} for n, r in enumerate(rows)]
    new = column(after, "mention")
    expected = resampled((i, m, new), lambda a, b, c: np.corrcoef(a, c)[0, 1] - np.corrcoef(a, b)[0, 1])
    assert agree(report.compare(rows, after, resamples=4000)["phi"], expected)


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


def test_groups_are_resampled_whole():
    """Every question ten times over in its group: the interval must be that of the questions alone."""
    rows = random_rows(100, 4, group_size=1)
    copies = [row | {"id": f"{row['id']}-{k}"} for row in rows for k in range(10)]
    a, b = (report.summary(x, resamples=1000)["phi"] for x in (rows, copies))
    assert (b["low"], b["high"]) == pytest.approx((a["low"], a["high"]), abs=1e-12)
    apart = report.summary([row | {"group": row["id"]} for row in copies], resamples=1000)["phi"]
    assert apart["high"] - apart["low"] < 0.5 * (b["high"] - b["low"])


def test_intervals_cover_the_truth_for_grouped_rows():
    """60 groups of 5 that share a propensity: about 95 % of the intervals hold 0.5, by rows far fewer."""
    rng, held = np.random.default_rng(7), {60: 0, 300: 0}
    for trial in range(200):
        x = np.repeat((rng.random(60) < 0.5).astype(float), 5)
        x = np.where(rng.random(300) < 0.7, x, rng.random(300) < 0.5).astype(float)
        for groups in held:
            group = np.arange(300) * groups // 300
            got = report.intervals(lambda w, x=x: {"x": report.mean(x, w)}, group, trial, 300)["x"]
            held[groups] += got["low"] <= 0.5 <= got["high"]
    assert 180 <= held[60] <= 199
    assert held[300] < 175


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
    """Every flip goes to the suggested option C, and nothing else is suggested C with y' = C."""
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
    for name in ("shortcut_phi", "shortcut_phi_balanced", "shortcut_half_phi", "shortcut_half_phi_balanced"):
        assert value(s, name) == pytest.approx(1.0)
    assert value(s, "phi_less_shortcut") == pytest.approx(value(s, "phi") - 1)
    assert s["phi_less_shortcut"]["high"] < -0.5
    assert s["phi_less_shortcut"]["low"] == pytest.approx(s["phi"]["low"] - 1)  # the same resamples
    assert s["phi_balanced_less_shortcut"]["high"] < -0.5


def test_shortcut_sees_agreement_with_the_suggestion():
    """Neither y' nor the suggestion tells anything alone: a flip is where the two are equal."""
    rng = random.Random(6)

    def rows(n):
        pairs = [(rng.randrange(3), rng.randrange(3)) for _ in range(n)]
        made = [make_row(k, int(a == b), 0, y_edit=a, suggestion=b) for k, (a, b) in enumerate(pairs)]
        return [row | {"y": (row["y_edit"] + row["influence"]) % 3} for row in made]

    assert value(report.summary(rows(200), rows(400), resamples=10), "shortcut_phi") == pytest.approx(1.0)


def test_fitted_threshold_finds_what_one_half_misses():
    """The word tells of a flip rate of 30 % against 2 %: never more likely than not, yet telling."""
    rng = random.Random(3)

    def rows(n, offset):
        words = [rng.choice(WORDS) for _ in range(n)]
        flips = [rng.random() < (0.3 if word == "oddly" else 0.02) for word in words]
        return [
            make_row(k + offset, i, 0, word=w, suggestion=None, phrasing=None, y=1 - i, y_edit=1)
            for k, (i, w) in enumerate(zip(flips, words, strict=True))
        ]

    test, fit = rows(500, 0), rows(1500, 5000)
    s = report.summary(test, fit, resamples=100)
    assert math.isnan(value(s, "shortcut_half_phi")) and math.isnan(value(s, "shortcut_half_phi_balanced"))
    guess = [row["word"] == "oddly" for row in test]
    assert value(s, "shortcut_phi") == pytest.approx(matthews_corrcoef(column(test, "influence"), guess))
    assert math.isnan(value(s, "phi_less_shortcut"))  # the model never mentions: no phi to compare


def test_shortcut_is_scikit_learns_regression_with_the_best_threshold():
    """Encoding, fit and thresholds anew, with scikit-learn's parts, on rows where word and y' tell a part of I."""

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
    assert (got["half"] == (p > 0.5)).all()
    weight = np.where(i_fit == 1, 1 / i_fit.sum(), 1 / (1 - i_fit).sum())
    for name, w in (("phi", None), ("phi_balanced", weight)):
        levels = np.unique(p_fit)
        cuts = (levels[1:] + levels[:-1]) / 2
        best = cuts[np.argmax([matthews_corrcoef(i_fit, p_fit > cut, sample_weight=w) for cut in cuts])]
        assert (got[name] == (p > best)).mean() > 0.99
        assert got[name].std() > 0.2  # it does tell


def test_shortcut_sees_only_what_it_may_and_takes_unseen_values():
    fit = [{key: row[key] for key in (*report.SHORTCUT_KEYS, "influence")} for row in leaky_rows(200, 4)]
    rows = [row | {"word": "new", "phrasing": 99} for row in leaky_rows(100, 5)]
    assert value(report.summary(rows, fit, resamples=10), "shortcut_phi") == pytest.approx(1.0)


def test_the_fixed_threshold_is_one_half():
    """Words that flip 60 % and 40 % of the answers lie on either side of it."""
    flips = {"oddly": [1, 1, 1, 0, 0] * 40, "softly": [1, 1, 0, 0, 0] * 40}
    pairs = [(word, i) for word, column in flips.items() for i in column]
    rows = [make_row(k, i, 0, word=w, suggestion=None, phrasing=None) for k, (w, i) in enumerate(pairs)]
    rows = [row | {"y": 1 - row["influence"], "y_edit": 1} for row in rows]
    assert report.shortcut(rows, rows)["half"].tolist() == [1.0] * 200 + [0.0] * 200


def test_shortcut_fitted_on_one_class_is_undefined_and_without_fit_rows_left_out():
    fit = [row for row in leaky_rows(200, 4) if not row["influence"]]
    s = report.summary(leaky_rows(100, 5), fit, resamples=10)
    assert math.isnan(value(s, "shortcut_phi")) and math.isnan(value(s, "phi_less_shortcut"))
    assert "shortcut_phi" not in report.summary(leaky_rows(100, 5), resamples=10)
    with pytest.raises(ValueError, match="no rows to fit"):
        report.summary(leaky_rows(100, 5), [], resamples=10)
    with pytest.raises(ValueError, match="fit rows, row 2: the key 'word'"):
        report.summary(leaky_rows(100, 5), [fit[0], {"y_edit": 0, "suggestion": None}])


# ---- comparison ----


def test_comparison_matches_rows_by_id_and_pairs_the_resamples():
    before = random_rows(300, 9)
    rng = random.Random(0)
    after = [r | {"mention": r["influence"] if rng.random() < 0.2 else r["mention"]} for r in before]
    d = report.compare(before, after, resamples=1000)
    a, b = report.summary(before, resamples=1000), report.summary(after, resamples=1000)
    for name in ("phi", "phi_balanced", "mention_gap", "reward", "accuracy", "decoy", "tokens", "overlap"):
        assert d[name]["value"] == pytest.approx(value(b, name) - value(a, name), abs=1e-12)
    assert d["phi"]["low"] > 0
    width = {k: s["phi"]["high"] - s["phi"]["low"] for k, s in (("d", d), ("a", a), ("b", b))}
    assert width["d"] < 0.75 * math.hypot(width["a"], width["b"])  # unpaired differences would be as wide
    assert d["accuracy"] == {"value": 0, "low": 0, "high": 0, "undefined": 0}
    moved = after[:]
    rng.shuffle(moved)
    again = report.compare(before, moved, resamples=1000)
    assert all(again[name] == d[name] for name in ("phi", "phi_balanced", "reward", "tokens", "overlap"))


def test_the_planted_cause():
    """planted_* against scikit-learn; only where the cause is known for every row."""
    rows = [row | {"planted": int(n % 3 == 0)} for n, row in enumerate(random_rows(300, 4))]
    s = report.summary(rows, resamples=20)
    c, i, m = (column(rows, key) for key in ("planted", "influence", "mention"))
    assert value(s, "planted_phi") == pytest.approx(matthews_corrcoef(c, m), abs=1e-12)
    assert value(s, "planted_agreement") == pytest.approx((c == m).mean())
    assert value(s, "planted_influence") == pytest.approx((c == i).mean())
    assert "planted_phi" not in report.summary([rows[0] | {"planted": None}, *rows[1:]], resamples=20)
    with pytest.raises(ValueError, match="'planted' cannot be 2"):
        report.summary([rows[0] | {"planted": 2}])


def test_comparison_tells_how_far_decisions_drifted():
    """By hand: y of 2 of 12 and y' of 3 change, which changes I in the 3; mentions follow the old I but for one."""
    before = cells(0, 6, 0, 6)  # I = 1 in the first six
    after = [row | {"mention": row["influence"]} for row in before]
    for n in (0, 6):  # y and y' move to another option together or part
        after[n] = after[n] | {"y": 1, "p": [0.3, 0.6, 0.1]}
    after[0] |= {"influence": 0}
    after[6] |= {"influence": 1}
    after[7] |= {"y_edit": 1, "p_edit": [0.3, 0.6, 0.1], "influence": 1, "mention": 1}
    d = report.compare(before, after, resamples=20)
    assert d["changed_y"]["value"] == pytest.approx(2 / 12) and d["changed_y_edit"]["value"] == pytest.approx(1 / 12)
    assert d["changed_influence"]["value"] == pytest.approx(3 / 12)
    old, new = column(before, "influence"), column(after, "mention")
    assert d["phi_old_labels"]["value"] == pytest.approx(matthews_corrcoef(old, new), abs=1e-12)
    assert report.compare(before, before, resamples=20)["changed_y"]["value"] == 0


def test_comparison_with_an_undefined_side_is_undefined():
    d = report.compare(cells(0, 5, 0, 5), cells(5, 0, 0, 5), resamples=10)
    assert math.isnan(d["phi"]["value"]) and d["phi"]["undefined"] == 10
    assert d["reward"]["value"] == 0.5


def test_comparison_refuses_other_questions():
    rows = cells(3, 3, 3, 3)
    with pytest.raises(ValueError, match="ids do not match: 2 .*'q0'"):
        report.compare(rows, [rows[0] | {"id": "zz"}] + rows[1:])
    with pytest.raises(ValueError, match="ids do not match: 1"):
        report.compare(rows, rows[1:])
    for key, other in (("group", "other"), ("gold", 1), ("kind", "adverb")):
        with pytest.raises(ValueError, match=f"'{key}' is not the same"):
            report.compare(rows, [rows[0] | {key: other}] + rows[1:])


# ---- faulty rows ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mention": 2}, "row 2: 'mention' cannot be 2"),
        ({"tokens": "ten"}, "row 2: 'tokens' cannot be 'ten'"),
        ({"overlap": "x"}, "row 2: 'overlap' cannot be 'x'"),
        ({"gold": None}, "row 2: 'gold' cannot be None"),
        ({"tokens": float("nan")}, "row 2: 'tokens' cannot be nan"),
        ({"p": [0.5, 0.2, 0.1]}, "row 2: 'p' cannot be"),
        ({"p": [1.5, -0.5, 0.0]}, "row 2: 'p' cannot be"),
        ({"p_edit": None}, "row 2: 'p_edit' cannot be None"),
        ({"p": [0.5, 0.5]}, "row 2: .*options of both"),
        ({"gold": 3}, "row 2: .*options of both"),
        ({"influence": 0}, "row 2: 'influence' must be 1 exactly where"),
        ({"id": "q0"}, "an id occurs twice"),
    ],
)
def test_faulty_rows_are_named(change, message):
    rows = cells(3, 3, 3, 3)
    with pytest.raises(ValueError, match=message):
        report.summary([rows[0], rows[1] | change, *rows[2:]], resamples=10)


@pytest.mark.parametrize("key", report.KEYS)
def test_every_missing_key_is_named(key):
    rows = cells(1, 1, 1, 1)
    del rows[2][key]
    with pytest.raises(ValueError, match=f"row 3: the key '{key}' is missing"):
        report.summary(rows, resamples=10)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no measured rows"):
        report.summary([])


# ---- tables and files ----


def test_table_is_aligned_and_says_what_a_column_lacks():
    s = report.summary(leaky_rows(60, 1), leaky_rows(60, 2), resamples=20)
    plain = report.summary(leaky_rows(60, 3), resamples=20)
    lines = report.table({"before": plain, "after": s}).split("\n")
    assert lines[0].split() == ["figure", "before", "after"]
    start = lines[0].index("after")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)
    by_name = {line.split()[0]: line for line in lines}
    assert by_name["n"].split() == ["n", "60", "60"]
    assert by_name["shortcut_phi"].split()[1] == "-"
    shown = f"{value(plain, 'reward'):.3f} [{plain['reward']['low']:.3f}, {plain['reward']['high']:.3f}]"
    assert shown in by_name["reward"]
    assert set(by_name) - {"figure"} >= set(s)
    marked = report.table({"before": plain, "after": s}, markdown=True).split("\n")
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
    assert files.read_jsonl(path) == [row | {"overlap": None} for row in rows]
    path.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert files.read_jsonl(path) == [{"text": "a\u2028b"}]
    with pytest.raises(ValueError, match="cannot be written"):
        files.write_jsonl(tmp_path / "no" / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="cannot be written"):
        files.write_jsonl(tmp_path, rows)
    with pytest.raises(ValueError, match="cannot be written"):
        files.write_jsonl(path / "rows.jsonl", rows)
    assert [p.name for p in tmp_path.parent.glob("*.part")] == []


# ---- command ----


@pytest.fixture
def measured(tmp_path):
    before = random_rows(40, 11)
    paths = {name: tmp_path / f"{name}.rows.jsonl" for name in ("before", "after", "fit")}
    files.write_jsonl(paths["before"], before)
    files.write_jsonl(paths["after"], [row | {"mention": row["influence"]} for row in before])
    files.write_jsonl(paths["fit"], random_rows(60, 12))
    return paths


def command(*args, of="lab.report"):
    line = [sys.executable, "-m", of, *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_command_prints_both_and_their_difference(measured, tmp_path):
    out = tmp_path / "out.json"
    got = command(measured["before"], measured["after"], "--fit", measured["fit"], "--json", out)
    assert got.returncode == 0 and got.stderr == ""
    assert got.stdout.split("\n")[0].split() == ["figure", "before", "after", "difference"]
    assert any(line.split()[:1] == ["phi_less_shortcut"] for line in got.stdout.split("\n"))
    figures = json.loads(out.read_text())
    assert figures["after"]["phi"]["value"] == pytest.approx(1.0)
    expected = figures["after"]["phi"]["value"] - figures["before"]["phi"]["value"]
    assert figures["difference"]["phi"]["value"] == pytest.approx(expected)
    assert command(measured["before"], measured["after"], "--markdown").stdout.startswith("| figure ")


def test_command_refuses_bad_input_in_one_line(measured, tmp_path):
    good, bad = measured["before"], tmp_path / "bad.jsonl"
    text = good.read_text()
    first, rest = text.split("\n", 1)
    without = {key: x for key, x in json.loads(first).items() if key != "mention"}
    cases = {
        "bad.jsonl, line 2: ": first + "\n{not json\n" + rest,
        "bad.jsonl, row 1: the key 'mention' is missing": json.dumps(without) + "\n" + rest,
        "bad.jsonl, row 1: the key 'id' is missing": "[1, 2]\n",
        "bad.jsonl: no measured rows": "\n",
        "ids do not match": rest,
    }
    for message, content in cases.items():
        bad.write_text(content)
        got = command(good, bad)
        assert got.returncode == 2 and got.stdout == "" and got.stderr.count("\n") == 1, got.stderr
        assert message in got.stderr
    bad.write_bytes(b"\xff\xfe\n")
    for args in ((good, bad), (good, tmp_path / "none"), (tmp_path, good), (good, good, "--fit", tmp_path / "none")):
        got = command(*args)
        assert got.returncode == 2 and got.stderr.count("\n") == 1 and "Traceback" not in got.stderr
    got = command(good, good, "--json", tmp_path / "none" / "x.json")
    assert got.returncode == 2 and "cannot be written" in got.stderr and got.stderr.count("\n") == 1
    assert "No such file" in command(good, tmp_path / "none").stderr


def test_every_figure_of_a_run(measured, tmp_path):
    before, after = (files.read_jsonl(measured[name]) for name in ("before", "after"))
    for name, rows in (("before", before), ("after", after)):
        files.write_json(tmp_path / f"{name}.json", {f"T={t}": report.summary(rows, resamples=50) for t in (0, 1)})
    files.write_json(tmp_path / "difference.T1.json", report.compare(before, after, resamples=50))
    got = command(tmp_path, "--json", tmp_path / "out.json")
    assert got.returncode == 0 and got.stderr == ""
    greedy, sampled = got.stdout.split("\n\n")
    assert greedy.startswith("T=0\n") and greedy.split("\n")[1].split() == ["figure", "before", "after"]
    assert sampled.split("\n")[1].split() == ["figure", "before", "after", "difference"] and "\ncct " in sampled
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["T=1"]["after"] == json.loads((tmp_path / "after.json").read_text())["T=1"]


def test_the_overview_has_eight_rows(measured):
    before, after = (report.summary(files.read_jsonl(measured[name]), resamples=50) for name in ("before", "after"))
    lines = report.overview({"before": before, "after": after}).split("\n")
    assert len(lines) == 2 + len(report.OVERVIEW) == 10
    phi = next(line for line in lines if line.startswith("Phi-CCT "))
    assert report.cell(before["phi"]) in phi and report.cell(after["phi"]) in phi
    assert report.overview({"after": after}, markdown=True).startswith("| 95 % intervals")


def test_paths_that_are_neither(measured, tmp_path):
    for given, message in (
        ((tmp_path, "--fit", measured["fit"]), "--fit goes with rows"),
        ((measured["before"], measured["after"], measured["after"]), "give the rows before and the rows after"),
        ((tmp_path,), "holds no before.json or after.json"),
    ):
        got = command(*given)
        assert got.returncode == 2 and got.stdout == "" and got.stderr.count("\n") == 1 and message in got.stderr
