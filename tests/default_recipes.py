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
}

# registered name: families that it refuses while planning, before anything is computed
REFUSED: dict[str, tuple[str, ...]] = {
    "quarot": ("gemma2", "opt", "opt_gelu_projected"),
}
