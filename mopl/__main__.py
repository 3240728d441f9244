"""`python -m mopl` is the command `mopl`."""

import sys

from mopl.cli import main

if __name__ == "__main__":
    sys.exit(main())
