"""`python -m torchreid_snloss`."""

import sys

from torchreid_snloss.cli import main

sys.exit(main())
