"""Running engines: ``Session(open_engine("folder")).generate("What is this?", ["photo.jpg"]).text``.

Needs NumPy, Pillow, tokenizers, jinja2 and ONNX Runtime; neither PyTorch nor transformers.
"""

from .directory import open_engine, write_engine_directory
from .errors import EngineError
from .manifest import Engine, Segment, kv_segments
from .preprocess import ImageError
from .prompt import PromptError
from .results import GenerationResult, StageCount
from .sampling import SamplingParams
from .session import Session

__all__ = [
    "Engine",
    "EngineError",
    "GenerationResult",
    "ImageError",
    "PromptError",
    "SamplingParams",
    "Segment",
    "Session",
    "StageCount",
    "kv_segments",
    "open_engine",
    "write_engine_directory",
]
