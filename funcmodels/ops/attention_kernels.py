"""The kernels that attention runs on, and the one function that chooses among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from funcmodels.errors import KernelError
from funcmodels.ops import attention_reference as reference
from funcmodels.ops.attention_cpu import CPU_FLASH
from funcmodels.ops.attention_cudnn import CUDNN
from funcmodels.ops.attention_flash import FLASH, FLASH_ATTN
from funcmodels.ops.attention_flex import FLEX
from funcmodels.ops.attention_kernel import Call, Kernel
from funcmodels.ops.attention_reference import Inputs, Rules

REFERENCE = Kernel(
    "reference",
    lacks=lambda call: None,
    forward=lambda call: reference.forward(*call),
    backward=lambda call, grad_out, out, lse: reference.vjp(
        call.x, grad_out, call.segment_ids, call.rules
    ),
    has_slopes_grad=True,
)

# The fastest first, as measured in benchmarks/results/2026-11-23-h100.md.
KERNELS = {k.name: k for k in (FLASH_ATTN, CUDNN, FLASH, FLEX, CPU_FLASH, REFERENCE)}

# Up to so many tokens cuDNN's forward is the faster one; its backward never is.
SHORT = 1024

_forced: str | None = None


def forced() -> str | None:
    """The name of the kernel that `attention_kernel` asks for."""
    return _forced


@contextmanager
def attention_kernel(name: str | None) -> Iterator[None]:
    """Make `ops.attention` run on one kernel, or refuse, while the context is active.

    Otherwise it runs on the first of these that has everything the call asks for (and forwards on
    "cudnn" where that is the faster one, on short sequences):

    - "flash_attn": the package flash-attn-4, on Hopper GPUs. All but ALiBi.
    - "cudnn": cuDNN's, on GPUs from Hopper on. Dense sequences, without window or softcap.
    - "flash": torch's own flash attention, as `torch.nn.attention.varlen` has it. All but softcap
      and ALiBi.
    - "flex": FlexAttention, on GPUs with Triton. Everything, float32 too.
    - "cpu_flash": ATen's flash kernel for CPUs. All but softcap.
    - "reference": plain tensor code, everywhere; memory for all scores.

    Gradients by `alibi_slopes`, and derivatives forwards or beyond the first, are computed by
    "reference" whatever the name. Segments that are no runs of tokens, as ids [0, 1, 0], go from
    "flash_attn" and "flash" to "flex". A compiled function is compiled anew for another name, and
    the context belongs around its call. It holds for all threads of the process.

    Args:
        name: one of the above; None chooses.
    Raises:
        KernelError: there is no such kernel; or, from `ops.attention`, it lacks something.
    """
    global _forced
    if name is not None and name not in KERNELS:
        raise KernelError(
            f"no attention kernel is named {name!r}", need=f"one of {', '.join(KERNELS)}"
        )
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(call: Call, *, is_backward: bool = False) -> Kernel:
    """The kernel asked for, or the fastest that can express every argument."""
    if call.rules.kernel is None:
        is_short = not is_backward and call.x.q.is_cuda and call.x.q.shape[-3] <= SHORT
        order = (CUDNN, *KERNELS.values()) if is_short else KERNELS.values()
        return next(k for k in order if k.lacks(call) is None)
    kernel = KERNELS[call.rules.kernel]
    lacks = kernel.lacks(call)
    if lacks is not None:
        able = [k.name for k in KERNELS.values() if k.lacks(call) is None]
        raise KernelError(
            f"the attention kernel {kernel.name!r} cannot run this call",
            got=f"attention_kernel({kernel.name!r}), which does not have: {lacks}",
            need=f"one of {', '.join(able)}",
            fix=f"attention_kernel({able[0]!r})",
        )
    return kernel


def forward(x: Inputs, segment_ids: Tensor | None, rules: Rules) -> tuple[Tensor, Tensor]:
    """The output (*batch, seq, heads, dv) in q's dtype, and lse (*batch, heads, seq)."""
    call = Call(x, segment_ids, rules)
    return choose(call).forward(call)


def backward(
    x: Inputs,
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_ids: Tensor | None,
    rules: Rules,
    *,
    slopes_grad: bool,
) -> Inputs:
    """The gradient of <grad_out, out>; that of slopes only if asked for."""
    call = Call(x, segment_ids, rules)
    kernel = choose(call, is_backward=True)
    if slopes_grad and not kernel.has_slopes_grad:
        kernel = REFERENCE
    return kernel.backward(call, grad_out, out, lse)
