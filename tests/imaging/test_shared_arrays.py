import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.imaging.shared_arrays import ArrayPool, AttachedArrays, SharedArrayPool


def test_memory_is_reused_only_after_every_tensor_is_gone():
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


def test_another_shape_gets_other_memory():
    pool = ArrayPool()
    first = pool.empty(2, 2)
    address = first.ctypes.data
    del first
    other = pool.empty(4, 1)
    assert other.shape == (4, 1)
    assert other.ctypes.data != address


@pytest.mark.skipif(sys.platform != "linux", reason="memfd_create is Linux only")
def test_handles_are_right_while_other_threads_allocate():
    pool, interval = SharedArrayPool(), sys.getswitchinterval()
    known = [pool.empty(64) for _ in range(20)]
    expected = [pool.handle(array) for array in known]

    def look_up(_):
        return all([pool.handle(array) for array in known] == expected for _ in range(150))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            seen = threads.map(look_up, range(3))
            more = [pool.empty(64) for _ in range(300)]
            assert all(seen)
    finally:
        sys.setswitchinterval(interval)
    assert len({(handle.file, handle.start) for handle in map(pool.handle, more)}) == 300


def test_a_handle_attaches_the_same_memory():
    pool, attached = SharedArrayPool(), AttachedArrays()
    arrays = [pool.empty(3, 5, 7), pool.empty(2, 4), pool.empty(3, 5, 7)]
    for number, array in enumerate(arrays):
        array[:] = number
        attached.array(pool.handle(array[1]))[:] = 100 + number
        assert (array[1] == 100 + number).all()
        assert (array[0] == number).all()
    files = pool.files
    del pool
    for file in files:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)
