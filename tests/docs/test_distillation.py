"""What docs/distillation.md shows is what the configuration takes, and the loss of docs/howto/own-loss.md is one."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.distill import loss
from pipeline.distill.config import DistillJobConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "distillation.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_loads_and_names_losses_that_there_are(example, tmp_path):
    (tmp_path / "recipe.yaml").write_text(example)
    for phase in load_config(DistillJobConfig, tmp_path / "recipe.yaml").phase_configs():
        loss.check_losses(phase.loss)


def test_there_are_examples():
    assert len(EXAMPLES) >= 8


def test_the_loss_of_the_how_to_is_one_like_the_others(tmp_path, monkeypatch):
    text = (DOCS / "howto/own-loss.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(DistillJobConfig, None, ['loss.patches={cosine: 0.9, "my_losses:log_cosh": 0.1}']).loss
    loss.check_losses(config)
    predicted, target = torch.randn(2, 3, 4, 4, 8, dtype=torch.float64).bfloat16()
    error = predicted.float() - target.float()
    found = loss.image_loss({"my_losses:log_cosh": 2.0}, predicted, target, config.temperature)
    torch.testing.assert_close(found, 2 * error.cosh().log().mean(dim=(1, 2, 3)))
