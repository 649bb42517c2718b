"""What docs/distillation.md shows is what the configuration takes."""

import re
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.distill.loss import check_losses

TEXT = Path(__file__).resolve().parent.parent.joinpath("docs/distillation.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_loads_and_names_losses_that_there_are(example, tmp_path):
    (tmp_path / "recipe.yaml").write_text(example)
    for phase in load_config(tmp_path / "recipe.yaml").phase_configs():
        check_losses(phase.loss)


def test_there_are_examples():
    assert len(EXAMPLES) >= 8
