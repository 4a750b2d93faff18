"""Triton versions of ops: importable where Triton is installed, and called by the ops of the same names."""
