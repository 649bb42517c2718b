"""Count what a teacher computes while a data set changes.

    python benchmarks/living_cache.py

Caches 80 JPEGs of a class folder for two teachers, and then makes one change after the other: an image is added, ten are
removed, files and a class are renamed and the folder moves, a label changes, a file gets other bytes of the same length, a
second data set shares half of the images, a tar comes to two others. After each change the whole job, `jobs/precompute.py`,
runs. Prints a table and one line of JSON: views that the teachers' forward saw, over the number of teachers.
"""

import io
import json
import os
import shutil
import sys
import tarfile
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

if not __package__:  # a script imports from its own checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.synthetic_cache import jpegs
from pipeline.config.load import load_config

COUNTING = '''
from pathlib import Path

from teachers.registry import create_teacher


def counting(options):
    """HOG that writes down how many images it sees."""
    log, cell = options.args.pop("log"), options.args.pop("side")
    teacher = create_teacher("hog", weights="pretrained", input_size=cell, pool=None, args={})
    forward = teacher.forward

    def counted(images):
        with Path(log).open("a") as file:
            file.write(f"{len(images)}\\n")
        return forward(images)

    teacher.forward = counted
    return teacher
'''


def main() -> None:
    """Make every change, and count."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "counting.py").write_text(COUNTING)
        os.environ["PYTHONPATH"] = os.pathsep.join([name, os.environ.get("PYTHONPATH", "")])
        sys.path.insert(0, name)
        print(json.dumps(_changes(folder)))


def _changes(folder: Path) -> dict[str, float]:
    photos = jpegs(96, 200)
    data = folder / "photos"
    for number in range(80):
        _write(data / f"class{number % 4}" / f"{number:03d}.jpg", photos[number])
    found = {"first": _run(folder, data)}
    _write(data / "class0" / "new.jpg", photos[80])
    found["added"] = _run(folder, data)
    for number in range(10, 20):
        (data / f"class{number % 4}" / f"{number:03d}.jpg").unlink()
    found["removed"] = _run(folder, data)
    (data / "class1").rename(data / "class9")
    (data / "class2" / "002.jpg").rename(data / "class2" / "two.jpg")
    (folder / "moved").mkdir()
    data = Path(shutil.move(data, folder / "moved"))
    found["renamed"] = _run(folder, data)
    (data / "class0" / "000.jpg").rename(data / "class3" / "000.jpg")
    found["relabelled"] = _run(folder, data)
    replaced = data / "class3" / "003.jpg"
    size = replaced.stat().st_size
    other = next(photo for photo in photos[81:] if len(photo) <= size)
    replaced.write_bytes(other + b"\0" * (size - len(other)))
    found["replaced"] = _run(folder, data)
    for number in [*range(20, 60), *range(120, 160)]:
        _write(folder / "second" / f"{number:03d}.jpg", photos[number])
    found["shared_half"] = _run(folder, folder / "second")
    for number in range(2):
        _tar(folder / "tars" / f"{number}.tar", photos[160 + 10 * number : 170 + 10 * number])
    _run(folder, folder / "tars")
    _tar(folder / "tars" / "2.tar", photos[180:195])
    found["tar_added"] = _run(folder, folder / "tars")
    for name, count in found.items():
        print(f"  {name:<12}{count:>8g} views a teacher", flush=True)
    return found


def _run(folder: Path, data: Path) -> float:
    """Run the job; returns the views that its two teachers have seen, over two."""
    from jobs.precompute import main as precompute
    from pipeline.cache.config import PrecomputeJobConfig

    log = folder / "log"
    log.unlink(missing_ok=True)
    teachers = ", ".join(f"{{model: 'counting:counting', args: {{log: '{log}', side: {side}}}}}" for side in (48, 64))
    settings = [f"data.train={data}", f"work={folder}/work", f"teachers=[{teachers}]", "cache.codec=float16"]
    with redirect_stdout(io.StringIO()):
        precompute(load_config(PrecomputeJobConfig, None, settings), dry_run=False)
    return sum(map(int, log.read_text().split())) / 2 if log.exists() else 0


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def _tar(file: Path, photos: list[bytes]) -> None:
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number, photo in enumerate(photos):
            for name, data in ((f"{number:03d}.jpg", photo), (f"{number:03d}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
