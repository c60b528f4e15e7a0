"""One picture's work, as far as it takes memory."""

from __future__ import annotations

from dataclasses import dataclass

PROMPT_TOKENS = 512  # longest prompt the text encoder takes
# Tokens that go through the transformer's feed-forward at once where it need not be all: models/z_image/token_rows.py.
FEED_FORWARD_TOKENS_ON_CPU, FEED_FORWARD_TOKENS_ON_GPU = 576, 2304
_PATCH_PIXELS = 16  # one image token covers 16 x 16 pixels: VAE factor 8, patch size 2
_CELL_PIXELS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One picture's work, as far as it takes memory.

    width, height: pixels. tile_cells: latent cells, 0 is untiled, and so is None, which leaves it to the plan.
    compute_bytes, vae_bytes: bytes per number of the two dtypes. decode_bytes: of the activations that a picture is
    decoded in, with a second decoder of that type, where they are not the VAE's own. guided: two passes in one batch.
    is_exact: all tokens go through the feed-forward at once, as in the reference.
    """

    width: int
    height: int
    tile_cells: int | None
    compute_bytes: int
    vae_bytes: int
    guided: bool
    on_cpu: bool = True
    decode_bytes: int | None = None
    is_exact: bool = False

    @property
    def pixels(self) -> int:
        """Of the picture."""
        return self.width * self.height

    @property
    def cells(self) -> int:
        """Latent cells along the longer side."""
        return -(-max(self.width, self.height) // _CELL_PIXELS)

    @property
    def decodes_beside(self) -> bool:
        """Whether a second decoder comes to a GPU for the decode."""
        return self.decode_bytes is not None and not self.on_cpu

    @property
    def tokens(self) -> int:
        """Of picture and prompt, in one pass."""
        picture = (self.width // _PATCH_PIXELS) * (self.height // _PATCH_PIXELS)
        return (picture + PROMPT_TOKENS) * (2 if self.guided else 1)

    @property
    def tokens_at_once(self) -> int:
        """Of them in the feed-forward."""
        part = FEED_FORWARD_TOKENS_ON_CPU if self.on_cpu else FEED_FORWARD_TOKENS_ON_GPU
        return self.tokens if self.is_exact else min(self.tokens, part)
