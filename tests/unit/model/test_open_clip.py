"""Loading, patch features, digests and refusals of the open_clip backbone, on tiny random models."""

import ast
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedmpt_core.model.backbone import base
from fedmpt_core.model.backbone.base import Backbone
from fedmpt_core.model.backbone.open_clip import OpenClipBackbone

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}


def save_config(folder, *, preprocess=None, **changes):
    folder.mkdir(exist_ok=True)
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, **changes}
    content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return str(folder)


def shake(backbone):
    """Away from the initial ones and zeros, so that a forgotten bias or scale shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone


def pictures(backbone, records=3):
    side = backbone.image_size
    return torch.randn(records, 3, side, side, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_config(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder):
    return shake(OpenClipBackbone(folder, "random:1"))


@pytest.fixture(scope="module")
def state(folder):
    """Weights that another seed would not give."""
    return OpenClipBackbone(folder, "random:2").model.state_dict()


# What a backbone is.


def test_it_describes_itself(tiny):
    assert isinstance(tiny, Backbone)
    assert tiny.name == "open_clip tiny (random:1)" and tiny.is_stand_in
    assert (tiny.feature_dim, tiny.token_dim, tiny.grid, tiny.image_size) == (24, 16, (4, 4), 32)


def test_everything_is_frozen_and_in_evaluation_mode(tiny):
    assert not any(p.requires_grad for p in tiny.model.parameters())
    assert not any(m.training for m in tiny.model.modules())
    assert not tiny.patches(pictures(tiny)).requires_grad


def test_importing_the_package_does_not_import_open_clip():
    for file in Path(base.__file__).parent.glob("*.py"):
        top = ast.parse(file.read_text()).body
        names = {n.name for node in top if isinstance(node, ast.Import) for n in node.names}
        names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
        assert not any(n.partition(".")[0] in ("open_clip", "transformers", "timm") for n in names), file.name


def test_only_one_module_imports_open_clip():
    for file in Path(base.__file__).parents[1].rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = {n.name for node in nodes if isinstance(node, ast.Import) for n in node.names}
        names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not any(n.partition(".")[0] == "open_clip" for n in names) or file.name == "open_clip.py", file.name


def test_random_weights_follow_their_seed_and_leave_the_global_generator_alone(folder):
    before = torch.get_rng_state()
    first, again, other = (OpenClipBackbone(folder, f"random:{s}").digest() for s in (3, 3, 4))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_bias_of_its_own_a_typical_cosine_starts_at_a_small_probability(folder):
    fresh = OpenClipBackbone(folder, "random:0")
    assert fresh.logit_scale == pytest.approx(1 / 0.07)
    assert 1 / (1 + math.exp(-(0.25 * fresh.logit_scale + fresh.logit_bias))) == pytest.approx(0.1, abs=0.001)


def test_a_bias_of_its_own_is_kept(tmp_path):
    own = save_config(tmp_path, init_logit_scale=math.log(10), init_logit_bias=-7.5, nonscalar_logit_scale=True)
    loaded = OpenClipBackbone(own, "random:0")
    assert loaded.logit_scale == pytest.approx(10) and loaded.logit_bias == -7.5


# Patches.


@torch.no_grad()
def tokens_of(visual, images):
    """Last layer of open_clip's own vision transformer, summary token first, before the final norm."""
    x = visual.conv1(images).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    return visual.transformer(visual.ln_pre(x))


def test_patches_are_the_normed_and_projected_patch_tokens(tiny):
    images, visual = pictures(tiny), tiny.model.visual
    tokens = tokens_of(visual, images)
    features = tiny.patches(images)
    assert features.shape == (3, 16, 24) and features.dtype == torch.float32
    torch.testing.assert_close(features, visual.ln_post(tokens[:, 1:]) @ visual.proj, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        summary = tiny.model.encode_image(images)
    torch.testing.assert_close(summary, (visual.ln_post(tokens) @ visual.proj)[:, 0], rtol=1e-5, atol=1e-5)
    assert bool(((features - summary[:, None]).abs().amax(-1) > 1e-2).all())


def test_a_patch_stands_where_its_pixels_are(tiny):
    """Without position embeddings and mixing, painting one patch moves that patch's feature most."""
    images = torch.zeros(1, 3, 32, 32)
    painted = images.clone()
    painted[..., 8:16, 16:24] = 1.0  # second row, third column
    moved = (tiny.patches(painted) - tiny.patches(images)).norm(dim=-1)
    assert int(moved.argmax()) == 1 * 4 + 2


def test_a_record_does_not_change_another(tiny):
    images = pictures(tiny)
    changed = images.clone()
    changed[1] = 0
    first, second = tiny.patches(images), tiny.patches(changed)
    assert torch.equal(first[[0, 2]], second[[0, 2]]) and not torch.equal(first[1], second[1])
    torch.testing.assert_close(tiny.patches(images[:1])[0], first[0], rtol=1e-5, atol=1e-5)


def test_a_tower_that_norms_after_pooling_norms_each_patch(tmp_path):
    vision = {**VISION, "patch_size": 32, "final_ln_after_pool": True, "pool_type": "avg", "no_ln_pre": True}
    one = shake(OpenClipBackbone(save_config(tmp_path, vision_cfg=vision), "random:1"))
    with torch.no_grad():
        pooled = one.model.encode_image(pictures(one))
    assert one.grid == (1, 1)
    torch.testing.assert_close(one.patches(pictures(one))[:, 0], pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pool", "proj"), [("token", "linear"), ("avg", "")])
def test_a_timm_patch_is_what_the_head_makes_of_its_token(tmp_path, pool, proj):
    vision = {**TIMM, "timm_pool": pool, "timm_proj": proj}
    timm = shake(OpenClipBackbone(save_config(tmp_path, vision_cfg=vision, embed_dim=20), "random:1"))
    images, visual = pictures(timm, 2), timm.model.visual
    features = timm.patches(images)
    assert timm.grid == (14, 14) and features.shape == (2, 196, 20)
    with torch.no_grad():
        tokens = visual.trunk.forward_features(images)  # the summary token first
        torch.testing.assert_close(visual.head(visual.trunk.forward_head(tokens)), timm.model.encode_image(images))
        for p in (0, 77, 195):
            # The pooling takes the first of two tokens, or the mean of all but the first.
            two = [p + 1, 0] if pool == "token" else [0, p + 1]
            alone = visual.head(visual.trunk.forward_head(tokens[:, two]))
            torch.testing.assert_close(features[:, p], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_tower_that_pools_by_attention_gives_what_its_head_makes_of_one_patch():
    tower = OpenClipBackbone("PE-Core-T-16-384", "random:1")
    images, visual = pictures(tower, 1), tower.model.visual
    features = tower.patches(images)
    assert features.shape == (1, 24 * 24, 512)
    with torch.no_grad():
        tokens = visual.trunk.forward_features(images)[:, 1:]
        alone = torch.stack([visual.trunk.forward_head(tokens[:, p : p + 1]) for p in (0, 5, 575)], 1)
    torch.testing.assert_close(features[:, [0, 5, 575]], visual.head(alone), rtol=1e-4, atol=1e-4)


def test_half_precision_gives_float32_patches_close_to_the_full_ones(tiny):
    images = pictures(tiny)
    full = tiny.patches(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = tiny.patches(images)
    assert half.dtype == torch.float32
    assert bool((torch.cosine_similarity(full, half, dim=-1) > 0.99).all())


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 32, 33), (1, 1, 32, 32), (2, 3, 224, 224)])
def test_images_of_another_shape_are_refused(tiny, shape):
    with pytest.raises(ValueError, match=r"it must be \(records, 3, 32, 32\)"):
        tiny.patches(torch.zeros(shape))


def test_features_that_are_not_finite_are_refused(tiny):
    images = pictures(tiny)
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        tiny.patches(images)


# Preprocessing.


def test_a_picture_is_resized_cropped_and_normalised_as_open_clip_does(tiny):
    import open_clip

    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    reference = open_clip.image_transform(32, is_train=False)
    assert torch.equal(tiny.preprocess(picture), reference(picture))
    flat = tiny.preprocess(Image.new("RGB", (300, 40), (255, 0, 128)))
    assert flat.shape == (3, 32, 32) and flat.dtype == torch.float32
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(flat[:, 16, 16], (torch.tensor([255, 0, 128]) / 255 - mean) / std)


@pytest.mark.parametrize(
    ("preprocess", "size"),
    [
        ({"resize_mode": "squash"}, (90, 50)),
        ({"resize_mode": "shortest"}, (50, 50)),
        ({"resize_mode": "longest", "fill_color": 200}, (90, 90)),
        ({}, (50, 50)),
    ],
)
def test_what_the_towers_see_of_a_picture_is_told(tmp_path, preprocess, size):
    loaded = OpenClipBackbone(save_config(tmp_path / "m", preprocess=preprocess), "random:1")
    slope = np.indices((50, 90)).transpose(1, 2, 0) * (5, 2.8)
    upright = Image.fromarray(np.dstack([slope, np.full((50, 90), 60)]).astype(np.uint8))
    for picture, expected in ((upright, size), (upright.transpose(Image.Transpose.TRANSPOSE), size[::-1])):
        seen = loaded.seen(picture)
        assert seen.size == expected
        # both end in the same square, but for a pixel of rounding at its edges
        again, once = loaded.preprocess(seen)[:, 1:-1, 1:-1], loaded.preprocess(picture)[:, 1:-1, 1:-1]
        assert (again - once).abs().mean() < 0.1
        assert (again - once.flip(-1)).abs().mean() > 0.2 < (again - once.flip(-2)).abs().mean()


def test_the_preprocessing_digest_follows_every_parameter(tmp_path, tiny):
    choices = [
        {},
        {"mean": [0.5] * 3},
        {"std": [0.5] * 3},
        {"interpolation": "bilinear"},
        {"resize_mode": "squash"},
    ]
    digests = []
    for k, choice in enumerate(choices):
        loaded = OpenClipBackbone(save_config(tmp_path / str(k), preprocess=choice), "random:1")
        digests.append(loaded.preprocessing_digest())
    assert digests[0] == tiny.preprocessing_digest() and len(set(digests)) == len(choices)
    assert all(len(d) == 64 for d in digests)


# Weights and digests.


def save(state, path):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({k: v.clone() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
def test_a_weights_file_makes_the_round_trip(folder, state, tmp_path, name):
    loaded = OpenClipBackbone(folder, save(state, tmp_path / name))
    assert loaded.name == f"open_clip tiny ({name})" and not loaded.is_stand_in
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in state.items())
    assert loaded.digest() == OpenClipBackbone(folder, "random:2").digest()


def test_a_training_checkpoint_is_read_too(folder, state, tmp_path):
    wrapped = {
        "epoch": 3,
        "state_dict": {f"module.{k}": v for k, v in state.items()},
        "optimizer": {"lr": 0.1},
    }
    loaded = OpenClipBackbone(folder, save(wrapped, tmp_path / "w.pt"))
    assert loaded.digest() == OpenClipBackbone(folder, "random:2").digest()


def test_a_folder_brings_its_own_weights(folder, state, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    save(state, moved / "open_clip_model.safetensors")
    torch.save({}, moved / "older.bin")  # safetensors go first
    for name in (str(moved), f"local-dir:{moved}"):
        loaded = OpenClipBackbone(name, "")
        assert loaded.name == "open_clip elsewhere (its own weights)"
        assert loaded.digest() == OpenClipBackbone(folder, "random:2").digest()


def test_the_digest_changes_with_one_weight_and_with_the_architecture_and_not_otherwise(folder, state, tmp_path):
    digest = OpenClipBackbone(folder, save(state, tmp_path / "a.pt")).digest()
    assert OpenClipBackbone(folder, save(state, tmp_path / "b.pt")).digest() == digest
    for name in ("visual.proj", "token_embedding.weight", "logit_scale"):
        changed = {k: v.clone() for k, v in state.items()}
        flat = changed[name].view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(10.0))
        assert OpenClipBackbone(folder, save(changed, tmp_path / "c.pt")).digest() != digest
    quick = save_config(tmp_path / "quick", quick_gelu=True)
    assert OpenClipBackbone(quick, str(tmp_path / "a.pt")).digest() != digest


def test_the_digest_is_kept_and_survives_use(tiny):
    digest = tiny.digest()
    tiny.patches(pictures(tiny))
    tiny.encode_prompts([tiny.embed([320])], [tiny.embed([269])])
    assert tiny.digest() == digest and tiny.to("cpu") is tiny


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("kind", ["torch", "torch_legacy", "pickle"])
def test_a_file_that_would_run_code_is_refused_without_running_it(folder, state, tmp_path, kind):
    mark, file = tmp_path / "ran", tmp_path / "evil.pt"
    content = {**state, "visual.proj": Payload(mark)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(ValueError, match=r"evil\.pt is not a file of plain tensors"):
        OpenClipBackbone(folder, str(file))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_open_clips_second_try_without_weights_only_is_never_reached(folder, state, tmp_path, monkeypatch):
    file, ran, load = save(state, tmp_path / "w.pt"), [], torch.load

    def confused(*arguments, weights_only=None, **options):
        if weights_only:
            raise TypeError("what makes open_clip try again")
        ran.append(1)
        return load(*arguments, weights_only=True, **options)

    monkeypatch.setattr(torch, "load", confused)
    with pytest.raises(ValueError, match=r"w\.pt is not a file of plain tensors"):
        OpenClipBackbone(folder, file)
    assert not ran


def drop(state):
    return {k: v for k, v in state.items() if k != "visual.proj"}


def grow(state):
    return {**state, "another.weight": torch.zeros(2)}


def reshape(state):
    return {**state, "visual.proj": torch.zeros(32, 25)}


@pytest.mark.parametrize(("spoil", "told"), [(drop, "visual.proj"), (grow, "another.weight"), (reshape, "visual.proj")])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_file_that_does_not_fit_is_refused(folder, state, tmp_path, spoil, told, name):
    with pytest.raises(ValueError, match=f"{name} does not fit architecture tiny: .*{told}") as caught:
        OpenClipBackbone(folder, save(spoil(state), tmp_path / name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_values_that_are_not_finite_are_refused(folder, state, tmp_path):
    spoiled = {**state, "visual.proj": torch.full((32, 24), torch.inf)}
    with pytest.raises(ValueError, match="holds values that are not finite"):
        OpenClipBackbone(folder, save(spoiled, tmp_path / "w.pt"))


def test_damaged_and_foreign_files_are_refused(folder, tmp_path):
    for name, text in [
        ("w.pt", "not a file of plain tensors"),
        ("w.safetensors", "does not fit"),
        ("w.onnx", "kind"),
    ]:
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(ValueError, match=text):
            OpenClipBackbone(folder, str(tmp_path / name))


# Names.


@pytest.fixture
def known(folder, state, tmp_path, monkeypatch):
    """An architecture and a tag as open_clip's own lists hold them."""
    import open_clip.factory
    import open_clip.pretrained

    config = json.loads((Path(folder) / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-Tiny-8", config)
    tag = {
        "file": save(state, tmp_path / "tag.bin"),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5,) * 3,
        "quick_gelu": True,
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-Tiny-8", {"openai": tag, "laion": {"url": "http://x"}})
    return tag


def test_a_tag_brings_weights_preprocessing_and_activation(known, state, tmp_path, recwarn):
    loaded = OpenClipBackbone("ViT-Tiny/8", "openai")
    assert loaded.name == "open_clip ViT-Tiny-8 (openai)" and not loaded.is_stand_in
    assert torch.equal(loaded.model.visual.proj, state["visual.proj"])
    activation = loaded.model.transformer.resblocks[0].mlp.gelu
    assert type(activation).__name__ == "QuickGELU"
    black = loaded.preprocess(Image.new("RGB", (32, 32)))[:, 0, 0]
    torch.testing.assert_close(black, torch.tensor([-0.2, -0.4, -0.6]))
    quick = save_config(tmp_path / "quick", quick_gelu=True)
    assert loaded.digest() == OpenClipBackbone(quick, known["file"]).digest()
    assert not recwarn.list


def test_a_tag_that_cannot_be_fetched_is_one_sentence(known, monkeypatch):
    import open_clip

    def unreachable(_):
        raise RuntimeError("a page of hub errors")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"weights='laion' of ViT-Tiny-8 is not in the local cache and could not") as e:
        OpenClipBackbone("ViT-Tiny-8", "laion")
    assert "a page of hub errors" not in str(e.value)


def test_a_hub_model_brings_its_own_weights(folder, state, tmp_path, monkeypatch):
    import open_clip.pretrained

    def hub(model, filename=None):
        assert model == "somebody/tiny"
        return str(Path(folder) / filename) if filename else save(state, tmp_path / "hub.safetensors")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", hub)
    loaded = OpenClipBackbone("hf-hub:somebody/tiny", "")
    assert loaded.name == "open_clip somebody/tiny (its own weights)"
    assert loaded.digest() == OpenClipBackbone(folder, "random:2").digest()
    with pytest.raises(ValueError, match="weights='openai': hf-hub:somebody/tiny brings its own"):
        OpenClipBackbone("hf-hub:somebody/tiny", "openai")

    def unreachable(*_, **__):
        raise OSError("a page of hub errors")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", unreachable)
    with pytest.raises(ValueError, match="architecture='hf-hub:somebody/tiny' is not in the local cache"):
        OpenClipBackbone("hf-hub:somebody/tiny", "")


@pytest.mark.parametrize(
    ("architecture", "weights", "told"),
    [
        ("ViT-B-61", "openai", "architecture='ViT-B-61' is neither a folder nor known.*'ViT-B-16'"),
        ("", "openai", "architecture='' is neither a folder nor known"),
        (
            "ViT-Tiny-8",
            "opneai",
            "weights='opneai' is neither a file nor a pretrained tag of ViT-Tiny-8.*'openai'",
        ),
        ("ViT-Tiny-8", "", "weights='' is neither a file nor a pretrained tag"),
        ("ViT-Tiny-8", "random:", "write 'random:SEED'"),
        ("ViT-Tiny-8", "random:-1", "write 'random:SEED'"),
        ("coca_ViT-B-32", "random:0", "coca_ViT-B-32 is a captioning model"),
    ],
)
def test_unknown_names_are_refused(known, architecture, weights, told):
    with pytest.raises(ValueError, match=told):
        OpenClipBackbone(architecture, weights)


def test_an_unknown_precision_is_refused(folder):
    with pytest.raises(ValueError, match="precision='half': use 'auto' or 'float32'"):
        OpenClipBackbone(folder, "random:0", precision="half")


def test_folders_without_what_is_needed_are_refused(folder, state, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"folder 'empty' holds no open_clip_config\.json"):
        OpenClipBackbone(str(tmp_path / "empty"), "")
    with pytest.raises(ValueError, match="folder 'tiny' holds 0 weights files"):
        OpenClipBackbone(folder, "")
    with pytest.raises(ValueError, match="weights='openai' is neither a file nor a pretrained tag of tiny"):
        OpenClipBackbone(folder, "openai")
    two = Path(save_config(tmp_path / "two"))
    for name in ("a.pt", "b.pt"):
        save(state, two / name)
    with pytest.raises(ValueError, match="folder 'two' holds 2 weights files"):
        OpenClipBackbone(str(two), "")
    for content in ("{", "[]", '{"model_cfg": {"embed_dim": 4}}'):
        (two / "open_clip_config.json").write_text(content)
        with pytest.raises(ValueError, match="is not valid: it needs model_cfg"):
            OpenClipBackbone(str(two), "")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"vision_cfg": {**VISION, "layers": [1, 1, 1, 1], "width": 8}},
            "no vision transformer with patch tokens",
        ),
        (
            {"vision_cfg": {"timm_model_name": "resnet10t", "image_size": 64}},
            "no vision transformer with patch tokens",
        ),
        (
            {"vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}},
            "into learned queries",
        ),
        ({"vision_cfg": {**VISION, "image_size": [32, 64]}}, "32 x 64 pixels: choose one with square"),
        ({"text_cfg": {**TEXT, "no_causal_mask": True}}, "is not a plain causal transformer"),
        ({"custom_text": True, "text_cfg": {**TEXT, "embed_cls": True}}, "is not a plain causal transformer"),
        ({"text_cfg": {**TEXT, "qk_norm": True}}, "is not a plain causal transformer"),
        ({"text_cfg": {**TEXT, "pool_type": "last"}}, "names no tokenizer"),
        ({"text_cfg": {**TEXT, "surprise": 1}}, "open_clip cannot build m: .*surprise"),
    ],
)
def test_towers_that_are_not_supported_are_refused_by_name(tmp_path, changes, told):
    folder = save_config(tmp_path / "m", **changes)
    with pytest.raises(ValueError, match=told):
        OpenClipBackbone(folder, "random:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees_with_the_cpu(folder):
    cpu = shake(OpenClipBackbone(folder, "random:1"))
    exact = shake(OpenClipBackbone(folder, "random:1", precision="float32")).to("cuda")
    half = shake(OpenClipBackbone(folder, "random:1")).to("cuda")
    words = [cpu.embed(cpu.tokenize(w)) for w in ("a photo", "dog.")]
    for other, least in ((exact, 0.99999), (half, 0.99)):
        patches = other.patches(pictures(cpu))
        text = other.encode_prompts([words[0].cuda()], [words[1].cuda()])
        assert patches.dtype == text.dtype == torch.float32 and patches.is_cuda and text.is_cuda
        assert bool((torch.cosine_similarity(patches.cpu(), cpu.patches(pictures(cpu)), dim=-1) > least).all())
        reference = cpu.encode_prompts(words[:1], words[1:])
        assert bool((torch.cosine_similarity(text.cpu(), reference, dim=-1) > least).all())
    assert exact.digest() == cpu.digest()
