"""These tests start processes in which Triton compiles; the interpreter's run leaves them out."""

from fastgrpo_kernels.runtime import HAS_TRITON, INTERPRETED

collect_ignore_glob = [] if HAS_TRITON and not INTERPRETED else ["test_*.py"]
