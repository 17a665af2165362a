"""`python -m koscli` is `kos`."""

import sys

from koscli.main import main

sys.exit(main())
