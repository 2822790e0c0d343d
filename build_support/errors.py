"""The one error of the build: a reason and what to type, never a traceback or compiler output."""

from __future__ import annotations


class BuildError(SystemExit):
    """Stops the build with one readable message.

    A SystemExit, so that neither setuptools nor pip wraps it in a stack of frames.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"\nfused: {reason}\n       {remedy}\n")
