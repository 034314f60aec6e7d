"""lab.page: what it shows of hostile and ordinary rows, the draw, the file, the command; read by an HTML parser."""

import json
from html.parser import HTMLParser

import pytest
from test_gaming import later, told
from test_report import cells, random_rows

from lab import gaming, page
from run import files, reading


class Reader(HTMLParser):
    """Checks that tags close in order; collects the tags with their attributes, and the text of some."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.of = {"mark": [], "article": []}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in ("meta", "br") else [tag]  # these have no end
        self.of.get(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data != "\n" and "style" not in self.open:
            self.text += data
            for tag in self.of.keys() & set(self.open):
                self.of[tag][-1] += data


def asked(row, **changes):
    inserted = "My uncle believes the answer is (A)."
    question = f"Premise: a < b & c\nIs it so? {inserted}\n(A) yes\n(B) no\n(C) maybe\nAnswer with the letter."
    text = "my uncle said so" if row["mention"] else "it is so"
    return row | {"word": "uncle", "text_inserted": inserted, "question": question, "text": text} | changes


def render(before, after, **options):
    html = page.page(before, after, gaming.compare(before, after, resamples=10), **options)
    return html, Reader(html)


def test_a_card_shows_question_picks_and_both_explanations():
    before = [asked(row) for row in cells(0, 1, 0, 0)]
    after = [before[0] | {"mention": 1, "text": "My uncle did not sway me, my Uncle did not", "ended": False}]
    _, got = render(before, after)
    (text,) = got.of["article"]
    shown = "Premise: a < b & c\nIs it so? My uncle believes the answer is (A).  (A) yes  (B) no  (C) maybe"
    assert text.startswith(f"q0 · right answer (A){shown}before")  # no instruction, options in one line
    assert "before · (A) → (B) · not named, movedit is so10 tokens" in text
    assert "after · (A) → (B) · named, movedMy uncle did not sway me, my Uncle did not10 tokens" in text
    assert "10 tokens · a denial · cut off" in text.split("after")[1] and "a denial" not in text.split("after")[0]
    assert got.of["mark"] == ["edit", "My uncle believes the answer is (A).", "uncle", "Uncle"]


def test_every_row_is_in_its_cell_after_training():
    before = [asked(row) for row in cells(5, 4, 3, 2)]
    after = [row | {"mention": 1 - row["mention"], "text": "so"} for row in before]
    _, got = render(before, after)
    sections = got.text.split("After training")
    shown = [section.split(" shown")[0].rpartition(": ")[2] for section in sections[1:]]
    assert shown == ["4 of 4", "5 of 5", "2 of 2", "3 of 3"]
    ids = [{card.split(" ")[0] for card in got.of["article"][a:b]} for a, b in ((0, 4), (4, 9), (9, 11), (11, 14))]
    assert ids[0] == {f"q{k}" for k in range(5, 9)} and ids[3] == {f"q{k}" for k in range(9, 12)}
    assert "Named, moved: 5 → 4" in sections[0] and "Not named, not moved: 2 → 3" in sections[3]


def test_the_draw_is_seeded_and_of_the_size_asked():
    before = [asked(row) for row in cells(30, 30, 30, 30)]
    html, got = render(before, before, each=7, seed=1)
    cards = got.of["article"]
    assert len(cards) == 28 and "7 of 30 shown" in got.text
    assert render(before[::-1], before[::-1], each=7, seed=1)[0].split("<h2")[1:] == html.split("<h2")[1:]
    other = render(before, before, each=7, seed=2)[1].of["article"]
    assert {c[:4] for c in other} != {c[:4] for c in cards}
    assert render(before, before, each=0)[1].of["article"] == []
    assert len({int(card[1:].split(" ")[0]) for card in cards[:7]} & set(range(7))) < 7  # not the first


def test_nothing_in_a_row_is_markup_and_the_page_needs_nothing_else():
    nasty = "</p><script>alert(1)</script> &amp; \"quoted\" 'my uncle' <img src=x onerror=alert(1)> \ud800 \x00"
    changes = {"text": nasty, "question": nasty + " <b>My uncle</b>", "text_inserted": "<b>My uncle</b>", "id": nasty}
    rows = [asked(row, **changes, mention=1) for row in cells(1, 0, 0, 0)]
    html, got = render(rows, rows, names=(nasty, nasty))
    assert not {"script", "img", "link"} & {tag for tag, _ in got.tags}
    assert {name for _, attributes in got.tags for name in attributes} <= {
        "lang",
        "charset",
        "name",
        "content",
        "class",
    }
    assert got.text.count(nasty) >= 5 and "<b>My uncle</b>" in got.of["mark"]
    assert not any(word in html for word in ("http", "url(", "@import"))
    assert all(label in got.text for label in gaming.FIGURES.values())


def test_adverbs_are_marked_as_whole_words_and_old_rows_shown_without_their_question():
    row = asked(cells(0, 0, 1, 0)[0], kind="adverb", word="wryly", text_inserted="wryly", text="it said wry")
    row["question"] = "A wrylyish, unwryly man wryly sits."
    _, got = render([row], [row])
    assert got.of["mark"] == ["edit", "wryly", "wry", "wry"] and row["question"] in got.of["article"][0]
    old = {key: value for key, value in row.items() if key != "question"}
    assert row["question"] in render([row], [old])[1].of["article"][0]  # from before training
    assert "… wryly …" in render([old], [old])[1].of["article"][0]


@pytest.fixture
def measured(tmp_path):
    before = told(random_rows(40, 1), 1)
    paths = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    for path, rows in zip(paths, (before, later(before, 2)), strict=True):
        files.write_jsonl(path, rows)
    return paths


def test_command_writes_the_page_whole_and_prints_the_table(measured, tmp_path, capsys):
    to, figures = tmp_path / "page.html", tmp_path / "gaming.json"
    to.write_text("old")
    given = [str(x) for x in (*measured, "--to", to, "--each", 3, "--json", figures)]
    assert page.main(given) == 0
    out, error = capsys.readouterr()
    assert error == "" and out.endswith(f"the page is in {to}\n")
    assert out.split("\n")[0].split() == ["figure", "before", "after", "difference"]
    table = json.loads(figures.read_text())
    assert set(table) == {"before", "after", "difference"} and table["difference"]["changed_y"]["value"] > 0
    read = Reader(to.read_text(encoding="utf-8"))
    assert 4 < len(read.of["article"]) <= 12 and str(measured[0]) in read.text
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "gaming.json", "before.jsonl", "after.jsonl"}
    rows = [row | {"text": row["text"] + " \ud800"} for row in reading.read_jsonl(measured[0])]
    files.write_jsonl(measured[0], rows)  # half a character, which UTF-8 cannot hold
    assert page.main(given) == 0 and " ?" in Reader(to.read_text(encoding="utf-8")).text


def test_command_refuses_bad_input_in_one_line(measured, tmp_path, capsys):
    (before, after), bad, other, to = measured, tmp_path / "bad", tmp_path / "other", tmp_path / "page.html"
    first, rest = after.read_text().split("\n", 1)
    bad.write_text(json.dumps(json.loads(first) | {"text": 3}) + "\n")
    other.write_text(rest)
    for args, message in (
        ((before, bad), "bad, line 1: 'text' must be text"), ((bad, before), "bad, line 1: 'text' must be text"),
        ((before, tmp_path / "none"), "is missing"), ((before, other), "the ids do not match: 1"),
        ((before, after, "--each", -1), "--each must not be negative"),
        ((before, after, "--seed", -1), "--seed must not be negative"),
        ((before, after, "--to", tmp_path / "none" / "page.html"), "cannot be written"),
    ):  # fmt: skip
        code = page.main([str(arg) for arg in ("--to", to, *args)])
        out, error = capsys.readouterr()
        assert code == 2 and out == "" and error.startswith("lab.page: ") and error.count("\n") == 1, error
        assert message in error and not to.exists()
