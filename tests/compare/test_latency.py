from pipeline.compare.latency import find_latencies
from pipeline.tracking.reading import LoggedRun

STUDENTS = {"regla_t": {"64 px"}, "regla_s": {"64 px"}}


def benchmark(metrics, name="bench"):
    params = {"benchmark.device": "cpu", "benchmark.threads": "2"}
    return LoggedRun(
        name, name, None, "FINISHED", 0, params, {}, {f"{key}/ms": value for key, value in metrics.items()}, {}
    )


def test_the_setting_that_covers_the_most_students_is_taken_for_all():
    wide = {"regla_t/onnx/float32/1x512": 9.0, "regla_s/onnx/float32/1x512": 12.0}
    narrow = {"regla_t/fused/float32/1x64": 1.0}
    found = find_latencies([benchmark(wide), benchmark(narrow, "later")], STUDENTS)
    assert found.milliseconds == {"regla_t": 9.0, "regla_s": 12.0}
    assert found.setting == "onnx, 512 px, batch 1, float32, CPU, 2 thread(s), run bench"


def test_the_students_own_size_then_the_fused_form_then_the_latest_run_decide():
    sizes = {"regla_t/onnx/float32/1x64": 1.0, "regla_t/fused/float32/1x512": 9.0}
    assert find_latencies([benchmark(sizes)], STUDENTS).milliseconds == {"regla_t": 1.0}
    forms = {"regla_t/eager/float32/1x64": 3.0, "regla_t/fused/float32/1x64": 2.0, "regla_t/fused/float32/8x64": 5.0}
    assert find_latencies([benchmark(forms)], STUDENTS).milliseconds == {"regla_t": 2.0}
    again = [benchmark({"regla_t/fused/float32/1x64": value}) for value in (2.0, 2.5)]
    assert find_latencies(again, STUDENTS).milliseconds == {"regla_t": 2.5}


def test_no_benchmark_of_these_students_gives_nothing():
    assert find_latencies([], STUDENTS) is None
    assert find_latencies([benchmark({"resnet18/fused/float32/1x64": 1.0, "loss": 2.0})], STUDENTS) is None
