"""The passes, one a file. This list is the only place that says their order."""

from ..pipeline import Pass, PassPipeline
from .annotate import Annotate
from .canonicalize import Canonicalize
from .cleanup import Cleanup
from .fold_quantize import FoldQuantize
from .fuse_linear import FuseLinear
from .fuse_memory_bound import FuseMemoryBound
from .insert_qdq import InsertQDQ
from .move_quantize import MoveQuantize

PASSES: tuple[Pass, ...] = (
    Canonicalize(),
    Annotate(),
    InsertQDQ(),
    FoldQuantize(),
    MoveQuantize(),
    FuseLinear(),
    FuseMemoryBound(),
    Cleanup(),
)


def default_pipeline() -> PassPipeline:
    """All passes, checked to fit together."""
    return PassPipeline(PASSES)


__all__ = ["PASSES", "default_pipeline"]
