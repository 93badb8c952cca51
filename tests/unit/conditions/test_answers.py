"""What is taken from a model's text, whatever it wraps it in, and what is not."""

import pytest

from fedmpt_core.conditions.answers import in_english, phrases, sentences

LABELS = ("dog", "dining table")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A dog sleeps under the table.\nA cat is near it.", ["A dog sleeps under the table."]),
        (
            "1. A dog sits still here.\n2) Two dogs run away fast!",
            ["A dog sits still here.", "Two dogs run away fast!"],
        ),
        ("- **A dog waits outside.** It barks at the dog.", ["A dog waits outside.", "It barks at the dog."]),
        ("Sure! Here you are:\n• The dining-table is set.", ["The dining-table is set."]),
        ('"The diningtable is big today."', ["The diningtable is big today."]),
        ("<think>A dog is what they want.</think>The dog is in the yard.", ["The dog is in the yard."]),
        ("<think>A dog is what they want, so", []),
        ("A dog sleeps under the table.\na DOG sleeps under the table.", ["A dog sleeps under the table."]),
        ("The hotdog stand is open now.", []),
        ("A dog.", []),
        ("dog " * 50, []),
        ("A dog " + "very " * 70 + "big.", []),
        ("一只 dog 在 桌子 下面 睡觉 呢 吧", []),
        ("", []),
        ("\n\n---\n", []),
        ("\x00\x01 dog \x02 lies on a mat", ["\x00\x01 dog \x02 lies on a mat"]),
    ],
)
def test_sentences(text: str, found: list[str]) -> None:
    assert list(sentences(text, LABELS, cut=False)) == found


def test_an_unfinished_last_sentence_is_dropped() -> None:
    text = "A dog sits in the sun. The dog runs across the"
    assert sentences(text, LABELS, cut=True) == ("A dog sits in the sun.",)
    assert len(sentences(text, LABELS, cut=False)) == 2
    assert sentences("A dog sits in the sun.", LABELS, cut=True) == ("A dog sits in the sun.",)


def test_a_label_of_signs_or_of_another_script_is_found() -> None:
    assert sentences("The price is 5 $ on this day", ("$",), cut=False)
    assert sentences("here we see 猫 on a mat today", ("猫",), cut=False)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Lighting\nScene type\nspatial layout", ["lighting", "scene type", "spatial layout"]),
        ("1. **Lighting**: bright or dim\n2. Pose - sitting\n3. Scale (small)", ["lighting", "pose", "scale"]),
        ("lighting, weather; season and the time of day", ["lighting", "weather"]),
        ("- The background.\n- and a viewpoint", ["background", "viewpoint"]),
        ("Dogs\nThe dining table\nhot dog\nmood", ["mood"]),
        ("a very long phrase of many words\nok", ["ok"]),
        ("conditions\nobjects\nothers\nobject scale", ["object scale"]),
        ("灯光\nтень\nlight 2\nlicht", ["licht"]),
        ("Lighting\nlighting\nLIGHTING", ["lighting"]),
        ("lighting/weather", ["lighting", "weather"]),
        ("incomprehensibilitiesandmoreofthem", []),
        ("", []),
    ],
)
def test_phrases(text: str, found: list[str]) -> None:
    assert list(phrases(text, LABELS, cut=False)) == found


def test_a_cut_off_phrase_is_dropped() -> None:
    assert phrases("lighting\npose\nbackgr", LABELS, cut=True) == ("lighting", "pose")
    assert phrases("lighti", LABELS, cut=True) == ()
    assert phrases("", LABELS, cut=True) == ()


def test_other_languages_are_noticed_as_a_whole() -> None:
    english = ["A dog lies on the sofa.", "A cat sits with a bird.", "Two boats sail at dawn.", "The bus is full."]
    german = ["Ein Hund liegt auf dem Sofa.", "Eine Katze sitzt an der Wand.", "Der Bus ist voll.", "Boote im Hafen."]
    spanish = ["Un perro en el sofá.", "Un gato a la sombra.", "El tren va a la ciudad.", "La vaca come hierba."]
    assert in_english(english)
    assert not in_english(german)
    assert not in_english(spanish)
    assert in_english(english + german[:2])
