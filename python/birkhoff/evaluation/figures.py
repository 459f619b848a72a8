"""The figures of an evaluation, for people."""

from __future__ import annotations

from birkhoff.evaluation.fidelity import Evaluation


def figures(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What each figure is, and its value."""
    rows = [
        ("pictures", f"{len(evaluation.pictures):,}"),
        ("prompts", f"{len(evaluation.comparisons):,} ({evaluation.prompts})"),
        ("mean IoU with the original's masks", f"{evaluation.mean_iou:.4f}"),
        ("lowest IoU", f"{evaluation.worst_iou:.4f}"),
        ("mean boundary F", f"{evaluation.mean_boundary_f:.4f}"),
        ("mean difference of the predicted IoU", f"{evaluation.mean_score_difference:.4f}"),
        ("prompts whose best mask changed", f"{100 * evaluation.best_changed_share:.1f} %"),
        ("mean IoU, the original's choice in both", f"{evaluation.mean_same_mask_iou:.4f}"),
    ]
    truth = evaluation.ground_truth
    if truth is not None:
        rows += [
            ("annotated objects", f"{truth.objects:,}"),
            ("mIoU, original and compressed", _pair(truth.original_miou, truth.compressed_miou)),
            ("AP, original and compressed", _pair(truth.original_ap, truth.compressed_ap)),
        ]
    return rows


def _pair(original: float, compressed: float) -> str:
    return f"{original:.4f}, {compressed:.4f}"
