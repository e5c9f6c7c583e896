"""`python -m torchreid_snloss.compare`."""

from torchreid_snloss.compare import main

raise SystemExit(main())
