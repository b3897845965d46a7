"""In a process in which Triton interprets, what says nothing of a backend is left out."""

from fastgrpo_kernels.runtime import INTERPRETED

OTHERS = ("test_matrix.py", "test_refusals.py", "test_gradients.py", "test_soak.py")
collect_ignore = list(OTHERS) if INTERPRETED else []
