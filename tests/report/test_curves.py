from pipeline.report.curves import by_epoch, read_curves


def test_curves_are_those_of_the_file_at_the_epochs_of_their_steps(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 0, "knn": 10.0}\n'
        '{"step": 3, "loss": 2.0, "epoch": 0.5}\n'
        '{"step": 6, "loss": 1.0, "epoch": 1.0}\n'
        '{"step": 6, "knn": 20.0}\n'
        "[1]\n"
        '{"step": 12, "lo'
    )
    curves = read_curves(file)
    assert curves == {"knn": {0: 10.0, 6: 20.0}, "loss": {3: 2.0, 6: 1.0}, "epoch": {3: 0.5, 6: 1.0}}
    assert by_epoch(curves, "knn") == ((0.0, 10.0), (1.0, 20.0))
    assert by_epoch(curves, "loss") == ((0.5, 2.0), (1.0, 1.0))
    assert by_epoch(curves, "unknown") == ()


def test_a_run_without_the_file_has_no_curves(tmp_path):
    assert read_curves(tmp_path / "metrics.jsonl") == {}
