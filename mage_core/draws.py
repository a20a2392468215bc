"""Random numbers that are the same on every machine and for ever: what makes a sample a function of its seed."""

from __future__ import annotations

import hashlib
import struct


class Draws:
    """A stream of random numbers that depends on its key alone: BLAKE2b of the key and a counter.

    numpy promises no stable streams for its Generator's methods; a hash is the same everywhere and for ever.
    """

    def __init__(self, *key: object):
        self._key = "|".join(map(str, key))
        self._block = 0
        self._words: list[int] = []

    def word(self) -> int:
        """A whole number, uniform in 0 to 2^64 - 1."""
        if not self._words:
            digest = hashlib.blake2b(f"{self._key}|{self._block}".encode()).digest()
            self._words = list(struct.unpack("<8Q", digest))
            self._block += 1
        return self._words.pop()

    def below(self, end: int) -> int:
        """A whole number, uniform in 0 to end - 1."""
        return self.word() * end >> 64

    def uniform(self) -> float:
        """Uniform in [0, 1), a multiple of 2^-53."""
        return (self.word() >> 11) * 2.0**-53

    def inside(self) -> float:
        """Uniform in the open interval (0, 1)."""
        return ((self.word() >> 12) + 0.5) * 2.0**-52

    def distinct(self, count: int, end: int) -> tuple[int, ...]:
        """`count` different whole numbers from 0 to end - 1, each order of them equally likely."""
        left = list(range(end))
        return tuple(left.pop(self.below(len(left))) for _ in range(count))
