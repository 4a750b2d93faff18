"""What an unmodified vLLM makes of an exported checkpoint, in plain torch: to measure the export without a GPU.

Int8 layers as vLLM 0.26 computes them (read in its sources): a static input is x / step, rounded to even, saturated to
-128..127; a dynamic one has absmax / 127 per token; sums are exact; one multiplication by the step of the input and of
the row, in float32; the result is rounded to the model's dtype. Weight-only layers are decoded in the model's dtype.

    python benchmarks/vllm/stock.py DIR EXPORTED --against MODEL --data TEXT [--samples N] [--seqlen L] [--json FILE]

prints what the checkpoint and its export lose against the float model, and how far they are from each other.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import mergequant
from mergequant.eval.evaluate import load_tokenizer

INT8 = torch.iinfo(torch.int8)
WORD_BITS = 32


class StockLinear(nn.Module):
    """An int8 layer of the stock engine; `dtype` is that of its output."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.weight = nn.Buffer(tensors["weight"])
        self.weight_scale = nn.Buffer(tensors["weight_scale"].reshape(-1))
        self.input_scale = nn.Buffer(tensors["input_scale"]) if "input_scale" in tensors else None
        self.bias = nn.Buffer(tensors["bias"]) if "bias" in tensors else None

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integers of the input, as floats, and the step that they are to be multiplied by."""
        wide = x.float()
        step = self.input_scale
        if step is None:
            step = wide.abs().amax(-1, keepdim=True) / INT8.max
        return torch.round(wide / step.clamp_min(1e-12)).clamp(INT8.min, INT8.max), step

    def forward(self, x: Tensor) -> Tensor:
        codes, step = self.codes(x)
        total = (codes.double() @ self.weight.double().T).float()  # doubles hold the integer sums exactly
        value = total * (step * self.weight_scale)
        return (value if self.bias is None else value + self.bias.float()).to(x.dtype)


def unpack_words(packed: Tensor, bits: int, width: int) -> Tensor:
    """Signed codes (rows, width) of 32-bit words (rows, words)."""
    wide = packed.to(torch.int64)[..., None] >> (torch.arange(WORD_BITS // bits) * bits)
    return (wide & ((1 << bits) - 1)).flatten(1)[:, :width] - (1 << (bits - 1))


def decoded(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """Weight of a weight-only layer, in the dtype of its scales."""
    scale, (rows, width) = tensors["weight_scale"], tensors["weight_shape"].tolist()
    codes = unpack_words(tensors["weight_packed"], bits, width)
    grouped = codes.reshape(rows, scale.shape[1], -1)
    if "weight_zero_point" in tensors:
        grouped = grouped - unpack_words(tensors["weight_zero_point"].T, bits, rows).T[..., None]
    return (grouped.to(scale.dtype) * scale[..., None]).reshape(rows, width)


def stock_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The model of an exported folder, in evaluation mode; `dtype` of hidden states, None as saved."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantization = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    del config.quantization_config
    dtype = dtype or config.dtype
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for group in quantization["config_groups"].values():
        for name in group["targets"]:
            own = {key: tensors.pop(f"{name}.{key}") for key in _keys(tensors, name)}
            if "weight_packed" in own:
                tensors[f"{name}.weight"] = decoded(own, group["weights"]["num_bits"])
                tensors.update({f"{name}.bias": own["bias"]} if "bias" in own else {})
            else:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, StockLinear(own))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    lost = {key for key in missing if not isinstance(model.get_submodule(key.rpartition(".")[0]), StockLinear)} - tied
    if lost or unexpected:
        raise ValueError(f"{folder}: tensors missing {sorted(lost)}, unexpected {unexpected}")
    return model.eval()


def _keys(tensors: dict[str, Tensor], name: str) -> list[str]:
    return [key.removeprefix(f"{name}.") for key in tensors if key.startswith(f"{name}.")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--against", required=True)
    parser.add_argument("--data", default="self")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    common = {"data": given.data, "samples": given.samples, "seqlen": given.seqlen}
    tokenizer = load_tokenizer(given.against)
    rows = {}
    for label, dtype in (("float32", torch.float32), ("as saved", None)):
        ours = mergequant.load(given.folder, dtype=dtype, serve=False)
        stock = stock_model(given.exported, dtype)
        for name, model, other in (
            ("checkpoint against float", ours, given.against),
            ("export against float", stock, given.against),
            ("export against checkpoint", stock, ours),
        ):
            # Text of `self` comes from the float model; a quantized one cannot write it.
            found = mergequant.evaluate(model, other, tokenizer=tokenizer, **common).to_dict()
            rows[f"{name}, {label}"] = {key: found[key] for key in ("nll_increase", "kl_mean", "top1_agreement")}
    for name, row in rows.items():
        print(f"{name:40}", "  ".join(f"{key} {value:.5f}" for key, value in row.items()))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
