import json
from typing import get_type_hints

import pytest

from jobs._cli import run


@pytest.fixture
def job(capsys):
    """Run a job in this process; gives its printed text and the figures of its last line."""

    def start(main, *arguments):
        run(get_type_hints(main)["config"], main, "a job", list(arguments))
        text = capsys.readouterr().out
        return text, json.loads(text.splitlines()[-1])

    return start


@pytest.fixture
def refused(capsys):
    """Run a job that must be refused; gives its one line."""

    def start(main, *arguments):
        with pytest.raises(SystemExit) as exit_:
            run(get_type_hints(main)["config"], main, "a job", list(arguments))
        assert exit_.value.code == 2
        error = capsys.readouterr().err.strip()
        assert "Traceback" not in error
        assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
        return error.splitlines()[-1]

    return start
