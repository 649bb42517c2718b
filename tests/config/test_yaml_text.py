import pytest

from pipeline.config.yaml_text import read_inline_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            (word, word)
            for word in ("no", "yes", "on", "off", "n", "010", "0x1f", "0b1", "1:30", "2024-01-01", "1e", "e5")
        ],
        ("8", 8),
        ("-3", -3),
        ("1_000", 1000),
        ("1e-3", 0.001),
        ("2E4", 20000.0),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("[a, 1, '1']", ["a", 1, "1"]),
        ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
        ("'a #b'", "a #b"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    for found in (read_yaml(text), read_inline_yaml(text)):
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{a: 1, a: 2}", "key a twice"),
        ("a:\n  b: 1\nc: 2\na: 3\n", "line 4: key a twice"),
        ("a: [1,\nb", "line 2: expected"),
        ("!!python/object:os.system {}", "could not determine a constructor"),
        ("a: \0", "special characters are not allowed"),
        ("[" * 1500, "recursion|expected"),
    ],
)
def test_what_is_no_value_is_refused_with_its_line(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        read_yaml(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a #b", "[a, b] #c", "#b", " # b", "1 # one"])
def test_a_line_has_no_comments(text):
    with pytest.raises(ValueError, match=r"'#.*' follows the value"):
        read_inline_yaml(text)
