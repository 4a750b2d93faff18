"""Recipes, data and places that cannot work, through `mergequant.quantize`: the right error, nothing half-written.

The parts test their own messages at length; here it is shown that they reach the user, and what is left behind.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mergequant
from families import make_model, save_model
from mergequant import errors
from mergequant.assets import TINY
from mergequant.checkpoint import tensorfile
from mergequant.pipeline import run as pipeline_run

Run = Callable[..., mergequant.Quantized]
Windows = Callable[..., Tensor]


# ---- recipe and data -----------------------------------------------------------------------------------------------


def test_quantize_when_recipe_is_unknown_offers_a_near_one(model: Path, refused: Callable[..., str]) -> None:
    assert "mergequant-plus" in refused(errors.RecipeError, model, "mergequant-pluss")


@pytest.mark.parametrize(("key", "near"), [("splitt", "split"), ("clip.modee", "mode"), ("clipp.mode", "clip")])
def test_quantize_when_setting_is_misspelt_offers_a_near_one(
    key: str, near: str, model: Path, refused: Callable[..., str]
) -> None:
    message = refused(errors.RecipeError, model, settings={key: "none"})
    assert key.rsplit(".", maxsplit=1)[-1] in message or key.split(".", maxsplit=1)[0] in message
    assert f"did you mean '{near}'" in message


def test_quantize_when_static_recipe_has_no_prefix_is_refused(model: Path, refused: Callable[..., str]) -> None:
    assert "needs a prefix" in refused(errors.RecipeError, model, settings={"other": "static"})


def test_quantize_when_prefix_is_bos_and_windows_have_none_is_refused(
    model: Path, refused: Callable[..., str], windows: Windows
) -> None:
    tokens = windows(make_model("llama"))
    tokens[:, 0] = torch.arange(3, 9)
    assert "prefix=bos" in refused(errors.RecipeError, model, "mergequant-plus", data=tokens)


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "no text"), (b"too short", "short"), (b"\xff\xfe caf\xe9" * 50, "UTF-8")]
)
def test_quantize_when_text_is_useless_says_why(
    content: bytes, word: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    message = refused(errors.DataError, TINY, data=str(path))
    assert "mine.txt" in message
    assert word in message


def test_quantize_when_folder_has_no_tokenizer_and_data_is_text_says_so(tmp_path: Path, run: Run) -> None:
    """transformers makes up an empty tokenizer for some families, which would turn any text into nothing."""
    model = save_model("qwen2", tmp_path / "model")
    with pytest.raises(errors.ModelError, match="no tokenizer there"):
        run(model, "rtn", tmp_path / "out", data="self")
    with pytest.raises(errors.UsageError, match="pass tokenizer="):
        run(make_model("qwen2"), "rtn", tmp_path / "out", data="self")


def test_quantize_when_windows_are_too_few_says_how_many(
    model: Path, refused: Callable[..., str], windows: Windows
) -> None:
    assert "4 + 2 windows are needed" in refused(errors.DataError, model, data=windows(make_model("llama"), count=5))


def test_quantize_when_token_is_outside_the_vocabulary_names_it(
    model: Path, refused: Callable[..., str], windows: Windows
) -> None:
    tokens = windows(make_model("llama"))
    tokens[2, 4] = 97
    assert "97" in refused(errors.UsageError, model, data=tokens)


@pytest.mark.parametrize("seqlen", [65, 1, 0])
def test_quantize_when_seqlen_does_not_fit_says_so(seqlen: int, model: Path, refused: Callable[..., str]) -> None:
    assert f"--seqlen {seqlen}" in refused(errors.UsageError, model, seqlen=seqlen)


def test_quantize_when_samples_is_zero_says_so(model: Path, refused: Callable[..., str]) -> None:
    assert "--samples 0" in refused(errors.UsageError, model, samples=0)


# ---- the place of the result -----------------------------------------------------------------------------------------


def test_quantize_when_out_is_not_ours_leaves_it_alone(model: Path, out: Path, refused: Callable[..., str]) -> None:
    out.mkdir(parents=True)
    (out / "diary.txt").write_text("dear")
    for resume in (True, False):
        assert "no mergequant checkpoint" in refused(errors.UsageError, model, resume=resume)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "diary.txt").read_text() == "dear"


def test_quantize_when_out_is_the_float_model_itself_leaves_it_alone(model: Path, run: Run, windows: Windows) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(errors.UsageError, match="no mergequant checkpoint"):
        run(model, "rtn", model, data=windows(make_model("llama")), resume=False)
    assert before == {path.name: path.read_bytes() for path in model.iterdir()}


@pytest.mark.parametrize("room", [0, 10_000, 30_000, 60_000, 90_000])
def test_quantize_when_disk_is_full_keeps_what_is_done_and_goes_on(
    room: int, model: Path, out: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, run: Run,
    windows: Windows,
) -> None:  # fmt: skip
    """The disk fills up while some tensor file is being written, wherever that is."""
    real, left = tensorfile.os.fsync, [room]

    def fsync(handle: int) -> None:
        left[0] -= os.fstat(handle).st_size
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        assert "disk is full" in refused(errors.CheckpointError, model)
    tokens = windows(make_model("llama"))
    resumed = run(model, "mergequant", out, data=tokens)
    fresh = run(model, "mergequant", out.with_name("fresh"), data=tokens)
    files = [result.folder / "model.safetensors" for result in (resumed, fresh)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_quantize_when_out_cannot_be_written_names_it(model: Path, run: Run, windows: Windows) -> None:
    """Permissions do not bind root; /proc does."""
    with pytest.raises(errors.CheckpointError, match="/proc/out"):
        run(model, "rtn", Path("/proc/out"), data=windows(make_model("llama")))


def test_quantize_when_parent_of_out_is_missing_says_so(
    model: Path, tmp_path: Path, run: Run, windows: Windows
) -> None:
    with pytest.raises(errors.CheckpointError, match="parent folder does not exist"):
        run(model, "rtn", tmp_path / "no" / "such" / "out", data=windows(make_model("llama")))


def test_quantize_when_verification_fails_publishes_nothing_however_often(
    model: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline_run.verify_checkpoint
    monkeypatch.setattr(
        pipeline_run,
        "verify_checkpoint",
        lambda found, own, expected, kv: real(found, own, {name: value + 1 for name, value in expected.items()}, kv),
    )
    for _ in range(2):
        assert "logits of the reloaded checkpoint differ" in refused(errors.VerifyError, model)
