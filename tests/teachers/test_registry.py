"""Teachers by name, plug-ins, and what is imported for them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import teachers
from teachers.base import Teacher, TeacherError, TeacherOptions
from teachers.registry import FACTORIES, create_teacher
from tests.teachers.plain import draw_pixels

PACKAGE = Path(teachers.__file__).parent
PLUGIN = """
from tests.fakes import ColourGrid

def remember(options):
    teacher = ColourGrid(8, "", 0.0, 0.0)
    teacher.options = options
    return teacher

def nothing(options):
    return None

number = 3
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Writes a module of the user's own beside the job, and names it."""

    def write(source, name):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("dinov2/vits14", "dinov2/vits14"),
        ("clip/ViT-B-32", "clip/ViT-B-32@openai"),
        ("sam/vit_b", "sam/vit_b"),
        ("hog", "hog"),
        ("timm/resnet18", "timm/resnet18"),
    ],
)
def test_every_teacher_is_made_by_its_name(name, readable):
    teacher = create_teacher(name)
    assert isinstance(teacher, Teacher)
    assert teacher.spec.name == readable
    assert teacher.weights_sha256 == ""


def test_the_names_are_those_that_are_documented():
    assert list(FACTORIES) == ["dinov2", "clip", "sam", "hog", "timm"]


def test_an_unknown_name_suggests_the_nearest_and_lists_all():
    with pytest.raises(TeacherError, match=r"no teacher dinov3/vitb16; did you mean dinov2\? known are dinov2, clip"):
        create_teacher("dinov3/vitb16")
    with pytest.raises(TeacherError, match=r"no teacher xyzzy; known are dinov2, clip, sam, hog, timm, and package"):
        create_teacher("xyzzy")


def test_a_plug_in_is_made_by_its_place_and_works_like_any_other():
    teacher = create_teacher("tests.fakes:colours", args={"dim": 12})
    teacher.load()
    summary, patches = teacher.encode(draw_pixels(2, 32))
    assert summary.shape == (2, 12)
    assert patches.shape == (2, 4, 4, 12)


def test_a_plug_in_gets_every_option(plugin):
    name = plugin(PLUGIN, "plugin_that_remembers")
    teacher = create_teacher(f"{name}:remember", weights="file.pth", input_size=48, pool=2, args={"a": 1})
    assert teacher.options == TeacherOptions("", "file.pth", 48, 2, {"a": 1})
    assert create_teacher(f"{name}:remember").options == TeacherOptions("", "pretrained", None, None, {})


def test_the_callers_arguments_are_not_shared(plugin):
    name = plugin(PLUGIN, "plugin_that_keeps")
    args = {"a": 1}
    teacher = create_teacher(f"{name}:remember", args=args)
    teacher.options.args["a"] = 2
    assert args == {"a": 1}


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(
        TeacherError, match=r"no_such_package\.teacher:make cannot be imported .*on PYTHONPATH, or install it"
    ):
        create_teacher("no_such_package.teacher:make")


def test_a_module_whose_own_import_fails_gives_the_reason(plugin):
    name = plugin("import no_such_dependency", "plugin_that_lacks")
    with pytest.raises(TeacherError, match=f"{name}:make cannot be imported .*no_such_dependency"):
        create_teacher(f"{name}:make")


def test_a_module_that_fails_in_itself_shows_its_own_error(plugin):
    name = plugin("import math\nmath.no_such_function", "plugin_that_fails")
    with pytest.raises(AttributeError, match="no_such_function"):
        create_teacher(f"{name}:make")


def test_an_attribute_that_is_not_there_is_named():
    with pytest.raises(TeacherError, match=r"module tests\.fakes has no colors"):
        create_teacher("tests.fakes:colors")


@pytest.mark.parametrize("location", [":colours", "tests.fakes:", ".fakes:colours", ":"])
def test_a_place_without_a_module_or_a_factory_is_refused(location):
    with pytest.raises(TeacherError, match=r"is not of the form package\.module:name"):
        create_teacher(location)


def test_what_is_not_callable_is_refused(plugin):
    name = plugin(PLUGIN, "plugin_with_a_number")
    with pytest.raises(TeacherError, match=f"{name}:number is not callable"):
        create_teacher(f"{name}:number")


def test_what_makes_no_teacher_is_refused(plugin):
    name = plugin(PLUGIN, "plugin_with_nothing")
    with pytest.raises(TeacherError, match=rf"{name}:nothing returned NoneType, not a teachers\.base\.Teacher"):
        create_teacher(f"{name}:nothing")


def test_a_teacher_without_a_library_loads_no_library():
    code = (
        "import sys; from teachers.registry import create_teacher; create_teacher('hog').load(); "
        "print(sorted({'timm', 'open_clip', 'torchvision', 'ray', 'mlflow', 'pipeline'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_teachers_import_nothing_of_the_pipeline(path):
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            roots.add(node.module.partition(".")[0])
    assert not roots & {"pipeline", "jobs", "tests", "benchmarks", "ray", "mlflow"}
