import os
import socket

import pytest

from pipeline.errors import UserError
from pipeline.ray_session import connect, is_submitted_job


def test_an_address_that_nothing_listens_on_is_an_error_at_once(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address} cannot be reached"), connect():
        pass


@pytest.mark.usefixtures("ray_session")
def test_within_an_open_session_that_one_is_used_and_stays():
    import ray

    node = ray.get_runtime_context().get_node_id()
    with connect():
        assert ray.get_runtime_context().get_node_id() == node
    assert ray.is_initialized()


@pytest.mark.usefixtures("ray_session")
def test_workers_import_this_checkout_and_see_what_the_session_set():
    import ray

    @ray.remote
    def look():
        import pipeline

        return pipeline.__path__[0], os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"]

    import pipeline

    assert ray.get(look.remote()) == (pipeline.__path__[0], "0")


@pytest.mark.parametrize("variable", ["RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_SUBMISSION_ID"])
def test_a_submitted_job_is_known_by_its_environment(monkeypatch, variable):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.delenv("RAY_JOB_SUBMISSION_ID", raising=False)
    assert not is_submitted_job()
    monkeypatch.setenv(variable, "x")
    assert is_submitted_job()


def test_the_drivers_own_warnings_are_still_shown(ray_session):
    import logging

    assert logging.getLogger("pipeline").isEnabledFor(logging.WARNING)
