"""`python -m srm_model` is `srm-iqa`."""

import sys

from srm_model.cli import main

sys.exit(main())
