"""What stands where a path names no model, for the messages of errors.

A run's folder holds `student/` after a distillation, `model/` after a fine-tuning, and `run.json` from its start on.
"""

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path

MODELS = {"student": "an exported student", "model": "a fine-tuned model"}
"""What the files `<name>.json`, and the folders of these names in a run's folder, hold."""
LISTED = 3


def nearest_folders(name: str, kinds: Sequence[str] = tuple(MODELS)) -> str:
    """A clause for the end of a message: the models inside a folder or beside a path, or that a run is unfinished; or "".

    Args:
        kinds: of the models that would do, by the names of their folders.
    """
    path = Path(name).expanduser()
    if "://" in name or (len(path.parts) < 2 and not path.exists()):
        return ""  # an address, or a name in timm
    try:
        return _nearest(path, kinds)
    except OSError:  # a folder that may not be read
        return ""


def _nearest(path: Path, kinds: Sequence[str]) -> str:
    wanted, folder = path.name, path
    while not folder.is_dir():
        wanted, folder = folder.name, folder.parent
    if held := [name for name in MODELS if (folder / f"{name}.json").is_file()]:
        return f"; it is {MODELS[held[0]]}" if folder == path else _question([folder] if held[0] in kinds else [])
    if inside := _models(folder, kinds):
        return _question(inside)
    if (folder / "run.json").is_file():
        return f"; {folder} {_state(folder / 'run.json')}"
    with os.scandir(folder) as entries:
        runs = {
            entry.name: found for entry in entries if entry.is_dir() and (found := _models(folder / entry.name, kinds))
        }
    similar = difflib.get_close_matches(wanted, sorted(runs), n=LISTED, cutoff=0.0)
    return _question([model for name in similar for model in runs[name]])


def _models(folder: Path, kinds: Sequence[str]) -> list[Path]:
    return [folder / name for name in kinds if (folder / name / f"{name}.json").is_file()]


def _question(found: list[Path]) -> str:
    named = [f"{path} ({MODELS['model']})" if (path / "model.json").is_file() else str(path) for path in found[:LISTED]]
    return f"; did you mean {' or '.join(named)}?" if found else ""


def _state(file: Path) -> str:
    try:
        finished = json.loads(file.read_text(encoding="utf-8"))["finished"] is True
    except (ValueError, KeyError, TypeError):
        finished = False
    if finished:
        return "is the folder of a run that made no such model"
    return "is the folder of an unfinished run and holds no model yet; the command that started it resumes it"
