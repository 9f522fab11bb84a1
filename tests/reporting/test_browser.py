"""Pages in a real browser, where there is one."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from akd_dist.reporting.page import write_report, write_reports
from tests.made_runs import leave, small_fleet, temperatures, two_runs, write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NARROW, WIDE = 375, 1600
# Shows a page in frames of two widths, opens what is folded, and writes down how wide each has become.
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><title>harness</title><body>
<script>
const said = {violations: [], frames: []};
let left = %(widths)s.length;
for (const width of %(widths)s) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `border: 0; height: 2000px; width: ${width}px`;
  frame.onload = () => {
    const page = frame.contentDocument;
    page.addEventListener("securitypolicyviolation", event => said.violations.push(event.blockedURI));
    page.querySelectorAll("details").forEach(one => { one.open = true; });
    said.frames.push({
      asked: width, width: page.documentElement.scrollWidth, figures: page.querySelectorAll("figure svg").length,
      shown: [...page.querySelectorAll("figure svg")].every(svg => svg.getBoundingClientRect().height > 100),
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
      title: page.title
    });
    if (--left === 0) {
      const told = document.createElement("pre");
      told.textContent = JSON.stringify(said);
      document.body.replaceChildren(told);
    }
  };
  frame.src = "%(page)s";
  document.body.append(frame);
}
</script>"""


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    return found


def opened(page: Path, folder: Path) -> tuple[dict[str, Any], str, list[str]]:
    """What a headless browser says of a page: the harness's findings, its log, and every address it asked for."""
    harness, requests = folder / "harness.html", folder / "requests.json"
    harness.write_text(HARNESS % {"page": page.as_uri(), "widths": [NARROW, WIDE]})
    command = [
        browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", f"--log-net-log={requests}", "--window-size=1700,2400",
        "--virtual-time-budget=20000", "--dump-dom", harness.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, f"the harness did not finish: {done.stdout[-500:]} {done.stderr[-2000:]}"
    return json.loads(html.unescape(found.group(1))), done.stderr, asked_for(requests)


def asked_for(log: Path) -> list[str]:
    """The addresses in a network log that are a page's: the browser's own services ask with nobody as initiator."""
    document = json.loads(log.read_text())
    events = [event.get("params", {}) for event in document["events"]]
    asked = [event for event in events if "url" in event]
    return [event["url"] for event in asked if event.get("initiator", "not an origin") != "not an origin"]


@pytest.mark.browser
@pytest.mark.parametrize("page", ["run", "runs"])
def test_page_in_a_browser(tmp_path: Path, page: str) -> None:
    one, two = two_runs(tmp_path)
    if page == "run":
        fleet = temperatures(2)
        fleet["students"] += small_fleet()["students"]
        write_run(one, fleet)
        label = np.arange(40) % 20
        for entry in fleet["students"]:
            leave(one, entry, label, np.roll(label, 1), label)
        path, figures = write_report(one), 8
    else:
        write_reports([one, two])
        path, figures = tmp_path / "report.html", 1
    said, log, asked = opened(path, tmp_path)
    narrow, wide = sorted(said["frames"], key=lambda frame: int(frame["asked"]))
    assert said["violations"] == []
    for frame in (narrow, wide):
        assert frame["width"] <= frame["asked"], f"wider than {frame['asked']} px"
        assert frame["figures"] >= figures
        assert frame["shown"]
        assert frame["loaded"] == []
        assert frame["title"].endswith("akd-dist")
    assert "CONSOLE" not in log
    assert [url for url in asked if not url.startswith("file:")] == []
