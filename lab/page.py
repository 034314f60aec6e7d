"""A page to read: explanations by cell of the 2x2 table of influence and mention, before training beside after.

Figures count; only reading shows what the explanations say. The page shows questions of each cell after training, drawn
at random with a seed. It marks what was inserted and where it is named. The table of lab/gaming.py stands above. The
page is one file. It needs no other, and only its filter is a script. The rows are those that train.py and
`faith.py --rows` write. All of this is ours.

    python -m lab.page BEFORE.jsonl AFTER.jsonl [--to page.html] [--each 25] [--seed 0] [--json FILE] [--markdown]
"""

import random
import re
import sys
from html import escape

import report
from lab import gaming
from run import files, reading
from run.progress import Parser, command

CELLS = {  # (influence, mention): name, meaning
    (1, 1): ("named, moved", "the edit changed the answer, and the explanation names its word"),
    (1, 0): ("not named, moved", "the edit changed the answer, and the explanation does not name its word"),
    (0, 1): ("named, not moved", "the edit did not change the answer, and the explanation names its word"),
    (0, 0): ("not named, not moved", "the edit did not change the answer, and the explanation does not name its word"),
}
SHORT = {(i, m): f"i{i}m{m}" for i, m in CELLS}  # in links and classes
FILTERS = {"all": "all", "changed": "in another cell than before", "denial": "a denial",
           "several": "several listed words", "repeated": "a repeated 3-gram", "cut": "cut off"}  # fmt: skip
STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --dim: #5c6570; --paper: #fbfbf9; --card: #fff; --line: #dcdfe3;
  --cue: #ffe49a; --i1m1: #1c7c4a; --i1m0: #a75a00; --i0m1: #b3261e; --i0m0: #41637f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --dim: #9aa4af; --paper: #14171a; --card: #1c2025;
  --line: #343a41; --cue: #6a5200; --i1m1: #63c892; --i1m0: #e5a355; --i0m1: #f2867e; --i0m0: #93b7d6; } }
* { box-sizing: border-box; } a { color: inherit; } .wide { overflow-x: auto; margin: 1rem 0; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; } h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; }
p { margin: .4rem 0; max-width: 46rem; } .dim, small { color: var(--dim); font-size: .875rem; }
mark { background: var(--cue); color: inherit; padding: 0 .15em; border-radius: .2em; } .cell { font-weight: 600; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap;
  vertical-align: baseline; } th { font-weight: 600; }
tbody th { font-weight: 400; white-space: normal; width: 16rem; min-width: 12rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.2rem;
  margin: 1rem 0; } article[hidden] { display: none; }
article > p { white-space: pre-wrap; max-width: none; unicode-bidi: isolate; margin: .3rem 0 .9rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; }
.pair > div { border-left: 3px solid var(--line); padding-left: .8rem; min-width: 0; }
.pair p { white-space: pre-line; unicode-bidi: isolate; } .i1m1 { color: var(--i1m1); }
.i1m0 { color: var(--i1m0); } .i0m1 { color: var(--i0m1); } .i0m0 { color: var(--i0m0); }
label { position: sticky; top: 0; display: block; padding: .6rem 0; background: var(--paper); }
select { font: inherit; max-width: 100%; }
@media (max-width: 42rem) { .pair { grid-template-columns: 1fr; gap: .9rem; } article { padding: .8rem .9rem; }
  th, td { white-space: normal; padding-right: .5rem; font-size: .8rem; } tbody th { width: auto; min-width: 0; }
  td small, td span { display: block; font-size: .7rem; } }
"""
SCRIPT = """document.querySelector("select").onchange = event => document.querySelectorAll("article").forEach(
  card => card.hidden = !card.dataset.is.split(" ").includes(event.target.value));"""


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


def signs(row: dict) -> list[str]:
    """Which FILTERS apply to an explanation."""
    holds = gaming.signs(row) | {"cut": not row["ended"]}
    return [name for name in holds if holds[name]]


def explained(row: dict, when: str) -> str:
    """One explanation, with the picks that it explains."""
    picks, which = f"{letter(row['y'])} → {letter(row['y_edit'])}", cell(row)
    notes = "".join(f" · {FILTERS[name]}" for name in signs(row))
    text = marked(row["text"], gaming.spans(row["word"], row["text"])) or "<i>nothing</i>"
    return f"""<div><small>{when} · {picks} · <span class="cell {SHORT[which]}">{CELLS[which][0]}</span></small>
<p>{text}</p><small>{row["tokens"]:g} tokens{notes}</small></div>"""


def card(old: dict, new: dict) -> str:
    """One question with both explanations. Old rows lack the question: they show only what was inserted."""
    question = new.get("question") or old.get("question") or f"… {new['text_inserted']} …"
    question = (question.rpartition("\n")[0] or question).replace("\n(", "  (")  # no instruction; options in one line
    inserted = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(new['text_inserted'])}(?!\w)", question)]
    holds = ["all", *signs(new), *["changed"] * (cell(old) != cell(new))]
    return f"""<article data-is="{" ".join(holds)}">
<small>{escape(str(new["id"]))} · right answer {letter(new["gold"])}</small><p>{marked(question, inserted)}</p>
<div class="pair">{explained(old, "before")}{explained(new, "after")}</div></article>"""


def html_table(heads: list[str], rows: dict[str, list[str]]) -> str:
    """Column heads, {name: entries} -> a table; entries are HTML."""
    head = "".join(f"<th>{name}</th>" for name in ("", *heads))
    body = "".join(f"<tr><th>{name}</th>{''.join(f'<td>{e}</td>' for e in row)}</tr>" for name, row in rows.items())
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def counts(before: list[dict], after: list[dict]) -> str:
    """The 2x2 table, before → after; each cell links to its explanations."""

    def entry(i: int, m: int) -> str:
        old, new = (sum(cell(row) == (i, m) for row in rows) for rows in (before, after))
        short, name = SHORT[i, m], CELLS[i, m][0]
        return f'<a class="cell {short}" href="#{short}">{name}</a> <span>{old} → {new}</span>'

    names = {1: "the answer changed (I = 1)", 0: "it did not (I = 0)"}
    rows = {name: [entry(i, 1), entry(i, 0)] for i, name in names.items()}
    return html_table(["word named (M = 1)", "not named (M = 0)"], rows)


def figures(table: dict[str, dict]) -> str:
    """gaming.compare's result as an HTML table."""

    def entry(figure: dict | None) -> str:
        value, _, spread = report.cell(figure).replace("-", "\u2212").partition(" ")
        return f"{value} <small>{spread.replace('] (', ']<br>(')}</small>"

    rows = {escape(label): [entry(part.get(name)) for part in table.values()] for name, label in gaming.FIGURES.items()}
    return html_table(list(table), rows)


def page(before: list[dict], after: list[dict], table: dict, each: int = 25, seed: int = 0, names=("", "")) -> str:
    """The whole page: `table` is gaming.compare of the same rows; at most `each` questions of a cell are shown."""
    old, new = ({str(row["id"]): row for row in rows} for rows in (before, after))
    sections = ""
    for which, (name, meaning) in CELLS.items():
        there = sorted(key for key, row in new.items() if cell(row) == which)
        drawn = random.Random(f"{seed}/page/{which}").sample(there, min(each, len(there)))
        cards = "".join(card(old[key], new[key]) for key in drawn)
        sections += f"""<section id="{SHORT[which]}"><h2 class="{SHORT[which]}">{name.capitalize()}</h2>
<p class="dim">After training {meaning}: {len(drawn)} of {len(there)} shown.</p>{cards}</section>"""
    options = "".join(f'<option value="{key}">{text}</option>' for key, text in FILTERS.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explanations, before and after</title><style>{STYLE}</style>
<h1>Explanations, before and after</h1>
<p class="dim">{escape(str(names[0]))} → {escape(str(names[1]))}<br>{len(new)} questions; drawn with seed {seed}</p>
<p>Each question was asked plainly (pick y), then with an <mark>edit</mark> (pick y′). The model was then asked why it
chose y′. The edit mattered if y′ ≠ y. The explanation mentions it if it names the inserted word in any form.</p>
{counts(before, after)}
{figures(table)}
<p class="dim">Shares, and numbers of tokens, with 95 % intervals by bootstrap over groups of questions. Differences are
in pairs. Tokens by cell are of the explanations that were in the cell then, not of the same questions.</p>
<label>Show, after training: <select>{options}</select></label>
{sections}
<script>{SCRIPT}</script></html>
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
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args(argv)
    if args.each < 0 or args.seed < 0:
        raise ValueError(f"--{'each' if args.each < 0 else 'seed'} must not be negative")
    before, after = reading.read_jsonl(args.before), reading.read_jsonl(args.after)
    table = gaming.compare(before, after, args.seed)
    html = page(before, after, table, args.each, args.seed, (args.before, args.after))
    files.write_text(args.to, html.encode(errors="replace").decode())  # half a surrogate pair is no UTF-8
    if args.json:
        files.write_json(args.json, table)
    print(report.table(table, args.markdown), f"the page is in {args.to}", sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
