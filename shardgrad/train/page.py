"""A run on one page: an HTML file that needs no other, made from what the run folder holds."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from math import isfinite, nan
from pathlib import Path
from typing import Any

import yaml

from shardgrad.files import replace_text
from shardgrad.train import folder, pictures
from shardgrad.train.metrics import read

Lines = Sequence[dict[str, Any]]

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6672; --line: #e3e6ea; --blue: #3b6ea5; --paper: #fff;
  --block: #f6f7f9; --good: #23794a; --bad: #b5432a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa4b1; --line: #333b46; --blue: #8ab4e0;
  --paper: #14181d; --block: #1d232b; --good: #6cc696; --bad: #ef8f78; }
  img { filter: invert(0.92) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: var(--paper); max-width: 1080px; margin: 28px auto; padding: 0 24px; }
h1 { font-size: 24px; margin: 0; } h1 + p { color: var(--soft); margin: 2px 0 18px; }
h2 { font-size: 14px; margin: 0 0 6px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); border: 1px solid var(--line);
  border-radius: 8px; margin-bottom: 18px; }
.tiles div { padding: 10px 14px; border-left: 1px solid var(--line); } .tiles div:first-child { border-left: 0; }
.tiles b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; } .tiles span { color: var(--soft); }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px 26px; margin-bottom: 20px; }
img { width: 100%; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; }
td { padding: 2px 8px 2px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--soft); white-space: nowrap; }
.right td + td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { font: 12px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--block); border-radius: 8px; padding: 10px 14px; margin: 0; }
.columns { columns: 3; column-gap: 26px; } .columns table { break-inside: avoid; margin-bottom: 10px; }
.columns th { text-align: left; color: var(--blue); padding-top: 2px; }
.columns tr { break-inside: avoid; }
.good { color: var(--good); } .bad { color: var(--bad); }
.verdict { border-left: 5px solid currentColor; padding: 4px 14px; margin: 0 0 18px; }
.verdict b { font-size: 17px; } .verdict span { color: var(--ink); display: block; }
.copied { position: relative; } .right .copied { padding-top: 20px; }
button { position: absolute; top: 0; right: 0; font: inherit; font-size: 11px;
  color: var(--soft); background: var(--paper); border: 1px solid var(--line); border-radius: 5px; cursor: pointer; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } @page { size: A4; margin: 10mm; } }
@media (max-width: 700px) { body { padding: 0 12px; } .two { grid-template-columns: minmax(0, 1fr); }
  .columns { columns: 1; } td:first-child, .right td + td { white-space: normal; } }
"""

# Tables as lines of cells with tabs between, which spreadsheets take; the second way is for browsers that give a file
# no clipboard.
_SCRIPT = """
for (const button of document.querySelectorAll("button")) button.onclick = async () => {
  const rows = [...button.parentNode.querySelectorAll("tr")];
  const text = rows.map(row => [...row.cells].map(cell => cell.textContent).join("\\t")).join("\\n");
  try { await navigator.clipboard.writeText(text); } catch {
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text; area.select(); document.execCommand("copy"); area.remove();
  }
  button.textContent = "copied"; button.dataset.text = text;
};
"""
_SAFE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_page(run: Path) -> Path:
    """Write `report.html` into a finished run's folder, from its metrics, configuration and sample."""
    lines = read(run / folder.METRICS)
    config = yaml.safe_load((run / folder.CONFIG).read_text(encoding="utf-8"))
    sample = (run / folder.SAMPLE).read_text(encoding="utf-8")
    path = run / folder.PAGE
    replace_text(path, _page(str(run), lines, config, sample))
    return path


def _page(name: str, lines: Sequence[dict[str, Any]], config: dict[str, dict[str, Any]], sample: str) -> str:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault(line["kind"], []).append(line)
    starts, end = kinds["start"], kinds["end"][-1]
    start, train, held_out = starts[-1], kinds.get("train", []), kinds.get("held_out", [])
    unit, begun = start["unit"], [line["step"] for line in starts[1:]]
    mesh = " × ".join(f"{axis} = {size}" for axis, size in start["mesh"].items())
    sent, comparison = kinds.get("bytes", []), kinds.get("comparison", [])
    tiles = [
        (f"{end['held_out']:.3f}", f"held-out loss, nats a {unit}"),
        (f"{end['step']:,}", "steps" + (f", {len(begun)} restart{'s' * (len(begun) > 1)}" if begun else "")),
        (f"{start['parameters'] / 1e6:,.2f} M", "parameters"),
        (f"{end['tokens_per_second']:,.0f}", f"{unit}s a second"),
        (f"{100 * end['communication_share']:.0f} %", "of the time communicating"),
    ]
    figures = [
        ("losses by step", pictures.losses(train, held_out, unit, begun)),
        ("speed", pictures.speed(train, begun)),
    ]
    proof = ""
    if comparison:
        shares = list(comparison[-1]["of_allowed"].values())
        figures.append(("first step against one device", pictures.rounding(shares)))
        proof += _comparison(comparison[-1])
    if sent:
        most = max(row["traced"] for row in sent[-1]["by_rank"])
        tiles.append((f"{most / 1e6:,.1f} MB", "sent by a rank in a step"))
        if sent[-1]["by_operation"]:
            figures.append(("bytes sent in a step", pictures.traffic(sent[-1]["by_operation"])))
        proof += _bytes(sent[-1]["by_rank"])
    shown = "".join(f'<img alt="{escape(alt)}" src="{_uri(picture)}">' for alt, picture in figures)
    sections = "".join(_table(inner.items(), section) for section, inner in config.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_SAFE}"><style>{_STYLE}</style></head><body>
<h1>{escape(name)}</h1><p>mesh {escape(mesh)} on {escape(start["environment"]["hardware"])} ·
{start["tokens"]:,} {unit}s to train on, {start["held_out"]:,} held out, a vocabulary of {start["vocab"]:,}</p>
{_verdict(held_out, comparison, sent, len(begun))}
<div class="tiles">{"".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in tiles)}</div>
<div class="two">{shown}</div>
<div class="two"><div><h2>What was proved before training</h2>{proof or "<p>nothing: run.check = false</p>"}</div>
<div><h2>Sample</h2><pre>{escape(_printable(sample)) or "none"}</pre></div></div>
<h2>Configuration</h2><div class="columns">{sections}{_table(start["environment"].items(), "environment")}</div>
<script>{_SCRIPT}</script></body></html>
"""


def _verdict(held_out: Lines, comparison: Lines, sent: Lines, restarts: int) -> str:
    """Whether the run is good, and why, in a word and a few sentences."""
    bad, good = [], []
    first, last = (float(held_out[at]["loss"] or "nan") for at in (0, -1)) if held_out else (nan, nan)
    if isfinite(last) and (last < first or len(held_out) < 2):
        good.append(
            f"the held-out loss fell from {first:.3f} to {last:.3f}" if len(held_out) > 1 else "it came to its end"
        )
    else:
        bad.append(f"the held-out loss did not fall: {first:.3f} at first, {last:.3f} in the end")
    if comparison:
        passed = comparison[-1]["passed"]
        (good if passed else bad).append(f"the first step {'agrees' if passed else 'does not agree'} with one device")
    else:
        good.append("its first step was not compared with one device (run.check = false)")
    if sent and not _as_predicted(sent[-1]["by_rank"]):
        bad.append("ranks sent other bytes than the layouts predict")
    good.append(f"{restarts} restart{'s' * (restarts > 1)}" if restarts else "no restarts")
    told = "; ".join([*bad, *good])
    word, kind = ("Look at this", "bad") if bad else ("Good", "good")
    return f'<p class="verdict {kind}"><b>{word}.</b><span>{escape(told[0].upper() + told[1:])}.</span></p>'


def _as_predicted(by_rank: Lines) -> bool:
    """Whether ranks sent what was predicted, as far as anything was."""
    return any(row["predicted"] is None for row in by_rank) or all(row["predicted"] == row["traced"] for row in by_rank)


def _comparison(line: dict[str, Any]) -> str:
    ratios, shares = line["times_rounding"], line["of_allowed"]
    verdict = "agree" if line["passed"] else "do not agree"
    rows = [(name, f"{ratios[name]:.3g} times, {share:.0%} of what is allowed") for name, share in shares.items()]
    return (
        f'<p class="{"good" if line["passed"] else "bad"}">The loss and all {len(rows) - 1} gradients of step '
        f"{line['step'] + 1} {verdict} with one device: at most {max(ratios.values()):.3g} times its rounding. The "
        "five that use most of what is allowed:</p>"
        f'<div class="right">{_table(rows[:5])}</div>'
    )


def _bytes(by_rank: Sequence[dict[str, Any]]) -> str:
    known = all(row["predicted"] is not None for row in by_rank)
    alike = _as_predicted(by_rank)
    sizes = sorted(row["traced"] for row in by_rank)
    span = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
    verdict = "as predicted from the layouts, to the byte" if alike else "not what the layouts predict"
    verdict = verdict if known else "traced; not predicted: the program between the layers is the model's own"
    return f'<p class="{"good" if alike else "bad"}">A rank sends {span} bytes a step, {verdict}.</p>'


def _table(rows: Iterable[tuple[str, Any]], title: str = "") -> str:
    head = f'<tr><th colspan="2">{escape(title)}</th></tr>' if title else ""
    cells = "".join(f"<tr><td>{escape(str(key))}</td><td>{escape(_shown(value))}</td></tr>" for key, value in rows)
    return f'<div class="copied"><table>{head}{cells}</table><button title="copy the table">copy</button></div>'


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
