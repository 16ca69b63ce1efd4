"""Run the command `srm-iqa` by `python -m srm_model`."""

import sys

from srm_model.cli import main

sys.exit(main())
