import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.runtime.prefetch import map_ahead


def test_results_come_in_order_and_work_stays_bounded():
    lock, running = threading.Lock(), {"taken": 0, "given": 0, "most": 0}

    def items():
        for number in range(50):
            with lock:
                running["taken"] += 1
                running["most"] = max(running["most"], running["taken"] - running["given"])
            yield number

    with ThreadPoolExecutor(4) as pool:
        for number, square in enumerate(map_ahead(pool, lambda n: n * n, items(), ahead=3)):
            assert square == number**2
            with lock:
                running["given"] += 1
    assert running["given"] == 50
    assert running["most"] <= 5


def test_an_error_is_raised_where_its_result_is_used():
    with ThreadPoolExecutor(2) as pool:
        results = map_ahead(pool, lambda n: 1 // n, [1, 0, 1], ahead=2)
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_pending_work_is_cancelled_when_the_consumer_stops():
    started = []
    gate = threading.Event()

    def work(number):
        started.append(number)
        gate.wait(5)
        return number

    with ThreadPoolExecutor(1) as pool:
        results = map_ahead(pool, work, range(10), ahead=4)
        gate.set()
        next(results)
        gate.clear()
        results.close()
        gate.set()
    assert len(started) < 10
