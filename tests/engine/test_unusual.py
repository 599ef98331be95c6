"""Parameters and layers used in unusual ways, served, equal the pure function."""

import pytest

from tests.engine.tiny import check, expected, saved, serve_model
from tests.engine.unusual import MODELS


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    model, folder = MODELS[request.param], tmp_path_factory.mktemp(request.param)
    return model, folder, expected(model, saved(model, folder))


@pytest.mark.parametrize(("tp", "compiled"), [(1, False), (2, False), (1, "trace")])
def test_equals_the_pure_function(case, tp, compiled):
    model, folder, want = case
    check(serve_model(model, folder, tp=tp, compiled=compiled), want)
