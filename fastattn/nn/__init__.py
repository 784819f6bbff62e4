"""Modules on fastattn's kernels: `MultiHeadAttention` in the place of torch's, layers made of it, and positions."""

from .layers import TransformerDecoderLayer, TransformerEncoderLayer
from .multihead import MultiHeadAttention
from .positions import LearnedPositions, SinusoidalPositions
from .rotary import Rotary, apply_rotary

__all__ = [
    "LearnedPositions",
    "MultiHeadAttention",
    "Rotary",
    "SinusoidalPositions",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "apply_rotary",
]
