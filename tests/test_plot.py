"""lab.plot: it draws what the run recorded, names the curves evenly, and says in one line what is wrong."""

import itertools
import json
import sys

import numpy as np
import pytest

from lab import paper, plot


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


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are saved."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


def test_smooth():
    """By hand: the mean of the last three, without the missing ones."""
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan, np.nan])
    assert np.array_equal(plot.smooth(values, 3), [1, 2, 2, 4, 5, 5, np.nan], equal_nan=True)


def test_what_is_read(run):
    steps, tested = plot.read(run)
    assert steps["mention_1"].tolist() == [n / 40 for n in range(40)]
    assert np.flatnonzero(np.isnan(steps["phi"])).tolist() == [3]
    assert {at: s["phi"]["value"] for at, s in tested.items()} == {0: None, 40: 0.8}


def test_the_picture(run, figures):
    """The lines of the figure are the smoothed metrics; two runs are drawn over each other."""
    file = plot.curves([run, run], run / "curves.png")
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and not list(run.glob("*.part*"))
    lines = [line.get_ydata() for panel in figures[0].axes for line in panel.get_lines()]
    drawn = [line for line in lines if len(line) == 40]
    assert len(drawn) == 8 and sum(np.array_equal(line, [np.nan, 0.8], equal_nan=True) for line in lines) == 2
    for values in plot.read(run)[0].values():
        assert sum(np.array_equal(plot.smooth(values, 2), line, equal_nan=True) for line in drawn) == 2


def test_the_lowest_phi_is_in_the_picture(run, figures):
    metrics = (run / "metrics.jsonl").read_text().replace('"phi": ', '"phi": -')
    (run / "metrics.jsonl").write_text(metrics.replace("-null", "null"))
    plot.curves([run], run / "curves.png")
    for panel in figures[0].axes:
        lowest = min(np.nanmin(line.get_ydata()) for line in panel.get_lines())
        assert panel.get_ylim()[0] <= min(lowest, -0.15) and panel.get_ylim()[0] > -1


@pytest.mark.parametrize(("measured", "names"), [(True, 5), (False, 4)])
def test_the_names_of_the_curves_are_evenly_spaced_and_do_not_overlap(run, figures, measured, names):
    """In pixels: the names stand at one height, with equal gaps that hold the next mark, and cover no panel or edge."""
    for file in () if measured else run.glob("*.json"):
        file.unlink()
    plot.curves([run], run / "curves.png")
    (figure,) = figures
    figure.draw_without_rendering()  # places everything at the figure's own resolution
    legends = [panel.get_legend() for panel in figure.axes]
    texts = [text for legend in legends for text in legend.get_texts()]
    assert len(texts) == names and {text.get_text() for text in texts} >= set(plot.NAMES.values())
    rows = [[text.get_window_extent() for text in legend.get_texts()] for legend in legends]
    gaps = [right.x0 - left.x1 for row in rows for left, right in itertools.pairwise(row)]
    assert gaps == pytest.approx([gaps[0]] * (names - 2), abs=1) and gaps[0] > 40  # a mark is 31 wide with its pad
    assert [box.y0 for row in rows for box in row] == pytest.approx([rows[0][0].y0] * names, abs=1)
    boxes = [part.get_window_extent() for part in (*figure.axes, *legends)]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_command(run, capsys):
    assert plot.main([str(run), "--to", str(run / "a.png")]) == 0 and (run / "a.png").exists()
    assert capsys.readouterr().out == f"{run / 'a.png'}\n"
    for ending, start in ((".pdf", b"%PDF"), (".svg", b"<?xml"), (".JPG", b"\xff\xd8")):
        file = run / f"a.b{ending}"
        assert plot.main([str(run), "--to", str(file)]) == 0 and file.read_bytes().startswith(start)
    assert not list(run.glob("*.part"))
    capsys.readouterr()
    plot.after_run(run)
    assert capsys.readouterr().out == f"its curves: {run / 'curves.png'}\n" and (run / "curves.png").exists()


def test_it_says_what_is_wrong(run, monkeypatch, capsys):
    """Without a run, with a file that is none, and without matplotlib."""
    broken = run / "broken"
    broken.mkdir()
    (broken / "metrics.jsonl").write_text("{}\n")
    for folder in (run / "missing", broken):
        assert plot.main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("lab.plot: ") and "metrics.jsonl" in error and error.count("\n") == 1
    for to, words in (
        ("a.docx", "must end in one of .png, .pdf, .svg"),
        ("a", "must end"),
        ("no/a.png", "make the folder"),
    ):
        for main in (plot.main, paper.main):  # before the runs are read
            assert main([str(run / "missing"), "--to" if main is plot.main else "--figure", to]) == 2
            assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.main([str(run)]) == 2
    assert capsys.readouterr().err == "lab.plot: it needs matplotlib: pip install matplotlib\n"
    plot.after_run(run)
    assert capsys.readouterr().out.startswith("its curves are not drawn: it needs matplotlib")
