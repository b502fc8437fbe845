"""The bounds of what is read from outside, each at the place that has it."""

import os

import pytest

from ssl_ib import UserError
from ssl_ib.config import outside


@pytest.mark.parametrize(
    "text, says",
    [
        ("a\0b", "cannot be a path: it has a NUL character"),
        ("\ud800", "cannot be the name of a file"),
        ("a" * (outside.LONGEST_NAME + 1), "is too long for a path: 256 bytes, 256 of them in one name"),
        ("/" + "a/" * 2048, "is too long for a path: 4096 bytes"),
        ("~nosuchuser/x", "there is no user whose home '~nosuchuser' could be"),
    ],
)
def test_a_path(text, says):
    with pytest.raises(UserError, match=f"^key: .*{says}"):
        outside.user_path(text, "key")


def test_the_longest_path():
    assert len(str(outside.user_path("a/" * 2048, "key"))) == outside.LONGEST_PATH


def test_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert outside.read_bytes(tmp_path / "file", 3) == b"abc"
    with pytest.raises(OSError, match="3 bytes, at most 2 are read"):
        outside.read_bytes(tmp_path / "file", 2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe, not a file"):
        outside.read_bytes(tmp_path / "pipe", 3)


def test_yaml(tmp_path):
    assert outside.parse_yaml("a: " + "b" * (outside.MOST_YAML - 3)) == {"a": "b" * (outside.MOST_YAML - 3)}
    with pytest.raises(outside.NotYaml, match="262,145 characters, at most 262,144 are read"):
        outside.parse_yaml("a: " + "b" * (outside.MOST_YAML - 2))
    with pytest.raises(outside.NotYaml, match="repeated key a"):
        outside.parse_yaml("{a: 1, a: 2}")
    (tmp_path / "a.yaml").write_bytes(b"a: \xff")
    with pytest.raises(outside.NotYaml, match="can't decode byte 0xff"):
        outside.read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"b\.yaml cannot be read: No such file"):
        outside.read_yaml(tmp_path / "b.yaml")


def test_json(tmp_path):
    for text, says in {
        "[1]": "expected an object, got list",
        "[" * 10**6: "nested too deeply",
        "{": "Expecting",
    }.items():
        with pytest.raises(ValueError, match=says):
            outside.json_object(text)
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=rf"a\.json is damaged: {says}"):
            outside.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json is damaged: No such file"):
        outside.read_json(tmp_path / "b.json")
