"""`python -m prune_opd_hf.cli`, for where the script `prune-opd` is not on the path."""

import sys

from prune_opd_hf.cli import main

sys.exit(main())
