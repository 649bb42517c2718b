"""What a reader must know beside the figures: the images they were measured on, and what is not counted."""

from collections.abc import Iterator

from pipeline.compare.comparison import Comparison


def notes(comparison: Comparison) -> list[str]:
    """Notes on a comparison, one sentence or two each."""
    found = [
        "A group holds all runs that differ only in the seed; ± is the standard deviation over the seeds.",
        "Parameters and MACs are those of the backbone in its inference form, on one image.",
    ]
    if comparison.differences:
        found.append("p-values are two-sided and not corrected for the number of comparisons.")
    if comparison.latency:
        found.append(f"Latency: {comparison.latency}.")
    return [*found, *_uncounted(comparison), *_different_images(comparison)]


def _uncounted(comparison: Comparison) -> Iterator[str]:
    entries, groups = comparison.entries, comparison.groups
    unfinished = [name for entry in entries for name in (*([] if entry.finished else [entry.name]), *entry.unfinished)]
    if unfinished:
        yield f"Unfinished, and not counted: {', '.join(unfinished)}."
    if earlier := sum(entry.finished for entry in entries) - sum(len(group.counted) for group in groups):
        yield f"Among runs of equal configuration and seed only the latest counts; {earlier} earlier ones are ignored."
    if left_out := ", ".join(f"{count} {job}" for job, count in comparison.left_out.items()):
        yield f"Runs without a student, not shown: {left_out}."


def _different_images(comparison: Comparison) -> Iterator[str]:
    if len(comparison.image_sets) == 1 and (only := comparison.image_sets[0]):
        yield f"All accuracies were measured on {comparison.named(only)}."
    for key in comparison.accuracies:
        by_images, common = comparison.by_images(key), comparison.comparable(key)
        if len(by_images) > 1:
            sets = [
                f"{f'{len(numbers)} groups' if numbers == common and len(numbers) > 1 else _labels(comparison, numbers)} "
                f"on {comparison.named(images)}"
                for images, numbers in by_images.items()
            ]
            yield (
                f"{comparison.all_measures[key].label} was measured on different held-out images, and only groups on the "
                f"same ones are compared: {'; '.join(sets)}."
            )


def _labels(comparison: Comparison, numbers: list[int]) -> str:
    return ", ".join(comparison.groups[number].label for number in numbers)
