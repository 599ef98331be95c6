"""Write the files that tests compare with anew: `python -m tests.golden.regenerate`.

A change of the compiler then shows in review, as a change of what it makes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run the tests that compare, letting them write."""
    tests = Path(__file__).parent.parent / "compiler"
    files = [str(tests / "test_passes.py"), str(tests / "test_emit.py")]
    environment = {**os.environ, "FUNCMODELS_REGENERATE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "golden or test_pass", *files]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
