import pytest
from hypothesis import given
from hypothesis import strategies as st

from casc.checkpoints.config_text import Unknown, at, read_config
from casc.errors import UserError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)  # fmt: skip


@given(PLAIN)
def test_plain_values_are_what_python_makes_of_them(value):
    assert read_config(f"name = {value!r}", "x") == {"name": value}


def test_dicts_by_call_and_paths():
    text = "a = dict(b=[dict(c=-1.5), dict(c=(1, 2))], d=1.0 / 4)\nprint(a)\ndel a\nb: int = 3"
    found = read_config(text, "x")
    assert found == {"a": {"b": [{"c": -1.5}, {"c": [1, 2]}], "d": 0.25}}
    assert at(found, "a.b.1.c") == [1, 2]
    assert at(found, "a.b.2.c", "none") == "none"
    assert at(found, "a.d.x", "none") == "none"


def test_nothing_runs(tmp_path):
    made = tmp_path / "made"
    text = f"a = open({str(made)!r}, 'w')\nb = dict(c=__import__('os').mkdir({str(made)!r}))"
    found = read_config(text, "x")
    assert isinstance(found["a"], Unknown)
    assert isinstance(found["b"]["c"], Unknown)
    assert not made.exists()


@pytest.mark.parametrize("text", ["a = (", "a = " + "(" * 10_000, "a = \0", "a = " + "-" * 10**5])
def test_what_is_no_python_is_said_in_a_line(text):
    with pytest.raises(UserError, match=r"x: the config in its meta can't be read") as error:
        read_config(text, "x")
    assert "\n" not in str(error.value)
