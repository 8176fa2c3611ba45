"""`python -m jidm.cli`, if the script is not on the path."""

import sys

from jidm.cli import main

sys.exit(main())
