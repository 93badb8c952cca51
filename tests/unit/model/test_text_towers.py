"""Prompts through causal and bidirectional text towers, against open_clip's own text forward."""

import json
from itertools import pairwise

import pytest
import torch

from fedmpt_core.model.backbone.open_clip import OpenClipBackbone
from fedmpt_core.model.backbone.text_causal import Tokenizer, check_prompts

CONDITIONS = ("color", "spatial layout", "lighting and weather of the scene")
CLASSES = ("potted plant", "dog", "a very small remote control", "cat", "tv monitor")
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3}
TOWERS = {
    "clip": {},
    "quick_gelu": {"quick_gelu": True},
    "custom": {"custom_text": True, "text_cfg": {**TEXT, "proj_bias": True, "ls_init_value": 0.5}},
    "unprojected": {"custom_text": True, "embed_dim": 64, "text_cfg": {**TEXT, "proj_type": "none"}},
}


def save_config(folder, **changes):
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, **changes}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return str(folder)


def shake(backbone):
    """Away from the initial ones and zeros, so that a forgotten bias or scale shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone


@pytest.fixture(scope="module", params=TOWERS)
def causal(request, tmp_path_factory):
    folder = save_config(tmp_path_factory.mktemp(request.param), **TOWERS[request.param])
    return shake(OpenClipBackbone(folder, "random:1"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return shake(OpenClipBackbone(save_config(tmp_path_factory.mktemp("plain")), "random:1"))


def halves(backbone, dtype=torch.float32):
    """Contexts that want gradients, and the prompts' halves made with them; lengths differ on both sides."""
    generator = torch.Generator().manual_seed(0)
    width = backbone.token_dim

    def context(tokens):
        return (0.5 * torch.randn(tokens, width, generator=generator)).to(dtype).requires_grad_()

    own, shared = [context(4) for _ in CONDITIONS], context(3)
    words = [backbone.embed(backbone.tokenize(c)) for c in CONDITIONS]
    prefixes = [torch.cat([v, e, shared]) for v, e in zip(own, words, strict=True)]
    suffixes = [backbone.embed(backbone.tokenize(f"{c}.")) for c in CLASSES]
    assert len({len(p) for p in prefixes}) > 1 and len({len(s) for s in suffixes}) > 2
    return [*own, shared], prefixes, suffixes


def plain(backbone, prefixes, suffixes, *, shift=0, causal_mask=True, read="end", pad_id=0):
    """N * C prompts padded to the whole context, through open_clip's transformer, mask, norm and projection."""
    tower = getattr(backbone.model, "text", backbone.model)
    table, width = tower.token_embedding.weight, tower.token_embedding.weight.shape[1]
    rows, ends, starts = [], [], []
    for prefix in prefixes:
        for suffix in suffixes:
            row = torch.cat([table[49406:49407], prefix, suffix, table[49407:49408]])
            starts.append(len(prefix) + 1)
            ends.append(len(row) - 1)
            rows.append(torch.cat([row, table[pad_id].expand(77 - len(row), width)]))
    positions = torch.arange(77).repeat(len(rows), 1)
    if shift:
        positions = positions + shift * (positions >= torch.tensor(starts)[:, None])
    x = torch.stack(rows) + tower.positional_embedding[positions.clamp(max=76)]
    x = tower.transformer(x, attn_mask=tower.attn_mask.to(x.dtype) if causal_mask else None)
    x = tower.ln_final(x)
    at = {"end": torch.tensor(ends), "last": torch.full((len(rows),), 76), "early": torch.tensor(ends) - 1}[read]
    x = x[torch.arange(len(rows)), at]
    projection = tower.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
    return x.unflatten(0, (len(prefixes), len(suffixes)))


def outcome(backbone, encode, dtype):
    """Features, and gradients of a random functional of them with respect to every context vector."""
    contexts, prefixes, suffixes = halves(backbone, dtype)
    features = encode(prefixes, suffixes)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    return features.detach(), torch.autograd.grad((features * weights).sum(), contexts)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_shared_prefix_encoding_equals_the_plain_one(causal, dtype, tolerance):
    causal.model.to(dtype)
    try:
        ours, ours_gradients = outcome(causal, causal.encode_prompts, dtype)
        theirs, their_gradients = outcome(causal, lambda p, s: plain(causal, p, s), dtype)
    finally:
        causal.model.float()
    assert ours.shape == (3, 5, causal.feature_dim) and ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
    for mine, other in zip(ours_gradients, their_gradients, strict=True):
        assert float(other.abs().max()) > 0
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize(
    "broken",
    [{"shift": 1}, {"shift": -1}, {"causal_mask": False}, {"read": "last"}, {"read": "early"}],
    ids=str,
)
def test_a_broken_twin_differs(clip, broken):
    _, prefixes, suffixes = halves(clip)
    with torch.no_grad():
        ours, twin = clip.encode_prompts(prefixes, suffixes), plain(clip, prefixes, suffixes, **broken)
    assert float((ours - twin).abs().max()) > 1e-2 * float(ours.abs().max())


def test_the_plain_twin_does_not_attend_to_its_padding(clip):
    _, prefixes, suffixes = halves(clip)
    other = plain(clip, prefixes, suffixes, pad_id=1234)
    torch.testing.assert_close(other, plain(clip, prefixes, suffixes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sentence", ["a photo of a", "Spatial  Layout: it's"])
@pytest.mark.parametrize("label", ["dog.", "Dining Table ."])
def test_a_sentence_equals_encode_text(causal, sentence, label):
    import open_clip

    ids = open_clip.SimpleTokenizer(context_length=77)([f"{sentence} {label}"])
    theirs = causal.model.encode_text(ids)
    prefix, suffix = (causal.embed(causal.tokenize(words)) for words in (sentence, label))
    ours = causal.encode_prompts([prefix], [suffix])
    torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-5)


def test_a_prompt_does_not_depend_on_the_others(clip):
    _, prefixes, suffixes = halves(clip)
    everything = clip.encode_prompts(prefixes, suffixes)
    for n, prefix in enumerate(prefixes):
        for c, suffix in enumerate(suffixes):
            alone = clip.encode_prompts([prefix], [suffix])[0, 0]
            torch.testing.assert_close(everything[n, c], alone, rtol=1e-5, atol=1e-5)


def test_permuting_classes_and_conditions_permutes_the_features(clip):
    _, prefixes, suffixes = halves(clip)
    everything = clip.encode_prompts(prefixes, suffixes)
    rows, columns = [2, 0, 1], [3, 1, 4, 0, 2]
    permuted = clip.encode_prompts([prefixes[n] for n in rows], [suffixes[c] for c in columns])
    torch.testing.assert_close(permuted, everything[rows][:, columns], rtol=1e-5, atol=1e-5)


def test_nothing_of_a_call_is_kept_for_the_next(clip):
    _, prefixes, suffixes = halves(clip)
    with torch.no_grad():
        first = clip.encode_prompts(prefixes, suffixes)
        changed = clip.encode_prompts([2 * p for p in prefixes], suffixes)
        again = clip.encode_prompts(prefixes, suffixes)
    assert bool(((first - changed).abs().amax(-1) > 1e-3).all())
    assert torch.equal(again, first)


def test_frozen_weights_get_no_gradient(clip):
    contexts, prefixes, suffixes = halves(clip)
    clip.encode_prompts(prefixes, suffixes).sum().backward()
    assert all(c.grad is not None for c in contexts)
    assert all(p.grad is None and not p.requires_grad for p in clip.model.parameters())


def test_empty_halves_are_the_special_tokens_alone(clip):
    nothing = torch.zeros(0, clip.token_dim)
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, 0], ids[0, 1] = 49406, 49407
    ours = clip.encode_prompts([nothing], [nothing])
    torch.testing.assert_close(ours[0], clip.model.encode_text(ids), rtol=1e-5, atol=1e-5)


def check_func(backbone):
    """`torch.func.vmap` of a `vjp` equals a loop of plain backward passes."""
    _, prefixes, suffixes = halves(backbone)
    prefixes = [p.detach() for p in prefixes]
    features, pull = torch.func.vjp(lambda *p: backbone.encode_prompts(p, suffixes), *prefixes)
    cotangents = torch.randn(3, *features.shape, generator=torch.Generator().manual_seed(2))
    batched = torch.func.vmap(pull)(cotangents)
    wanted = [p.clone().requires_grad_() for p in prefixes]
    plain_features = backbone.encode_prompts(wanted, suffixes)
    torch.testing.assert_close(features, plain_features.detach(), rtol=1e-5, atol=1e-5)
    for k, cotangent in enumerate(cotangents):
        looped = torch.autograd.grad(plain_features, wanted, cotangent, retain_graph=True)
        for mine, other in zip(batched, looped, strict=True):
            torch.testing.assert_close(mine[k], other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_torch_func_can_batch_the_gradient(clip):
    check_func(clip)


def test_half_precision_gives_float32_features_close_to_the_full_ones(clip):
    contexts, prefixes, suffixes = halves(clip)
    full = clip.encode_prompts(prefixes, suffixes)
    with torch.autocast("cpu", torch.bfloat16):
        half = clip.encode_prompts(prefixes, suffixes)
    assert half.dtype == torch.float32
    assert bool((torch.cosine_similarity(full, half, dim=-1) > 0.999).all())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(half.sum(), contexts))


# Tokens.


def test_words_become_pieces_cleaned_as_open_clip_does(clip):
    import open_clip

    reference = open_clip.SimpleTokenizer()
    for words in ("Potted   PLANT", "caf&eacute;", "tv/monitor", "."):
        assert clip.tokenize(words) == reference([words])[0].tolist()[1 : len(clip.tokenize(words)) + 1]
    assert len(clip.tokenize("potted plant")) > 1
    assert clip.embed(clip.tokenize("potted plant")).shape == (len(clip.tokenize("potted plant")), 64)
    assert not clip.embed([320]).requires_grad


@pytest.mark.parametrize("words", ["", "   ", "\n"])
def test_words_without_a_token_are_refused(clip, words):
    with pytest.raises(ValueError, match="give no token") as caught:
        clip.tokenize(words)
    assert repr(words) in str(caught.value)


def test_words_that_spell_a_special_token_are_refused(clip):
    with pytest.raises(ValueError, match="special or unknown token"):
        clip.tokenize("dog <end_of_text> cat")


def test_a_prompt_that_is_too_long_names_condition_class_and_lengths(clip):
    prefixes = [torch.zeros(n, 64) for n in (5, 60, 7)]
    suffixes = [torch.zeros(n, 64) for n in (2, 3, 16, 4)]
    with pytest.raises(ValueError, match=r"condition 1 with class 2 has 78 tokens .* at most 77"):
        clip.encode_prompts(prefixes, suffixes)
    assert clip.encode_prompts(prefixes, suffixes[:2] + suffixes[3:]).shape == (3, 3, 24)
    full = torch.randn(60, 64, generator=torch.Generator().manual_seed(1))
    longest = clip.encode_prompts([full], [full[:15]])
    torch.testing.assert_close(longest, plain(clip, [full], [full[:15]]), rtol=1e-5, atol=1e-5)


def test_tensors_that_are_no_prompts_are_refused(clip):
    good = torch.zeros(2, 64)
    for prefixes, suffixes, text in [
        ([], [good], "0 conditions and 1 classes"),
        ([good], [], "1 conditions and 0 classes"),
        ([good, torch.zeros(2, 63)], [good], r"prefix 1 has shape \(2, 63\), it must be \(tokens, 64\)"),
        ([good], [torch.zeros(64)], r"suffix 0 has shape \(64,\)"),
    ]:
        with pytest.raises(ValueError, match=text):
            clip.encode_prompts(prefixes, suffixes)


def test_the_length_check_counts_every_special_token():
    tokenizer = Tokenizer(lambda _: [], (1, 2), (3,), frozenset(), 8)
    check_prompts([torch.zeros(3, 4)], [torch.zeros(2, 4)], 4, tokenizer)
    with pytest.raises(ValueError, match=r"has 9 tokens .* 3 special"):
        check_prompts([torch.zeros(4, 4)], [torch.zeros(2, 4)], 4, tokenizer)


# Hugging Face towers.

VOCABULARY = [
    *("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "photo", "of", "color", "spatial", "layout"),
    *("light", "##ing", "and", "weather", "the", "scene", "pot", "##ted", "plant", "dog", "cat", "tv"),
    *("monitor", "very", "small", "remote", "control"),
]
FAMILIES = {
    "bert": {"hf_pooler_type": "cls_pooler", "hf_proj_type": "mlp"},
    "bert_last": {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "linear"},
    "roberta": {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"},
}


def save_hugging_face(folder, family):
    """A model folder as open_clip knows it: its configuration, the text tower's and the tokenizer's files."""
    from tokenizers import Tokenizer as Pieces
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig

    pieces = Pieces(models.WordPiece({w: k for k, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=pieces, **special).save_pretrained(folder)
    config = (RobertaConfig if family == "roberta" else BertConfig)(
        vocab_size=len(VOCABULARY),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=40,
        pad_token_id=1,
    )
    config.save_pretrained(folder)
    text = {"hf_model_name": "somebody/text", "hf_tokenizer_name": "somebody/text", "context_length": 64}
    return save_config(folder, text_cfg={**text, **FAMILIES[family]})


@pytest.fixture(scope="module", params=FAMILIES)
def bidirectional(request, tmp_path_factory):
    folder = save_hugging_face(tmp_path_factory.mktemp(request.param), request.param)
    return shake(OpenClipBackbone(folder, "random:3"))


def sentence_features(backbone, sentences, length=30):
    """open_clip's own encoding of sentences padded to `length`."""
    from open_clip.tokenizer import HFTokenizer

    ids = HFTokenizer(str(backbone.model.text.config._name_or_path), length)(sentences)
    return backbone.model.encode_text(ids)


def test_a_hugging_face_sentence_equals_encode_text(bidirectional):
    conditions, classes = (
        ("a photo of color", "lighting"),
        ("potted plant.", "dog.", "very small remote control ."),
    )
    theirs = sentence_features(bidirectional, [f"{n} {c}" for n in conditions for c in classes])
    prefixes, suffixes = ([bidirectional.embed(bidirectional.tokenize(w)) for w in x] for x in (conditions, classes))
    ours = bidirectional.encode_prompts(prefixes, suffixes)
    assert ours.shape == (2, 3, 24)
    torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=1e-5, atol=1e-5)
    assert all(bool(((a - b).abs() > 1e-3).any()) for a, b in pairwise(theirs))


def test_a_hugging_face_prompt_does_not_depend_on_padding_or_neighbours(bidirectional):
    _, prefixes, suffixes = halves(bidirectional)
    everything = bidirectional.encode_prompts(prefixes, suffixes)
    for n, prefix in enumerate(prefixes):
        for c, suffix in enumerate(suffixes):
            alone = bidirectional.encode_prompts([prefix], [suffix])[0, 0]
            torch.testing.assert_close(everything[n, c], alone, rtol=1e-5, atol=1e-5)
    short, long = (sentence_features(bidirectional, ["color dog."], length) for length in (8, 30))
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_hugging_face_tower_agree_with_finite_differences(bidirectional):
    bidirectional.model.double()
    try:
        _, prefixes, suffixes = halves(bidirectional, torch.float64)
        features = bidirectional.encode_prompts(prefixes, suffixes)
        generator = torch.Generator().manual_seed(9)
        weights = torch.randn(features.shape, generator=generator).double()
        steps = [torch.randn(p.shape, generator=generator).double() for p in prefixes]
        gradients = torch.autograd.grad((features * weights).sum(), prefixes)

        def moved(size):
            changed = [p.detach() + size * step for p, step in zip(prefixes, steps, strict=True)]
            return (bidirectional.encode_prompts(changed, suffixes) * weights).sum().item()

        along = sum((g * step).sum().item() for g, step in zip(gradients, steps, strict=True))
        assert (moved(1e-5) - moved(-1e-5)) / 2e-5 == pytest.approx(along, rel=1e-6)
    finally:
        bidirectional.model.float()
    assert all(p.grad is None for p in bidirectional.model.parameters())


def test_torch_func_can_batch_the_gradient_of_a_hugging_face_tower(bidirectional):
    check_func(bidirectional)


def test_hugging_face_words_bring_no_special_tokens(bidirectional):
    assert bidirectional.tokenize("Potted plant.") == [VOCABULARY.index(w) for w in ("pot", "##ted", "plant", ".")]
    for words in ("dog [SEP] cat", "[PAD]", "zebra"):
        with pytest.raises(ValueError, match="special or unknown token"):
            bidirectional.tokenize(words)
    with pytest.raises(ValueError, match="give no token"):
        bidirectional.tokenize(" ")


def test_hugging_face_prompts_are_bounded_by_the_towers_positions(bidirectional):
    roberta = bidirectional.model.text.config.model_type == "roberta"
    allowed = 38 if roberta else 40  # RoBERTa starts counting behind its padding id, here 1
    suffix = bidirectional.embed(bidirectional.tokenize("dog"))
    fits = torch.zeros(allowed - 3, 48)
    assert bidirectional.encode_prompts([fits], [suffix]).shape == (1, 1, 24)
    with pytest.raises(ValueError, match=f"condition 0 with class 0 has {allowed + 1} tokens .* most {allowed}"):
        bidirectional.encode_prompts([torch.zeros(allowed - 2, 48)], [suffix])
