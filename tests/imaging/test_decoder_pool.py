import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.imaging.crop import crop_and_pad, crop_and_resize
from pipeline.imaging.decode import decode_pixels
from pipeline.imaging.decoder_pool import ATTEMPTS, MIN_CHUNK, CropTask, DecoderPool
from pipeline.imaging.geometry import FULL, View

VIEWS = (FULL, View((0.1, 0.2, 0.8, 0.9)), View((0.0, 0.5, 0.5, 1.0), flip=True))


def _files(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        sink = io.BytesIO()
        cells = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        cells.resize((60, 50), Image.Resampling.BICUBIC).save(sink, "jpeg")
        yield sink.getvalue()


def _submit_all(decoders, files):
    pixels = decoders.arrays.empty(len(files) * len(VIEWS), 3, 24, 32)
    rows = decoders.arrays.row_targets(pixels)
    work = [
        (data, [CropTask(view, "bicubic", rows[i * len(VIEWS) + j]) for j, view in enumerate(VIEWS)])
        for i, data in enumerate(files)
    ]
    pieces = range(0, len(work), MIN_CHUNK)
    return pixels, [decoders.submit(work[first : first + MIN_CHUNK]) for first in pieces]


def _expected(files):
    return np.stack(
        [crop_and_resize(decode_pixels(data), view, (24, 32), "bicubic") for data in files for view in VIEWS]
    )


@pytest.fixture(scope="module", params=[False, True], ids=["threads", "processes"])
def decoders(request):
    return DecoderPool(2, request.param)


def test_each_view_is_written_to_its_target(decoders):
    files = list(_files(20))
    for _ in range(3):  # the last ones into memory that was lent before
        pixels, pending = _submit_all(decoders, files)
        decoders.finish(pending)
        assert np.array_equal(pixels, _expected(files))


def test_one_decoding_serves_squashed_and_padded_views(decoders):
    data = next(_files(1))
    targets = [decoders.arrays.empty(1, channels, 24, 24) for channels in (3, 4)]
    crops = [CropTask(VIEWS[1], "bilinear", decoders.arrays.row_targets(target)[0]) for target in targets]
    decoders.decode([(data, crops)])
    for crop, target in zip((crop_and_resize, crop_and_pad), targets, strict=True):
        assert np.array_equal(target[0], crop(decode_pixels(data), VIEWS[1], (24, 24), "bilinear"))


def test_several_threads_can_use_it(decoders):
    sets = [[data] * 9 for data in _files(6)]

    def run(files):
        pixels, pending = _submit_all(decoders, files)
        decoders.finish(pending)
        return np.array_equal(pixels, _expected(files))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, sets))


def test_a_damaged_image_is_reported_after_the_rest_is_done(decoders):
    files = list(_files(40))
    pixels, pending = _submit_all(decoders, [*files[:20], files[20][:200], *files[21:]])
    with pytest.raises(UserError, match=r"an image in the cache cannot be decoded: .*; an earlier version accepted it"):
        decoders.finish(pending)
    assert np.array_equal(pixels[-3 * len(VIEWS) :], _expected(files[-3:]))


def test_work_of_a_killed_process_is_repeated():
    decoders, files = DecoderPool(2, processes=True), list(_files(64))
    pixels, pending = _submit_all(decoders, files)
    for process in list(decoders.pool._processes.values()):
        os.kill(process.pid, signal.SIGKILL)
    decoders.finish(pending)
    assert np.array_equal(pixels, _expected(files))
    pixels, pending = _submit_all(decoders, files[::-1])
    decoders.finish(pending)
    assert np.array_equal(pixels, _expected(files[::-1]))


def test_attempts_are_limited_when_processes_are_killed_repeatedly(monkeypatch):
    decoders, given = DecoderPool(1, processes=True), []
    monkeypatch.setattr(decoders, "_submit", lambda tasks: given.append(tasks) or decoders._start().submit(os._exit, 1))
    with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
        decoders.finish([decoders.submit([])])
    assert len(given) == ATTEMPTS
