"""Benchmarks: `python -m bench` in the source tree, `python -m lcattn.bench` elsewhere."""
