import os
import pickle
import re
import struct
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from casc.checkpoints.pickles import load_pickle, load_torch
from casc.errors import UserError

DTYPES = ("<f4", ">f4", "<f2", "<f8", "<i8", ">i4", "u1", "?")


@given(
    data=st.sampled_from(DTYPES).flatmap(
        lambda t: arrays.arrays(t, arrays.array_shapes(min_dims=0, max_side=4, min_side=0))
    ),
    fortran=st.booleans(),
    protocol=st.sampled_from([0, 1, 2, 3, 4, 5]),
)
def test_arrays_come_back_to_the_bit(tmp_path_factory, data, fortran, protocol):
    path = tmp_path_factory.mktemp("p") / "a.pkl"
    value = np.array(data, order="F" if fortran else "C")
    path.write_bytes(pickle.dumps({"model": OrderedDict(a=value), "x": (1, "y")}, protocol))
    found = load_pickle(path)
    assert found["x"] == [1, "y"]
    expected = np.array(data, data.dtype.newbyteorder("="))
    tensor = found["model"]["a"]
    assert tensor.shape == data.shape
    assert tensor.numpy().dtype == expected.dtype
    assert tensor.numpy().tobytes() == expected.tobytes()


def test_scalars_and_python_2s_arrays(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"step": np.int64(7), "x": np.float32(0.5)}, 2))
    assert load_pickle(tmp_path / "a.pkl") == {"step": 7, "x": 0.5}
    # Python 2 wrote an array's bytes as a str: SHORT_BINSTRING here, where Python 3 has encode().
    numbers = struct.pack("<2f", 1.0, -2.0)
    old = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08" + numbers + b"tb."
    )
    (tmp_path / "b.pkl").write_bytes(old)
    assert load_pickle(tmp_path / "b.pkl").tolist() == [1.0, -2.0]


class Payload:
    """Pickles as a call that makes a file."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def payloads(target):
    """Ways to make `target` while being unpickled."""
    command = f"open({str(target)!r}, 'w').close()"
    return {
        "os.system": Payload(os.system, f"touch {target}"),
        "eval": Payload(eval, command),
        "exec": Payload(exec, command),
        "getattr": Payload(getattr, str(target), "upper"),
        "mkdir": Payload(os.mkdir, str(target)),
        "numpy": Payload(np.save, str(target), 1),
        "torch": Payload(torch.save, 1, str(target)),
    }


@pytest.mark.parametrize("name", payloads("x"))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_pickle_runs(tmp_path, name, protocol):
    target = tmp_path / "made"
    bomb = {"model": {"a": np.zeros(2)}, "x": payloads(target)[name]}
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(bomb, protocol))
    with pytest.raises(UserError, match=r"bomb.pkl: its pickle asks for .*nothing of it was run"):
        load_pickle(tmp_path / "bomb.pkl")
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize("name", payloads("x"))
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_torch_file_runs(tmp_path, name, zipped):
    target = tmp_path / "made"
    bomb = {"state_dict": {"a": torch.zeros(2)}, "x": payloads(target)[name]}
    torch.save(bomb, tmp_path / "bomb.pth", _use_new_zipfile_serialization=zipped)
    # What a log of MMDetection may name is replaced by something that does nothing.
    if name in ("getattr", "numpy") and zipped:
        data = load_torch(tmp_path / "bomb.pth")
        assert type(data["x"]).__name__ == "_Nothing"
    else:
        with pytest.raises(UserError, match=r"bomb.pth: its pickle asks for .*nothing of it was"):
            load_torch(tmp_path / "bomb.pth")
    assert not list(tmp_path.glob("made*"))


def test_a_log_of_losses_beside_the_weights_is_left_out(tmp_path, monkeypatch):
    """MMDetection 3 saves its message hub, whose classes aren't here when it is read."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.array([1.0, 2.0])
            self._count_history = np.array([1, 1])
            self.max = np.float64(2.0)

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    data = {
        "state_dict": OrderedDict(a=torch.arange(3.0)),
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}},
        "meta": {"dataset_meta": {"classes": ("cat",)}, "epoch": 12},
    }
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(data, tmp_path / "epoch_12.pth")
    with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer"):
        torch.load(tmp_path / "epoch_12.pth", weights_only=True)
    before = torch.serialization.get_safe_globals()
    found = load_torch(tmp_path / "epoch_12.pth")
    assert found["state_dict"]["a"].tolist() == [0, 1, 2]
    assert found["meta"] == data["meta"]
    assert torch.serialization.get_safe_globals() == before


def test_damaged_and_other_files(tmp_path):
    good = pickle.dumps({"model": {"a": np.arange(100.0)}}, 4)
    for name, content in {
        "short.pkl": good[: len(good) // 2],
        "empty.pkl": b"",
        "text.pkl": b"hello",
        "objects.pkl": pickle.dumps(np.array([{}, 1], object)),
        "records.pkl": pickle.dumps(np.zeros(2, [("a", "f4")])),
        # 100 numbers of 8 bytes are said to be 200.
        "lies.pkl": good.replace(b"Kd\x85", b"K\xc8\x85"),
    }.items():
        assert content != good
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a pickle of arrays") as error:
            load_pickle(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for name, content in {
        "short.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"hello",
        "arrays.pth": good,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: ") as error:
            load_torch(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"\x80\x02}", "it ends too early"),
        (b"hello\n", "it isn't made of tensors and plain values alone, or is damaged"),
    ],
)
def test_what_is_no_checkpoint_is_told_apart(tmp_path, content, why):
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{file}: not a file of tensors")) as caught:
        load_torch(file)
    assert str(caught.value).endswith(f"reads safely ({why})")
