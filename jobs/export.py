"""Export a backbone or a fine-tuned model to the formats of other runtimes, compare each with eager, and write a model card.

python jobs/export.py work/runs/<run>/student --format torch_export onnx hf
python jobs/export.py work/runs/<run>/model --to classifier
python jobs/export.py models:/m-... --to exported
python jobs/export.py timm/<name> --weights <file> --size 224
python jobs/export.py work/runs/<run>/student --classes "a cat, a dog" --to classifier
python jobs/export.py work/runs/<run>/student --sam sam_vit_b_01ec64.pth
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs._cli import later, model_parser, run_parser, table, tracking_uri
from jobs._prompts import add_sam_flag, write_prompts
from jobs._words import add_class_flags, word_classifier
from pipeline.export.formats import FORMATS, ROUNDS


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, and print a table of the files and one line of JSON."""
    parser = model_parser(
        __doc__, "exported student or fine-tuned model folder, MLflow model URI (models:/m-...), or timm name"
    )
    formats = [form for form in FORMATS if form != "coreml"]
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=formats, help=f"default: {' '.join(formats)}")
    parser.add_argument("--heads", action="store_true", help="keep the heads of a student distilled with keep_heads")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"rounds of the latency measurement; default: {ROUNDS}"
    )
    parser.add_argument("--to", type=Path, default=Path("exported"), help="output folder; default: exported")
    add_class_flags(parser)
    add_sam_flag(parser.add_argument_group("prompts", "also write a student's SAM head and SAM's decoder as ONNX"))
    run_parser(parser, later("jobs.export", "export"), arguments)


if __name__ == "__main__":
    main()
    sys.exit()

from pipeline.downstream.saved import find_model
from pipeline.errors import UserError
from pipeline.export.bundle import ExportBundle, make_bundle, make_task_bundle
from pipeline.export.folder import export_bundle
from pipeline.runs.addresses import fetch_student
from pipeline.student.loading import LoadedStudent, load_student


def export(options: argparse.Namespace) -> Mapping[str, Any]:
    """Write the folder."""
    if "hf" in options.format and options.heads:
        options.format = [form for form in options.format if form != "hf"]
        print("hf is left out: its layout has no place for heads", flush=True)
    if options.rounds < 1:
        raise UserError(f"--rounds={options.rounds}: at least 1")
    if options.to.exists() and not options.to.is_dir():
        raise UserError(f"--to: {options.to} is a file; name a folder")
    prompts = write_prompts(options) if options.sam else {}
    bundle = load_bundle(options)
    described = export_bundle(bundle, options.format, options.to, options.rounds)
    rows = {form: f"{options.to / entry['file']}  {_shown(entry)}" for form, entry in described["formats"].items()}
    print(f"{bundle.name} at {bundle.size} px\n{table({**rows, 'model card': options.to / 'README.md'})}")
    return {"folder": str(options.to.resolve()), "formats": described["formats"], **prompts}


def load_bundle(options: argparse.Namespace) -> ExportBundle:
    """The model to export."""
    if options.classes is not None:
        return word_classifier(options)
    lost = [flag for flag in ("templates", "text_weights", "teacher") if getattr(options, flag) is not None]
    if lost:
        raise UserError(f"--{lost[0].replace('_', '-')}: needs --classes")
    store = tracking_uri(options)
    saved = find_model(options.model, store)
    if saved is None:
        loaded = with_evaluations(load_student(fetch_student(options.model, store), weights=options.weights), store)
        return make_bundle(loaded, options.size or loaded.input_size or 224, heads=options.heads)
    if options.heads:
        raise UserError(f"--heads: {options.model} is fine-tuned and no longer has the heads of its teachers")
    return make_task_bundle(saved, options.size)


def with_evaluations(student: LoadedStudent, store: str) -> LoadedStudent:
    """The student, with its evaluations that the store holds in its provenance, for the model card."""
    known, trained_by = student.provenance, student.provenance.get("run_id")
    if not trained_by:
        return student
    from pipeline.tracking.evaluations import evaluations, latest  # imports MLflow

    try:
        found = evaluations(store, trained_by)
    except UserError as error:
        print(f"the model card has no new evaluations: {error}", flush=True)
        return student
    if not found:
        return student
    return student._replace(provenance={**known, "evaluations": latest([*known.get("evaluations", []), *found])})


def _shown(entry: Mapping[str, Any]) -> str:
    parity = entry["parity"]
    if isinstance(parity, str):
        return parity
    timed = f", {entry['latency']['of_eager']:.2f} of its time" if "latency" in entry else ""
    return f"differs from eager by {parity['relative_error']:.1e} of the largest output{timed}"
