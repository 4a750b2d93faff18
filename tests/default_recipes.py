"""Recipes that the matrix of tests runs on every family of models. A new paper is one line here."""

from typing import Any

# label: registered name, and settings that keep it quick or show another of its branches
DEFAULT_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "rtn-w8a8": ("rtn", {"weight_bits": 8, "activation_bits": 8, "clip": True}),
    "rtn-w4-groups": ("rtn", {"activation_bits": 16, "group_size": 4}),
    "gptq": ("gptq", {}),
    "gptq-w4a4": ("gptq", {"activation_bits": 4, "activation_clip": True}),
    "mergequant": ("mergequant", {}),
    "mergequant-bare": ("mergequant", {"split": 0, "clip": "none", "compensation": "none", "rounding": "rtn"}),
    "mergequant-auto-keep": ("mergequant", {"split": "auto", "width": "keep", "quantile": 0.99, "clip": "activation"}),
    "mergequant-low-rank": ("mergequant", {"compensation": "low_rank", "other": "hadamard", "low_rank.epochs": 2}),
    "mergequant-w8": ("mergequant", {"weight_bits": 8, "activation_bits": 8, "other_bits": 8}),
    "mergequant-static": (
        "mergequant",
        {"other": "static", "other_bits": 8, "other_split": 0.1, "stagger": True, "prefix": "bos"},
    ),
    "mergequant-static-no-prefix": ("mergequant", {"other": "static", "other_bits": 8, "allow_no_prefix": True}),
    "mergequant-plus": ("mergequant-plus", {"tile": 8}),
    "mergequant-plus-static": ("mergequant-plus", {"tile": 8, "other": "static", "other_bits": 8, "prefix": (1, 5)}),
    "mergequant-w4a8": ("mergequant-w4a8", {"tile": 8}),
    "quarot": ("quarot", {}),
    "quarot-fused": ("quarot", {"heads": "fused", "hessian": "quantized"}),
    "quarot-online-prefix": ("quarot", {"heads": "online", "activation_clip": "search", "prefix": "bos"}),
    "smoothquant": ("smoothquant", {}),
    "smoothquant-w4a4-all": (
        "smoothquant",
        {
            "weight_bits": 4,
            "activation_bits": 4,
            "alpha": "search",
            "smooth_all": True,
            "rounding": "gptq",
            "clip": True,
        },
    ),
    "smoothquant-tensor": ("smoothquant", {"inputs": "tensor", "alpha": 0.8, "smooth_all": True, "prefix": "bos"}),
    "awq": ("awq", {"group_size": 32}),
    "awq-w3-rows": ("awq", {"weight_bits": 3, "group_size": 0, "rounding": "gptq", "prefix": "bos"}),
    "qllm": ("qllm", {"epochs": 2}),
    "qllm-w6a6-prefix": (
        "qllm",
        {"weight_bits": 6, "activation_bits": 6, "correction": "merged", "epochs": 1, "prefix": "bos"},
    ),
    "qllm-wider": ("qllm", {"expansion": 0.1, "merge": False, "correction": "none", "rounding": "gptq", "clip": True}),
    "qllm-fixed": ("qllm", {"expansion": 0.2, "distance": "sums", "correction": "none", "rounding": "gptq"}),
    "prefixquant": ("prefixquant", {}),
    "prefixquant-tuned": ("prefixquant", {"fine_tune": 2}),
    "prefixquant-online-explicit": ("prefixquant", {"heads": "online", "grid": 1, "rounding": "rtn", "prefix": (1, 5)}),
    "qserve": ("qserve", {"group_size": 8}),
    "qserve-rows-prefix": ("qserve", {"group_size": 0, "rounding": "rtn", "prefix": "bos"}),
    "outliertune": ("outliertune", {}),
    "outliertune-w6a6-clip": (
        "outliertune",
        {"weight_bits": 6, "activation_bits": 6, "clip": "activation", "skip": 1, "shift_threshold": 0.05},
    ),
    "outliertune-w4a4-plain": (
        "outliertune",
        {"weight_bits": 4, "activation_bits": 4, "symmetrize": False, "rounding": "rtn", "weight_clip": False},
    ),
    "outlier-suppression-plus": ("outlier-suppression-plus", {"thresholds": 6}),
    "outlier-suppression-plus-tensor": (
        "outlier-suppression-plus",
        {"inputs": "tensor", "weight_bits": 8, "activation_bits": 8, "thresholds": 4, "spacing": "log"},
    ),
    "outlier-suppression-plus-w4a4-all": (
        "outlier-suppression-plus",
        {
            "weight_bits": 4,
            "activation_bits": 4,
            "shift": "all",
            "scale_all": True,
            "thresholds": 4,
            "rounding": "gptq",
            "clip": True,
            "prefix": "bos",
        },
    ),
    "flatquant": ("flatquant", {"epochs": 2, "batch_tokens": 48}),
    "flatquant-random-prefix": (
        "flatquant",
        {"epochs": 1, "start": "random", "scale": False, "clip": False, "rounding": "rtn", "prefix": "bos"},
    ),
    "spinquant": ("spinquant", {"steps": 3, "batch_tokens": 48}),
    "spinquant-search-prefix": ("spinquant", {"steps": 1, "activation_clip": "search", "prefix": "bos"}),
}

# registered name: families that it refuses while planning, before anything is computed
REFUSED: dict[str, tuple[str, ...]] = {
    "prefixquant": ("gemma2", "opt", "opt_gelu_projected"),
    "qserve": ("gemma2", "opt", "opt_gelu_projected"),
    "quarot": ("gemma2", "opt", "opt_gelu_projected"),
    "spinquant": ("gemma2", "opt", "opt_gelu_projected"),
}
