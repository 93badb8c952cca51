"""What a language model's text holds: sentences about label sets, and short phrases.

A model may answer with lists, headings, loops, its own thoughts, nothing, or in another language. Only what passes the
rules below counts; nothing is repaired.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FEWEST_WORDS, MOST_WORDS = 4, 60  # of a sentence (chosen)
LEAST_DISTINCT = 0.5  # share of different words in a sentence: below it the model loops (chosen)
LEAST_ENGLISH = 0.4  # share of sentences with one of the words below; 0.9 in English text, near 0 elsewhere (chosen)
MOST_PHRASE_WORDS = 3
MOST_PHRASE_LENGTH = 30  # characters

_ENGLISH = re.compile(
    r"\b(?:the|and|with|of|its|their|from|there|this|that|while|near|under|his|her|are|is|behind)\b", re.IGNORECASE
)
_MARK = re.compile(r"^\s*(?:[-*•+>#]+\s*|\(?\d{1,3}\s*[.):]\s*|\(?[a-zA-Z][.)]\s+)+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z])")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_PHRASE = re.compile(r"[a-z]+(?:[ -][a-z]+)*")
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_BEHIND = re.compile(r":|\s[-–—]+\s|\(|–|—")  # what follows is no longer the phrase
_QUOTES = "\"'`*_“”‘’ \t."
_EMPTY_WORD = re.compile(
    r"and|or|the|others?|etc|none|conditions?|abstract|photos?|photographs?|pictures?|images?|sentences?|examples?|objects?"
)


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens.
        cut: whether it was still talking when the token limit came.
    """

    text: str
    cut: bool


def sentences(text: str, labels: Sequence[str], *, cut: bool) -> tuple[str, ...]:
    """The usable sentences of an answer.

    Args:
        text: the answer.
        labels: names of the label set that it is about.
        cut: whether the model was still talking when it was stopped; an unfinished last sentence is dropped.

    Returns:
        Different sentences of 4 to 60 words in Latin letters, without loops, each with at least one of the labels.
    """
    named = [_mention(label) for label in labels]
    lines = list(_lines(text))
    pieces = [piece.strip() for line in lines for piece in _SENTENCE_END.split(line)]
    if cut and pieces and not pieces[-1].endswith((".", "!", "?")):
        pieces.pop()
    kept: dict[str, str] = {}
    for piece in pieces:
        words = _WORD.findall(piece.casefold())
        if not FEWEST_WORDS <= len(words) <= MOST_WORDS or len(set(words)) < LEAST_DISTINCT * len(words):
            continue
        letters = [c for c in piece if c.isalpha()]
        latin = sum(c.isascii() for c in letters) >= 0.9 * len(letters)
        if latin and any(mention.search(piece) for mention in named):
            kept.setdefault(piece.casefold(), piece)
    return tuple(kept.values())


def phrases(text: str, classes: Sequence[str], *, cut: bool) -> tuple[str, ...]:
    """The usable condition phrases of an answer, in its order, in lower case.

    Args:
        text: the answer, one phrase a line or separated by commas; what follows a colon, dash or bracket is dropped.
        classes: all labels; a phrase that names one is not abstract.
        cut: whether the model was still talking when it was stopped; the last phrase is dropped then.

    Returns:
        Different phrases of 1 to 3 English words, at most 30 characters.
    """
    named = [_mention(label) for label in classes]
    kept: dict[str, None] = {}
    pieces = [part for line in _lines(text) for part in re.split(r"[,;/]", _BEHIND.split(line, 1)[0])]
    for piece in pieces[: len(pieces) - cut]:
        phrase = " ".join(re.sub(r"^(?:(?:and|or|the|an?)\s+)+", "", piece.strip(_QUOTES).casefold()).split())
        usable = _PHRASE.fullmatch(phrase) and len(phrase) <= MOST_PHRASE_LENGTH
        words = phrase.split()
        empty = all(_EMPTY_WORD.fullmatch(word) for word in words)
        if usable and len(words) <= MOST_PHRASE_WORDS and not empty and not any(m.search(phrase) for m in named):
            kept.setdefault(phrase)
    return tuple(kept)


def names_a_class(phrase: str, classes: Sequence[str]) -> bool:
    """Whether a phrase holds one of the labels, so that it is not abstract."""
    return any(_mention(label).search(phrase) for label in classes)


def in_english(sentences: Sequence[str]) -> bool:
    """Whether sentences, as a whole, are English: the words of conditions are read by English text towers."""
    english = sum(bool(_ENGLISH.search(s)) for s in sentences)
    return english >= LEAST_ENGLISH * len(sentences)


def _lines(text: str) -> Iterator[str]:
    """Non-empty lines without thoughts, list marks and quotes around them."""
    for line in _THOUGHTS.sub("", text).splitlines():
        bare = _MARK.sub("", line.replace("**", "")).strip().strip('"“”')
        if bare:
            yield bare


def _mention(label: str) -> re.Pattern[str]:
    """Finds a label as words, in the plural too, however its words are joined."""
    words = [re.escape(word) for word in re.split(r"[\W_]+", label) if word] or [re.escape(label)]
    return re.compile(r"(?<!\w)" + r"[\W_]*".join(words) + r"(?:e?s)?(?!\w)", re.IGNORECASE)
