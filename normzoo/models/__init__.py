"""Networks that take any norm, fully connected, convolutional, recurrent and Transformers, and some that do without.

>>> import torch
>>> model = create_model("lstm", norm="layer_norm", inputs=Inputs((8, 8)), outputs=10, width=16)
>>> model(torch.randn(4, 8, 8)).shape
torch.Size([4, 10])
"""

from __future__ import annotations

from normzoo.models.base import (
    Inputs,
    ModelInfo,
    Network,
    NormChoice,
    Sites,
    create_model,
    list_models,
    model_info,
    register_model,
)
from normzoo.models.cnn import ConvNet, ResNet
from normzoo.models.dropout import Dropout, seed_dropout
from normzoo.models.mlp import MLP
from normzoo.models.normfree import SELUMLP, AlphaDropout, FixupResNet, NFResNet, SkipInitResNet, clip_adaptively_
from normzoo.models.placements import renormalize_
from normzoo.models.rnn import RNN, PerStep
from normzoo.models.transformer import Placement, Transformer, list_placements, register_placement

__all__ = [
    "MLP",
    "RNN",
    "SELUMLP",
    "AlphaDropout",
    "ConvNet",
    "Dropout",
    "FixupResNet",
    "Inputs",
    "ModelInfo",
    "NFResNet",
    "Network",
    "NormChoice",
    "PerStep",
    "Placement",
    "ResNet",
    "Sites",
    "SkipInitResNet",
    "Transformer",
    "clip_adaptively_",
    "create_model",
    "list_models",
    "list_placements",
    "model_info",
    "register_model",
    "register_placement",
    "renormalize_",
    "seed_dropout",
]
