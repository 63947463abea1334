"""Verifiers: does an answer solve its question?"""

from megavar.verifiers.pool import Verdicts, WorkerPool, verify_all
from megavar.verifiers.registry import NAMES, PAYLOAD_KEYS, Verifier, is_correct, load_verifier

__all__ = [
    "NAMES",
    "PAYLOAD_KEYS",
    "Verdicts",
    "Verifier",
    "WorkerPool",
    "is_correct",
    "load_verifier",
    "verify_all",
]
