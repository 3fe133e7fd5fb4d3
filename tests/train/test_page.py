"""A run's page: one look tells whether the run is good; it works from a file, on a phone, in the dark, in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from shardgrad.train.page import _page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</pre><script>document.title = 'broken'</script>"


def page(*, held_out: tuple[float | None, ...] = (5.5, 2.0), restarts: int = 0, passed: bool | None = True,
         traced: int = 7_000_000) -> str:  # fmt: skip
    start = {
        "kind": "start", "unit": "byte", "step": 3, "mesh": {"dp": 1, "tp": 2}, "tokens": 1000, "held_out": 100,
        "vocab": 256, "parameters": 2_500_000, "environment": {"hardware": HOSTILE, "torch": "2"},
    }  # fmt: skip
    speed = {"tokens_per_second": 900.0, "communication_share": 0.25}
    lines: list[dict[str, Any]] = [start] * (1 + restarts)
    lines += [{"kind": "train", "step": at, "loss": 6.0 - at, **speed} for at in (1, 2, 3)]
    lines += [{"kind": "held_out", "step": at, "loss": loss} for at, loss in enumerate(held_out)]
    if passed is not None:
        used = {"times_rounding": {"loss": 0.5, "w": 9.0}, "of_allowed": {"w": 0.9, "loss": 0.1}}
        lines.append({"kind": "comparison", "step": 0, "passed": passed, **used})
    by_rank = [{"predicted": 7_000_000, "traced": traced}]
    lines.append({"kind": "bytes", "step": 0, "by_operation": [["all-reduce", "tp", 3, traced]], "by_rank": by_rank})
    lines.append({"kind": "end", "step": 3, "held_out": held_out[-1] or float("nan"), **speed})
    return _page("runs/" + HOSTILE, lines, {"run": {"dir": HOSTILE, "seed": 3}, "train": {"steps": 3}}, HOSTILE)


@pytest.mark.parametrize(
    ("changes", "word", "told"),
    [
        ({}, "Good", "The held-out loss fell from 5.500 to 2.000; the first step agrees with one device; no restarts."),
        ({"restarts": 2}, "Good", "one device; 2 restarts."),
        ({"passed": None}, "Good", "its first step was not compared with one device (run.check = false); no restarts."),
        ({"held_out": (2.0, 2.5)}, "Look at this", "The held-out loss did not fall: 2.000 at first, 2.500 in the end;"),
        ({"held_out": (2.0, None)}, "Look at this", "2.000 at first, nan in the end;"),
        ({"passed": False}, "Look at this", "The first step does not agree with one device; the held-out loss fell"),
        ({"traced": 6_999_999}, "Look at this", "Ranks sent other bytes than the layouts predict; the held-out loss"),
    ],
)  # fmt: skip
def test_one_look_tells_whether_the_run_is_good(changes: dict[str, Any], word: str, told: str) -> None:
    text = page(**changes)
    kind = "good" if word == "Good" else "bad"
    assert f'<p class="verdict {kind}"><b>{word}.</b>' in text
    assert told in unescape(text)


def test_texts_of_others_are_text() -> None:
    text = page()
    assert "<script>document.title" not in text
    assert text.count("&lt;script&gt;document.title") == 6  # title, heading, hardware twice, run.dir, and the sample
    assert text.count("<script>") == 1


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")
@pytest.mark.parametrize(("width", "dark"), [pytest.param(1200, False, marks=pytest.mark.slow), (500, True)])
def test_in_a_browser(width: int, dark: bool, tmp_path: Path) -> None:
    """A probe behind the page tells what the browser made of it."""
    probe = """<pre id="told"></pre><script>
      const errors = []; window.onerror = error => errors.push(String(error));
      document.addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
      const buttons = [...document.querySelectorAll("button")];
      const squeezed = () => [...document.querySelectorAll("body *")].filter(
        e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
      buttons[1].click();
      setTimeout(() => { document.getElementById("told").textContent = JSON.stringify({
        errors, wide: squeezed(), scroll: document.documentElement.scrollWidth - innerWidth, title: document.title,
        paper: getComputedStyle(document.body).backgroundColor, loaded: [...document.images].every(i => i.naturalWidth),
        filter: getComputedStyle(document.images[0]).filter, copied: buttons[1].dataset.text,
        requests: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length}); }, 300);
    </script>"""
    path = tmp_path / "report.html"
    path.write_text(page().replace("</body>", probe + "</body>"), encoding="utf-8")
    assert BROWSER is not None
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    shown = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *scheme, f"--window-size={width},900",
         f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=90, check=True,
    ).stdout  # fmt: skip
    told = json.loads(unescape(shown.split('<pre id="told">')[1].split("</pre>")[0]))
    assert told["errors"] == []
    assert told["wide"] == []
    assert told["scroll"] <= 0
    assert told["requests"] == 0
    assert told["loaded"]
    assert told["title"] == "runs/" + HOSTILE
    assert told["copied"] == "run\ndir\t" + HOSTILE + "\nseed\t3"
    assert told["paper"] == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")
    assert (told["filter"] != "none") is dark
