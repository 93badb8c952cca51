"""Patch features of a frozen image tower of open_clip.

A patch feature is a patch token of the last layer, through the tower's final norm and its projection into
the space shared with the text (method of the paper, section 4: the frozen f_v). Summary tokens are left out.

A tower that pools before its final norm, or pools by attention with a learned query, has no norm or
projection made for single tokens. There a patch gets what the tower's head makes of this one token alone: its
norm, or its attention with nothing else to attend to.

Must never: return a token that sums up the picture, or features outside the space of the text.
"""

from typing import Any

from torch import Tensor


def patch_grid(visual: Any, label: str) -> tuple[int, int]:
    """Rows and columns of patches.

    Args:
        visual: open_clip's image tower.
        label: what to call the model in an error.

    Raises:
        ValueError: a tower that has no patch features in the shared space.
    """
    if hasattr(visual, "class_embedding"):  # open_clip's own vision transformer
        if visual.attn_pool is not None:
            raise ValueError(
                f"the image tower of {label} pools its patches into learned queries, so no patch has a "
                "feature in the space of the text: choose a plain CLIP ViT"
            )
        return visual.grid_size[0], visual.grid_size[1]
    trunk = getattr(visual, "trunk", None)
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if trunk is None or grid is None or not hasattr(trunk, "fc_norm") or hasattr(visual.head, "pool"):
        raise ValueError(f"the image tower of {label} is no vision transformer with patch tokens: choose a CLIP ViT")
    pool = trunk.attn_pool
    if pool is not None and (pool.pos_embed is not None or pool.latent_len != 1):
        raise ValueError(f"the image tower of {label} pools its patches by place: choose a plain CLIP ViT")
    return grid[0], grid[1]


def patch_features(visual: Any, images: Tensor) -> Tensor:
    """(B,3,H,W) -> (B,P,D), for a tower that `patch_grid` accepts."""
    tokens = visual.forward_intermediates(
        images, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
    )["image_intermediates"][0]  # (B,P,width)
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return tokens @ visual.proj
    if trunk.attn_pool is not None:
        alone = tokens.flatten(0, 1)[:, None]  # (B*P,1,width)
        tokens = trunk.attn_pool(alone).unflatten(0, tokens.shape[:2])
    return visual.head(trunk.head(trunk.fc_norm(tokens)))
