"""`python -m sa_lens`."""

import sys

from sa_lens.cli import main

sys.exit(main())
