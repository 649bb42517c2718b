import pytest

from pipeline.config.load import Config, describe_fields, iter_fields, load_config
from pipeline.errors import UserError


def test_a_recipe_then_overrides_in_order(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: a\nteachers: [hog, {model: dinov2, weights: random}]\ntrain: {epochs: 3}\n")
    config = load_config(
        recipe, ["train.epochs=5", "train.epochs=6", "teachers.1.weights=random:7", "teachers.0.weight=0.5"]
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
        (["teachers=[hog]", "teachers.3.weights=x"], "teachers.3: the list has 1 entries, numbered from 0"),
        (["teachers=[{weights: x}]"], r"teachers.0.model must be given"),
        (["loss.patches={}"], "loss.patches: dictionary should have at least 1 item"),
        (["loss.summary={}"], "loss.summary: dictionary should have at least 1 item"),
        (["teachers=[{model: hog, weight: {}}]"], r"teachers.0.weight: .*a schedule has one point at least"),
        (["train.epochs"], "'train.epochs' is neither a recipe"),
        (["train={a: [}"], "is not valid YAML"),
    ],
)
def test_mistakes_are_named_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(None, overrides)
    assert "\n" not in str(error.value)


def test_none_is_the_absence_of_a_value_as_in_the_help(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loss: {max_patches: none}\ndata.val: photos\nteachers: [hog]\n")
    config = load_config(recipe, ["data.val=none", "teachers.0.codec=none", "train.best_metric=none"])
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
    one, other = load_config(dotted), load_config(nested)
    assert one == other
    assert one.fingerprint() == other.fingerprint()
    assert (one.student.name, one.teachers[1].weight) == ("regla_s", 2)
    assert [teacher.input_size for teacher in one.phase_configs()[1].teachers] == [64, None]


@pytest.mark.parametrize("phase", ["{train: {lr: 0.1}, train.epochs: 28}", "{train.epochs: 28, train: {lr: 0.1}}"])
def test_an_override_reaches_a_phase_however_its_fields_are_written(tmp_path, phase):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"phases: [{phase}]\n")
    overrides = ["phases.0.train.epochs=1", "phases.0.loss.drop=0.5"]
    for config in (load_config(recipe, overrides), load_config(None, [f"phases=[{phase}]", *overrides])):
        (only,) = config.phase_configs()
        assert (only.train.lr, only.train.epochs, only.loss.drop) == (0.1, 1, 0.5)


def test_a_missing_recipe_names_those_there_are():
    with pytest.raises(UserError, match=r"recipe recipes/none\.yaml does not exist; there are .*quickstart\.yaml"):
        load_config("recipes/none.yaml")


def test_a_recipe_that_is_no_mapping_or_no_yaml_is_refused(tmp_path):
    for text, message in (("- a\n", "must be a mapping"), ("a: [", "is not valid YAML")):
        recipe = tmp_path / "r.yaml"
        recipe.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(recipe)


def test_every_field_has_a_meaning_and_help_lists_it():
    fields = list(iter_fields())
    assert all(meaning for *_, meaning in fields)
    text = describe_fields()
    assert all(key in text for key, *_ in fields)
    assert "train.epochs" in text


def test_held_out_scenes_come_with_generated_training_scenes_only():
    assert load_config(None).data.held_out == "samples"
    assert load_config(None, ["data.train=photos"]).data.held_out is None
    assert load_config(None, ["data.train=photos", "data.val=more"]).data.held_out == "more"
    assert load_config(None, ["data.samples.val=0"]).data.held_out is None


def test_fingerprint_changes_with_what_is_computed_and_not_with_where():
    base = Config().fingerprint()
    assert load_config(None, ["work=/elsewhere", "tracking.experiment=x"]).fingerprint() == base
    assert load_config(None, ["seed=1"]).fingerprint() != base
    assert load_config(None, ["train.lr=2e-3"]).fingerprint() != base
