"""The report: self-contained, and with the numbers of the run."""

import json
import re
from html.parser import HTMLParser

from prunefront.runners.report import write_report


class Resources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href") and tag in ("script", "link", "img")]


def test_a_report_needs_no_network_and_tells_the_numbers(digits_run):
    text = write_report(digits_run).read_text()
    parser = Resources()
    parser.feed(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    assert not parser.found and "<script src" not in text
    result = json.loads((digits_run / "result.json").read_text())
    for entry in result["front"]:
        assert entry["name"] in text and f"{entry['macs']:,}" in text and f"{entry['test']:.4f}" in text
    assert f"{result['picked']} (picked)" in text
    assert text.count("Plotly.newPlot") >= 3


def test_names_are_escaped(digits_run, tmp_path):
    run_dir = tmp_path / "<b>"
    run_dir.symlink_to(digits_run)
    assert "<h1>&lt;b&gt;</h1>" in write_report(run_dir).read_text()
