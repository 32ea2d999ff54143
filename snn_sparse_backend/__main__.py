"""``python -m snn_sparse_backend``."""

import sys

from .cli import main

sys.exit(main())
