"""The plugin's door: entry point, versions, registration, and what of it needs vLLM."""

import importlib.util
import logging
import math
import pickle
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergequant.integrations.vllm as plugin
from mergequant import ops
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import CheckpointError, UsageError, VersionError
from mergequant.integrations.vllm import versions

ROOT = Path(__file__).parents[2]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason=f"needs vLLM {versions.SUPPORTED}: pip install 'mergequant[vllm]'"
)


def test_entry_point_and_extra_name_what_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"mergequant": "mergequant.integrations.vllm:register"}
    assert project["optional-dependencies"]["vllm"] == [f"vllm{versions.SUPPORTED}"]


@pytest.mark.parametrize("found", ["0.26.0", "0.26.3", "0.26.1+cu130", "0.26.1.dev5"])
def test_releases_of_the_series_are_served(found: str) -> None:
    assert versions.unsupported(found) is None


@pytest.mark.parametrize("found", ["0.25.1", "0.27.0", "1.26.0", "dev", None])
def test_other_releases_are_refused_with_what_to_install(found: str | None) -> None:
    assert "pip install 'vllm>=0.26.0,<0.27'" in (versions.unsupported(found) or "")


def test_unknown_release_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "version", lambda _: "0.99.0")
    with caplog.at_level(logging.WARNING, "mergequant"):
        plugin.register()
        plugin.register()
    assert "vLLM 0.99.0 is installed" in caplog.text
    with pytest.raises(VersionError):
        plugin.require_supported()


def test_two_files_alone_know_vllm_and_none_knows_what_makes_checkpoints() -> None:
    """The package imports without vLLM; `register` opens the two once vLLM is there."""
    knows_vllm, rooms = set(), set()
    for file in Path(plugin.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        rooms |= set(re.findall(r"^from mergequant\.(\w+)", text, re.MULTILINE))
        if re.search(r"^(?:from|import) vllm\b", text, re.MULTILINE):
            knows_vllm.add(file.name)
    assert knows_vllm == {"attention.py", "config.py", "models.py"}
    assert rooms == {"checkpoint", "errors", "integrations", "nn", "ops"}


OPS = (
    "rmsnorm_quant", "add_rmsnorm_quant", "add_rmsnorm", "tiled_linear", "tiled_swiglu_quant", "silu_mul",
    "silu_mul_quant", "silu_mul_dynamic_quant", "static_quant", "dynamic_quant", "hadamard_quant",
    "hadamard_dynamic_quant", "kronecker_dynamic_quant",
)  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_ops_of_the_served_model_can_be_traced(name: str) -> None:
    """vLLM compiles the model as one graph: each op is registered, and has a schema that says what it changes."""
    schema = getattr(torch.ops.mergequant, name).default._schema
    changed = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert changed == (["residual"] if name.startswith("add_") else [])
    assert hasattr(ops, name)


@needs_vllm
@pytest.mark.filterwarnings("default")  # vLLM and what it imports warn of their own affairs
def test_registering_twice_leaves_one_config_and_the_four_models() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.models import ModelRegistry

    plugin.register()
    plugin.register()
    from mergequant.integrations.vllm.config import MergeQuantConfig

    assert get_quantization_config("mergequant") is MergeQuantConfig
    for name in plugin.ARCHITECTURES:
        assert ModelRegistry.models[name].module_name == plugin.MODELS


@needs_vllm
@pytest.mark.filterwarnings("default")  # vLLM and what it imports warn of their own affairs
def test_config_is_parsed_and_a_damaged_checkpoint_refused(saved: Callable[..., Any]) -> None:
    from mergequant.integrations.vllm.config import MergeQuantConfig

    _, folder = saved("llama", prefix=(1,))
    config = MergeQuantConfig.from_config(open_checkpoint(folder).config["quantization_config"])
    config.maybe_update_config(str(folder))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert config._parts("model.layers.0.self_attn.qkv_proj")[2] == "model.layers.0.self_attn.v_proj"
    assert config._parts("lm_head") == ["lm_head"]
    with pytest.raises(UsageError, match="floating point only"):
        config.get_quant_method(torch.nn.Embedding(2, 2), "model.layers.0.self_attn.o_proj")
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        config.maybe_update_config(str(folder))


@needs_vllm
@pytest.mark.filterwarnings("default")  # vLLM and what it imports warn of their own affairs
def test_a_worker_that_gets_the_config_knows_the_models(saved: Callable[..., Any]) -> None:
    """vLLM starts workers as new processes and sends them its config; entry points need an installed package."""
    from vllm.model_executor.models import ModelRegistry

    from mergequant.integrations.vllm.config import MergeQuantConfig

    _, folder = saved("llama", prefix=(1,))
    sent = pickle.dumps(MergeQuantConfig.from_config(open_checkpoint(folder).config["quantization_config"]))
    for name in plugin.ARCHITECTURES:
        ModelRegistry.models.pop(name, None)
    assert "model.layers.0.mlp.down_proj" in pickle.loads(sent).quantization.layers
    for name in plugin.ARCHITECTURES:
        assert ModelRegistry.models[name].module_name == plugin.MODELS


@needs_vllm
@pytest.mark.filterwarnings("default")  # vLLM and what it imports warn of their own affairs
@pytest.mark.parametrize("bits", [8, 4])
def test_pages_of_own_caches_have_the_bytes_that_are_asked_for(bits: int) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from mergequant.integrations.vllm.attention import BACKENDS, PageSpec

    backend = BACKENDS[bits]
    made = {"block_size": 128, "num_kv_heads": 8, "head_size": 64, "dtype": torch.uint8, "bits": bits}
    merged = PageSpec.merge([PageSpec(**made), PageSpec(**made)])
    assert merged == pickle.loads(pickle.dumps(PageSpec(**made)))
    assert (
        merged.page_size_bytes == math.prod(backend.get_kv_cache_shape(1, 128, 8, 64)) == 2 * 128 * 8 * 64 * bits // 8
    )
    with pytest.raises(AssertionError):
        PageSpec.merge([PageSpec(**made), PageSpec(**(made | {"bits": 12 - bits}))])
    assert backend.get_preferred_block_size(16) == 64
    assert backend.get_preferred_block_size(128) == 128
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM
    assert KVCacheSpecRegistry.get_manager_class(merged) is FullAttentionManager
