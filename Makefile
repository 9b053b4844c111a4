PYTHON ?= python3.11

.PHONY: search test check

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[dashboard,dev,mysql,onnx,openvino,postgresql,text,vision]'
	touch $@

search: .venv/ready
	.venv/bin/prunefront search task=digits budget.macs=50%

test: .venv/ready
	.venv/bin/python -m pytest

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
