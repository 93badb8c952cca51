"""What is asked of a language model, stage by stage, and the candidate conditions that result.

`generate`, the paper's two stages:
  1. for each of many label sets the model writes sentences that describe pictures in which the labels occur together,
  2. it sums up portions of the sentences into abstract conditions, and merges these into K candidates.
`choose`: the model says how firmly each label set decides each condition of a lexicon, see `scorer`.

An answer that cannot be used is left out and counted; when too many cannot, nothing results but a sentence.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fedmpt_core.common.progress import StageProgress
from fedmpt_core.conditions.answers import Answer, in_english, phrases, sentences
from fedmpt_core.conditions.journal import Journal
from fedmpt_core.conditions.language_model import LanguageModel
from fedmpt_core.conditions.ranking import readable, text_features
from fedmpt_core.conditions.sampling import MOST_SETS, LabelSet
from fedmpt_core.conditions.scorer import PROMPT, Lexicon, in_words, strengths
from fedmpt_core.config.checks import checked
from fedmpt_core.model.backbone.base import Backbone

DESCRIBE = (
    "Write {count} different short sentences. Each describes what can be seen in a photograph that shows {labels} "
    "together: where they are, how they are placed and what surrounds them. Write one sentence per line and nothing "
    "else."
)
SUMMARISE = (
    "These sentences describe photographs:\n{sentences}\n\nName {count} abstract conditions in which such photographs "
    "differ and which explain why things occur together in them. A condition is one to three words, names no object, "
    "and does not overlap with the others. Write one condition per line and nothing else."
)
MERGE = (
    "These conditions describe in what photographs differ:\n{phrases}\n\nMerge them into {count} abstract conditions "
    "that do not overlap. A condition is one to three words and names no object. Write one condition per line and "
    "nothing else."
)
SCORE_STAGE, STAGES = "score", ("1 describe", "2 summarise", "3 merge")
PER_SET = (SCORE_STAGE, STAGES[0])  # one answer for each label set
PORTION = 40  # sentences that are summed up at once (chosen)
MOST_PROMPT = 4096  # tokens of such a portion, as far as the model's context allows (chosen)
MOST_MERGED = 60  # phrases that are merged at once (chosen)
LEAST_USABLE = 0.5  # share of the label sets with at least one usable sentence (chosen)
LEAST_STRENGTH = 1e-9  # above rounding; answers that differ in one last digit give at least some 1e-8 (worked out)


class DiscoveryError(ValueError):
    """The model's answers give no list of conditions; the sentence says what they were and what to do."""


@checked
class DiscoveryConfig:
    """What is asked."""

    method: Literal["generate", "score"] = "generate"
    """`generate`: the model writes; `score`: it chooses from a lexicon."""
    conditions: Annotated[int, Field(ge=1, le=100)] = 5
    """N, how many are kept."""
    candidates: Annotated[int, Field(ge=1, le=200)] = 15
    """K, how many the model shall name, at least N (`generate`)."""
    budget: Annotated[int, Field(ge=1, le=MOST_SETS)] = 240
    """Most label sets."""
    sentences: Annotated[int, Field(ge=1, le=20)] = 3
    """Asked for each label set (`generate`)."""
    most_tokens: Annotated[int, Field(ge=8, le=4096)] = 160
    """Where an answer is cut off (`generate`)."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0 takes the most probable token every time, above it tokens are drawn (`generate`)."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    """Prompts that are run together (`generate`)."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Of label sets, draws and embedded scenes."""
    most_cosine: Annotated[float | None, Field(ge=-1, le=1)] = None
    """Largest cosine of text features between two kept conditions; None takes 0.9, and for the stand-in 0.7."""
    pictures: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Embedded scenes on which visual usefulness is measured, at least 2; 0 leaves it out."""

    def __post_init__(self) -> None:
        """Raises ValueError when fields contradict each other."""
        if self.method == "generate" and self.candidates < self.conditions:
            raise ValueError(
                f"candidates={self.candidates} is out of range: allowed is [{self.conditions}, 200], as many as are "
                "kept at least"
            )
        if self.pictures == 1:
            raise ValueError("pictures=1: a variance over pictures needs at least 2; 0 leaves it out")

    def asked(self) -> dict[str, Any]:
        """The fields that decide the answers; the others only rank them."""
        common = {"method": self.method, "budget": self.budget, "seed": self.seed}
        if self.method == "score":
            return common
        names = ("candidates", "sentences", "most_tokens", "temperature", "batch_size")
        return common | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Proposed:
    """Candidates before they are ranked: (M, K) `strength`, and `facts` on how it went."""

    candidates: tuple[str, ...]
    strength: np.ndarray
    facts: dict[str, Any]


class Asking:
    """Puts prompts to the model, batch by batch, and keeps the answers; those of a broken run are not asked again.

    Batches are cut the same way every time, so that a run that went on has the answers of one that never broke.
    """

    def __init__(
        self, model: LanguageModel, config: DiscoveryConfig, journal: Journal, on_progress: StageProgress
    ) -> None:
        self.model, self.config, self._journal, self._on_progress = model, config, journal, on_progress

    def each(self, stage: str, count: int, size: int, ask: Callable[[list[int]], list[Answer]]) -> list[Answer]:
        """The answers of a stage; `ask` answers a batch of its numbers."""
        self._on_progress(stage, 0, count)
        for start in range(0, count, size):
            numbers = list(range(start, min(start + size, count)))
            if any(self._journal.get(stage, n) is None for n in numbers):
                self._journal.append(stage, numbers, ask(numbers))
            self._on_progress(stage, numbers[-1] + 1, count)
        return [answer for n in range(count) if (answer := self._journal.get(stage, n)) is not None]

    def prompts(self, stage: str, prompts: Sequence[str]) -> list[Answer]:
        """Answers to prompts."""
        config = self.config

        def ask(numbers: list[int]) -> list[Answer]:
            return self.model.answer(
                [prompts[n] for n in numbers],
                numbers,
                most_tokens=config.most_tokens,
                temperature=config.temperature,
                seed=config.seed,
            )

        return self.each(stage, len(prompts), config.batch_size, ask)


def choose(asking: Asking, classes: Sequence[str], sets: Sequence[LabelSet], lexicon: Lexicon) -> Proposed:
    """The lexicon's conditions, with how firmly each label set decides them."""
    values = [value for of_one in lexicon.values.values() for value in of_one]

    def ask(numbers: list[int]) -> list[Answer]:
        prompts = [PROMPT.format(labels=in_words([classes[c] for c in sets[n]])) for n in numbers]
        rows = [asking.model.log_probabilities(prompt, values) for prompt in prompts]
        if not all(np.isfinite(row).all() for row in rows):
            raise DiscoveryError(f"{asking.model.name}: its probabilities are not finite: take another model")
        return [Answer(" ".join(f"{p:.3f}" for p in row), cut=False) for row in rows]

    answers = asking.each(SCORE_STAGE, len(sets), 1, ask)
    # from the text that was kept, so that a run that went on gives the same list
    try:
        table = np.array([[float(p) for p in answer.text.split()] for answer in answers])
    except ValueError:
        raise DiscoveryError("the kept raw answers are not the scorer's numbers: remove their file") from None
    strength = strengths(table, lexicon)
    if strength.max() <= LEAST_STRENGTH:
        raise DiscoveryError(
            f"{asking.model.name} says the same of all {len(sets)} label sets, so that no condition of {lexicon.name} "
            "follows from the labels: take another model, another lexicon, or a larger --budget"
        )
    facts = {"label_sets": len(sets), "candidates_ranked": len(lexicon.values)}
    return Proposed(tuple(lexicon.values), strength, facts)


def generate(asking: Asking, classes: Sequence[str], sets: Sequence[LabelSet], backbone: Backbone) -> Proposed:
    """The model's own candidates, with how close each of its sentences is to them."""
    config = asking.config
    named = [[classes[c] for c in labels] for labels in sets]
    prompts = [DESCRIBE.format(count=config.sentences, labels=in_words(labels)) for labels in named]
    answers = asking.prompts(STAGES[0], prompts)
    per_set = [sentences(a.text, labels, cut=a.cut) for a, labels in zip(answers, named, strict=True)]
    unique = list(dict.fromkeys(s for of_one in per_set for s in of_one))
    _check_sentences(answers, per_set, unique, config)
    portions = _portions(asking.model, unique, config)
    texts = [SUMMARISE.format(count=config.candidates, sentences="\n".join(portion)) for portion in portions]
    ballots = [phrases(a.text, classes, cut=a.cut) for a in asking.prompts(STAGES[1], texts)]
    votes = Counter(phrase for of_one in ballots for phrase in of_one)
    by_votes = [phrase for phrase, _ in votes.most_common()]
    merged: tuple[str, ...] = ()
    if len(portions) > 1 and by_votes:
        text = MERGE.format(count=config.candidates, phrases="\n".join(by_votes[:MOST_MERGED]))
        [answer] = asking.prompts(STAGES[2], [text])
        merged = tuple(p for p in phrases(answer.text, classes, cut=answer.cut) if readable(backbone, p))
    enough = len(merged) >= config.conditions
    usable = [p for p in (merged if enough else by_votes) if readable(backbone, p)][: config.candidates]
    if len(usable) < config.conditions:
        raise DiscoveryError(
            f"{asking.model.name} named {len(usable)} usable conditions ({', '.join(usable) or 'none'}), "
            f"{config.conditions} are needed: a condition is one to three English words and names no class; take a "
            "larger model, or let this one choose from the lexicon (--scorer)"
        )
    read = [s for s in unique if readable(backbone, s)]
    if not read:
        raise DiscoveryError(f"{backbone.name} can read none of the {len(unique)} sentences: take another backbone")
    strength = text_features(backbone, read) @ text_features(backbone, usable).T
    facts = {
        "label_sets": len(sets),
        "label_sets_described": sum(map(bool, per_set)),
        "sentences_found": len(unique),
        "portions": len(portions),
        "candidates_from": "the model's merge" if enough else "votes of the portions",
        "candidates_ranked": len(usable),
    }
    return Proposed(tuple(usable), strength.double().cpu().numpy(), facts)


def _check_sentences(
    answers: Sequence[Answer], per_set: Sequence[tuple[str, ...]], sentences: Sequence[str], config: DiscoveryConfig
) -> None:
    described = sum(map(bool, per_set))
    if described < LEAST_USABLE * len(per_set):
        empty, cut = sum(not a.text for a in answers), sum(a.cut for a in answers)
        raise DiscoveryError(
            f"{described} of {len(answers)} answers hold a usable sentence ({empty} are empty, {cut} were cut off at "
            f"{config.most_tokens} tokens), {LEAST_USABLE:.0%} are needed: a sentence has 4 to 60 words in Latin "
            "letters, does not loop, and names one of its classes. Take a larger model, allow longer answers, or let "
            "this one choose from the lexicon (--scorer)"
        )
    if not in_english(sentences):
        raise DiscoveryError(
            f"the {len(sentences)} sentences are not in English, which the text towers read: give English class names, "
            "or take another model"
        )


def _portions(model: LanguageModel, sentences: Sequence[str], config: DiscoveryConfig) -> list[list[str]]:
    """Sentences in portions of at most 40 that fit the model's context."""
    empty = model.tokens(SUMMARISE.format(count=config.candidates, sentences=""))
    room = min(model.context, MOST_PROMPT) - config.most_tokens - empty
    per_call = model.tokens("")
    portions: list[list[str]] = [[]]
    left = room
    for sentence in sentences:
        cost = model.tokens(sentence) - per_call + 2  # a line's end, and what joining may change
        if portions[-1] and (cost > left or len(portions[-1]) == PORTION):
            portions.append([])
            left = room
        portions[-1].append(sentence)
        left -= cost
    return portions
