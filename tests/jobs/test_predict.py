"""Flags of `predict` that what is asked for does not use."""

import pytest

from jobs import predict
from jobs.predict import PLAIN, UNUSED

ASKED = {
    "classes": ["--classes", "a, b"],
    "find": ["--find", "a"],
    "like": ["--like", "a.jpg"],
    "pca": ["--pca"],
    "match": ["--match"],
    "parts": ["--parts", "3"],
    "points": ["--points", "1,1"],
    "boxes": ["--boxes", "1,1,5,5"],
    "everything": ["--everything"],
}
GIVEN = {"weights": "random", "text_weights": "clip.pt", "teacher": "sam/vit_b", "batch_size": "4", "min_score": "0.5"}


@pytest.mark.parametrize(("flag", "unused"), [(flag, name) for flag, unused in UNUSED.items() for name in unused])
def test_a_flag_that_would_be_ignored_is_refused_in_one_line(flag, unused, tmp_path, capsys):
    given = f"--{unused.replace('_', '-')}"
    with pytest.raises(SystemExit) as ended:
        predict.main(["none", str(tmp_path), *ASKED[flag], given, GIVEN[unused]])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {given}: --{flag} does not use it (")


def test_every_flag_of_a_voice_is_looked_at():
    assert set(ASKED) == set(UNUSED)
    assert set(GIVEN) == set(PLAIN)
