"""The scripts in examples/ run as a user would start them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
#: What each prints at its end.
TOLD = {
    "bert_heads": "trial",
    "custom_target": "ms, ",
    "llama_checkpoint": "parameters, read back within",
    "own_cnn": "after three more epochs",
    "timm_without_labels": "fidelity",
}


def test_there_is_one_of_each():
    assert [path.stem for path in EXAMPLES] == sorted(TOLD)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOLD[path.stem] in done.stdout
