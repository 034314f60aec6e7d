"""lab.plot: what is drawn is what the run recorded; a clear line where it cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lab import plot

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    """A run of 40 steps, one of them without a Phi, measured before and after."""
    rng = np.random.default_rng(0)
    steps = [{"phi": None if n == 3 else float(rng.random()), "reward": float(rng.random()), "mention_1": n / 40,
              "mention_0": 1 - n / 40} for n in range(40)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    for name, phi in (("before", None), ("after", 0.8)):
        figure = {"value": phi, "low": phi and 0.7, "high": phi and 0.9}
        (tmp_path / f"{name}.json").write_text(json.dumps({"T=1": {"phi": figure}}))
    return tmp_path


def test_smooth():
    """By hand: the mean of the last three, what is missing left out."""
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan, np.nan])
    assert plot.smooth(values, 3)[:6].tolist() == [1, 2, 2, 4, 5, 5] and np.isnan(plot.smooth(values, 3)[6])


def test_what_is_read(run):
    steps, tested = plot.read(run)
    assert steps["mention_1"].tolist() == [n / 40 for n in range(40)]
    assert np.flatnonzero(np.isnan(steps["phi"])).tolist() == [3]
    assert {at: s["phi"]["value"] for at, s in tested.items()} == {0: None, 40: 0.8}


def test_the_picture(run, monkeypatch):
    """The lines of the figure are the smoothed metrics; two runs are drawn over each other."""
    figures = []
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    file = plot.curves([run, run], run / "curves.png")
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and not list(run.glob("*.part*"))
    lines = [line for panel in figures[0].axes for line in panel.get_lines()]
    smoothed = [plot.smooth(plot.read(run)[0][key], 2) for key in plot.NAMES]
    drawn = [line.get_ydata() for line in lines if len(line.get_ydata()) == 40]
    assert len(drawn) == 8
    for wanted in smoothed:
        assert sum(np.array_equal(wanted, line, equal_nan=True) for line in drawn) == 2
    assert {text.get_text() for panel in figures[0].axes for text in panel.get_legend().get_texts()} > set(
        plot.NAMES.values()
    )


def command(*arguments, first="pass"):
    code = f"import sys; {first}; import plot; sys.exit(plot.main({[str(a) for a in arguments]!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_command(run, tmp_path):
    done = command(run, "--to", tmp_path / "a.png")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "a.png") and (tmp_path / "a.png").exists()


def test_it_says_what_is_wrong(run, tmp_path):
    """Without matplotlib, without a run, and with a file that is none."""
    done = command(run, first="sys.modules['matplotlib.figure'] = None")
    assert done.returncode == 2 and done.stderr == "lab.plot: it needs matplotlib: pip install matplotlib\n"
    for broken in (tmp_path / "missing", run):
        (run / "metrics.jsonl").write_text("{}\n")
        done = command(broken)
        assert done.returncode == 2 and "metrics.jsonl" in done.stderr and done.stderr.count("\n") == 1
