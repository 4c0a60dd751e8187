"""`python -m gralora_convert`: the command line."""

from gralora_convert.cli import main

if __name__ == "__main__":
    main()
