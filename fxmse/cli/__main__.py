"""``python -m fxmse.cli``."""

import sys

from fxmse.cli.running import main

sys.exit(main())
