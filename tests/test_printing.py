"""Names and addresses of others, as a terminal, a page and a file of ours get to see them."""

import io
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from casc.config import to_json
from casc.data.remote import location
from casc.errors import TransientError, UserError
from casc.printing import plain, plain_json, redacted, say
from casc.train.log import RunLog
from casc.train.recipe import Recipe

SECRET = "s3cr3t/Sig+nature%2F=="
ADDRESSES = [
    f"https://host/x/a.tar?X-Amz-Signature={SECRET}&Expires=1",
    f"https:/host/x?sig={SECRET}",
    f"s3://key:{SECRET.replace('/', '')}@bucket/x",
    f"https://{SECRET.replace('/', '')}@host:80/x",
    f"simplecache::https://host/x?sig={SECRET}",
    f"pipe:curl -s 'https://host/x?sig={SECRET}'",
]


@given(st.text(st.characters(codec=None), max_size=30))
def test_no_character_commands_the_terminal(text):
    shown = plain(text)
    # Of Unicode's own tables: controls, surrogates, and what turns or breaks lines.
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not turning & {unicodedata.bidirectional(c) for c in shown}
    assert plain(shown) == shown


@pytest.mark.parametrize("text", ["a cat", "Ærø", "ねこ", "café", "\U0001f600", "नी\u200d"])
def test_names_of_all_languages_stay(text):
    assert plain(text) == text


def test_escapes_are_seen():
    assert plain("\x1b]0;x\x07\u202e\n\ud800\U000e0041") == (
        r"\x1b]0;x\x07\u202e\x0a\ud800\U000e0041"
    )
    assert plain("a\n\tb\r", lines=True) == "a\n\tb\\x0d"
    assert plain_json({"\x1b": ["\u202e", 1, None]}) == {r"\x1b": [r"\u202e", 1, None]}


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "around", ["{}", "{}: not found; mend it", "see '{}', or", "<{}>", "({})."]
)
def test_no_secret_is_left(address, around):
    text = around.format(address)
    for shown in (redacted(text), plain(text), str(UserError(text)), str(TransientError(text))):
        assert "s3cr3t" not in shown
        assert "nature" not in shown
        assert "host" in shown or "bucket" in shown
    assert redacted(redacted(text)) == redacted(text)
    assert redacted(text).endswith(around.partition("{}")[2])


@pytest.mark.parametrize("text", ["a?b", "runs/x?", "s3://bucket/x@y", "http://h/x: why?", "a://b"])
def test_other_texts_stay(text):
    assert redacted(text) == text


def test_output_of_any_encoding():
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", write_through=True) as file:
        say("Ærø \x1b[2J\nnext", file)
        assert raw.getvalue() == b"\\xc6r\\xf8 \\x1b[2J\nnext\n"


@pytest.mark.parametrize(
    ("address", "mend"),
    [
        ("https://me:pw@host/x", r"login and password in ~/\.netrc"),
        ("http://token@host/x", r"login and password in ~/\.netrc"),
        ("s3://key:pw@bucket/x", "AWS_ACCESS_KEY_ID.* or fsspec's configuration"),
        (Path("ftp://me:pw@host/x"), "own environment variables"),
        ("https://host/x?[redacted]", "isn't stored with a run; give the whole URL"),
    ],
)
def test_credentials_in_addresses_are_refused(address, mend):
    with pytest.raises(UserError, match=mend) as told:
        location(address)
    assert "pw@" not in str(told.value)
    assert "token" not in str(told.value)


def test_what_is_stored_has_no_secrets(tmp_path):
    secret = Recipe("x", data=Path(ADDRESSES[0]), init=ADDRESSES[0])
    assert "s3cr3t" not in str(to_json(secret))
    log = RunLog(tmp_path, start=0, total=1)
    log.say(f"reading {ADDRESSES[0]}")
    log.warn(ADDRESSES[2])
    log.error(ADDRESSES[3])
    log.record("x", text={"a": [ADDRESSES[0]]})
    log.close()
    for file in tmp_path.rglob("*.jsonl"):
        assert "s3cr3t" not in file.read_text()
