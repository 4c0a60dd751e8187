"""`verify`: do base + adapter and a merged checkpoint compute the same?"""

from gralora_convert.verbs.verification.verdict import Equivalence, verify

__all__ = ["Equivalence", "verify"]
