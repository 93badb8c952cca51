"""Why a protocol step was refused: a code that travels, and a sentence that holds no secret."""

from enum import IntEnum


class Abort(IntEnum):
    """The reasons that a site tells the server when it leaves a round (one byte on the wire)."""

    BAD_SIG = 1
    BAD_CERT = 2
    ROSTER = 3
    POLICY = 4
    CTX_MISMATCH = 5
    BELOW_THRESHOLD = 6
    LATCHED = 7
    BAD_SHARE = 8
    OVERFLOW = 9
    MALFORMED = 11
    STORAGE = 12


class SecAggError(ValueError):
    """A message or a setting that the protocol refuses. The sentence names ids, counts and bounds, never a secret.

    Attributes:
        code: what kind of refusal it is.
        culprit: roster id of the member whose fault it shows to be, if any.
    """

    def __init__(self, code: Abort, text: str, *, culprit: int | None = None) -> None:
        super().__init__(text)
        self.code, self.culprit = code, culprit


class UnexpectedMessage(SecAggError):
    """A well-formed message that does not belong to this state."""

    def __init__(self, came: str, expected: str) -> None:
        super().__init__(Abort.CTX_MISMATCH, f"{came} came, expected was {expected}")
