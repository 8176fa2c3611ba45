"""`python -m jidm.cli`, for where the script is not on the path."""

import sys

from jidm.cli import main

sys.exit(main())
