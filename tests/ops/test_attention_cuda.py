"""Every kernel on a GPU against float64, and the chosen one under torch.func and torch.compile."""

import pytest
import torch

from benchmarks.gpu_check import BOUND, TRANSFORMS, check
from funcmodels.ops.attention_kernels import KERNELS


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*KERNELS, TRANSFORMS])
def test_errors(name):
    rows = list(check(name))
    assert rows or name in ("flash_attn", "cpu_flash"), "a kernel of torch ran nothing"
    assert [row.what for row in rows if not row.ours < BOUND] == []
