"""The command `regla`: one subcommand for each job, which takes the arguments of `python jobs/<job>.py`."""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata

COMMANDS = {
    "distill": "distil teachers into a student: fill the cache, train, measure, register",
    "plan": "print bytes and hours of cache and training, and the price (distill --plan)",
    "precompute": "fill the feature cache; verify, repair, list and clean it",
    "evaluate": "kNN, linear and segmentation probes; zero-shot and retrieval; metrics of fine-tuned models",
    "finetune": "fine-tune for classification, segmentation or detection",
    "predict": "features, classes, label maps or objects of images; words and correspondences",
    "export": "write files for other runtimes",
    "benchmark": "measure parameters, MACs, memory and latency of networks",
    "compare": "compare the runs of an MLflow experiment on one page",
    "weights": "list the weights that a recipe needs, and fetch them",
    "clean": "show what a work folder takes on disk, and remove old checkpoints",
    "submit": "submit a job to a Ray cluster",
}
SHELLS = ("bash", "zsh", "fish")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the job that the first argument names with those that follow it; None: the arguments of this process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:
        words = _complete(parser)
    options = parser.parse_args(words[:2] if words[:1] == ["completion"] else words[:1])
    if options.command == "completion":
        import argcomplete

        print(argcomplete.shellcode(["regla"], shell=options.shell))
    else:
        job, flags = ("distill", ["--plan"]) if options.command == "plan" else (options.command, [])
        sys.argv = [f"regla {options.command}", *flags, *words[1:]]
        # As a script, a job reads its command line before it imports torch.
        runpy.run_module(f"jobs.{job}", run_name="__main__")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the first argument; each job parses its own."""
    parser = argparse.ArgumentParser(
        prog="regla",
        description="Distil vision foundation models into a small, fast backbone.",
        epilog="regla COMMAND --help shows the arguments of a command.",
    )
    version = next(iter(metadata.Distribution.discover(name="regla-distill")), None)
    parser.add_argument("--version", action="version", version=version.version if version else "not installed")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    completion = commands.add_parser("completion", help='print shell completion: eval "$(regla completion bash)"')
    completion.add_argument("shell", choices=SHELLS)
    return parser


def _complete(parser: argparse.ArgumentParser) -> list[str]:
    """Complete the command, or give the words before the one that the job is to complete."""
    import argcomplete
    from argcomplete.lexers import split_line

    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    first = 3 if words[1:2] == ["submit"] and words[2:3] and words[2] in COMMANDS else 2
    if len(words) < first or words[first - 1] not in COMMANDS:
        argcomplete.autocomplete(parser)
    os.environ["_ARGCOMPLETE"] = str(first)  # the number of words before the arguments that are completed
    return words[first - 1 :]
