"""Figures as text, aligned or Markdown. A figure is {value, low, high, undefined}: see report.summary."""

import numpy as np


def cell(figure):
    """A figure as text: value [low, high], and how many resamples or seeds were undefined, if any; "-" for None."""
    if not figure or isinstance(figure["value"], int):
        return str(figure["value"]) if figure else "-"
    value, low, high = (f"{np.nan if figure.get(k) is None else figure[k]:.3f}" for k in ("value", "low", "high"))
    spread = f" [{low}, {high}]" if low != "nan" else ""
    of = f"of {figure['seeds']} seeds" if figure.get("seeds") else "resample" + "s" * (figure.get("undefined") != 1)
    unknown = f" ({figure['undefined']} {of} undefined)" if figure.get("undefined") else ""
    return "undefined" if value == "nan" else (value + spread + unknown).replace("-0.000", "0.000")


# The rows that train.py and faith.py print.
OVERVIEW = {"accuracy": "accuracy", "flip_rate": "influence rate", "mention_if_flip": "P(M|I=1)",
            "mention_if_same": "P(M|I=0)", "phi": "Phi-CCT, natural rate, own labels",
            "phi_paper": "Phi-CCT, balanced, initial labels (paper)",
            "phi_less_shortcut": "Phi-CCT minus the shortcut's", "decoy_any": "decoy rate"}  # fmt: skip
SHORT = "accuracy", "flip_rate", "mention_if_flip", "mention_if_same", "phi", "phi_paper"
ASKED = {name: OVERVIEW[name] for name in SHORT} | {  # with detection
    "detection": "asked outright: correlation with I",
    "detection_less_shortcut": "asked outright, minus the shortcut's",
}


def overview(summaries, markdown=False, rows=None):
    """The main figures of {heading: summary or differences} as a table, if they are known; `table` has all of them."""
    rows = rows or (ASKED if any("detection" in part for part in summaries.values()) else OVERVIEW)
    known = {name: text for name, text in rows.items() if any(name in part for part in summaries.values())}
    known |= {name: name for part in summaries.values() for name in part if name.startswith("Phi-CCT, ")}  # of a task
    return table(summaries, markdown, known, "95 % intervals")


def table(summaries, markdown=False, rows=None, corner="figure"):
    """{heading: summary or differences} -> aligned text, or Markdown, with one figure per line. rows: {name: text}."""
    rows = rows or {name: name for part in summaries.values() for name in part}
    body = [[text, *(cell(part.get(name)) for part in summaries.values())] for name, text in rows.items()]
    return grid([corner, *summaries], body, markdown)


def grid(head, body, markdown=False):
    """The headings of columns, and lines of as many texts -> aligned text, or Markdown."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [head, ["-" * width for width in widths], *body]
    lines = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" if markdown else "  ".join(line).rstrip() for line in lines)
