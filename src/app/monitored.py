"""Which way a metric is better, by its name, and what follows the metric of the checkpoints."""

import copy
import re

from omegaconf import DictConfig, OmegaConf

LOWER = frozenset(("loss", "error", "err", "errors", "perplexity", "ppl", "mse", "rmse", "mae",
                   "mape", "smape", "msle", "rmsle", "nll", "ece", "brier", "wer", "cer", "ter",
                   "eer", "fid", "kid", "lpips", "bpc", "bpd", "bpb", "fpr", "fnr", "logloss",
                   "crossentropy", "entropy", "regret", "cost"))  # fmt: skip
HIGHER = frozenset(("acc", "accuracy", "auc", "auroc", "auprc", "ap", "map", "f1", "fbeta",
                    "precision", "recall", "sensitivity", "specificity", "tpr", "iou", "miou",
                    "jaccard", "dice", "bleu", "rouge", "rougel", "meteor", "cider", "chrf",
                    "bertscore", "r2", "psnr", "ssim", "snr", "sdr", "mcc", "kappa", "mrr",
                    "ndcg", "pearson", "spearman", "elbo", "reward", "return"))  # fmt: skip
OPPOSITE = frozenset(("neg", "negative", "minus", "inverse"))
ENDINGS = {"loss": "min", "error": "min", "perplexity": "min", "accuracy": "max", "recall": "max"}


def mode_of(name: str) -> str | None:
    """min or max: which values of a metric are better; None where its name does not say."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()
    words = set(re.split(r"[^a-z0-9]+", spaced))
    words |= {word.rstrip("0123456789") for word in words}
    found = {mode for ending, mode in ENDINGS.items() for w in words if w.endswith(ending)}
    found |= {mode for mode, known in (("min", LOWER), ("max", HIGHER)) if words & known}
    return found.pop() if len(found) == 1 and not words & OPPOSITE else None


def followed(cfg: DictConfig) -> DictConfig:
    """A configuration in which all that watches a metric says which, and which way is better.

    Early stopping and the schedule watch the checkpoints' metric, the same way, unless typed. A way
    that was not typed is told by the name; it stays null where that does not tell it.
    """
    checkpoint = OmegaConf.select(cfg, "callbacks.checkpoint")
    monitor = None if checkpoint is None else checkpoint.get("monitor")
    mode = None if monitor is None else checkpoint.get("mode") or mode_of(monitor)
    found: dict[str, str | bool | None] = {}
    if monitor is not None and "mode" in checkpoint:
        found["callbacks.checkpoint.mode"] = mode
    for key in ("callbacks.early_stopping", "scheduler"):
        watching = OmegaConf.select(cfg, key)
        if watching is not None and {"monitor", "mode"} <= {*watching}:
            name = watching.monitor or monitor or "val_loss"
            found[f"{key}.monitor"] = name
            of_name = mode if name == monitor else mode_of(name)
            found[f"{key}.mode"] = watching.mode or of_name
            late = "check_on_train_epoch_end"
            if re.search(r"(?<![a-z])train", name) and watching.get(late, False) is None:
                found[f"{key}.{late}"] = True
    if cfg.get("objective") is not None and cfg.get("direction", "") is None:
        told = mode_of(cfg.objective)
        found["direction"] = told and f"{told}imize"
    chosen = copy.deepcopy(cfg) if found else cfg  # with its type, whose rules are checked
    for key, value in found.items():
        OmegaConf.update(chosen, key, value)
    return chosen
