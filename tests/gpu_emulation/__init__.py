"""Runs GPU kernels, as PTX, on a machine without a GPU: each CUDA thread is a fiber, and a checker watches memory.

    with Memory() as memory:
        x = memory.copy(torch.randn(64))
        y = memory.empty((64,))
        counts = emulate(ptx, "kernel", grid=(1, 1, 1), block=(64, 1, 1), args=[x, y])

PTX becomes C++ (translate.py), which runs on the library in runtime/. That emulates neither ptxas nor the hardware: a
kernel that passes is verified at the level of PTX only.
"""

from tests.gpu_emulation.build import EmulationError
from tests.gpu_emulation.emulate import Counts, Memory, Traffic, emulate

__all__ = ["Counts", "EmulationError", "Memory", "Traffic", "emulate"]
