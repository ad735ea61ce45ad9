# Everything runs in .venv, which is made here on first use and again when pyproject.toml changes.

set shell := ["bash", "-euo", "pipefail", "-c"]

# The Python that makes .venv: 3.11 or newer.
python := env("CASC_PYTHON", "python3")
# Processes (one per device) of train-8p and perf-8p.
devices := env("CASC_DEVICES", "8")
# Folder of shards that the training and performance runs read.
data := env("CASC_DATA", "shards")

bin := ".venv/bin"
torchrun := bin / "torchrun --standalone --nproc-per-node " + devices

[private]
default:
    @just --list --unsorted

# The main job on generated data: make, shard, train, evaluate, draw
demo *args: setup
    {{ bin }}/python -m casc.recipes.demo {{ args }}

# Tests, two files at a time, longest files first; the slow ones with `just test -m slow`
test *args: setup
    {{ bin }}/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder {{ args }}

# Make or refresh .venv
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    [ .venv/.installed -nt pyproject.toml ] && exit 0
    {{ python }} -c 'import sys; sys.exit("Python 3.11 or newer is needed; set CASC_PYTHON") if sys.version_info < (3, 11) else 0'
    {{ python }} -m venv .venv
    {{ bin }}/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
    touch .venv/.installed

# Shard a data set in COCO's layout: just shard COCO [--splits val2017 ...]
shard coco *args: setup
    {{ bin }}/data_tools shard "{{ coco }}" --out "{{ data }}" {{ args }}

# The full run on eight devices (CASC_DEVICES for another number): 12 epochs, evaluation, checkpoints
train-8p *args: setup
    {{ torchrun }} -m casc.recipes.coco_1x --data "{{ data }}" {{ args }}

# The full run on one device
train-1p *args: setup
    {{ bin }}/python -m casc.recipes.coco_1x --data "{{ data }}" --name coco_1x_1p {{ args }}

# Throughput on eight devices: a few hundred steps, no evaluation
perf-8p *args: setup
    {{ torchrun }} -m casc.recipes.coco_1x --data "{{ data }}" --name perf_8p --max-steps 300 --evaluate-every 0 --save-every 0 {{ args }}

# Throughput on one device
perf-1p *args: setup
    {{ bin }}/python -m casc.recipes.coco_1x --data "{{ data }}" --name perf_1p --max-steps 300 --evaluate-every 0 --save-every 0 {{ args }}

# Time the training step of the reference model on this machine
bench *args: setup
    {{ bin }}/casc bench {{ args }}

# Style, types and which room may import which
lint: setup
    {{ bin }}/ruff check
    {{ bin }}/ruff format --check
    {{ bin }}/pyright --pythonpath {{ bin }}/python
    PYTHONPATH=. {{ bin }}/lint-imports --no-logo

# Runs that are killed, stopped, told of full disks, and resumed: just chaos --minutes 60 [--seed 7]
chaos *args: setup
    {{ bin }}/python -m pytest -s tests/train/test_chaos.py --minutes 60 {{ args }}

# Hostile input of each kind: just fuzz [--cases 10000] [--seed 7] [-k pickles]
fuzz *args: setup
    {{ bin }}/python -m pytest tests/test_fuzz.py tests/data_tools/test_shard_fuzz.py --cases 10000 {{ args }}

# Mistakes of one line in model and ops: does verify, or else a test, find each? (just mutants NAME)
mutants *args: setup
    PYTHONPATH=. {{ bin }}/python tests/mutants.py {{ args }}

# The tests with an older torch, in an environment of its own: just compat 2.11
compat torch *args:
    #!/usr/bin/env bash
    set -euo pipefail
    home=.venv-{{ torch }}
    [ -d "$home" ] || {{ python }} -m venv "$home"
    # torchvision names the torch that it is built for, so pip finds the one that fits.
    "$home/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[dev]' 'torch=={{ torch }}.*'
    "$home/bin/python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder {{ args }}

# API reference into site/
docs *args: setup
    {{ bin }}/pdoc --docformat google --output-directory site {{ args }} casc data_tools

# The rooms and their arrows, drawn into docs/rooms.svg
rooms: setup
    {{ bin }}/python docs/plot_rooms.py

# Tests with coverage
coverage: setup
    {{ bin }}/python -m coverage erase
    {{ bin }}/python -m coverage run -m pytest
    {{ bin }}/python -m coverage combine --quiet
    {{ bin }}/python -m coverage report
