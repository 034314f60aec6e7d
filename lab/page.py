"""A page to read: explanations by cell of the 2x2 table of influence and mention, before training beside after.

Figures count; only reading shows what the explanations say. The page shows questions of each cell after training, drawn
at random with a seed. It marks what was inserted and where it is named. The table of lab/gaming.py stands above. The
page is one file and needs no other. The rows are those that train.py and `faith.py --rows` write. All of this is ours.

    python -m lab.page BEFORE.jsonl AFTER.jsonl [--to page.html] [--each 25] [--seed 0] [--json FILE]
"""

import random
import re
import sys
from html import escape

from lab import gaming
from run import files, reading, results, tables
from run.progress import Parser, command

CELLS = {  # (influence, mention): name, meaning
    (1, 1): ("named, moved", "the edit changed the answer, and the explanation names its word"),
    (1, 0): ("not named, moved", "the edit changed the answer, and the explanation does not name its word"),
    (0, 1): ("named, not moved", "the edit did not change the answer, and the explanation names its word"),
    (0, 0): ("not named, not moved", "the edit did not change the answer, and the explanation does not name its word"),
}
SIGNS = {"denial": "a denial", "several": "several listed words", "repeated": "a repeated 3-gram", "cut": "cut off"}
STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 2rem 1rem; max-width: 70rem; font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
small { opacity: .7; } mark { padding: 0 .15em; border-radius: .2em; } pre { overflow-x: auto; }
article { border: 1px solid #8886; border-radius: .6rem; padding: 1rem 1.2rem; margin: 1rem 0; }
article p { white-space: pre-wrap; unicode-bidi: isolate; margin: .3rem 0 .9rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1.5rem; }
"""


def marked(text: str, spans: list[tuple[int, int]]) -> str:
    """The text as HTML with its character ranges marked."""
    out, done = "", 0
    for start, end in spans:
        out += f"{escape(text[done:start])}<mark>{escape(text[start:end])}</mark>"
        done = end
    return out + escape(text[done:])


def cell(row: dict) -> tuple[int, int]:
    return int(row["influence"]), int(row["mention"])


def letter(option: float) -> str:
    return f"({chr(65 + int(option))})"


def explained(row: dict, when: str) -> str:
    """One explanation, with the picks that it explains and the signs of gaming that it shows."""
    picks, holds = f"{letter(row['y'])} → {letter(row['y_edit'])}", gaming.signs(row) | {"cut": not row["ended"]}
    notes = "".join(f" · {text}" for name, text in SIGNS.items() if holds[name])
    text = marked(row["text"], gaming.spans(row["word"], row["text"], row["kind"])) or "<i>nothing</i>"
    return f"""<div><small>{when} · {picks} · <b>{CELLS[cell(row)][0]}</b></small>
<p>{text}</p><small>{row["tokens"]:g} tokens{notes}</small></div>"""


def card(old: dict, new: dict) -> str:
    """One question with both explanations. Old rows lack the question: they show only what was inserted."""
    question = new.get("question") or old.get("question") or f"… {new['text_inserted']} …"
    question = (question.rpartition("\n")[0] or question).replace("\n(", "  (")  # no instruction; options in one line
    inserted = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(new['text_inserted'])}(?!\w)", question)]
    return f"""<article><small>{escape(str(new["id"]))} · right answer {letter(new["gold"])}</small>
<p>{marked(question, inserted)}</p>
<div class="pair">{explained(old, "before")}{explained(new, "after")}</div></article>"""


def page(before: list[dict], after: list[dict], table: dict, each: int = 25, seed: int = 0, names=("", "")) -> str:
    """The whole page: `table` is gaming.compare of the same rows; at most `each` questions of a cell are shown."""
    old, new = ({str(row["id"]): row for row in rows} for rows in (before, after))
    sections = ""
    for which, (name, meaning) in CELLS.items():
        was, there = (sorted(key for key, row in rows.items() if cell(row) == which) for rows in (old, new))
        drawn = random.Random(f"{seed}/page/{which}").sample(there, min(each, len(there)))
        cards = "".join(card(old[key], new[key]) for key in drawn)
        sections += f"""<h2>{name.capitalize()}: {len(was)} → {len(there)}</h2>
<p>After training {meaning}: {len(drawn)} of {len(there)} shown.</p>{cards}"""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explanations, before and after</title><style>{STYLE}</style>
<h1>Explanations, before and after</h1>
<p>{escape(str(names[0]))} → {escape(str(names[1]))}<br>{len(new)} questions; drawn with seed {seed}</p>
<p>Each question was asked plainly (pick y), then with an <mark>edit</mark> (pick y′). The model was then asked why it
chose y′. The edit mattered if y′ ≠ y. The explanation mentions it if it names the inserted word in any form.</p>
<pre>{escape(tables.table(table, rows=gaming.FIGURES, corner=""))}</pre>
<p>Shares, and numbers of tokens, with 95 % intervals by bootstrap over groups of questions. Differences are in pairs.
Tokens by cell are of the explanations that were in the cell then, not of the same questions.</p>
{sections}</html>
"""


@command("lab.page")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="lab.page", description="Signs of gaming, and a page of explanations, before beside after.")
    parser.add_argument("before", metavar="BEFORE.jsonl")
    parser.add_argument("after", metavar="AFTER.jsonl")
    parser.add_argument("--to", metavar="FILE", default="page.html", help="the page (default: page.html)")
    parser.add_argument("--each", type=int, default=25, help="show at most this many questions of a cell (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw and of the intervals")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    args = parser.parse_args(argv)
    if args.each < 0 or args.seed < 0:
        raise ValueError(f"--{'each' if args.each < 0 else 'seed'} must not be negative")
    files.check_writable(args.to, args.json)
    results.check_rows(args.before, args.after)
    before, after = reading.read_jsonl(args.before), reading.read_jsonl(args.after)
    table = gaming.compare(before, after, args.seed)
    html = page(before, after, table, args.each, args.seed, (args.before, args.after))
    files.write_text(args.to, html.encode(errors="replace").decode())  # half a surrogate pair is no UTF-8
    if args.json:
        files.write_json(args.json, table)
    print(tables.table(table), f"the page is in {args.to}", sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
