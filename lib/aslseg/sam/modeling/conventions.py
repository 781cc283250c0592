"""How a SAM file expects its slices and prompts: as its training showed them.

A new checkpoint format is recognised in :mod:`aslseg.sam.modeling.checkpoints` and gets its entry in :data:`BY_KIND`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Conventions:
    """Preprocessing and prompts that a file was trained with. The defaults are those of SAM.

    Attributes:
        resize: ``longest`` keeps the aspect ratio and pads; ``squash`` does not (MedSAM, SAM-Med2D).
        interpolation: How a slice is resized: SAM bilinear, MedSAM bicubic, SAM-Med2D nearest.
        scaling: ``imagenet`` (SAM's mean and standard deviation), ``minmax`` (MedSAM: each slice to 0..1) or
            ``zscore`` (CFR: each volume to zero mean and unit variance).
        mask_prompt: The values of a mask prompt: logits for SAM, probabilities for SAM-Med2D.
        multimask: Which prompts are answered with several masks, of which the one with the highest predicted IoU
            counts: ``ambiguous`` ones (SAM: a lone point), all of them (``always``: SAM-Med2D, whose single-mask output
            was never trained) or none (``never``: MedSAM, which trained only the single mask).
        box_mask: Whether a box without a mask is accompanied by the ellipse in it as mask prompt. SAMs trained here
            know this: a coarse token grid locates a box roughly, a mask prompt to a quarter of a token.
    """

    resize: Literal["longest", "squash"] = "longest"
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    scaling: Literal["imagenet", "minmax", "zscore"] = "imagenet"
    mask_prompt: Literal["logits", "probabilities"] = "logits"
    multimask: Literal["ambiguous", "always", "never"] = "ambiguous"
    box_mask: bool = False

    def use_multimask(self, ambiguous: bool) -> bool:
        """Whether a prompt, ambiguous or not, is answered with several masks."""
        return self.multimask == "always" or (ambiguous and self.multimask == "ambiguous")


SAM = Conventions()
OURS = Conventions(box_mask=True)
BY_KIND = {
    "medsam": Conventions(resize="squash", interpolation="bicubic", scaling="minmax", multimask="never"),
    "sam_med2d": Conventions(resize="squash", interpolation="nearest", mask_prompt="probabilities", multimask="always"),
    "cfr_lora": Conventions(scaling="zscore"),
}
