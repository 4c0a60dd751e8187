"""Fuzzing: mutated folders through every command, and single parsers under atheris.

    python -m tests.fuzz folders --inputs 10000 --seed 1
    python -m tests.fuzz parser header --seconds 60        (needs `pip install atheris`)

A failure prints the number of its input; `--seed N --inputs 1` repeats it.
"""
