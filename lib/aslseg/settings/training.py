"""Settings of the data and of the networks that are trained on them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from aslseg.registry import NETWORKS, SSL_METHODS
from aslseg.settings.base import Auto, Section, setting
from aslseg.settings.values import LabelNames, Nesting, PatchSize, PromptKinds, Spacing, registered


class DataSettings(Section):
    """Scans and labels."""

    labels: LabelNames = setting(
        ("liver", "tumour"),
        "Names of the labels in the order of their values 1 to N in label files; the background is left out",
        example="atrium",
        common=True,
    )
    nested: Nesting = setting(
        (("tumour", "liver"),),
        "Pairs child:parent of labels where the child lies inside the parent",
        example="tumour:liver,cyst:liver",
        common=True,
    )
    modality: Literal["ct", "mr"] = setting(
        "ct",
        "How intensities are scaled: ct by the fixed window window_low to window_high, mr by percentiles of each scan",
        example="mr",
        common=True,
    )
    window_low: float = setting(
        -160.0, "Lower end of the intensity window of CT scans", unit="HU", example="-100", common=True
    )
    window_high: float = setting(
        240.0, "Upper end of the intensity window of CT scans", unit="HU", example="300", common=True
    )
    spacing: Spacing = setting(
        "auto",
        "Voxel size of the working grid, on which everything is trained and predicted: x,y,z; native for each scan's "
        "own; or auto, the median of the labelled scans, coarsened until that has at most max_working_voxels",
        unit="mm",
        example="1.5,1.5,2",
        common=True,
    )
    max_working_voxels: float = setting(
        4e6,
        "Size that the median scan may have on the working grid when spacing is auto",
        unit="voxels",
        example="8e6",
        gt=1e3,
    )
    max_voxels: float = setting(
        1.6e9, "Scans with more voxels than this are refused", unit="voxels", example="5e8", gt=1
    )
    max_upload_voxels: float = setting(
        2e8, "Scans uploaded by a client with more voxels than this are refused", unit="voxels", example="1e8", gt=1
    )


class SSLSettings(Section):
    """SSL network."""

    ssl_method: Annotated[str, registered(SSL_METHODS)] = setting(
        "bcp_mt",
        "Method that trains the SSL network on labelled and unlabelled scans (docs/ssl.md)",
        example="mean_teacher",
        common=True,
    )
    network: Annotated[str, registered(NETWORKS, "auto")] = setting(
        "auto",
        "Network of the SSL model; auto: vnet_small on a CPU, vnet on a GPU",
        example="unet",
        common=True,
    )
    patch: PatchSize = setting(
        "auto",
        "Size of the SSL network's training patches: x,y,z, rounded to multiples of 16 and at least 32,32,16; or auto, "
        "as large as patch_voxels allows",
        unit="voxels",
        example="112,112,80",
    )
    patch_voxels: Auto | Annotated[float, Field(gt=500)] = setting(
        "auto",
        "Most voxels of a training patch when patch is auto; auto: 200,000 on a CPU, 112 x 112 x 80 on a GPU",
        unit="voxels",
        example="4e5",
    )
    ssl_iterations: Auto | Annotated[int, Field(gt=0)] = setting(
        "auto",
        "Training steps of the SSL network; auto: 2000 on a CPU, 6000 on a GPU",
        unit="steps",
        example="4000",
        common=True,
    )
    retrain_iterations: Auto | Annotated[int, Field(gt=0)] = setting(
        "auto",
        "Training steps when the SSL network is trained again with promoted masks; auto: 1500 on a CPU, 4500 on a GPU",
        unit="steps",
        example="3000",
    )
    batch_labelled: Auto | Annotated[int, Field(gt=0)] = setting(
        "auto",
        "Labelled patches in a training batch of the SSL network; auto: 2, or 4 on a GPU with 24 GB or more",
        unit="patches",
        example="4",
    )
    batch_unlabelled: Auto | Annotated[int, Field(ge=0)] = setting(
        "auto",
        "Unlabelled patches in a training batch of the SSL network; auto: 2, or 4 on a GPU with 24 GB or more",
        unit="patches",
        example="4",
    )
    accumulate: int = setting(
        1,
        "Batches whose mean gradient makes one training step of the SSL network; several processes share them",
        unit="batches",
        example="4",
        gt=0,
    )
    learning_rate: float = setting(
        0.01, "Learning rate of the SSL network at the first step (SGD)", example="0.005", gt=0
    )
    schedule: Literal["poly", "milestones"] = setting(
        "poly",
        "How the SSL network's learning rate falls over the training: poly is (1 - t)^0.9, milestones divides it by "
        "ten after 41.7 % and 83.3 % of the steps",
        example="milestones",
    )
    consistency: Auto | Annotated[float, Field(ge=0)] = setting(
        "auto",
        "Largest weight of the loss on unlabelled patches in mean_teacher, ua_mt, cps, dtc and mcnet; the other "
        "methods have none; auto: as published, 1 for dtc and mcnet, 0.1 for the others",
        example="0.1",
    )
    ema_decay: float = setting(
        0.99, "Decay of the moving average that makes the teacher's weights, per step", example="0.999", gt=0, lt=1
    )
    overlap: float = setting(
        0.5,
        "Fraction of a window's edge that neighbouring sliding windows share in prediction",
        example="0.25",
        ge=0,
        lt=0.95,
    )
    flips: bool = setting(
        False,
        "For anatomy that looks the same when mirrored left-right or front-back: train with mirrored patches, and "
        "average predictions over mirrored scans",
        example="true",
    )


class NestedSettings(Section):
    """Second stage of the SSL model, for labels that lie in another one (nested)."""

    nested_fraction: float = setting(
        0.6,
        "Fraction of the SSL network's steps that a network of its own for nested labels gets (docs/nested.md); "
        "0: one network learns all labels. Without nested labels it has no effect",
        example="0",
        ge=0,
        lt=1,
    )
    nested_margin: float = setting(
        15.0,
        "Distance around the parent's bounding box within which nested labels are looked for",
        unit="mm",
        example="25",
        ge=0,
    )
    nested_range: float = setting(
        0.25,
        "Difference from the parent's median intensity at which relative intensities end, as a fraction of "
        "the window (CT) or of the scan's range (MR)",
        example="0.15",
        gt=0,
    )
    nested_first_voxels: float = setting(
        5e5,
        "Most voxels of a scan as the first stage sees it; its grid is the working grid, or coarser if the median "
        "labelled scan would have more. Where a label has nothing nested in it, the grid is the working grid",
        unit="voxels",
        example="1e7",
        gt=1e3,
    )
    nested_voxels: float = setting(
        4e6,
        "Most voxels of the parent's box; its grid is the working grid, or coarser if the median box would have more",
        unit="voxels",
        example="2e6",
        gt=1e3,
    )
    nested_synthetic: float = setting(
        0.5,
        "Fraction of the second stage's labelled training patches that get synthetic lesions of the nested labels; "
        "SAM and the adaptation network learn from a copy of each labelled scan with some. 0: none",
        example="0",
        ge=0,
        le=1,
    )


class SAMSettings(Section):
    """SAM."""

    sam_checkpoint: str = setting(
        "",
        "SAM weights to start from; empty: the small SAM that comes with the app",
        unit="file",
        example="sam_vit_b_01ec64.pth",
        common=True,
    )
    sam_kind: Literal["auto", "sam", "medsam", "sam_med2d"] = setting(
        "auto",
        "What sam_checkpoint holds; auto: seen from its content, and from its name where SAM and MedSAM look alike",
        example="medsam",
    )
    sam_base: str = setting(
        "",
        "SAM that a checkpoint of CFR was trained from; it holds only LoRA, prompt encoder and mask decoder",
        unit="file",
        example="sam_vit_b_01ec64.pth",
    )
    sam_image_size: int = setting(
        0,
        "Edge of SAM's input image; 0: as the checkpoint has it, any other size resizes its position embeddings",
        unit="pixels",
        example="512",
        ge=0,
    )
    sam_iterations: int = setting(300, "Fine-tuning steps of SAM", unit="steps", example="1000", ge=0)
    sam_batch: int = setting(8, "Slices that SAM processes at once", unit="slices", example="4", gt=0)
    sam_learning_rate: float = setting(
        2e-4, "Learning rate of SAM's fine-tuning at the first step (AdamW)", example="1e-4", gt=0
    )
    sam_train: Literal["decoder", "med2d_adapter", "lora", "full"] = setting(
        "full",
        "What of SAM's image encoder is fine-tuned beside prompt encoder and mask decoder: decoder nothing, "
        "med2d_adapter the adapter layers of SAM-Med2D, lora low-rank updates, full everything",
        example="lora",
    )
    sam_lora_rank: int = setting(
        4, "Rank of the low-rank updates of queries and values when sam_train is lora", example="8", gt=0
    )
    sam_canvas: int = setting(
        0,
        "Edge of the canvas on which the recipe cfr stitches slices; 0: SAM's input, or a slice's edge if that is more",
        unit="pixels",
        example="1024",
        ge=0,
    )
    sam_zoom: float = setting(
        5,
        "Objects shorter than this are segmented a second time on an enlarged crop of the slice; 0: never",
        unit="tokens of SAM's image encoder",
        example="0",
        ge=0,
    )
    sam_prompts: PromptKinds = setting(
        ("box", "point", "mask"),
        "What the SSL network's mask is turned into to prompt SAM: box, point and mask, joined by +",
        example="box+mask",
    )
    box_margin: float = setting(
        3.0,
        "Width by which a box prompt exceeds the mask on each side",
        unit="pixels of SAM's input",
        example="5",
        ge=0,
    )
    min_component: int = setting(
        9,
        "Components of a slice's mask that are smaller than this give no prompt for SAM",
        unit="pixels of SAM's input",
        example="25",
        ge=0,
    )


class AdapterSettings(Section):
    """Adaptation network."""

    adapter_iterations: int = setting(
        600, "Training steps of the adaptation network", unit="steps", example="1500", ge=0
    )
    adapter_learning_rate: float = setting(
        2e-3, "Learning rate of the adaptation network at the first step (AdamW)", example="1e-3", gt=0
    )
