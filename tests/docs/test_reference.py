"""docs/reference.md is what the code says today; pages link to what is there; the own teacher of the how-to is one."""

import re
import runpy
import sys

import pytest
import torch

from pipeline.cache.config import TeacherConfig
from pipeline.cache.layout.cached_teacher import make_teacher
from tests.docs.commands import PAGES, REPOSITORY


def test_the_reference_is_what_the_code_says():
    written = (REPOSITORY / "docs/reference.md").read_text(encoding="utf-8")
    assert written == runpy.run_path(str(REPOSITORY / "docs/reference.py"))["reference"](), "make reference"


def anchors(page):
    """As the hub of the repository makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_the_teacher_of_the_how_to_is_one(tmp_path, monkeypatch):
    page = (REPOSITORY / "docs/howto/own-teacher.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "my_teachers.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_teachers", raising=False)
    teacher = make_teacher(TeacherConfig(model="my_teachers:colours"))
    teacher.load()
    output = teacher.forward(torch.rand(2, 3, 32, 32))
    assert output.patches.shape == (2, 4, 4, 3)
    assert output.summary.shape == (2, 3)
