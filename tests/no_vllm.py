"""A pytest plugin that makes vLLM unimportable: `pytest -p tests.no_vllm`.

Declaring, training and compiling need no vLLM. The quick suite runs under this plugin, so it fails
as soon as one of them does.
"""

import sys

assert "vllm" not in sys.modules, "vLLM was imported before the tests began"
# Python's own way of saying that there is no such module: imports fail, and find_spec finds none.
sys.modules["vllm"] = None  # type: ignore[assignment]
