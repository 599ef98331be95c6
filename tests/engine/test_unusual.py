"""Parameters and layers used in unusual ways, served, equal the pure function."""

import pytest

from tests.engine.tiny import check, distance, expected, saved, serve_model
from tests.engine.unusual import MODELS


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    model, folder = MODELS[request.param], tmp_path_factory.mktemp(request.param)
    return model, folder, expected(model, saved(model, folder))


@pytest.mark.parametrize(("tp", "compiled"), [(1, False), (2, False), (1, "trace")])
def test_equals_the_pure_function(case, tp, compiled):
    model, folder, want = case
    check(serve_model(model, folder, tp=tp, compiled=compiled), want)


FAULTS = {
    "stacked": ('.q" for i in range(LAYERS)]', '.q" for i in reversed(range(LAYERS))]'),
    "shared": ("* self.scale", "* (self.scale + 0.1)"),
    "mapped": ("torch.tanh(", "torch.sin("),
    "crossed": (".amax(dim, True)", ".amin(dim, True)"),
    "turned": ("torch.finfo(torch.float32).eps", "0.5"),
    "paired": ("self.local_heads * 2,", "self.local_heads,"),
}


def test_a_planted_fault_is_seen(case):
    """Layers in another order; another scale of what is shared; another function of each head; the
    least for the largest; another eps; fewer groups."""
    model, folder, want = case
    fault = FAULTS[model.name.removesuffix("ForCausalLM").lower()]
    served = serve_model(model, folder, edit=lambda source: source.replace(*fault))
    assert distance(served, want) > 1e-3
