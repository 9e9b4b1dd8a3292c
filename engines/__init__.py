"""Running engines: ``Session(open_engine("folder")).generate("What is this?", ["photo.jpg"]).text``.

Needs NumPy, Pillow, tokenizers, jinja2 and ONNX Runtime; neither PyTorch nor transformers.
"""

from .batcher import Batcher, BatcherStats
from .directory import open_engine, write_engine_directory
from .errors import EngineError, QueueFull, RequestCancelled, RequestTimeout, ShuttingDown
from .manifest import Engine, Segment, kv_segments
from .preprocess import ImageError
from .prompt import PromptError
from .results import GenerationResult, StageCount
from .sampling import SamplingParams
from .session import Session
from .ticket import Ticket

__all__ = [
    "Batcher",
    "BatcherStats",
    "Engine",
    "EngineError",
    "GenerationResult",
    "ImageError",
    "PromptError",
    "QueueFull",
    "RequestCancelled",
    "RequestTimeout",
    "SamplingParams",
    "Segment",
    "Session",
    "ShuttingDown",
    "StageCount",
    "Ticket",
    "kv_segments",
    "open_engine",
    "write_engine_directory",
]
