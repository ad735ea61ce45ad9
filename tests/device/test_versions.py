"""Compiling on releases of torch that can't count recompilations per call."""

from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from casc.device import versions
from casc.device.versions import compile_apart

CLOSED_OVER = 3


def make(offset: int):
    def add(x, factor=2, *, more=1):
        return x * factor + offset + more

    return add


@pytest.fixture(params=["new", "old"] if versions.ISOLATES else ["old"])
def release(request, monkeypatch):
    """This torch as it is, and as one before 2.14."""
    monkeypatch.setattr(versions, "ISOLATES", request.param == "new")
    torch.compiler.reset()


def test_many_of_one_function(release):
    """One per canvas, and more than Dynamo lets one function have."""
    compiled = [compile_apart(make(number), backend="eager") for number in range(12)]
    for number, function in enumerate(compiled):
        x = torch.ones(number + 2)
        assert torch.equal(function(x), x * 2 + number + 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        for number, function in enumerate(compiled):
            function(torch.ones(number + 2))


def test_the_limit_is_the_functions_own(release):
    function = compile_apart(make(0), backend="eager", recompile_limit=2)
    for size in (2, 3):
        function(torch.ones(size))
    with pytest.raises(FailOnRecompileLimitHit):
        function(torch.ones(4))
    compile_apart(make(0), backend="eager")(torch.ones(4))


def test_any_size_where_that_is_asked_for(release):
    function = compile_apart(make(0), backend="eager", dynamic=True, recompile_limit=1)
    for size in (5, 6, 7):
        assert function(torch.ones(size)).shape == (size,)


def test_options_reach_the_compiler(release):
    seen = []

    def backend(graph, inputs, options):
        seen.append(options)
        return graph

    named: Any = backend
    compile_apart(make(0), backend=named, options={"combo_kernels": True})(torch.ones(3))
    assert seen == [{"combo_kernels": True}]
