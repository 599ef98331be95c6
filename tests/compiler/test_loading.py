"""What the names of a checkpoint's tensors become in the served model."""

from compiler.emit.whole import Whole
from compiler.loading import apply
from compiler.vllm_target import lower_to_vllm
from tests.models.zoo import rows


def test_a_tensor_that_gets_the_name_of_another():
    """Of Mamba-2's `in_proj.bias` a part becomes `dt_bias`, and its `dt_bias` something else."""
    loading = Whole(lower_to_vllm(rows()["mamba2"].model("bias"))).loading
    at = "backbone.layers.1.mixer"
    found = {f"{at}.dt_bias": f"{at}.dt_shift", f"{at}.in_proj#4.bias": f"{at}.dt_bias"}
    assert {name: apply(loading, name)[0] for name in found} == found
