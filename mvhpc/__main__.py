"""`python -m mvhpc` is the `mvhpc` command."""

import sys

from mvhpc.cli import main

sys.exit(main())
