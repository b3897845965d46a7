"""In a process in which Triton interprets, what says nothing of a backend is left out."""

from fastgrpo_kernels.runtime import INTERPRETED

OF_BACKENDS = ("test_tokens.py", "test_operands.py", "test_values.py")
OTHERS = ("test_matrix.py", "test_autograd_rows.py", "test_models.py", "test_soak.py")
collect_ignore = list(OTHERS) if INTERPRETED else []
