"""The public face: what is listed is there, nothing else is meant to be, and importing it does nothing unexpected."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import mergequant
from mergequant import errors

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import json, os, signal, sys, warnings
import torch, transformers
# What these do is not ours: transformers.generation, for one, brings pyarrow along where scikit-learn is installed.
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, generation, quantizers
from transformers.generation import GenerationMixin
known = set(sys.modules)
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), len(warnings.filters),
          transformers.utils.logging.get_verbosity(), dict(os.environ), signal.getsignal(signal.SIGINT))
import mergequant
after = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), len(warnings.filters),
         transformers.utils.logging.get_verbosity(), dict(os.environ), signal.getsignal(signal.SIGINT))
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(json.dumps({
    "unchanged": before == after,
    "registered": "mergequant" in AUTO_QUANTIZER_MAPPING,
    "cuda": torch.cuda.is_initialized(),
    "optional": sorted({"lm_eval", "matplotlib", "datasets", "pyarrow", "mergequant.cli"} & (set(sys.modules) - known)),
}))
"""


def test_all_is_sorted_and_complete() -> None:
    assert mergequant.__all__ == sorted(mergequant.__all__)
    for name in mergequant.__all__:
        assert getattr(mergequant, name) is not None
    rooms = {path.stem for path in Path(mergequant.__file__).parent.iterdir()}
    public = {name for name in vars(mergequant) if not name.startswith("_")}
    assert public - rooms - {"register"} <= set(mergequant.__all__)


def test_every_public_callable_has_docstring() -> None:
    assert [name for name in mergequant.__all__ if not getattr(mergequant, name).__doc__] == []


def test_errors_all_have_one_root_and_stand_in_the_drawing() -> None:
    assert errors.__all__ == sorted(errors.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), mergequant.MergeQuantError)
        assert name in str(errors.__doc__)


def test_version_agrees_with_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == mergequant.__version__
    assert project["scripts"] == {"mergequant": "mergequant.cli:main"}


def test_import_registers_and_does_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"unchanged": True, "registered": True, "cuda": False, "optional": []}
    assert done.stderr == ""
