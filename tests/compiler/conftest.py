"""Settings of the compiler's tests."""

from __future__ import annotations

import logging

# torch logs each symbolic expression that tracing makes; pytest would keep them all.
logging.getLogger("torch.__trace").propagate = False
