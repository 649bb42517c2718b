import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.imaging.shared_arrays import ArrayPool, SharedArrayPool


def test_memory_is_lent_again_only_when_every_tensor_of_it_is_gone():
    pool = ArrayPool()
    array = pool.empty(4, 8)
    address = array.ctypes.data
    tensor = torch.from_numpy(array)
    row = tensor[1]
    del array, tensor
    assert pool.empty(4, 8).ctypes.data != address
    pool = ArrayPool()
    array = pool.empty(4, 8)
    address = array.ctypes.data
    row = torch.from_numpy(array)[1]
    del array, row
    assert pool.empty(4, 8).ctypes.data == address


def test_another_shape_is_other_memory():
    pool = ArrayPool()
    first = pool.empty(2, 2)
    address = first.ctypes.data
    del first
    other = pool.empty(4, 1)
    assert other.shape == (4, 1)
    assert other.ctypes.data != address


@pytest.mark.skipif(sys.platform != "linux", reason="there is no memory to share")
def test_places_are_right_while_other_threads_make_more():
    pool, interval = SharedArrayPool(), sys.getswitchinterval()
    known = [pool.empty(64) for _ in range(20)]
    due = [pool.handle(array) for array in known]

    def look(_):
        return all([pool.handle(array) for array in known] == due for _ in range(150))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            seen = threads.map(look, range(3))
            more = [pool.empty(64) for _ in range(300)]
            assert all(seen)
    finally:
        sys.setswitchinterval(interval)
    assert len({(place.file, place.start) for place in map(pool.handle, more)}) == 300
