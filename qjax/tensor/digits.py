"""Where codes lie in words, digit by digit of their row and column."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Digits:
    """Where each binary digit of a code's row k and column n goes.

    The words are a table, and a code is a field of one. Digits are named "k0", "k1",
    ..., "n0", ... from the least significant up, and listed from the most significant
    down. Some count the fields of a word, some the words of a *run*. Of those that are
    left, the ones of the letter ``lines`` count the lines of the table, and the ones of
    the other letter the runs of a line.

    Attributes:
      lines: Whose digits count the lines.
      fields: Digits that count the fields of a word, with blanks between them.
      run: Digits that count the words of a run.
      width: Bits of a word.
      rotate: By how many bits a word is rotated left, once its fields are in place.
      flip: With what the number of a field is XORed.

    Example:
      >>> gptq = Digits("k", fields="k2 k1 k0")  # eight rows of a column share a word
      >>> gptq.position(3, bits=4), gptq.left("k", 6)
      (12, ['k5', 'k4', 'k3'])
    """

    lines: Literal["k", "n"]
    fields: str
    run: str = ""
    width: int = 32
    rotate: int = 0
    flip: int = 0

    @classmethod
    def of_stream(cls, lines: Literal["k", "n"], bits: int) -> "Digits | None":
        """Returns those of streams of codes along k.

        Args:
          lines: "n" where the words of a stream lie side by side, "k" where those of
            all columns do.
          bits: Width of a code.

        Returns:
          The digits; None where codes straddle words.
        """
        count = 32 // bits
        if count * bits != 32:
            return None
        return cls(lines, " ".join(_low("k", count.bit_length() - 1)))

    def position(self, field: int, bits: int) -> int:
        """Returns the lowest bit of a field; after the last bit of a word comes 0."""
        return (self.rotate + bits * (field ^ self.flip)) % self.width

    def taken(self, letter: str) -> list[str]:
        """Returns the digits of k or n that count fields, or words of a run."""
        listed = f"{self.run} {self.fields}".split()
        return [digit for digit in listed if digit[0] == letter]

    def left(self, letter: str, count: int) -> list[str]:
        """Returns which of the low ``count`` digits of k or n count lines or runs."""
        taken = self.taken(letter)
        return [digit for digit in _low(letter, count) if digit not in taken]

    def reach(self, letter: str) -> int:
        """Returns of how many low digits of k or n those of `taken` are some."""
        return max((int(digit[1:]) + 1 for digit in self.taken(letter)), default=0)


def _low(letter: str, count: int) -> list[str]:
    return [f"{letter}{place}" for place in reversed(range(count))]
