"""Messages to MLflow while it answers, is down, or refuses them; no server is needed."""

import json
import pickle
import threading
import time

import pytest
from mlflow.exceptions import MlflowException

from pipeline.errors import UserError
from pipeline.storage.store import Store
from pipeline.tracking import sender as sending
from pipeline.tracking.sender import Sender, retry_until_reachable
from pipeline.tracking.write_buffer import WriteBuffer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(sending, "POLL_S", 0.01)
    monkeypatch.setattr(sending, "LONGEST_PAUSE_S", 0.02)


class Server:
    """Takes messages while it is `up`; what it is asked to refuse, it refuses."""

    def __init__(self):
        self.up, self.taken, self.asked = True, [], 0

    def __call__(self, kind, content):
        self.asked += 1
        if not self.up:
            raise MlflowException("connection refused")
        if content == "refused":
            raise MlflowException.invalid_parameter_value("no such thing")
        self.taken.append((kind, content))


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def box(tmp_path):
    return WriteBuffer(Store.at(tmp_path / "unsent"))


@pytest.fixture
def sender(server, box):
    sender = Sender(box, server, "http://there")
    yield sender
    sender.close()


def test_messages_are_sent_in_order_and_then_deleted(box, server, sender):
    for number in range(20):
        box.append("metrics", number)
    assert sender.flush()
    assert server.taken == [("metrics", number) for number in range(20)]
    assert box.pending() == []


def test_a_server_that_is_down_keeps_nobody_waiting_and_gets_everything_later(box, server, sender, caplog):
    server.up = False
    box.append("metrics", 0)
    assert not sender.flush()
    started = time.monotonic()
    for number in range(1, 50):
        box.append("metrics", number)
        assert not sender.flush()
    assert time.monotonic() - started < sending.WAIT_S
    asked = server.asked
    while server.asked < asked + 3:
        time.sleep(0.01)
    server.up = True
    assert sender.flush(30)
    assert [number for _, number in server.taken] == list(range(50))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2, told
    assert told[0].startswith("MLflow at http://there is unreachable (connection refused); messages are kept in ")
    assert told[1] == "MLflow at http://there answers again"


def test_what_is_refused_is_named_and_does_not_hold_up_the_rest(box, server, sender, caplog):
    box.append("tags", "refused")
    box.append("tags", "taken")
    assert sender.flush()
    assert server.taken == [("tags", "taken")]
    assert "refuses tags: no such thing" in caplog.text


def test_messages_of_another_process_are_found_and_sent(box, server, sender):
    assert sender.flush()
    elsewhere = pickle.loads(pickle.dumps(box))  # noqa: S301
    elsewhere.append("metrics", 1)
    while not server.taken:
        time.sleep(0.01)
    assert server.taken == [("metrics", 1)]


def test_what_was_not_sent_before_the_process_ended_is_sent_by_the_next(box, server):
    server.up = False
    first = Sender(box, server, "")
    box.append("metrics", 1)
    assert not first.flush()
    first.close()
    assert len(box.pending()) == 1
    server.up = True
    second = Sender(box, server, "")
    assert second.flush()
    second.close()
    assert server.taken == [("metrics", 1)]


def test_a_clock_that_is_set_back_changes_no_order(box, monkeypatch):
    times = iter([1000, 400, 400, 2000])
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    for number in range(4):
        box.append("metrics", number)
    assert [box.read(name)[1] for name in box.pending()] == [0, 1, 2, 3]


def test_a_call_that_cannot_wait_for_another_time_waits_for_the_server(monkeypatch):
    answers = iter([MlflowException("down"), MlflowException("down"), 7])

    def call():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert retry_until_reachable("there", call) == 7
    monkeypatch.setattr(sending, "PATIENCE_S", 0.0)

    def down():
        raise OSError("no route")

    with pytest.raises(UserError, match=r"there does not answer \(no route\); nothing is lost: .*the same command"):
        retry_until_reachable("there", down)
    with pytest.raises(MlflowException, match="gone"):
        retry_until_reachable("there", lambda: _raise(MlflowException.invalid_parameter_value("gone")))


def _raise(error):
    raise error


def test_two_concurrent_writers_lose_nothing(box, server, sender):
    threads = [threading.Thread(target=lambda: [box.append("m", n) for n in range(25)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sender.flush(30)
    assert sorted(number for _, number in server.taken) == sorted([*range(25)] * 2)


def test_a_message_is_json(box, tmp_path):
    box.append("text", ["line", "path"])
    (file,) = (tmp_path / "unsent").iterdir()
    assert json.loads(file.read_text()) == {"kind": "text", "content": ["line", "path"]}
