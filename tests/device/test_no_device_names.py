"""The table of devices is the only place that names an accelerator or its package."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = re.compile(r"\b(cuda|npu|xpu|mps|hpu|hccl|nccl|torch_npu|privateuseone|ascend)\b", re.I)
# The table, and what explains a machine to people or compares with other frameworks.
FREE = {
    "casc/device/devices.py",
    "casc/cli/doctor.py",
    "casc/cli/device_checks.py",
    # What lowers a step for a card that isn't there.
    "casc/bench/cards.py",
    "casc/bench/graph.py",
    "casc/bench/no_gpu.py",
}
FILES = sorted(
    path
    for folder in ("casc", "recipes", "data_tools")
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT).as_posix() not in FREE
)


def named(source: str) -> list[str]:
    """Names of accelerators in code: identifiers, attributes, imports, and strings but docs."""
    tree = ast.parse(source)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    words = []
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value if id(node) not in prose else ""
        elif isinstance(node, ast.Attribute):
            text = node.attr
        elif isinstance(node, ast.Name):
            text = node.id
        elif isinstance(node, ast.alias):
            text = node.name
        elif isinstance(node, ast.ImportFrom):
            text = node.module or ""
        # is_cuda, cuda_stream and the like are one word to \b.
        words += [f"{m[1]} (line {getattr(node, 'lineno', '?')})" for m in NAMES.finditer(
            text.replace("_", " ") if isinstance(node, ast.Attribute) else text
        )]  # fmt: skip
    return words


def test_what_counts_as_a_name():
    assert named('"""For cuda and npu."""\nx = 1') == []
    assert named("class A:\n    b: int = 1\n    'Or cuda.'") == []
    for source in (
        "x.cuda()",
        "f(device='npu')",
        "import torch_npu",
        "y.is_cuda",
        "x = 'cpu:gloo,npu'",
    ):
        assert named(source), source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_but_the_table_names_an_accelerator(path):
    assert named(path.read_text()) == []
