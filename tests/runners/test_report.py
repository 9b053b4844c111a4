"""The report, opened in Chromium with no network: what it tells, and what a reader can do on it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from prunefront.runners.cli import main
from prunefront.runners.report import write_report
from prunefront.runners.report.content import described_run, history
from prunefront.runners.report.page import page
from prunefront.search.formats import score_text
from prunefront.search.front import hypervolume, hypervolumes
from prunefront.search.study import finished, read_study
from tests.services import missing

SIZE_LIMIT, DRAWN_LIMIT_MS = 5e6, 2000


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; the page may load nothing."""
    if not shutil.which("chromedriver"):
        missing("chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1000",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def opened(browser, path: Path):
    """The page, drawn without a complaint."""
    browser.get(path.resolve().as_uri())
    assert float(browser.execute_script("return document.documentElement.dataset.drawn || 'nan'")) > 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    return browser


def texts(browser, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(node => node.textContent)"
    return browser.execute_script(script, selector)


def sections(browser) -> list[str]:
    return texts(browser, "section h2")


def table(browser, heading: str):
    """The first table of a section."""
    return browser.find_element("xpath", f"//section[h2='{heading}']//table")


@pytest.fixture(scope="module")
def front_run(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "front"
    options = ["task.width=4", "task.epochs=2", "n_trials=24", "mode=front", "tracker=none"]
    assert main(["search", *options, f"run_dir={run_dir}"]) == 0
    return run_dir


def test_the_page_tells_the_numbers_of_the_run(browser, front_run):
    driver = opened(browser, front_run / "report.html")
    result = json.loads((front_run / "result.json").read_text())
    table = texts(driver, "table")[0]
    for entry in result["front"]:
        assert entry["name"] in table and f"{entry['test']:.4f}" in table and f"{entry['score']:.4f}" in table
    expected = ["Which model should I take?", "Front", "Widths, from input to output", "Models", "History"]
    expected += ["Sensitivity", "Importance", "All trials", "What cannot be pruned"]
    assert sections(driver) == expected
    assert result["picked"] in texts(driver, ".tile b")
    assert len(driver.find_elements("css selector", "svg.chart")) == 3
    assert set(result["machine"]) >= {"cpu", "cores", "torch", "optuna", "prunefront"}
    assert set(result["sensitivity"]) <= {group["name"] for group in described_run(front_run)["groups"]}


def test_a_limit_is_answered_with_the_best_model_that_holds_it(browser, front_run):
    driver = opened(browser, front_run / "report.html")
    run = described_run(front_run)
    shares = sorted(entry["macs"] / run["dense"]["macs"] for entry in run["front"])
    limit = driver.find_element("css selector", "input[type=number]")
    for share in (shares[0], shares[len(shares) // 2], 1.0):
        limit.clear()
        limit.send_keys(f"{100 * share + 1e-4:.5f}")
        holding = [e for e in run["front"] if e["macs"] <= share * run["dense"]["macs"] * (1 + 1e-5)]
        best = max(holding, key=lambda entry: entry["score"])["name"]
        commands = texts(driver, ".answer code")
        assert f"prunefront export {front_run} pick={best} format=onnx" in commands
        assert f'prunefront.load("{front_run}/front/{best}")' in commands
        assert best in texts(driver, "tr.chosen")[0]
    limit.clear()
    limit.send_keys(f"{50 * shares[0]:.5f}")
    assert "No model of this run" in texts(driver, ".answer")[0]
    assert texts(driver, ".answer code")[0].startswith("prunefront search task=... budget.macs=")


def test_the_command_of_the_answer_works(front_run, tmp_path):
    name = json.loads((front_run / "result.json").read_text())["picked"]
    assert main(["export", str(front_run), f"pick={name}", "format=onnx", f"path={tmp_path}"]) == 0


def test_points_tables_and_trials_answer(browser, front_run):
    driver = opened(browser, front_run / "report.html")
    box = "document.querySelector('svg.chart path.front:last-of-type')"
    tip = driver.execute_script(
        f"const svg = document.querySelector('svg.chart'), mark = {box}.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: mark.left + 5, clientY: mark.bottom - 5}));"
        "return document.getElementById('tip').textContent"
    )
    assert tip.startswith("trial") and "MACs" in tip
    trials = table(driver, "All trials")
    heads = trials.find_elements("css selector", "th button")
    for _ in range(2):  # descending first
        heads[2].click()
    costs = [cell.text for cell in trials.find_elements("css selector", "tbody td:nth-child(3)")]
    shares = [float(text.split()[1]) for text in costs]
    assert shares == sorted(shares) and len(shares) == 24
    row = trials.find_element("css selector", "tbody tr")
    row.click()
    number = row.find_element("css selector", "td").text
    note = driver.find_element("xpath", "//section[h2='Widths, from input to output']//p").text
    assert note.startswith(f"trial{number.zfill(4)}:")


def test_the_csv_holds_every_trial_and_every_width(browser, front_run):
    driver = opened(browser, front_run / "report.html")
    rows = driver.execute_script(
        "const run = RUNS[0], t = run.trials; return csv(['trial', ...run.groups.map(g => g.name)],"
        "t.number.map((n, i) => [n, ...t.widths[i]]))"
    ).splitlines()
    study = read_study(front_run)
    assert len(rows) == 25
    for row, trial in zip(rows[1:], study.trials, strict=True):
        widths = trial.user_attrs["plan"]["widths"]
        assert row == ",".join(map(str, [trial.number, *(widths[name] for name in rows[0].split(",")[1:])]))


def test_two_runs_are_compared_on_one_page(browser, front_run, digits_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(front_run), str(digits_run)]) == 0
    driver = opened(browser, tmp_path / "report.html")
    assert sections(driver)[0] == "Runs" and texts(driver, "#tabs button") == ["front", "digits"]
    assert "mode=front" in texts(driver, "table")[0]
    driver.find_elements("css selector", "#tabs button")[1].click()
    assert json.loads((digits_run / "result.json").read_text())["picked"] in texts(driver, ".tile b")


def test_nothing_sticks_out_on_a_phone(browser, front_run):
    driver = opened(browser, front_run / "report.html")
    driver.set_window_size(500, 900)  # the narrowest window that Chromium opens
    try:
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        for control in driver.find_elements("css selector", ".controls *"):
            assert control.rect["x"] + control.rect["width"] <= 500
    finally:
        driver.set_window_size(1200, 1000)


def test_names_are_text_and_never_markup(browser, digits_run, tmp_path):
    run_dir = tmp_path / "<img src=x onerror=alert(1)>"
    run_dir.symlink_to(digits_run)
    described = {**described_run(run_dir), "name": "</script><b>{{data}}"}
    path = tmp_path / "page.html"
    path.write_text(page([described]))
    driver = opened(browser, path)
    assert texts(driver, "h1") == ["</script><b>{{data}}"] and texts(driver, "img, b b") == []


def test_values_that_differ_by_rounding_alone_are_drawn(browser, digits_run, tmp_path):
    run = described_run(digits_run)
    entry = {**run["front"][0], "score": 0.3, "test": 0.3}
    run["front"] = [entry, {**entry, "name": "trial9998", "score": float(np.nextafter(0.3, 1))}]
    run["dense"] |= {"score": 0.3, "test": 0.3}
    run["trials"]["value"] = run["history"]["best"] = [0.3] * len(run["trials"]["value"])
    path = tmp_path / "page.html"
    path.write_text(page([run]))
    driver = opened(browser, path)
    assert "0.3000" in texts(driver, "table")[0]
    assert len(driver.execute_script("return ticks(1e16, 1e16 + 4, 1000)")) <= 51


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0.0000"), (-0.0, "0.0000"), (-3.21e-5, "-3.210e-05"), (0.87123, "0.8712"), (-123456.7, "-1.235e+05")],
)
def test_small_and_large_scores_keep_four_digits(browser, front_run, value, expected):
    def plain(text):  # Python and JavaScript write exponents in their own ways
        return text if "e" not in text else f"{float(text):.3e}"

    opened(browser, front_run / "report.html")
    assert plain(score_text(value, None)) == expected
    assert plain(browser.execute_script("return scoreText(arguments[0])", value)) == expected
    assert score_text(0.9, 0.9 + 2e-16) == "0.9000 (+0.0000)" and score_text(0.5, 0.9) == "0.5000 (-0.4000)"


def test_two_thousand_trials_are_a_small_page_that_is_soon_there(browser, digits_run, tmp_path):
    run = described_run(digits_run)
    rng = np.random.default_rng(0)
    run["groups"] = [{"name": f"layers.{i}.conv", "kind": "channel", "size": 256, "exact": True} for i in range(100)]
    run["front"] = [{**entry, "widths": rng.integers(1, 256, 100).tolist()} for entry in run["front"] * 4]
    values = rng.random(2000).round(4).tolist()
    run["trials"] = {
        "number": list(range(2000)),
        "value": values,
        "state": ["complete"] * 2000,
        **{key: rng.integers(10**6, 10**9, 2000).tolist() for key in ("macs", "params", "memory_bytes", "size_bytes")},
        "widths": rng.integers(1, 256, (2000, 100)).tolist(),
    }
    run["history"] = {"number": list(range(2000)), "best": np.maximum.accumulate(values).tolist()}
    path = tmp_path / "page.html"
    path.write_text(page([run]))
    assert path.stat().st_size < SIZE_LIMIT
    driver = opened(browser, path)
    drawn = float(driver.execute_script("return document.documentElement.dataset.drawn"))
    print(f"{path.stat().st_size / 1e6:.2f} MB, drawn after {drawn:.0f} ms")
    assert drawn < DRAWN_LIMIT_MS
    assert len(table(driver, "All trials").find_elements("css selector", "tbody tr")) == 200


def test_a_multirun_is_one_page(front_run, tmp_path):
    (tmp_path / "multirun.yaml").touch()
    for name in ("0", "1"):
        (tmp_path / name).symlink_to(front_run)
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists()


def test_reports_say_what_is_missing(tmp_path, capsys, digits_run):
    (tmp_path / "multirun.yaml").touch()
    assert main(["report", str(tmp_path)]) == 1
    assert "no run in" in capsys.readouterr().err
    assert main(["pick", str(digits_run), str(digits_run)]) == 1
    assert "takes one run, not 2" in capsys.readouterr().err


def test_running_hypervolumes_agree_with_computing_each_anew():
    rng = np.random.default_rng(0)
    scores, costs = rng.random(40), rng.random(40)
    expected = [hypervolume(scores[: i + 1], costs[: i + 1], (0.1, 0.9)) for i in range(40)]
    assert np.allclose(hypervolumes(scores, costs, (0.1, 0.9)), expected)


def test_the_history_follows_the_trials(front_run):
    study, run = read_study(front_run), json.loads((front_run / "result.json").read_text())
    trials = finished(study)
    found = history(study, trials, run["objective"], described_run(front_run)["dense"])
    assert found["best"] == np.maximum.accumulate([t.values[0] for t in trials]).tolist()
    assert 0 <= found["hypervolume"][0] <= found["hypervolume"][-1] <= 1
    assert write_report(front_run, front_run / "again.html").read_text() == (front_run / "report.html").read_text()
