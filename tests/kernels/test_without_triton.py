"""The package without Triton: it imports, surrogates work, and launchers say what is missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run_without_triton(code: str) -> str:
    blocked = "import sys; sys.modules['triton'] = None\n"
    command = [sys.executable, "-c", blocked + textwrap.dedent(code)]
    # The package's own folder, wherever this process found it.
    paths = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_surrogates_and_launchers_without_triton():
    printed = run_without_triton(
        """
        import torch, fastgrpo_kernels
        from fastgrpo_kernels.runtime import HAS_TRITON, INTERPRETED
        from fastgrpo_kernels.surrogates import SURROGATES
        from fastgrpo_kernels.twins import torch_twin
        assert not HAS_TRITON and not INTERPRETED
        one = torch.ones(1)
        print(torch_twin(SURROGATES["reinforce"].fn)(-one, 0 * one, 3 * one, 0 * one)[:2])
        try:
            fastgrpo_kernels.segment_reduce(one, torch.tensor([0, 1]), "sum")
        except RuntimeError as error:
            print(error)
        """
    )
    assert "(tensor([3.]), tensor([-3.]))" in printed
    assert "triton" in printed and "backend='torch'" in printed
