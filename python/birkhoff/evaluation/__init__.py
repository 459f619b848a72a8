"""How well a compressed model keeps the masks of its original, on pictures that need no labels.

>>> from birkhoff.evaluation import evaluate
>>> evaluation = evaluate(compressed, original, "pictures")  # doctest: +SKIP
>>> evaluation.mean_iou, evaluation.worst_iou  # doctest: +SKIP

It takes the ``eval`` extra. Torch is imported where a torch model is evaluated.
"""

from birkhoff.evaluation.annotations import Annotations, read_annotations
from birkhoff.evaluation.fidelity import Comparison, Evaluation, GroundTruth, evaluate
from birkhoff.evaluation.metrics import boundary_f, iou
from birkhoff.evaluation.predictors import Prediction, Predictor
from birkhoff.evaluation.prompts import Prompt, PromptKind
from birkhoff.evaluation.report import write_report

__all__ = [
    "Annotations",
    "Comparison",
    "Evaluation",
    "GroundTruth",
    "Prediction",
    "Predictor",
    "Prompt",
    "PromptKind",
    "boundary_f",
    "evaluate",
    "iou",
    "read_annotations",
    "write_report",
]
