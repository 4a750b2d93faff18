"""Arguments of a launch, as the driver reads them: an array of addresses, each of a value of its kind."""

import ctypes
import threading

import torch

from mergequant.ops.cuda import launch
from mergequant.ops.cuda.launch import Argument, Long, TensorMap

READ = {"pointer": ctypes.c_uint64, "long": ctypes.c_int64, "int": ctypes.c_int32, "float": ctypes.c_float}


def read(address: int, *kinds: str) -> list[int | float | bytes]:
    """What a kernel with parameters of these kinds would get."""
    pointers = (ctypes.c_void_p * len(kinds)).from_address(address)
    found: list[int | float | bytes] = []
    for place, kind in zip(pointers, kinds):
        assert place is not None
        if kind == "map":
            assert place % launch.TENSOR_MAP_ALIGNMENT == 0
            found.append(ctypes.string_at(place, launch.TENSOR_MAP_BYTES))
        else:
            assert place % ctypes.sizeof(READ[kind]) == 0
            found.append(READ[kind].from_address(place).value)
    return found


def test_arguments_expect_each_value_where_its_address_says() -> None:
    tensor, parameter = torch.zeros(3), torch.nn.Parameter(torch.ones(5))
    first, second = TensorMap(bytes(range(128)), tensor), TensorMap(bytes(range(127, -1, -1)), tensor)
    args: list[Argument] = [7, first, tensor, None, -3, 0.5, parameter, second, Long(-(1 << 40)), 1 << 30]
    kinds = ("int", "map", "pointer", "pointer", "int", "float", "pointer", "map", "long", "int")
    wanted = [7, first.data, tensor.data_ptr(), 0, -3, 0.5, parameter.data_ptr(), second.data, -(1 << 40), 1 << 30]
    assert read(launch._arguments(args), *kinds) == wanted
    args[0], args[2] = 8, None
    assert read(launch._arguments(args), *kinds) == [8, first.data, 0, *wanted[3:]]
    assert launch._arguments([])


def test_arguments_of_two_threads_expect_memory_of_their_own() -> None:
    mine, found = launch._arguments([1, 2]), list[int]()
    other = threading.Thread(target=lambda: found.append(launch._arguments([3, 4])))
    other.start()
    other.join()
    assert found[0] != mine
    assert read(mine, "int", "int") == [1, 2]
