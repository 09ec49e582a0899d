"""Triton kernels, imported as `lcattn.triton_kernels`; each module holds one kernel and its launcher."""
