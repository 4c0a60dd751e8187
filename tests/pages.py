"""`python -m tests.pages`: writes the pages of docs/ that are made from the code."""

from pathlib import Path

from gralora_convert.verbs.codes import page

FINDINGS = Path(__file__).parent.parent / "docs" / "findings.md"

if __name__ == "__main__":
    FINDINGS.write_text(page())
