"""The measurements of `gpu.py`, one module each."""
