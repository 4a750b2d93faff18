import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mergequant.assets import TINY
from mergequant.errors import DataError, NumericsError, UsageError
from mergequant.integrations.lm_eval import LOCAL_TASKS, require_lm_eval, run_tasks
from mergequant.integrations.lm_eval.local import Item, read_items

LETTERS = {"text": ["wood", "iron"], "label": ["A", "B"]}
RECORDS: dict[str, tuple[dict[str, Any], Item]] = {
    "arc_challenge": (
        {"question": "Hard?", "choices": LETTERS, "answerKey": "B"},
        Item(("Question: Hard?\nAnswer:",), ("wood", "iron"), 1),
    ),
    "arc_easy": (
        {"question": "Soft?", "choices": LETTERS, "answerKey": "A"},
        Item(("Question: Soft?\nAnswer:",), ("wood", "iron"), 0),
    ),
    "blimp": (
        {"UID": "agreement", "sentence_good": "Dogs bark.", "sentence_bad": "Dogs barks."},
        Item(("",), ("Dogs bark.", "Dogs barks."), 0, "agreement"),
    ),
    "boolq": (
        {"passage": "Iron rusts.", "question": "does iron rust", "answer": True},
        Item(("Iron rusts.\nQuestion: does iron rust?\nAnswer:",), ("no", "yes"), 1),
    ),
    "copa": (
        {
            "premise": "It rained.",
            "choice1": "The road got wet.",
            "choice2": "It sang.",
            "question": "effect",
            "label": 0,
        },
        Item(("It rained therefore",), ("the road got wet.", "it sang."), 0),
    ),
    "hellaswag": (
        {"ctx": "Cooking: A man", "endings": ["stirs.", "flies."], "label": "0"},
        Item(("Cooking: A man",), ("stirs.", "flies."), 0),
    ),
    "lambada_openai": ({"context": "He read the", "continuation": "signs"}, Item(("He read the",), (" signs",))),
    "openbookqa": (
        {"question_stem": "Nails are", "choices": LETTERS, "answerKey": "B"},
        Item(("Nails are",), ("wood", "iron"), 1),
    ),
    "piqa": (
        {"goal": "Open", "sol1": "pull", "sol2": "sleep", "label": 0},
        Item(("Question: Open\nAnswer:",), ("pull", "sleep"), 0),
    ),
    "sciq": (
        {"question": "Who?", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d"}
        | {"support": " S."},
        Item(("S.\nQuestion: Who?\nAnswer:",), ("a", "b", "c", "d"), 3),
    ),
    "winogrande": (
        {"sentence": "Ann helped Eve so _ was glad.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        Item(("Ann helped Eve so Ann", "Ann helped Eve so Eve"), ("was glad.",), 1),
    ),
}


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", sorted(LOCAL_TASKS))
def test_records_when_of_the_task_become_its_question(name: str, tmp_path: Path) -> None:
    record, item = RECORDS[name]
    assert read_items(name, write(tmp_path, LOCAL_TASKS[name].files[-1], [record])) == [item]


def test_items_when_limited_are_spread_over_groups(tmp_path: Path) -> None:
    record = RECORDS["blimp"][0]
    write(tmp_path, "blimp", [record | {"UID": uid} for uid in "aaaabbbbcccc"])
    assert "".join(item.group for item in read_items("blimp", tmp_path, limit=5)) == "aabbc"


def test_items_when_file_or_record_is_wrong_name_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_items("piqa", tmp_path / "none")
    write(tmp_path, "sciq", [])
    with pytest.raises(DataError, match=r"piqa\.jsonl.*files there: sciq\.jsonl"):
        read_items("piqa", tmp_path)
    with pytest.raises(DataError, match="no record"):
        read_items("sciq", tmp_path)
    write(tmp_path, "piqa", [RECORDS["piqa"][0], {"goal": "x"}])
    with pytest.raises(DataError, match=r"line 2.*sol1"):
        read_items("piqa", tmp_path)


def test_lm_eval_when_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install mergequant\[eval\]"):
        require_lm_eval()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install mergequant\[eval\]"):
        require_lm_eval()


@pytest.fixture
def adapter(model: Any, tokenizer: Any) -> Any:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`)")
    from mergequant.integrations.lm_eval.adapter import MergeQuantLM

    return MergeQuantLM(model, tokenizer, batch_size=3)


def requests(*pairs: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


PAIRS = [
    ("The river", " runs to the sea"),
    ("", "Stone"),
    ("A much longer context of many words", " ends"),
    ("A", " b c"),
]


def test_loglikelihood_when_batched_and_padded_equals_one_window_at_a_time(adapter: Any, tokenizer: Any) -> None:
    results = adapter.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, results, strict=True):
        whole = [1, *tokenizer(context + continuation, add_special_tokens=False)["input_ids"]]
        start = 1 + len(tokenizer(context, add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            logs = adapter.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        expected = sum(float(logs[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert value == pytest.approx(expected, rel=1e-5)
        assert greedy is all(int(logs[i - 1].argmax()) == whole[i] for i in range(start, len(whole)))


def test_loglikelihood_when_context_is_too_long_keeps_bos_and_the_end(adapter: Any) -> None:
    context = list(range(100, 300))
    assert adapter._window(context, [7, 8]) == [1, *context[-62:], 7, 8]
    assert adapter._window([1, 5], [7]) == [1, 5, 7]


def test_rolling_when_text_is_longer_than_the_model_predicts_each_token_once(adapter: Any, tokenizer: Any) -> None:
    short = "The river runs to the sea"
    (value,) = adapter.loglikelihood_rolling(requests((short,)))
    ((direct, _),) = adapter.loglikelihood(requests(("", short)), disable_tqdm=True)
    assert value == pytest.approx(direct, rel=1e-6)
    seen: list[int] = []
    original = adapter._loglikelihood_tokens

    def counted(parts: Any, **options: Any) -> Any:
        seen.extend(token for _, _, rest in parts for token in rest)
        return original(parts, **options)

    adapter._loglikelihood_tokens = counted
    long = " ".join([short] * 20)
    adapter.loglikelihood_rolling(requests((long,)))
    assert seen == tokenizer(long, add_special_tokens=False)["input_ids"]


def test_generate_when_stop_string_occurs_ends_before_it(adapter: Any) -> None:
    options = {"until": [], "max_gen_toks": 12, "temperature": 0.0}
    (full,) = adapter.generate_until(requests(("The river", options)), disable_tqdm=True)
    stop = full[len(full) // 2 :][:3]
    (cut,) = adapter.generate_until(requests(("The river", options | {"until": stop})), disable_tqdm=True)
    assert len(full) > 4
    assert cut == full.split(stop)[0]
    with pytest.raises(UsageError, match="num_beams"):
        adapter.generate_until(requests(("x", {"num_beams": 4})), disable_tqdm=True)


def test_loglikelihood_when_model_gives_nan_raises(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = adapter.model.forward

    def broken(**options: Any) -> Any:
        out = forward(**options)
        out.logits[..., 3] = torch.nan
        return out

    monkeypatch.setattr(adapter.model, "forward", broken)
    with pytest.raises(NumericsError, match="runs to the sea"):
        adapter.loglikelihood(requests(PAIRS[0]), disable_tqdm=True)


@pytest.mark.filterwarnings("default")  # lm-eval and what it pulls in warn about themselves
def test_run_tasks_when_files_are_local_gives_accuracy_and_error(
    adapter: Any, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    for name, (record, _) in RECORDS.items():
        write(tmp_path, name, [record | ({"UID": uid} if name == "blimp" else {}) for uid in "xxyy"])
    results = run_tasks({"quantized": model, "float": model}, tokenizer, sorted(LOCAL_TASKS), task_data=tmp_path)
    assert list(results) == sorted(LOCAL_TASKS)
    for name, result in results.items():
        item = RECORDS[name][1]
        assert (result["samples"], result["bos"]) == (4, True)
        assert result["models"]["quantized"] == result["models"]["float"]
        expected = _is_right(adapter, item, normalized=result["metric"] == "acc_norm")
        assert result["models"]["float"]["accuracy"] == expected
        assert result["models"]["float"]["standard_error"] == 0
        assert result["models"]["float"]["metrics"][result["metric"]] == expected
    assert set(results["blimp"]["models"]["float"]["groups"]) == {"x", "y"}
    assert results["lambada_openai"]["chance"] is None
    assert results["sciq"]["chance"] == 0.25
    json.dumps(results)


def _is_right(adapter: Any, item: Item, *, normalized: bool) -> float:
    """The answer by hand: the likeliest candidate, per character if normalized; greedy for a single candidate."""
    if item.candidates == 1:
        return float(
            adapter.loglikelihood(requests((item.contexts[0], item.continuations[0])), disable_tqdm=True)[0][1]
        )
    pairs = [(context, f" {rest}") for context in item.contexts for rest in item.continuations]
    values = [value for value, _ in adapter.loglikelihood(requests(*pairs), disable_tqdm=True)]
    if normalized:
        values = [value / len(rest) for value, rest in zip(values, item.continuations, strict=True)]
    return float(values.index(max(values)) == item.gold)


@pytest.mark.filterwarnings("default")
def test_run_tasks_when_name_is_misspelt_suggests_the_near_one(
    adapter: Any, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="hellaswag"):
        run_tasks({"float": model}, tokenizer, ["helaswag"], task_data=tmp_path)
    with pytest.raises(UsageError, match="--task-samples"):
        run_tasks({"float": model}, tokenizer, ["piqa"], task_data=tmp_path, limit=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_run_tasks_when_trained_model_is_given_beats_chance(adapter: Any, test_data: Path) -> None:
    folder = test_data / "models" / "ref"
    trained = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results = run_tasks(
        {"float": trained},
        AutoTokenizer.from_pretrained(folder),
        ["blimp", "sciq"],
        task_data=test_data / "data" / "tasks",
        limit=67,
        batch_size=16,
    )
    for name, result in results.items():
        figures = result["models"]["float"]
        assert figures["accuracy"] > result["chance"] + 2 * figures["standard_error"], name
