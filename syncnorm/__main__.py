"""``python -m syncnorm``."""

import sys

from syncnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
