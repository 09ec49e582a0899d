"""Device memory and launches of kernels on a machine without a GPU."""

from __future__ import annotations

import ctypes
import struct
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from tests.gpu_emulation.build import EmulationError, Kernel, kernel, runtime_library
from tests.gpu_emulation.ptx import TYPE_BYTES
from tests.gpu_emulation.translate import KernelParameter, short_opcode

Order = Literal["forward", "reverse"] | int

# the bits of shadow.h's ByteState
_OWNED, _WRITTEN = 1, 2
# a launch specialises on addresses modulo 16, so a copy keeps them
_KEPT_ALIGNMENT = 16

_lock = threading.RLock()


class _Traffic(ctypes.Structure):
    _fields_ = [
        ("site", ctypes.c_uint32),
        ("is_shared", ctypes.c_bool),
        ("is_write", ctypes.c_bool),
        ("requests", ctypes.c_uint64),
        ("passes", ctypes.c_uint64),
        ("ideal", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Traffic:
    """Warps' requests of one instruction. `passes` are those over the banks of shared memory (more than `ideal` are
    bank conflicts), or the 32-byte sectors of global memory."""

    where: str
    space: Literal["shared", "global"]
    is_write: bool
    requests: int
    passes: int
    ideal: int


@dataclass(frozen=True)
class Counts:
    """What a launch executed. `instructions` are thread-instructions by the first two parts of the opcode, and
    `opcodes` by the whole of it; those whose predicate was false count too, as they are issued."""

    instructions: dict[str, int]
    opcodes: dict[str, int]
    total: int
    seconds: float
    blocks: int
    traffic: tuple[Traffic, ...] = field(default=(), repr=False)


@dataclass
class _Allocation:
    region: int
    begin: int
    bytes: int


class Memory:
    """Device memory: each tensor between pages that fault, with its bytes' states for the checker."""

    def __init__(self) -> None:
        self._library = runtime_library()
        _declare(self._library)
        self._allocations: list[_Allocation] = []
        # a struct may hold the address of a tensor that nothing else refers to
        self._tensors: list[Tensor] = []

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kernels may not access the tensors any more; the host still may."""
        with _lock:
            for allocation in self._allocations:
                self._library.gpu_emulation_retire(allocation.region)
                _live.pop(allocation.begin)
            self._allocations.clear()
            self._tensors.clear()

    def copy(self, tensor: Tensor) -> Tensor:
        """A tensor of the same sizes, strides and values, whose memory counts as written."""
        tensor = tensor.detach()
        copied = self._allocate(tensor, tensor.data_ptr() % _KEPT_ALIGNMENT)
        _copy_elements(tensor, copied)
        self.mark_written(copied)
        return copied

    def empty(self, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of NaNs, or of ones in every bit, that a kernel must write before it reads."""
        return self._allocate(torch.empty(tuple(size), dtype=dtype, device="meta"), 0)

    def mark_written(self, tensor: Tensor) -> None:
        """What the host wrote into a tensor of this memory; `copy` does so by itself."""
        if tensor.numel() == 0:
            return
        allocation = _find(tensor)
        states = self._states(allocation)
        _bytes_of(states, tensor, allocation.begin)[...] |= _WRITTEN
        self._library.gpu_emulation_set_state(allocation.region, states.ctypes.data)

    def written(self, tensor: Tensor) -> Tensor:
        """Which elements have been written in all their bytes. Only launches with check=True note what they write."""
        if tensor.numel() == 0:
            return torch.empty_like(tensor, dtype=torch.bool)
        allocation = _find(tensor)
        states = _bytes_of(self._states(allocation), tensor, allocation.begin)
        return torch.from_numpy(numpy.asarray(((states & _WRITTEN) != 0).all(axis=-1)))

    def _states(self, allocation: _Allocation) -> numpy.ndarray:
        states = numpy.empty(allocation.bytes, numpy.uint8)
        self._library.gpu_emulation_get_state(allocation.region, states.ctypes.data)
        return states

    def _allocate(self, like: Tensor, offset: int) -> Tensor:
        if like.device.type not in ("cpu", "meta"):
            raise ValueError(f"expected a tensor of the CPU, got one of {like.device}")
        size = _span(like) * like.element_size() + offset
        begin, mapped, mapped_bytes = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
        with _lock:
            region = self._library.gpu_emulation_allocate(
                size, ctypes.byref(begin), ctypes.byref(mapped), ctypes.byref(mapped_bytes)
            )
            if not region:
                raise EmulationError(self._library.gpu_emulation_message().decode())
            address = int(begin.value or 0)
            allocation = _Allocation(region, address, size)
            self._allocations.append(allocation)
            _live[address] = allocation
        # an empty tensor still has an address
        buffer = (ctypes.c_char * max(size, offset + like.element_size())).from_address(address)
        weakref.finalize(buffer, self._library.gpu_emulation_unmap, mapped.value, mapped_bytes.value)
        tensor = (
            torch.frombuffer(buffer, dtype=torch.uint8)[offset:].view(like.dtype).as_strided(like.shape, like.stride())
        )
        states = numpy.zeros(size, numpy.uint8)
        _bytes_of(states, tensor, address)[...] = _OWNED
        self._library.gpu_emulation_set_state(region, states.ctypes.data)
        self._tensors.append(tensor)
        return tensor


# by address, of all memories
_live: dict[int, _Allocation] = {}


def _find(tensor: Tensor) -> _Allocation:
    found = _find_or_none(tensor)
    if found is None:
        raise ValueError("expected a tensor of a Memory")
    return found


def _find_or_none(tensor: Tensor) -> _Allocation | None:
    address = tensor.data_ptr()
    for allocation in _live.values():
        if allocation.begin <= address < allocation.begin + max(allocation.bytes, 1):
            return allocation
    return None


def _span(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last, with what lies between."""
    if tensor.numel() == 0:
        return 0
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def _bytes_of(states: numpy.ndarray, tensor: Tensor, begin: int) -> numpy.ndarray:
    """The states of a tensor's bytes, of those from address `begin`, with a last dimension of an element's bytes."""
    size = tensor.element_size()
    strides = (*(stride * size for stride in tensor.stride()), 1)
    shape = (*tensor.shape, size)
    if tensor.numel() == 0:
        return numpy.empty(shape, numpy.uint8)
    return numpy.lib.stride_tricks.as_strided(states[tensor.data_ptr() - begin :], shape, strides)


def _copy_elements(source: Tensor, destination: Tensor) -> None:
    """Between tensors of equal sizes and strides, as an expanded tensor's may be; not what lies between elements."""
    owned = numpy.zeros(_span(source) * source.element_size(), numpy.uint8)
    _bytes_of(owned, source, source.data_ptr())[...] = 1
    spans = [
        torch.as_strided(tensor, (_span(tensor),), (1,), tensor.storage_offset()).view(torch.uint8).numpy()
        for tensor in (source, destination)
    ]
    numpy.copyto(spans[1], spans[0], where=owned.astype(bool))


def _declare(library: ctypes.CDLL) -> None:
    library.gpu_emulation_allocate.restype = ctypes.c_void_p
    library.gpu_emulation_allocate.argtypes = [ctypes.c_size_t, *[ctypes.c_void_p] * 3]
    library.gpu_emulation_retire.argtypes = [ctypes.c_void_p]
    library.gpu_emulation_unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.gpu_emulation_label.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    for name in ("gpu_emulation_set_state", "gpu_emulation_get_state"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.gpu_emulation_message.restype = ctypes.c_char_p
    library.gpu_emulation_launch.restype = ctypes.c_char_p
    library.gpu_emulation_launch.argtypes = [
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_uint32 * 3] * 2,
        ctypes.c_uint32,
        ctypes.c_uint64,
        *[ctypes.c_bool] * 4,
    ]
    library.gpu_emulation_traffic.restype = ctypes.c_uint32
    library.gpu_emulation_traffic.argtypes = [ctypes.c_void_p, ctypes.c_uint32]


def _pack(value: Any, parameter: KernelParameter) -> bytes:
    """The bytes of an argument that is not a tensor."""
    expected = f"parameter {parameter.name} (.{parameter.type}, {parameter.bytes} bytes)"
    if isinstance(value, bytes):
        if len(value) != parameter.bytes:
            raise EmulationError(f"{expected} got {len(value)} bytes")
        return value
    if isinstance(value, bool | int | float) and parameter.bytes == TYPE_BYTES[parameter.type]:
        width = parameter.bytes * 8
        if isinstance(value, float):
            formats = {"f32": "<f", "b32": "<f", "f64": "<d", "b64": "<d", "f16": "<e", "b16": "<e"}
            if parameter.type in formats:
                return struct.pack(formats[parameter.type], value)
        elif parameter.type.startswith("f"):
            return struct.pack({"f32": "<f", "f64": "<d", "f16": "<e"}[parameter.type], float(value))
        elif -(1 << (width - 1)) <= value < (1 << width):
            return (int(value) & ((1 << width) - 1)).to_bytes(parameter.bytes, "little")
    raise EmulationError(f"{expected} cannot take {type(value).__name__} {value!r}")


def _arguments(compiled: Kernel, args: Sequence[Any], memory: Memory) -> tuple[bytes, list[tuple[Tensor, Tensor]]]:
    """The parameters' bytes, and the tensors that were copied in, which are to be copied back."""
    if len(args) != len(compiled.parameters):
        names = ", ".join(parameter.name for parameter in compiled.parameters)
        raise EmulationError(f"expected {len(compiled.parameters)} arguments ({names}), got {len(args)}")
    packed = bytearray(compiled.parameter_bytes)
    copies: list[tuple[Tensor, Tensor]] = []
    for number, (value, parameter) in enumerate(zip(args, compiled.parameters, strict=True)):
        if isinstance(value, Tensor):
            if parameter.bytes != 8:
                raise EmulationError(f"parameter {parameter.name} of {parameter.bytes} bytes cannot take a tensor")
            # torch gives tensors without elements a null pointer
            allocation = _find_or_none(value)
            if allocation is None and value.numel():
                earlier = [copy for original, copy in copies if _same_memory(original, value)]
                copy = earlier[0] if earlier else memory.copy(value)
                copies.append((value, copy))
                value = copy
                allocation = _find(copy)
            if allocation is not None:
                runtime_library().gpu_emulation_label(allocation.region, f"argument {number}".encode())
            data = value.data_ptr().to_bytes(8, "little")
        else:
            data = _pack(value, parameter)
        packed[parameter.offset : parameter.offset + parameter.bytes] = data
    return bytes(packed), copies


def _same_memory(first: Tensor, second: Tensor) -> bool:
    return (first.data_ptr(), first.shape, first.stride(), first.dtype) == (
        second.data_ptr(),
        second.shape,
        second.stride(),
        second.dtype,
    )


def _order(order: Order) -> int:
    if isinstance(order, str):
        if order not in ("forward", "reverse"):
            raise ValueError(f"expected an order of forward, reverse or a seed, got {order!r}")
        return ("forward", "reverse").index(order)
    # the runtime's 0 and 1 are the orders with names
    return 2 + order


def emulate(
    ptx: str,
    kernel_name: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int = 0,
    args: Sequence[Any] = (),
    order: Order = "forward",
    check: bool = True,
    mma: Literal["exact", "truncating"] = "exact",
    allow_unordered: bool = False,
    allow_equal_writes: bool = False,
) -> Counts:
    """Runs a kernel of a PTX text, block after block.

    args: a Tensor is a pointer to its data, and one that is not of a Memory is copied in and back; an int, float or
    bool takes the parameter's type; bytes are a struct.
    shared_bytes: of dynamic shared memory.
    order: that of threads and blocks; a seed shuffles them.
    check: whether the checker watches each access.
    mma: "truncating" sums products pessimistically.
    allow_unordered: whether several threads may add floats to one address in any order.
    allow_equal_writes: whether several threads may write the same bytes to one address of shared memory by the same
    instruction, as code that Triton generates does.
    """
    compiled = kernel(ptx, kernel_name)
    with _lock, Memory() as memory:
        try:
            parameters, copies = _arguments(compiled, args, memory)
        except EmulationError as unfit:
            raise EmulationError(f"{kernel_name}: {unfit}") from None
        library = runtime_library()
        dimensions = [(ctypes.c_uint32 * 3)(*size) for size in (grid, block)]
        begin = time.perf_counter()
        error = library.gpu_emulation_launch(
            compiled.module,
            parameters,
            *dimensions,
            shared_bytes,
            _order(order),
            check,
            mma == "truncating",
            allow_unordered,
            allow_equal_writes,
        )
        seconds = time.perf_counter() - begin
        if error is not None:
            raise EmulationError(error.decode())
        for original, copy in copies:
            _copy_elements(copy, original.detach())
        return _counts(compiled, seconds, grid[0] * grid[1] * grid[2], _read_traffic(compiled) if check else ())


def _read_traffic(compiled: Kernel) -> tuple[Traffic, ...]:
    entries = (_Traffic * len(compiled.sites))()
    count = runtime_library().gpu_emulation_traffic(entries, len(entries))
    return tuple(
        Traffic(
            compiled.sites[entry.site],
            "shared" if entry.is_shared else "global",
            entry.is_write,
            entry.requests,
            entry.passes,
            entry.ideal,
        )
        for entry in entries[:count]
    )


def _counts(compiled: Kernel, seconds: float, blocks: int, traffic: tuple[Traffic, ...]) -> Counts:
    opcodes: Counter[str] = Counter()
    for opcodes_of_block, executed in zip(compiled.blocks, compiled.block_counts(), strict=True):
        if executed:
            for opcode in opcodes_of_block:
                opcodes[opcode] += executed
    instructions: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        instructions[short_opcode(opcode)] += count
    return Counts(dict(instructions), dict(opcodes), opcodes.total(), seconds, blocks, traffic)
