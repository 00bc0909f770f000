"""``python -m mica`` is the ``mica`` command."""

import sys

from mica.cli.main import main

sys.exit(main())
