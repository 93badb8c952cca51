"""Discovery end to end: what results, that it repeats, how a broken run goes on, and what bad models lead to."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmpt_core.conditions.answers import Answer
from fedmpt_core.conditions.cooccurrence import NoisyCounts
from fedmpt_core.conditions.discover import discover, write_list
from fedmpt_core.conditions.journal import JournalError, unpacked
from fedmpt_core.conditions.sampling import label_sets
from fedmpt_core.conditions.scorer import Lexicon, strengths
from fedmpt_core.conditions.stages import LEAST_STRENGTH, DiscoveryConfig, DiscoveryError
from fedmpt_core.config.condition_lists import load_conditions, read_content
from tests.fakes import FakeBackbone
from tests.tiny_llm import TEMPLATE, Scripted, tiny

CLASSES = ("dog", "sofa", "bus", "potted plant", "cat", "train")
BACKBONE = FakeBackbone(context_length=64)
CONFIG = DiscoveryConfig(conditions=3, candidates=6, budget=20, most_cosine=0.99)
WORDS = ["lighting", "spatial layout", "weather", "background", "object pose", "season"]
LEXICON = Lexicon("small", {"light": ("in the dark", "in the sun"), "place": ("indoors", "outdoors")}, "d" * 64)


def sensible(prompt: str) -> str:
    """What a good model says."""
    if about := re.search(r"shows (.*) together", prompt):
        kind = hashlib.sha256(prompt.encode()).digest()[0] % 3
        place = ["in bright light", "under a grey sky", "near an old wall"][kind]
        return f"Here you are:\n1. We see {about[1]} {place}.\n2. There is {about[1]}, side by side."
    return "\n".join(f"{i}. {word}" for i, word in enumerate(WORDS, start=1))


def run(tmp_path: Path, model: Any, config: DiscoveryConfig = CONFIG, name: str = "raw", **more: Any) -> dict[str, Any]:
    return discover("mine", CLASSES, config, model, BACKBONE, tmp_path / f"{name}.jsonl", **more)


def test_a_good_model_gives_a_list_that_a_job_can_name(tmp_path: Path) -> None:
    model, seen = Scripted(sensible), []
    content = run(tmp_path, model, on_progress=lambda *told: seen.append(told))
    write_list(content, tmp_path / "mine.json")
    found = load_conditions(tmp_path / "mine.json")
    assert all(BACKBONE.tokenize(words) for words in found.conditions)
    assert len(found.conditions) == 3
    assert set(found.conditions) <= set(WORDS)
    assert found.classes == CLASSES
    provenance = read_content(tmp_path / "mine.json")["provenance"]
    raw = unpacked(provenance["answers"])
    assert raw is not None
    described = [r for r in raw if r["stage"] == "1 describe"]
    sets = label_sets(len(CLASSES), 20, 0)
    assert [tuple(CLASSES.index(c) for c in r["labels"]) for r in described] == list(sets)
    assert all(r["answer"] == sensible(model.asked[r["number"]]) for r in described)
    assert provenance["settings"]["sentences_found"] == 40
    assert provenance["settings"]["candidates_from"] == "votes of the portions"  # one portion is not merged
    assert [r["condition"] for r in provenance["ranking"] if r["kept"]] == list(found.conditions)
    assert ("1 describe", 20, 20) in seen
    assert ("2 summarise", 1, 1) in seen


def test_many_sentences_are_summed_up_in_portions_and_merged(tmp_path: Path) -> None:
    config = replace(CONFIG, budget=35, sentences=2)
    model = Scripted(sensible)
    content = run(tmp_path, model, config)
    settings = content["provenance"]["settings"]
    assert settings["sentences_found"] == 70
    assert settings["portions"] == 2
    assert settings["candidates_from"] == "the model's merge"
    summed = [p for p in model.asked if p.startswith("These sentences")]
    lines = [line for p in summed for line in p.splitlines() if line.startswith(("We see", "There is"))]
    assert len(lines) == len(set(lines)) == 70
    assert model.asked[-1].startswith("These conditions")

    def no_merge(prompt: str) -> str:
        return "Sorry." if prompt.startswith("These conditions") else sensible(prompt)

    content = run(tmp_path, Scripted(no_merge), config, "other")
    assert content["provenance"]["settings"]["candidates_from"] == "votes of the portions"


def test_a_small_context_gets_smaller_portions(tmp_path: Path) -> None:
    model = Scripted(sensible)
    model.context = 400
    content = run(tmp_path, model)
    assert content["provenance"]["settings"]["portions"] > 1
    assert all(model.tokens(p) + CONFIG.most_tokens <= 400 for p in model.asked if p.startswith("These sentences"))


def test_twice_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_list(run(tmp_path, Scripted(sensible), name=name), tmp_path / f"{name}.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    other = run(tmp_path, Scripted(sensible), replace(CONFIG, seed=1), "three")
    assert other["digest"] != read_content(tmp_path / "one.json")["digest"]


class Broken(Exception):
    pass


@pytest.mark.parametrize("after", [0, 9, 20])
def test_a_broken_run_goes_on_and_gives_the_same(tmp_path: Path, after: int) -> None:
    config = replace(CONFIG, batch_size=4, temperature=0.7)
    whole = run(tmp_path, Scripted(sensible), config, "whole")
    calls = 0

    def breaks(prompt: str) -> str:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Broken
        return sensible(prompt)

    with pytest.raises(Broken):
        run(tmp_path, Scripted(breaks), config)
    kept = len((tmp_path / "raw.jsonl").read_text().splitlines()) - 1
    assert kept == after // 4 * 4
    again = Scripted(sensible)
    assert run(tmp_path, again, config) == whole
    assert len(again.asked) == 21 - kept
    finished = Scripted(sensible)
    assert run(tmp_path, finished, config) == whole
    assert finished.asked == []


def test_answers_can_be_ranked_anew_without_asking(tmp_path: Path) -> None:
    run(tmp_path, Scripted(sensible))
    again = Scripted(sensible)
    content = run(tmp_path, again, replace(CONFIG, conditions=2, most_cosine=0.95, pictures=3))
    assert again.asked == []
    assert all(row["visual"] > 0 for row in content["provenance"]["ranking"])
    with pytest.raises(JournalError, match="of another run"):
        run(tmp_path, Scripted(sensible), replace(CONFIG, sentences=4))


def cut_loop(prompt: str) -> Answer:
    return Answer("A dog and a sofa and " + "and on " * 200, cut=True)


def german(prompt: str) -> str:
    if about := re.search(r"shows (.*) together", prompt):
        things = about[1].replace(", a ", ", ein ").replace(" and a ", " und ein ")
        return f"Hier liegt {things} im Garten.\nDort steht {things} vor dem Haus."
    return "Licht\nOrt\nFarbe"


def no_conditions(prompt: str) -> str:
    return sensible(prompt) if "shows" in prompt else "I am afraid that there is no answer to this; dogs are nice."


@pytest.mark.parametrize(
    ("say", "says"),
    [
        (lambda _: "", r"0 of 20 answers hold a usable sentence \(20 are empty, 0 were cut off at 160 tokens\)"),
        (lambda _: "zxq " * 9, "0 of 20 answers hold a usable sentence"),
        (lambda _: "\udcff\x00 ¤¤¤ 8723 }{", "0 of 20 answers hold a usable sentence"),
        (cut_loop, r"20 were cut off at 160 tokens\), 50% are needed.*--scorer"),
        (lambda p: "这里有一只狗 dog 和沙发 sofa 在一起 的 照片 里", "0 of 20 answers"),
        (german, "not in English"),
        (no_conditions, r"scripted named 0 usable conditions \(none\), 3 are needed.*--scorer"),
        (lambda p: sensible(p) if "shows" in p else "lighting\npose", r"named 2 usable conditions \(lighting, pose\)"),
        (lambda p: sensible(p) if "shows" in p else "Licht\n灯光\n" + "x" * 99, "named 1 usable conditions"),
    ],
)
def test_a_model_that_cannot_be_used_is_a_sentence_and_leaves_no_list(
    tmp_path: Path, say: Callable[[str], str | Answer], says: str
) -> None:
    with pytest.raises(DiscoveryError, match=says):
        run(tmp_path, Scripted(say))
    assert [p.name for p in tmp_path.iterdir()] == ["raw.jsonl"]


def test_half_of_the_answers_are_enough(tmp_path: Path) -> None:
    sets = label_sets(len(CLASSES), 20, 0)
    usable = {n for n in range(20) if {0, 1} & set(sets[n])}
    assert 10 <= len(usable) < 20

    def partly(prompt: str) -> str:
        return "Yes." if "shows" in prompt and not re.search("dog|sofa", prompt) else sensible(prompt)

    content = run(tmp_path, Scripted(partly))
    assert content["provenance"]["settings"]["label_sets_described"] == len(usable)


def test_candidates_that_all_mean_the_same_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match=r"only 1 of 6 candidates .* differ .* at most_cosine=-1, 3 are needed"):
        run(tmp_path, Scripted(sensible), replace(CONFIG, most_cosine=-1.0))


def test_a_random_model_cannot_write(tmp_path: Path) -> None:
    """What transformers really returns from a model that never learnt anything."""
    config = replace(CONFIG, budget=4, most_tokens=16, batch_size=4)
    with pytest.raises(DiscoveryError, match=r"0 of 4 answers hold a usable sentence \(0 are empty, 4 were cut off"):
        run(tmp_path, tiny(template=TEMPLATE), config)


SCORE = DiscoveryConfig(method="score", conditions=2, budget=4, most_cosine=1.0)


def scored(prompt: str, value: str) -> float:
    return -float(len(prompt) * len(value) % 7) - 1


def test_a_random_model_can_score_and_repeats_itself(tmp_path: Path) -> None:
    one = run(tmp_path, tiny(), SCORE, "one", lexicon=LEXICON)
    two = run(tmp_path, tiny(), SCORE, "two", lexicon=LEXICON)
    assert one == two
    assert set(one["conditions"]) == {"light", "place"}
    assert one["provenance"]["model"]["weights"] == tiny().identity()["weights"]
    other = run(tmp_path, tiny(seed=1), SCORE, "three", lexicon=LEXICON)
    assert other["provenance"]["model"]["weights"] != one["provenance"]["model"]["weights"]
    with pytest.raises(JournalError, match="of another run"):
        run(tmp_path, tiny(seed=1), SCORE, "one", lexicon=LEXICON)


def test_the_scorer_finds_the_condition_that_labels_decide(tmp_path: Path) -> None:
    def knows_places(prompt: str, phrase: str) -> float:
        inside = bool(re.search("sofa|cat", prompt))
        return {"indoors": -1.0 if inside else -9.0, "outdoors": -9.0 if inside else -1.0}.get(phrase, -3.0)

    content = run(tmp_path, Scripted(sensible, knows_places), SCORE, lexicon=LEXICON)
    assert content["conditions"] == ["place", "light"]
    assert content["provenance"]["ranking"][0]["coverage"] == 1.0
    raw = unpacked(content["provenance"]["answers"])
    assert raw is not None
    assert all(r["answer"].split()[:2] == ["-3.000", "-3.000"] for r in raw)


def test_a_condition_that_names_a_class_is_left_out(tmp_path: Path) -> None:
    lexicon = replace(LEXICON, values={**LEXICON.values, "dog walk": ("slow", "fast")})
    content = run(tmp_path, Scripted(sensible, scored), SCORE, lexicon=lexicon)
    assert {row["condition"] for row in content["provenance"]["ranking"]} == {"light", "place"}
    bad = replace(LEXICON, values={"dog walk": ("slow", "quick")})
    with pytest.raises(DiscoveryError, match="of 1 candidates 0 name no class"):
        run(tmp_path, Scripted(sensible, scored), SCORE, "bad", lexicon=bad)


@pytest.mark.parametrize("text", ["one two", "-1.000 -2.000"])
def test_raw_answers_that_were_edited_are_a_sentence(tmp_path: Path, text: str) -> None:
    run(tmp_path, Scripted(sensible, scored), SCORE, lexicon=LEXICON)
    path = tmp_path / "raw.jsonl"
    edited, count = re.subn(r'"answer": "-[^"]*"', f'"answer": "{text}"', path.read_text(), count=1)
    assert count == 1
    path.write_text(edited)
    with pytest.raises(DiscoveryError, match="are not the scorer's numbers"):
        run(tmp_path, Scripted(sensible, scored), SCORE, lexicon=LEXICON)


@pytest.mark.parametrize("number", [-1.0, -3.123, -0.1])
def test_a_scorer_that_always_says_the_same_ranks_nothing(tmp_path: Path, number: float) -> None:
    model = Scripted(sensible, lambda p, v: number * len(v))  # values differ, label sets do not
    with pytest.raises(DiscoveryError, match=r"scripted says the same of all 4 label sets, .* of small follows"):
        run(tmp_path, model, SCORE, lexicon=LEXICON)


def test_one_last_digit_is_a_difference(tmp_path: Path) -> None:
    """The smallest difference that raw answers can hold, in one of very many label sets, is no rounding error."""
    table = np.full((20_000, 4), -3.123)
    table[7, 0] += 0.001
    assert strengths(table, LEXICON).max() > 10 * LEAST_STRENGTH
    table[7, 0] = -3.123
    assert strengths(table, LEXICON).max() < LEAST_STRENGTH / 1000


def test_one_label_set_is_no_comparison_and_leaves_no_file(tmp_path: Path) -> None:
    model: Any = Scripted(sensible, scored)
    path = tmp_path / "raw.jsonl"
    for config, classes in ((replace(SCORE, budget=1), CLASSES), (SCORE, CLASSES[:2])):
        with pytest.raises(DiscoveryError, match="give one label set, with which the scorer can compare nothing"):
            discover("mine", classes, config, model, BACKBONE, path, lexicon=LEXICON)
    assert not path.exists()


def test_a_scorer_without_numbers_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match="its probabilities are not finite"):
        run(tmp_path, Scripted(sensible, lambda p, v: float("nan")), SCORE, lexicon=LEXICON)


def counts_of(site: str, wanted: tuple[int, int], classes: tuple[str, ...] = CLASSES) -> NoisyCounts:
    pairs = [(a, b) for a in range(len(classes)) for b in range(a + 1, len(classes))]
    numbers = tuple(500.0 if pair == wanted else 0.0 for pair in pairs)
    return NoisyCounts(site, classes, numbers, "record", 1.0, 2.0, "co-occurrence-1", "f" * 64)


def test_counts_steer_what_is_asked_and_are_named(tmp_path: Path) -> None:
    config = replace(CONFIG, budget=4)
    for wanted in ((0, 5), (2, 3)):
        content = run(tmp_path, Scripted(sensible), config, f"{wanted}", counts=[counts_of("north", wanted)])
        raw = unpacked(content["provenance"]["answers"])
        assert raw is not None
        assert raw[0]["labels"] == [CLASSES[c] for c in wanted]
    assert content["provenance"]["counts"] == [
        {
            "site": "north",
            "unit": "record",
            "max_norm": 1.0,
            "noise_multiplier": 2.0,
            "ledger": "co-occurrence-1",
            "sha256": "f" * 64,
        }
    ]
    assert "500" not in json.dumps({**content, "digest": "", "provenance": content["provenance"]["counts"]})
    assert run(tmp_path, Scripted(sensible), config, "none")["provenance"]["counts"] is None


def test_a_lexicon_belongs_to_the_scorer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a lexicon is for 'score', which needs one"):
        run(tmp_path, Scripted(sensible), CONFIG, lexicon=LEXICON)
    with pytest.raises(ValueError, match="a lexicon is for 'score', which needs one"):
        run(tmp_path, Scripted(sensible), SCORE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "guess"}, "method='guess'"),
        ({"conditions": 0}, "conditions=0"),
        ({"candidates": 2}, r"candidates=2 is out of range: allowed is \[3, 200\]"),
        ({"budget": 0}, "budget=0"),
        ({"sentences": 21}, "sentences=21"),
        ({"most_tokens": 4}, "most_tokens=4"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"pictures": 1}, "pictures=1: a variance over pictures needs at least 2"),
        ({"most_cosine": 1.5}, "most_cosine=1.5"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **changes)


def test_candidates_are_for_a_model_that_writes() -> None:
    assert replace(SCORE, conditions=20).conditions == 20
    with pytest.raises(ValueError, match="candidates=15 is out of range"):
        replace(SCORE, method="generate", conditions=20)


def test_a_list_is_never_replaced_and_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = run(tmp_path, Scripted(sensible))
    path = tmp_path / "mine.json"
    path.write_text("precious")
    with pytest.raises(DiscoveryError, match="exists, and a list is frozen"):
        write_list(content, path)
    assert path.read_text() == "precious"
    with pytest.raises(DiscoveryError, match="cannot be written"):
        write_list(content, tmp_path / "nowhere" / "mine.json")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiscoveryError, match="No space left on device"):
        write_list(content, tmp_path / "new.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "raw.jsonl"]
