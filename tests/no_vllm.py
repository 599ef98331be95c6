"""A pytest plugin that makes vLLM unimportable: `pytest -p tests.no_vllm`.

Declaring, training and compiling need no vLLM. The quick suite runs under this plugin, so it fails
as soon as one of them does.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder


class _Blocked(MetaPathFinder):
    """Answers every import of vLLM, and of nothing else, with an error."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError("No module named 'vllm': blocked by tests.no_vllm", name=name)


assert "vllm" not in sys.modules, "vLLM was imported before the tests began"
sys.meta_path.insert(0, _Blocked())
