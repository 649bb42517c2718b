"""Copies of a run's results in a folder or an object store.

<outputs>/<run>/report.html, student/ or model/, figures/, evaluation/
"""

from pathlib import Path

from pipeline.errors import UserError, blame_field
from pipeline.report.report import FILE as REPORT
from pipeline.storage.store import Store

PARTS = ("student", "model", "figures", "evaluation")
"""Folders of a run that are its results; checkpoints and state are not."""


def outputs_store(outputs: str) -> Store:
    """The store of all runs' results; UserError if it cannot be written."""
    with blame_field("outputs"):
        store = Store.at(outputs)
        store.check_writable()
    return store


def publish(run: Path, store: Store) -> str:
    """Copy the results of a run's folder over those of an earlier start; returns their address.

    Raises:
        UserError: if the store fails; the results stay in the run's folder.
    """
    target = store.sub(run.name)
    found = [run / REPORT, *(file for part in PARTS for file in sorted((run / part).rglob("*")))]
    files = [file for file in found if file.is_file()]
    try:
        for file in files:
            target.put(file.relative_to(run).as_posix(), file.read_bytes())
    except UserError as error:
        raise UserError(f"outputs: {error}; the results are in {run}") from error
    return target.uri
