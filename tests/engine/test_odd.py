"""An architecture that exists nowhere, served at once, equals the pure function."""

import pytest

from tests.engine.odd import model
from tests.engine.tiny import check, expected, saved, serve_model


@pytest.mark.parametrize(("tp", "compiled"), [(1, False), (2, False), (1, "trace")])
def test_a_model_that_exists_nowhere(tp, compiled, tmp_path):
    weights = saved(model, tmp_path)
    check(serve_model(model, tmp_path, tp=tp, compiled=compiled), expected(model, weights))
