"""`python -m fastvlm_mlx` is the command `fastvlm-mlx`."""

import sys

from fastvlm_mlx.cli import main

if __name__ == "__main__":
    sys.exit(main())
