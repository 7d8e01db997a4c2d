"""The passes, one a file. This list is the only place that says their order."""

from ..pipeline import Pass, PassPipeline
from .absorb_scales import AbsorbScales
from .annotate import Annotate
from .calibrate import Calibrate
from .canonicalize import Canonicalize
from .cast_layers import CastLayers
from .cleanup import Cleanup
from .clip_scales import ClipScales
from .correct_bias import CorrectBias
from .distill_layers import DistillLayers
from .fold_quantize import FoldQuantize
from .fuse_attention import FuseAttention
from .fuse_linear import FuseLinear
from .fuse_memory_bound import FuseMemoryBound
from .gptq import ApplyGPTQ
from .insert_lorc import InsertLoRC
from .insert_qdq import InsertQDQ
from .move_quantize import MoveQuantize
from .smooth_activations import SmoothActivations

PASSES: tuple[Pass, ...] = (
    Canonicalize(),
    Annotate(),
    Calibrate(),
    SmoothActivations(),
    CastLayers(),
    InsertQDQ(),
    AbsorbScales(),
    ClipScales(),
    ApplyGPTQ(),
    DistillLayers(),
    InsertLoRC(),
    CorrectBias(),
    FoldQuantize(),
    MoveQuantize(),
    FuseLinear(),
    FuseAttention(),
    FuseMemoryBound(),
    Cleanup(),
)


def default_pipeline() -> PassPipeline:
    """All passes, checked to fit together."""
    return PassPipeline(PASSES)


__all__ = ["PASSES", "default_pipeline"]
