"""`python -m funcmodels`: the command line of `compiler.cli`."""

from compiler.cli import main

if __name__ == "__main__":
    main()
