import torch

from pipeline.recycle import ArrayPool


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
