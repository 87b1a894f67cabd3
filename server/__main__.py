"""`python -m server` is `latentd`."""

import sys

from server.cli import main

sys.exit(main())
