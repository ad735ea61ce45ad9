"""A process group named hccl, by gloo: it sees the device's memory as the host's."""

# torch declares other names for these parameters, and not all methods of gloo's.
# pyright: reportIncompatibleMethodOverride=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportAssignmentType=false
from typing import Any

import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from torch_npu import _C


class ProcessGroupHCCL(dist.ProcessGroup):
    """What torch's data parallel and object collectives call; all of it is done at once."""

    def __init__(self, store, rank: int, size: int, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return "hccl"

    def allreduce(self, tensors, opts=None):
        opts = opts or c10d.AllreduceOptions()
        if opts.reduceOp != dist.ReduceOp.AVG:
            return self._run("allreduce", tensors, tensors, opts)
        opts.reduceOp = dist.ReduceOp.SUM
        work = self._run("allreduce", tensors, tensors, opts)
        for tensor in tensors:
            _C.cpu_alias(tensor).div_(self.size())
        return work

    def allreduce_coalesced(self, tensors, opts=None):
        for tensor in tensors:
            self.allreduce([tensor])
        return _done(list(tensors))

    def broadcast(self, tensors, opts=None):
        return self._run("broadcast", tensors, tensors, opts or c10d.BroadcastOptions())

    def allgather(self, outputs, inputs, opts=None):
        return self._run("allgather", outputs, outputs, inputs, opts or c10d.AllgatherOptions())

    def all_gather_single(self, output, given, opts=None):
        parts = list(output.view(-1).chunk(self.size()))
        return self._run(
            "allgather", [output], [parts], [given.reshape(-1)], c10d.AllgatherOptions()
        )

    # Its name before torch 2.14.
    _allgather_base = all_gather_single

    def reduce(self, tensors, opts=None):
        return self._run("reduce", tensors, tensors, opts or c10d.ReduceOptions())

    def gather(self, outputs, inputs, opts=None):
        return self._run("gather", outputs, outputs, inputs, opts)

    def scatter(self, outputs, inputs, opts=None):
        return self._run("scatter", outputs, outputs, inputs, opts)

    def barrier(self, opts=None):
        self.gloo.barrier().wait()
        return _done([])

    def _run(self, name: str, outputs: list, *args: Any):
        given = [_host(arg) for arg in args]

        def launch() -> None:
            getattr(self.gloo, name)(*given).wait()

        if _C.capturing():
            for tensor in outputs:
                _C.will_write(tensor)
            _C.capture(launch)
        launch()
        return _done([t for x in outputs for t in (x if isinstance(x, (list, tuple)) else [x])])


def register() -> None:
    """Let torch.distributed find it under the name that Huawei's has."""

    def make(store, rank, size, timeout):
        return ProcessGroupHCCL(store, rank, size, timeout)

    dist.Backend.register_backend("hccl", make, devices=["npu"])


def _done(tensors: list[Tensor]):
    devices = sorted({t.device for t in tensors if t.device.type != "cpu"}, key=str)
    future = Future(devices=list(devices))
    future.set_result(tensors)
    return c10d._create_work_from_future(future)


def _host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _C.cpu_alias(value)
    if isinstance(value, (list, tuple)):
        return [_host(entry) for entry in value]
    return value
