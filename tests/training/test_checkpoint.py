"""Checkpoint files."""

from pathlib import Path

import pytest
import torch
from pyarrow import fs

from pipeline.errors import UserError
from pipeline.training.checkpoint import STATE_FILE, best_copy_path, delete_previous_best, load_state


def test_only_the_present_best_checkpoint_is_kept(tmp_path):
    local = fs.LocalFileSystem()
    for number in (1, 2):
        checkpoint = tmp_path / f"checkpoint-000{number}-000000"
        delete_previous_best(local, str(checkpoint))  # nothing is there yet
        copy = Path(best_copy_path(str(checkpoint)))
        copy.mkdir(parents=True)
        state = {"model": {}, "ema": {}, "position": {"epoch": number}, "evaluations": []}
        torch.save(state, copy / STATE_FILE)
        delete_previous_best(local, str(checkpoint))
    (best,) = (tmp_path / "best").iterdir()
    assert load_state(best)["position"] == {"epoch": 2}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", None], ids=["empty", "truncated", "other"])
def test_a_checkpoint_that_is_damaged_is_named_with_what_to_remove(tmp_path, content):
    file = tmp_path / "train" / "checkpoint-0001-000000" / STATE_FILE
    file.parent.mkdir(parents=True)
    torch.save({"model": {}}, file)
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"the checkpoint {file} cannot be read \(.*remove {tmp_path}/train, and"):
        load_state(file.parent)
