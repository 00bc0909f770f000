"""``python -m mica.daemon``."""

from __future__ import annotations

import sys

from mica.daemon.main import main

if __name__ == "__main__":
    sys.exit(main())
