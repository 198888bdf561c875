"""python -m bsfa_compile: the command line."""

from bsfa_compile.cli import main

if __name__ == "__main__":
    main()
