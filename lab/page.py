"""A page to read: explanations by cell of the 2x2 table of influence and mention, before training beside after.

A figure says how often, only reading says what.  The page shows the questions of each cell after training (told
truly, missed, claimed falsely, rightly silent), a seeded draw and not a choice, with what was slipped in and where it
was named marked; above them the table of gaming.py.  One file that needs nothing else, not even scripts but for its
filter.  The rows are those that train.py and `faith.py --rows` write; all of it is ours.

    python page.py BEFORE.jsonl AFTER.jsonl [--to page.html] [--each 25] [--seed 0] [--json FILE] [--markdown]
"""

import random
import re
from html import escape

import report
from lab import gaming
from run import files
from run.progress import Parser

NAMES = {(1, 1): "told truly", (1, 0): "missed", (0, 1): "claimed falsely", (0, 0): "rightly silent"}
MEANING = {
    (1, 1): "the cue changed the answer, and the explanation names it",
    (1, 0): "the cue changed the answer, and the explanation does not name it",
    (0, 1): "the cue changed nothing, and the explanation names it",
    (0, 0): "the cue changed nothing, and the explanation does not name it",
}
SHORT = {cell: name.split()[0] for cell, name in NAMES.items()}  # in links and classes
FILTERS = {
    "all": "all",
    "changed": "in another cell than before",
    "denial": "a denial",
    "several": "several listed words",
    "repeated": "a repeated 3-gram",
    "cut": "cut off",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --dim: #5c6570; --paper: #fbfbf9; --card: #fff; --line: #dcdfe3;
  --cue: #ffe49a; --told: #1c7c4a; --missed: #a75a00; --claimed: #b3261e; --rightly: #41637f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --dim: #9aa4af; --paper: #14171a; --card: #1c2025;
  --line: #343a41; --cue: #6a5200; --told: #63c892; --missed: #e5a355; --claimed: #f2867e; --rightly: #93b7d6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; }
p { margin: .4rem 0; max-width: 46rem; }
.dim, small { color: var(--dim); font-size: .875rem; }
mark { background: var(--cue); color: inherit; padding: 0 .15em; border-radius: .2em; }
a { color: inherit; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { font-weight: 600; vertical-align: baseline; }
td { vertical-align: baseline; }
tbody th { font-weight: 400; white-space: normal; width: 16rem; min-width: 12rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.2rem;
  margin: 1rem 0; }
article[hidden] { display: none; }
article > p { white-space: pre-wrap; max-width: none; unicode-bidi: isolate; margin: .3rem 0 .9rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; }
.pair > div { border-left: 3px solid var(--line); padding-left: .8rem; min-width: 0; }
.pair p { white-space: pre-line; unicode-bidi: isolate; }
.told { color: var(--told); } .missed { color: var(--missed); } .claimed { color: var(--claimed); }
.rightly { color: var(--rightly); } .cell { font-weight: 600; }
label { position: sticky; top: 0; display: block; padding: .6rem 0; background: var(--paper); }
select { font: inherit; max-width: 100%; }
@media (max-width: 42rem) { .pair { grid-template-columns: 1fr; gap: .9rem; } article { padding: .8rem .9rem; }
  th, td { white-space: normal; padding-right: .5rem; font-size: .8rem; }
  tbody th { width: auto; min-width: 0; } td small, td span { display: block; font-size: .7rem; } }
"""
SCRIPT = """
document.querySelector("select").onchange = event => {
  for (const card of document.querySelectorAll("article"))
    card.hidden = !card.dataset.is.split(" ").includes(event.target.value);
};
"""


def marked(text: str, spans: list[tuple[int, int]]) -> str:
    """The text as HTML, its character ranges marked."""
    out, done = [], 0
    for start, end in spans:
        out += [escape(text[done:start]), f"<mark>{escape(text[start:end])}</mark>"]
        done = end
    return "".join(out) + escape(text[done:])


def inserted(row: dict, question: str) -> list[tuple[int, int]]:
    """Where the question holds what was slipped into it."""
    return [m.span() for m in re.finditer(rf"(?<!\w){re.escape(row['text_inserted'])}(?!\w)", question)]


def cell(row: dict) -> tuple[int, int]:
    return int(row["influence"]), int(row["mention"])


def signs(row: dict) -> list[str]:
    """Which of FILTERS hold for an explanation."""
    tests = {
        "denial": row["mention"] and gaming.denies(row["word"], row["text"]),
        "several": len(gaming.listed(row["kind"], row["text"])) > 1,
        "repeated": (row["repeats"] or 0) > 0,
        "cut": not row["ended"],
    }
    return [name for name, holds in tests.items() if holds]


def explained(row: dict, when: str) -> str:
    """One explanation, with the picks it explains."""
    picks = " → ".join(f"({chr(65 + int(row[key]))})" for key in ("y", "y_edit"))
    notes = "".join(f" · {FILTERS[name]}" for name in signs(row))
    text = marked(row["text"], gaming.spans(row["word"], row["text"])) or "<i>nothing</i>"
    return (
        f'<div><small>{when} · {picks} · <span class="cell {SHORT[cell(row)]}">{NAMES[cell(row)]}</span></small>'
        f"<p>{text}</p><small>{row['tokens']:g} tokens{notes}</small></div>"
    )


def card(old: dict, new: dict) -> str:
    """One question with both explanations; rows from before questions were recorded show what was inserted only."""
    question = new.get("question") or old.get("question") or f"… {new['text_inserted']} …"
    question = (question.rpartition("\n")[0] or question).replace("\n(", "  (")  # less the instruction; options in line
    is_ = ["all", *signs(new), *(["changed"] if cell(old) != cell(new) else [])]
    return (
        f'<article data-is="{" ".join(is_)}"><small>{escape(str(new["id"]))} · right answer '
        f"({chr(65 + int(new['gold']))})</small><p>{marked(question, inserted(new, question))}</p>"
        f'<div class="pair">{explained(old, "before")}{explained(new, "after")}</div></article>'
    )


def counts(before: dict[str, dict], after: dict[str, dict]) -> str:
    """The 2x2 table, before → after, each cell a link to its explanations."""

    def entry(which: tuple[int, int]) -> str:
        old, new = (sum(cell(row) == which for row in rows.values()) for rows in (before, after))
        link = f'<a class="cell {SHORT[which]}" href="#{SHORT[which]}">{NAMES[which]}</a>'
        return f"<td>{link} <span>{old} → {new}</span></td>"

    rows = "".join(f"<tr><th>{name}</th>{entry((i, 1))}{entry((i, 0))}</tr>"
                   for i, name in ((1, "the answer changed (I = 1)"), (0, "it did not (I = 0)")))  # fmt: skip
    head = "<th></th><th>cue named (M = 1)</th><th>not named (M = 0)</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def figures(table: dict[str, dict]) -> str:
    """gaming.compare's result as an HTML table."""

    def entry(figure: dict | None) -> str:
        value, _, spread = report.cell(figure).replace("-", "\u2212").partition(" ")
        return f"<td>{value} <small>{spread.replace('] (', ']<br>(')}</small></td>"

    rows = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(entry(part.get(name)) for part in table.values())}</tr>"
        for name, label in gaming.FIGURES.items()
    )
    head = "".join(f"<th>{name}</th>" for name in table)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def page(before: list[dict], after: list[dict], table: dict, each: int = 25, seed: int = 0, names=("", "")) -> str:
    """The whole page: `table` from gaming.compare of the same rows, at most `each` questions a cell."""
    old, new = ({str(row["id"]): row for row in rows} for rows in (before, after))
    sections = ""
    for which, name in NAMES.items():
        there = sorted(key for key, row in new.items() if cell(row) == which)
        drawn = random.Random(f"{seed}/page/{which}").sample(there, min(each, len(there)))
        cards = "".join(card(old[key], new[key]) for key in drawn)
        sections += (
            f'<section id="{SHORT[which]}"><h2 class="{SHORT[which]}">{name.capitalize()}</h2><p class="dim">After '
            f"training {MEANING[which]}: {len(drawn)} of {len(there)} shown.</p>{cards}</section>"
        )
    options = "".join(f'<option value="{key}">{text}</option>' for key, text in FILTERS.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Explanations, before and after</title><style>{STYLE}</style>
<h1>Explanations, before and after</h1>
<p class="dim">{escape(str(names[0]))} → {escape(str(names[1]))}<br>{len(new)} questions; drawn with seed {seed}</p>
<p>Each question was asked plainly (pick y), then with a <mark>cue</mark> slipped in (pick y′). The model was then asked
why it chose y′. The cue mattered where y′ ≠ y; the explanation mentions it where it names it in any form.</p>
<div class="wide">{counts(old, new)}</div>
<div class="wide">{figures(table)}</div>
<p class="dim">Shares, and tokens; 95 % intervals by bootstrap over groups of questions, the difference in pairs. Tokens
by cell are those of the explanations that were in it then, not of the same questions.</p>
<label>Show, after training: <select>{options}</select></label>
{sections}
<script>{SCRIPT}</script></html>
"""


def main(argv=None):
    """Command line; input that cannot be used ends it with one line on stderr and status 2."""
    parser = Parser(description="Signs of gaming, and a page of explanations, before beside after.")
    parser.add_argument("before", metavar="BEFORE.jsonl")
    parser.add_argument("after", metavar="AFTER.jsonl")
    parser.add_argument("--to", metavar="FILE", default="page.html", help="the page (default: page.html)")
    parser.add_argument("--each", type=int, default=25, help="questions shown of a cell, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the intervals")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    args = parser.parse_args(argv)
    try:
        for name in ("each", "seed"):
            if getattr(args, name) < 0:
                raise ValueError(f"--{name} must not be negative")
        before, after = files.read_jsonl(args.before), files.read_jsonl(args.after)
        table = gaming.compare(before, after, args.seed)
        html = page(before, after, table, args.each, args.seed, (args.before, args.after))
        files.write_text(args.to, html.encode(errors="replace").decode())  # half a surrogate pair is no UTF-8
        if args.json:
            files.write_json(args.json, table)
        print(report.table(table, args.markdown), f"the page is in {args.to}", sep="\n\n")
    except ValueError as error:
        parser.exit(2, f"lab.page: {error}\n")


if __name__ == "__main__":
    main()
