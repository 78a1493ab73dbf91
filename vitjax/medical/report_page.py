"""The report as pages: Markdown, and one HTML file that holds its pictures.

Both are made of the blocks of `report_sections`. Names of classes, ids and notes come from the
data, so every text is escaped where it is written, and nowhere else.
"""

import base64
import html as html_lib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitjax.medical import report_figures
from vitjax.medical.report import plain
from vitjax.medical.report_sections import Report, blocks
from vitjax.telemetry import write_whole

FIGURES = "figures"
NO_LOADING = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:66rem;margin:2rem auto}
h2{margin-top:2.2rem;border-bottom:1px solid #ccc} figcaption{color:#555;font-size:.85rem}
.aside{border-left:5px solid #D55E00;background:#fff4ec;padding:.6rem 1rem} .wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.87rem;margin:.8rem 0;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid #ddd;padding:.25rem .7rem;text-align:left;vertical-align:top}
th{background:#f3f3f3} img{max-width:100%;height:auto} figure{margin:1rem 0;break-inside:avoid}
pre{overflow-x:auto;background:#f6f6f6;padding:.8rem;font-size:.8rem} tr{break-inside:avoid}
@media print{body{margin:0;max-width:none;font-size:11px} .wide,pre{overflow:visible}
th,td{padding:.15rem .3rem;font-size:9px} h2{break-after:avoid} pre{white-space:pre-wrap}}
"""


def write(report: Report, workdir: Path) -> Path:
    """Writes report.json, report.md, report.html and figures/; returns the HTML file."""
    report = plain(report)
    figures = report_figures.draw(report, workdir / FIGURES)
    write_whole(workdir / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_whole(workdir / "report.md", markdown(report, figures))
    write_whole(workdir / "report.html", html(report, figures, workdir / FIGURES))
    return workdir / "report.html"


def markdown(report: Report, figures: Sequence[str]) -> str:
    """The report as Markdown, with links to `figures/`."""
    parts = []
    for b in blocks(report, figures):
        text = _md(b.text)
        if b.kind == "table":
            rows = [[_md(cell) for cell in row] for row in [b.head, *b.rows]]
            lines = [f"| {' | '.join(row)} |" for row in rows]
            parts.append("\n".join([lines[0], "|---" * len(b.head) + "|", *lines[1:]]))
        elif b.kind == "list":
            parts.append("\n".join(f"- {_md(row)}" for row in b.rows))
        elif b.kind == "figure":
            parts.append(f"![{_md(report_figures.CAPTIONS[b.text])}]({FIGURES}/{b.text})")
        elif b.kind == "fold":
            parts += [text, *("    " + row.replace("\n", "\n    ") for row in b.rows)]
        else:
            marks = {"title": ("# ", ""), "heading": ("## ", ""), "aside": ("> ", "")}
            before, after = marks.get(b.kind, ("**", "**") if b.kind == "strong" else ("", ""))
            parts.append(f"{before}{text}{after}")
    return "\n\n".join(parts) + "\n"


def html(report: Report, figures: Sequence[str], folder: Path) -> str:
    """The report as one file that loads nothing, with the pictures of a folder inside it."""
    parts, esc = [], lambda text: html_lib.escape(_line(text))
    tags = {"title": "h1", "heading": "h2", "text": "p"}
    for b in blocks(report, figures):
        if b.kind == "table":
            cells = [[f"<td>{esc(cell)}</td>" for cell in row] for row in b.rows]
            head = "".join(f"<th>{esc(name)}</th>" for name in b.head)
            body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
            table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
            parts.append(f'<div class="wide">{table}</div>')
        elif b.kind == "list":
            parts.append(f"<ul>{''.join(f'<li>{esc(row)}</li>' for row in b.rows)}</ul>")
        elif b.kind == "figure":
            data = base64.b64encode((folder / b.text).read_bytes()).decode()
            caption = esc(report_figures.CAPTIONS[b.text])
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        elif b.kind == "fold":
            rows = "".join(f"<pre>{html_lib.escape(row)}</pre>" for row in b.rows)
            parts.append(f"<details><summary>{esc(b.text)}</summary>{rows}</details>")
        elif b.kind == "aside":
            parts.append(f'<p class="aside"><strong>{esc(b.text)}</strong></p>')
        elif b.kind == "strong":
            parts.append(f"<p><strong>{esc(b.text)}</strong></p>")
        else:
            parts.append(f"<{tags[b.kind]}>{esc(b.text)}</{tags[b.kind]}>")
    title = esc(blocks(report, figures)[0].text)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_LOADING}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts) + "\n</body></html>\n"
    )  # fmt: skip


def _line(text: Any) -> str:
    """One line, without characters that hide or reorder others."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _md(text: Any) -> str:
    """Text in which Markdown finds no marks: neither GitHub's nor HTML's."""
    text = _line(text).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"[\\`*|~$#]|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)
    return re.sub(r"^(\d*)([-+=.)](?=\s|$|[-=])|[\[>])", r"\1\\\2", text)
