import pytest

from pipeline.benchmark.config import BenchmarkJobConfig
from pipeline.cache.config import PrecomputeJobConfig
from pipeline.config.load import load_config
from pipeline.distill.config import DistillJobConfig
from pipeline.downstream.config import FinetuneJobConfig
from pipeline.errors import UserError


def test_a_recipe_then_overrides_in_order(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: a\nteachers: [hog, {model: dinov2, weights: random}]\ntrain: {epochs: 3}\n")
    config = load_config(
        DistillJobConfig,
        recipe,
        ["train.epochs=5", "train.epochs=6", "teachers.1.weights=random:7", "teachers.0.weight=0.5"],
    )
    assert config.name == "a"
    assert config.train.epochs == 6
    assert [t.model for t in config.teachers] == ["hog", "dinov2"]
    assert [t.weights for t in config.teachers] == ["pretrained", "random:7"]
    assert config.teachers[0].weight == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epoch=5"], "unknown key train.epoch; did you mean train.epochs?"),
        (["lr=1e-3"], "unknown key lr; did you mean train.lr?"),
        (
            ["batch_size=5"],
            "unknown key batch_size; did you mean cache.batch_size or train.batch_size or knn.batch_size",
        ),
        (["trian.epochs=3"], "unknown key trian; did you mean train?"),
        (["qqqq.zzzz=1"], "unknown key qqqq; --help lists every key"),
        (["train=5"], "^train: input should be a valid dictionary, not 5$"),
        (
            ["teachers=[{model: hog, weight: x}]"],
            "^teachers.0.weight: .* valid number.*; teachers.0.weight: .* dictionary, not 'x'$",
        ),
        (["teachers=[hog,"], r"override 'teachers=\[hog,' is not valid YAML .* is quoted for the shell"),
        (["train.epochs=many"], "train.epochs: input should be a valid integer.*not 'many'"),
        (["train.epochs=0"], "train.epochs: input should be greater than or equal to 1, not 0"),
        (["train.lr=.inf"], "train.lr: input should be a finite number"),
        (["cache.precision=int4"], "cache.precision: input should be 'float32' or 'bfloat16', not 'int4'"),
        (["teachers=[]"], "teachers: list should have at least 1 item"),
        (["teachers=[{model: hog, qqqq: 1}]"], "unknown key teachers.0.qqqq; did you mean teachers.0"),
        (
            ["teachers=[hog, hog]", "teachers.1.weigths=x"],
            "unknown key teachers.1.weigths; did you mean teachers.0.weights",
        ),
        (["teachers=[hog]", "teachers.3.weights=x"], "teachers.3: the list has 1 entries, numbered from 0"),
        (["teachers=[{weights: x}]"], r"teachers.0.model must be given"),
        (["loss.patches={}"], "loss.patches: dictionary should have at least 1 item"),
        (["loss.summary={}"], "loss.summary: dictionary should have at least 1 item"),
        (["teachers=[{model: hog, weight: {}}]"], r"teachers.0.weight: .*a schedule has at least one point"),
        (["train.epochs"], "'train.epochs' is neither a recipe"),
        (["train={a: [}"], "is not valid YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(DistillJobConfig, None, overrides)
    assert "\n" not in str(error.value)


def test_none_is_the_absence_of_a_value_as_in_the_help(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loss: {max_patches: none}\ndata.val: photos\nteachers: [hog]\n")
    config = load_config(DistillJobConfig, recipe, ["data.val=none", "teachers.0.codec=none", "train.best_metric=none"])
    assert config.data.val is None
    assert config.loss.max_patches is None
    assert config.teachers[0].codec is None
    assert config.train.best_metric is None


def test_dotted_keys_are_those_of_a_nested_recipe(tmp_path):
    dotted, nested = tmp_path / "dotted.yaml", tmp_path / "nested.yaml"
    dotted.write_text(
        "student.name: regla_s\nteachers: [hog, sam]\nteachers.1.weight: 2\n"
        "phases: [{train: {lr: 0.1}, train.epochs: 28}, {teachers.0.input_size: 64}]\n"
    )
    nested.write_text(
        "student: {name: regla_s}\nteachers: [hog, {model: sam, weight: 2}]\n"
        "phases: [{train: {lr: 0.1, epochs: 28}}, {teachers: {0: {input_size: 64}}}]\n"
    )
    one, other = load_config(DistillJobConfig, dotted), load_config(DistillJobConfig, nested)
    assert one == other
    assert one.fingerprint() == other.fingerprint()
    assert (one.student.name, one.teachers[1].weight) == ("regla_s", 2)
    assert [teacher.input_size for teacher in one.phase_configs()[1].teachers] == [64, None]


@pytest.mark.parametrize("phase", ["{train: {lr: 0.1}, train.epochs: 28}", "{train.epochs: 28, train: {lr: 0.1}}"])
def test_an_override_reaches_a_phase_however_its_fields_are_written(tmp_path, phase):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"phases: [{phase}]\n")
    overrides = ["phases.0.train.epochs=1", "phases.0.loss.drop=0.5"]
    for config in (
        load_config(DistillJobConfig, recipe, overrides),
        load_config(DistillJobConfig, None, [f"phases=[{phase}]", *overrides]),
    ):
        (only,) = config.phase_configs()
        assert (only.train.lr, only.train.epochs, only.loss.drop) == (0.1, 1, 0.5)


def test_a_missing_recipe_names_those_there_are():
    with pytest.raises(UserError, match=r"recipe recipes/none\.yaml does not exist; there are .*quickstart\.yaml"):
        load_config(DistillJobConfig, "recipes/none.yaml")


def test_a_recipe_that_is_no_mapping_or_no_yaml_is_refused(tmp_path):
    for text, message in (("- a\n", "must be a mapping"), ("a: [", "is not valid YAML")):
        recipe = tmp_path / "r.yaml"
        recipe.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(DistillJobConfig, recipe)


def test_held_out_scenes_come_with_generated_training_scenes_only():
    assert load_config(DistillJobConfig, None).data.held_out == "samples"
    assert load_config(DistillJobConfig, None, ["data.train=photos"]).data.held_out is None
    assert load_config(DistillJobConfig, None, ["data.train=photos", "data.val=more"]).data.held_out == "more"
    assert load_config(DistillJobConfig, None, ["data.samples.val=0"]).data.held_out is None


def test_a_recipe_serves_several_jobs_and_each_reads_its_sections():
    recipe = {"train": {"epochs": 3}, "detect.anchor": 8, "finetune": {"task": "detect"}, "student.token_dim": 64}
    assert load_config(DistillJobConfig, recipe).student.token_dim == 64
    config = load_config(FinetuneJobConfig, recipe)
    assert (config.train.epochs, config.detect.anchor) == (3, 8)
    assert not hasattr(config, "classify")
    assert not hasattr(config.student, "token_dim")
    assert "train" not in load_config(PrecomputeJobConfig, recipe).model_dump()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["detect.anchr=8"], "unknown key detect.anchr; did you mean detect.anchor?"),
        (["detect.anchor=0"], "detect.anchor: input should be greater than or equal to 1, not 0"),
        (
            ["finetune.task=dream"],
            "finetune.task: there is no task dream; known are classify, segment, detect, and package.module:Class",
        ),
        (
            ["phases=[{detect.anchor: 8}]"],
            "phases.0: detect.anchor cannot change between phases; a phase may change data,",
        ),
        (["phases=[{train.epohcs: 8}]"], "phases.0: unknown key train.epohcs; did you mean train.epochs?"),
        (["phases=[{train.epochs: 0}]"], "phases.0: train.epochs: input should be greater than or equal to 1, not 0"),
        (["phases=[{seed: 1}]"], "phases.0: seed cannot change between phases"),
    ],
)
@pytest.mark.parametrize("root", [DistillJobConfig, BenchmarkJobConfig])
def test_mistakes_in_fields_of_other_jobs_are_named_too(root, overrides, message):
    with pytest.raises(UserError) as error:
        load_config(root, None, overrides)
    assert message in str(error.value)


def test_an_override_of_another_job_is_one_warning_and_a_recipe_none(caplog):
    load_config(PrecomputeJobConfig, {"loss.drop": 0.5}, ["train.epochs=3", "train.lr=1", "seed=1"])
    assert caplog.messages == ["ignored, since this job does not read them: train.epochs, train.lr"]


def test_fields_may_come_from_python():
    config = load_config(
        DistillJobConfig,
        {"train": {"epochs": 3}, "loss.drop": 0.5},
        {"train.lr": 2, "loss": {"queue": 9}},
    )
    assert (config.train.epochs, config.train.lr, config.loss.drop, config.loss.queue) == (3, 2, 0.5, 9)


@pytest.mark.parametrize(
    "text",
    ["photos #1/train", "a # b", "2024-01-01", "123", "010", "no", "true", "{a,b}.tar", "[x]/y", "a: b", "%20?", "-"],
)
def test_an_override_of_a_string_is_its_text(text):
    keys = ("data.train", "name", "data.label_column", "phases.0.data.val")
    config = load_config(DistillJobConfig, None, ["phases=[{}]", *(f"{key}={text}" for key in keys)])
    assert (config.data.train, config.name, config.data.label_column) == (text, text, text)
    assert config.phase_configs()[0].data.val == text


def test_an_override_may_still_be_quoted_for_yaml_and_a_string_that_may_be_missing_may_be_none():
    config = load_config(DistillJobConfig, None, ["data.train='a #b'", 'work="w"', "data.val=", "data.name=null"])
    assert (config.data.train, config.work, config.data.val, config.data.name) == ("a #b", "w", None, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=010", "train.epochs: input should be a valid integer, not '010'"),
        ("train.epochs=true", "train.epochs: input should be a valid integer, not True"),
        ("train.epochs=2.5", "train.epochs: input should be a valid integer, not 2.5"),
        ("train.epochs='5'", "train.epochs: input should be a valid integer, not '5'"),
        ("train.lr=true", "train.lr: input should be a valid number, not True"),
        ("train.lr=1:30", "train.lr: input should be a valid number, not '1:30'"),
        ("train.compile=1", "train.compile: input should be a valid boolean, not 1"),
        ("train.compile=yes", "train.compile: input should be a valid boolean, not 'yes'"),
        ("train.epochs=5 #6", r"override 'train.epochs=5 #6' is not valid YAML \('#6' follows the value\)"),
        ("teachers=[hog] #x", r"is not valid YAML \('#x' follows the value\)"),
        ("loss.patches={mse: 1, mse: 2}", r"is not valid YAML \(key mse twice\)"),
    ],
)
def test_values_are_of_the_type_that_help_names(override, message):
    with pytest.raises(UserError, match=message):
        load_config(DistillJobConfig, None, [override])


def test_a_number_for_a_string_in_a_recipe_says_how_to_write_it(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: 123\n")
    with pytest.raises(UserError, match="name: input should be a valid string, not 123; write '123' in quotes"):
        load_config(DistillJobConfig, recipe)


def test_workers_may_be_a_list_of_two(tmp_path):
    assert load_config(DistillJobConfig, None, ["train.workers=[2, 8]"]).train.workers == (2, 8)
    with pytest.raises(UserError, match=r"train\.workers"):
        load_config(DistillJobConfig, None, ["train.workers=[true, 8]"])
