# SPDX-License-Identifier: Apache-2.0
"""Mask2Former on a SwinV2: its options, and the start of its own code."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Swinv2Backbone

from sfa_peft import SFAError
from sfa_peft.dense import NormedFeatures

PAPER_POINTS = 12544  # sampled per mask for the loss
DECODER_HELP = "Mask2Former's predictions, the first from bare queries; 10 in its paper."
QUERIES_HELP = "Masks that Mask2Former predicts per image; 100 in its paper."

Model = TypeVar("Model", bound=Mask2FormerForUniversalSegmentation)


@dataclass
class Mask2FormerOptions:
    """Options of scripts that can have this head; defaults are for rendered scenes."""

    hidden_size: int = field(
        default=64, metadata={"help": "Channels of the head; 256 in Mask2Former's paper."}
    )
    encoder_layers: int = field(
        default=2, metadata={"help": "Blocks of Mask2Former's pixel decoder; 6 in its paper."}
    )
    decoder_layers: int = field(default=4, metadata={"help": DECODER_HELP})
    num_queries: int = field(default=20, metadata={"help": QUERIES_HELP})


def check_width(options: Mask2FormerOptions) -> None:
    """Refuse a width that the head's 32 groups of channels do not divide."""
    if options.hidden_size % 32:
        raise SFAError(f"--hidden_size: Mask2Former takes multiples of 32: {options.hidden_size}")


def build_mask2former(
    kind: type[Model], args: Any, backbone: Swinv2Backbone, num_labels: int
) -> Model:
    """Return Mask2Former on a backbone; what is not an argument is as in its paper.

    Args:
        kind: Class of the model.
        args: `Mask2FormerOptions`, `norm_outputs`, and `image_size`: small images have fewer points
            for the loss.
        backbone: All its stages are put out.
        num_labels: Classes.
    """
    width, (height, columns) = args.hidden_size, args.image_size
    config = Mask2FormerConfig(
        backbone_config=backbone.config,
        feature_size=width,
        mask_feature_size=width,
        hidden_dim=width,
        encoder_feedforward_dim=4 * width,
        dim_feedforward=8 * width,
        encoder_layers=args.encoder_layers,
        decoder_layers=args.decoder_layers,
        num_queries=args.num_queries,
        num_labels=num_labels,
        train_num_points=min(PAPER_POINTS, height * columns // 4),
    )
    model = kind(config)
    start_as_original(model)
    pixels = model.model.pixel_level_module
    pixels.encoder = backbone
    if args.norm_outputs:
        pixels.decoder = NormedFeatures(pixels.decoder, backbone.channels)
    return model


def start_as_original(model: Mask2FormerForUniversalSegmentation) -> None:
    """Give a new head the random start of Mask2Former's own code, in place.

    transformers draws most layers from a normal distribution of standard deviation 0.02 whatever
    their width, with which training hardly starts; nobody sees it who begins with a trained head.
    The start of deformable attention and of norms is the original's already.
    """
    start_pixel_decoder(model.model.pixel_level_module.decoder)
    start_queries(model.model.transformer_module)
    model.class_predictor.reset_parameters()


def start_pixel_decoder(decoder: nn.Module) -> None:
    """See `start_as_original`."""
    for projection, _ in decoder.input_projections:
        nn.init.xavier_uniform_(projection.weight)
    levels = [*decoder.lateral_convolutions, *decoder.output_convolutions]
    for convolution in (decoder.mask_projection, *(level[0] for level in levels)):
        nn.init.kaiming_uniform_(convolution.weight, a=1)  # Detectron2's c2_xavier_fill
    nn.init.normal_(decoder.level_embed)
    start_feedforward(decoder.encoder.layers)


def start_queries(transformer: nn.Module) -> None:
    """See `start_as_original`."""
    for module in transformer.modules():
        if isinstance(module, (nn.Embedding, nn.Linear)):
            module.reset_parameters()
    for layer in transformer.decoder.layers:
        for attention in (layer.self_attn, layer.cross_attn):
            nn.init.xavier_uniform_(attention.out_proj.weight)
            nn.init.zeros_(attention.out_proj.bias)
        nn.init.xavier_uniform_(layer.cross_attn.in_proj_weight)
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            # A third of the rows of the original's one matrix, whose size counts.
            nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)
            nn.init.zeros_(linear.bias)
    start_feedforward(transformer.decoder.layers)


def start_feedforward(layers: Iterable[nn.Module]) -> None:
    """See `start_as_original`; biases stay as torch draws them."""
    for layer in layers:
        for linear in (layer.fc1, layer.fc2):
            linear.reset_parameters()
            nn.init.xavier_uniform_(linear.weight)
