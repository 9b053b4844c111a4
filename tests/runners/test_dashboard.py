"""Optuna's dashboard on a run, asked as a browser asks it."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from benchmarks.postgresql import free_port
from prunefront.search.study import finished, read_study


def test_the_dashboard_shows_plans_costs_and_constraints(digits_run):
    pytest.importorskip("optuna_dashboard")
    port = free_port()
    command = [sys.executable, "-m", "prunefront", "dashboard", str(digits_run), "host=127.0.0.1", f"port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def asked(path: str):
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{path}") as answer:
                    return json.load(answer)
            except urllib.error.URLError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)

    try:
        (study,) = asked("studies")["study_summaries"]
        detail = asked(f"studies/{study['study_id']}")
        trial = next(t for t in detail["trials"] if t["state"] == "Complete")
        assert {"plan", "costs", "constraints"} <= {entry["key"] for entry in trial["user_attrs"]}
    finally:
        server.terminate()
        server.wait(30)


def test_constraints_are_how_far_a_plan_is_below_its_limits(digits_run):
    for trial in finished(read_study(digits_run)):
        assert list(trial.constraints) == ["macs"] and -0.1 < trial.constraints["macs"] <= 0
