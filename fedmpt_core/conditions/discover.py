"""Finding conditions with a language model, offline, once, before training (the paper's condition discovery).

Label sets are drawn (`sampling`), a model is asked about them (`stages`), its candidates are ranked (`ranking`) and the
best N become a frozen list. Input is class names; with the sites' noisy co-occurrence counts (`cooccurrence`), which
are already known to whoever runs this, also those. The same model, settings and machine give the same list, byte for
byte. Must never: use a picture or label of a client, or write a list that is not complete.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmpt_core.common.canonical import canonical_digest
from fedmpt_core.common.files import WriteError, write_whole
from fedmpt_core.common.progress import StageProgress
from fedmpt_core.common.release import RELEASE
from fedmpt_core.conditions.answers import names_a_class
from fedmpt_core.conditions.cooccurrence import NoisyCounts, steering_weights
from fedmpt_core.conditions.journal import Journal, packed
from fedmpt_core.conditions.language_model import LanguageModel
from fedmpt_core.conditions.ranking import MOST_COSINE, Candidate, rank, readable, text_features, visual_usefulness
from fedmpt_core.conditions.sampling import label_sets
from fedmpt_core.conditions.scorer import PROMPT, Lexicon
from fedmpt_core.conditions.stages import (
    DESCRIBE,
    MERGE,
    PER_SET,
    SUMMARISE,
    Asking,
    DiscoveryConfig,
    DiscoveryError,
    Proposed,
    choose,
    generate,
)
from fedmpt_core.config.condition_lists import SCHEMA_VERSION, content_digest
from fedmpt_core.data.scenes import SceneConfig, scenes
from fedmpt_core.model.backbone.base import Backbone

PROMPTS = {"score": {"scene": PROMPT}, "generate": {"describe": DESCRIBE, "summarise": SUMMARISE, "merge": MERGE}}


def discover(
    name: str,
    classes: Sequence[str],
    config: DiscoveryConfig,
    model: LanguageModel,
    backbone: Backbone,
    journal_path: Path,
    *,
    lexicon: Lexicon | None = None,
    counts: Sequence[NoisyCounts] = (),
    on_progress: StageProgress | None = None,
) -> dict[str, Any]:
    """Ask, rank, and put together a list.

    Args:
        name: of the list.
        classes: C labels.
        config: what is asked.
        model: of whom.
        backbone: whose text tower judges what is redundant, and whose vocabulary the conditions must be in.
        journal_path: file of raw answers; one of the same run is gone on with.
        lexicon: to choose from; for `score` only.
        counts: noisy co-occurrence counts of sites, each site once.
        on_progress: called with (what, done, total).

    Returns:
        The JSON content of a list of schema 2, its digest included; `write_list` writes it.

    Raises:
        DiscoveryError: the answers cannot be used, or there is only one label set to score.
        JournalError: the file of raw answers is of another run, or cannot be written.
        ValueError: an argument out of range.
    """
    if (lexicon is None) == (config.method == "score"):
        raise ValueError(f"method='{config.method}': a lexicon is for 'score', which needs one")
    sets = label_sets(len(classes), config.budget, config.seed, steering_weights(counts, classes))
    if config.method == "score" and len(sets) < 2:
        raise DiscoveryError(
            f"budget={config.budget} and {len(classes)} classes give one label set, with which the scorer can compare "
            "nothing: allow a --budget of 2 or more, and give at least 3 classes"
        )
    identity = model.identity()
    words = lexicon and {"name": lexicon.name, "digest": lexicon.digest}
    whom = {k: v for k, v in identity.items() if k != "device"}  # a broken run may go on elsewhere
    asked = [whom, list(classes), config.asked(), words, PROMPTS[config.method], sets]
    progress = on_progress or (lambda what, done, total: None)
    with Journal(journal_path, canonical_digest(asked)) as journal:
        asking = Asking(model, config, journal, progress)
        if lexicon is not None:
            chosen = choose(asking, classes, sets, lexicon)
        else:
            chosen = generate(asking, classes, sets, backbone)
        records = journal.records()
    for record in records:  # an answer of a later stage is about all labels
        if record["stage"] in PER_SET:
            record["labels"] = [classes[c] for c in sets[record["number"]]]
    most_cosine = MOST_COSINE[backbone.is_stand_in] if config.most_cosine is None else config.most_cosine
    ranking = _ranked(chosen, classes, config, backbone, most_cosine)
    kept = [c.condition for c in ranking if c.kept]
    if len(kept) < config.conditions:
        raise DiscoveryError(
            f"only {len(kept)} of {len(ranking)} candidates ({', '.join(kept)}) differ by their text features at "
            f"most_cosine={most_cosine:g}, {config.conditions} are needed: allow a larger cosine, ask for fewer "
            "conditions, or for more candidates"
        )
    settings = {
        **config.asked(),
        "conditions": config.conditions,
        "pictures": config.pictures,
        "most_cosine": most_cosine,
        "backbone": backbone.name,
        "backbone_digest": backbone.digest(),
        "lexicon": words,
        "release": RELEASE,
        **chosen.facts,
    }
    content = {
        "schema": SCHEMA_VERSION,
        "name": name,
        "conditions": kept,
        "classes": list(classes),
        "provenance": {
            "model": identity,
            "method": config.method,
            "settings": settings,
            "prompts": PROMPTS[config.method],
            "answers": packed(records),
            "ranking": [{k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(c).items()} for c in ranking],
            "counts": [c.facts() for c in counts] or None,
            "note": "Found by `fedmpt conditions discover`"
            + (" from class names and the sites' noisy counts." if counts else " from class names alone."),
        },
    }
    return {**content, "digest": content_digest(content)}


def write_list(content: dict[str, Any], path: Path) -> None:
    """Write a list: all of it or nothing; an existing file is never replaced.

    Raises:
        DiscoveryError: the file exists, or the disk refuses.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_whole(path, text.encode(), mode=0o644, replace=False)
    except FileExistsError:
        raise DiscoveryError(f"{path}: exists, and a list is frozen: name a new file") from None
    except WriteError as error:
        raise DiscoveryError(f"{path}: cannot be written ({error.strerror})") from None


def _ranked(
    chosen: Proposed, classes: Sequence[str], config: DiscoveryConfig, backbone: Backbone, most_cosine: float
) -> tuple[Candidate, ...]:
    abstract = [k for k, c in enumerate(chosen.candidates) if not names_a_class(c, classes)]
    usable = [k for k in abstract if readable(backbone, chosen.candidates[k])]
    if not usable:
        raise DiscoveryError(
            f"of {len(chosen.candidates)} candidates {len(abstract)} name no class, and {backbone.name} can read none "
            "of these: take another lexicon or backbone"
        )
    candidates = [chosen.candidates[k] for k in usable]
    visual = None
    if config.pictures:
        # public pictures, labels independent of each other, none of them a test scene
        made = scenes(
            SceneConfig(config.seed, spurious_strength=0.0), site=0, sites=1, split="train", count=config.pictures
        )
        visual = visual_usefulness(backbone, candidates, made.pictures)
    return rank(
        candidates,
        chosen.strength[:, usable],
        text_features(backbone, candidates),
        count=config.conditions,
        most_cosine=most_cosine,
        visual=visual,
    )
