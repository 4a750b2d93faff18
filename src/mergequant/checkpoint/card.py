"""The model card (README.md) of a checkpoint: how it was made, how good and how large it is, how to use it."""

from collections.abc import Mapping
from typing import Any

from mergequant.checkpoint.format import Quantization
from mergequant.nn import NormSpec
from mergequant.nn.spec import FLOAT_BITS

__all__ = ["model_card"]


def model_card(
    name: str,
    quantization: Quantization,
    *,
    base: str = "",
    language: str = "",
    results: Mapping[str, Mapping[str, Any]] | None = None,
    generates: bool = True,
) -> str:
    """Markdown with a YAML head that the Hub understands.

    Args:
        name: of the checkpoint.
        quantization: its description.
        base: name of the float model.
        language: two-letter code, if known.
        results: rows of the results table, for example {"float": {"perplexity": 7.1}, "quantized": {...}}.
        generates: the model writes text; False for an encoder, which is used in another way.
    """
    head = ["library_name: transformers", "tags:", "- mergequant", "- quantized"]
    head += [f"base_model: {base}"] if base else []
    head += [f"language: {language}"] if language else []
    recipe = quantization.recipe.get("name", "unnamed")
    lines = ["---", *head, "---", "", f"# {name}", ""]
    source = f" from `{base}`" if base else ""
    lines += [f"Made{source} by mergequant with the recipe `{recipe}`: {_scheme(quantization)}.", ""]
    if quantization.prefix is not None:
        replaces = (
            " The first one stands for BOS, which prompts must begin with." if quantization.prefix.replaces_bos else ""
        )
        lines += [f"Every cache starts with {len(quantization.prefix.tokens)} stored prefix token(s).{replaces}", ""]
    if quantization.kv is not None:
        rotation = quantization.kv.key_rotation
        rotated = f" Such a cache holds keys rotated by {rotation}." if rotation else ""
        lines += [
            f"Static steps for a cache of keys and values of 8 or 4 bits are stored, one per channel.{rotated}",
            "",
        ]
    if results:
        lines += ["## Results", "", *_table(results), ""]
    lines += [
        "## Use",
        "",
        "```python",
        "import mergequant",
        "from transformers import AutoTokenizer",
        "",
        'model = mergequant.load("PATH/TO/THIS/FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")',
        'print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"))[0]))'
        if generates
        else 'print(model(**tokenizer("Once", return_tensors="pt")))',
        "```",
        "",
    ]
    if quantization.provenance:
        lines += ["## Provenance", "", *_table({"": _readable(quantization.provenance)}, flat=True), ""]
    return "\n".join(lines)


def _scheme(quantization: Quantization) -> str:
    counts: dict[str, int] = {}
    for spec in quantization.layers.values():
        if isinstance(spec, NormSpec):
            text = "norms with a bias" if spec.bits == FLOAT_BITS else f"norms that emit {spec.bits}-bit codes"
        else:
            inputs = {
                "float": "float inputs",
                "codes": f"{spec.input.bits}-bit inputs from a norm",
                "static": f"{spec.input.bits}-bit inputs with static scales",
                "dynamic": f"{spec.input.bits}-bit inputs with a scale per token",
            }[spec.input.kind]
            text = f"linear layers with {spec.weight_bits}-bit weights and {inputs}"
        counts[text] = counts.get(text, 0) + 1
    return ", ".join(f"{count} {text}" for text, count in sorted(counts.items()))


def _readable(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Provenance for people: nested values in words, without the data sketches, which only programs compare."""
    rows = {}
    for key, value in provenance.items():
        if isinstance(value, Mapping) and "hashes" in value:
            continue
        nested = value.items() if isinstance(value, Mapping) else ()
        rows[key] = ", ".join(f"{name} {part}" for name, part in nested if part not in (None, "")) or str(value)
    return rows


def _table(rows: Mapping[str, Mapping[str, Any]], *, flat: bool = False) -> list[str]:
    if flat:
        pairs = [(key, value) for row in rows.values() for key, value in row.items()]
        return ["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in pairs)]
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| | " + " | ".join(map(_cell, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, row in rows.items():
        lines.append(f"| {_cell(label)} | " + " | ".join(_cell(row.get(key, "")) for key in columns) + " |")
    return lines


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
