"""What every job says about its recipe."""

import pytest

from jobs._cli import run
from pipeline.distill.config import DistillJobConfig


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([], "no recipe is named: this is recipes/quickstart.yaml, on generated scenes; "),
        (["train.epochs=2"], "no recipe is named: this is recipes/quickstart.yaml, on generated scenes; "),
        (["data.train=photos"], "no recipe is named: this is recipes/quickstart.yaml; "),
        (["recipes/quickstart.yaml"], ""),
        (["quickstart.yaml", "data.train=photos.yaml"], ""),
    ],
)
def test_the_first_line_names_a_recipe_that_the_command_does_not(items, said, capsys):
    run(DistillJobConfig, lambda config, dry_run: {"work": "done"}, "a job", items)
    *first, last = capsys.readouterr().out.splitlines()
    assert last == '{"work": "done"}'
    assert len(first) == bool(said)
    assert not said or first[0].startswith(said)
