"""`python -m gralora_convert`: the command line."""

from gralora_convert.cli import run

if __name__ == "__main__":
    run()
