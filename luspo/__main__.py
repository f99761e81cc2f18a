"""`python -m luspo` is the program `luspo`."""

import sys

from luspo.program import main

sys.exit(main())
