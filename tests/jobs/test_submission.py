"""What `jobs/submit.py` would upload and run, without a cluster."""

import shlex
import socket
import subprocess
import sys
import zipfile

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from jobs import submit
from pipeline.errors import UserError
from pipeline.runtime.ray_session import REPOSITORY


@pytest.fixture
def checkout(tmp_path):
    """A checkout with what must stay at home."""
    for name in (
        "jobs/a.py",
        ".venv/lib/x.so",
        "work/cache/x.parquet",
        ".env",
        "docs/x.png",
        "pipeline/deep/b.py",
        ".git/x",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    for name in (".gitignore", ".rayignore"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    return tmp_path


def test_what_is_counted_is_what_ray_packs_and_data_stays_at_home(checkout, tmp_path_factory):
    files = submit.uploaded_files(checkout)
    assert (
        {"jobs/a.py", "pipeline/deep/b.py"}
        <= files.keys()
        <= {"jobs/a.py", "pipeline/deep/b.py", ".gitignore", ".rayignore"}
    )
    package = tmp_path_factory.mktemp("package") / "x.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as archive:
        packed = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    assert files == packed


def test_a_large_file_is_named_before_anything_is_uploaded(checkout):
    assert submit.check_upload(checkout) < 10_000
    for name, size in (("jobs/small.bin", 1 << 20), ("teachers/weights.pth", 60 << 20)):
        path = checkout / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
    with pytest.raises(
        UserError, match=r"would be uploaded.*teachers/weights\.pth \(60\.0 MiB\), jobs/small\.bin.*\.rayignore"
    ):
        submit.check_upload(checkout)


def test_this_checkout_is_small_enough():
    files = submit.uploaded_files(REPOSITORY)
    assert "jobs/distill.py" in files
    assert "recipes/quickstart.yaml" in files
    assert submit.check_upload(REPOSITORY) < submit.MAX_UPLOAD


def test_the_words_of_a_job_reach_it_as_they_are():
    words = ["jobs/distill.py", "recipes/photos.yaml", "teachers=[hog, {model: dinov2/vits14}]", "name=it's"]
    line = submit.entrypoint(words)
    shown = subprocess.run(
        line.replace("python", shlex.quote(sys.executable) + " -c 'import sys; print(sys.argv[1:])'", 1),
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == repr(words)


def test_a_cluster_that_does_not_answer_is_named(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
        with pytest.raises(SystemExit) as ended:
            submit.main(["jobs/distill.py"])
    assert ended.value.code == 2
    assert f"error: RAY_API_SERVER_ADDRESS: no cluster can be used at {address} (" in capsys.readouterr().err


def test_what_is_no_job_is_refused_with_the_jobs_that_there_are(capsys):
    for arguments in ([], ["recipes/photos.yaml"], ["jobs/submit.py"], ["../elsewhere.py"]):
        with pytest.raises(SystemExit) as ended:
            submit.main(arguments)
        assert ended.value.code == 2
        assert "jobs/distill.py" in capsys.readouterr().err
