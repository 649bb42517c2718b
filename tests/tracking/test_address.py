"""What an address must not hold."""

import os

import pytest

from pipeline.errors import UserError
from pipeline.tracking.address import resolve_uri

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD")


@pytest.fixture
def environment(monkeypatch):
    """Only these variables, put back afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # or monkeypatch would not know that it is to be put back
        monkeypatch.delenv(name)
    return lambda: {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_a_password_of_a_server_moves_to_the_variables_that_mlflow_reads(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s%40cret@there:5000/base")
    for _ in range(2):
        assert resolve_uri(None, tmp_path) == "https://there:5000/base"
    assert environment() == {
        "MLFLOW_TRACKING_URI": "https://there:5000/base",
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "s@cret",
    }


def test_a_password_of_a_database_moves_to_the_variable_that_its_driver_reads(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://me:secret@there:5432/mlflow?sslmode=require")
    assert resolve_uri(None, tmp_path) == "postgresql+psycopg2://me@there:5432/mlflow?sslmode=require"
    assert environment()["PGPASSWORD"] == "secret"
    assert "secret" not in environment()["MLFLOW_TRACKING_URI"]


@pytest.mark.parametrize(
    "uri", ["mysql://me:hunter2@there/mlflow", "postgresql://there/mlflow?user=me&password=hunter2"]
)
def test_a_password_that_cannot_be_taken_out_is_refused_and_not_repeated(environment, tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="PGPASSWORD") as refused:
        resolve_uri(None, tmp_path)
    assert "hunter2" not in str(refused.value)


def test_an_address_without_a_password_stays_as_it_is(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert resolve_uri(None, tmp_path) == "http://there:5000"
    assert environment() == {"MLFLOW_TRACKING_URI": "http://there:5000"}


def test_a_password_is_refused_under_the_name_of_where_it_was_given(environment, tmp_path):
    with pytest.raises(UserError, match=r"^--tracking-uri: a password in an address is refused"):
        resolve_uri("https://me:secret@there:5000", tmp_path, "--tracking-uri")


def test_the_store_is_the_configured_one_then_the_environment_s_then_the_work_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert resolve_uri("http://here:5000", tmp_path) == "http://here:5000"
    assert resolve_uri(None, tmp_path) == "http://there:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("uri", ["http://me:secret@there:5000", "postgresql://me:secret@there/mlflow"])
def test_a_password_in_the_configuration_is_refused_and_not_repeated(tmp_path, uri):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        resolve_uri(uri, tmp_path)
    assert "secret" not in str(refused.value)
