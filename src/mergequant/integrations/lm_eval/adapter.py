"""lm-eval's view of a model: likelihoods of continuations, and greedy generation. Imports lm-eval.

Every request begins with BOS if the tokenizer has one, also where lm-eval's own adapter would leave it out: quantized
models with a stored prefix need it, and most models were trained with it.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergequant.errors import NumericsError, UsageError
from mergequant.integrations.lm_eval.local import LOCAL_TASKS, Item

__all__ = ["JsonlTask", "MergeQuantLM"]

_MAX_GENERATED = 256
_GENERATION_OPTIONS = ("do_sample", "temperature", "top_k", "top_p")
Request = tuple[tuple[str, str], list[int], list[int]]


class MergeQuantLM(TemplateLM):
    """A transformers model and its tokenizer for lm-eval.

    Requests are batched by length and padded on the right; results do not depend on the order of the requests.
    Raises `NumericsError` at the first non-finite logit.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.bos: int | None = getattr(tokenizer, "bos_token_id", None)
        self.max_length: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048

    @property
    def eot_token_id(self) -> int:
        """End of text; stands in for BOS as the empty context of tokenizers without BOS."""
        token: int | None = getattr(self.tokenizer, "eos_token_id", None)
        return token if token is not None else 0

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        return self.bos if self.bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, always without special tokens: BOS is added once, by `_window`."""
        return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of continuations; no bars where nobody watches."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token predicted once."""
        results = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # room for BOS in front of later windows
                context_len=1,
            )
            parts = [(("", text), context, rest) for context, rest in map(make_disjoint_window, windows)]
            results.append(sum(value for value, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
        return results

    def _window(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """[BOS] + as much of the context as fits + continuation; the last token is predicted only, so one more fits."""
        tokens = [*context, *continuation]
        start = [] if self.bos is None else [self.bos]
        if start and tokens[:1] == start:
            tokens = tokens[1:]
        room = self.max_length + 1 - len(start)
        return start + tokens[-room:]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=lambda i: (-len(windows[i]), i))  # the longest first: fail early
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = tqdm(total=len(order), desc="Scoring answers", disable=disable_tqdm or None, leave=False)
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            lengths = torch.tensor([len(windows[i]) - 1 for i in batch])
            tokens = torch.zeros((len(batch), int(lengths.max())), dtype=torch.int64)
            for row, i in enumerate(batch):
                tokens[row, : lengths[row]] = torch.tensor(windows[i][:-1])
            mask = torch.arange(tokens.shape[1]) < lengths[:, None]
            device = self.model.device
            logits = self.model(
                input_ids=tokens.to(device), attention_mask=mask.long().to(device), use_cache=False
            ).logits
            for row, i in enumerate(batch):
                count = min(len(requests[i][2]), int(lengths[row]))
                if count == 0:
                    continue
                last = int(lengths[row])
                logs = logits[row, last - count : last].float().log_softmax(-1)
                if not bool(torch.isfinite(logs).any(-1).all()) or bool(logs.isnan().any()):
                    raise NumericsError(f"Non-finite logits for the text {requests[i][0][1][:80]!r}; run in float32.")
                labels = torch.tensor(windows[i][-count:], device=logs.device)
                value = logs.gather(-1, labels[:, None]).sum(dtype=torch.float64)
                results[i] = (float(value), bool((logs.argmax(-1) == labels).all()))
            bar.update(len(batch))
        bar.close()
        return results

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts until a stop string, one at a time; greedy unless the task asks for sampling."""
        texts = []
        for request in tqdm(requests, desc="Generating", disable=disable_tqdm or None, leave=False):
            context, options = request.args[0], dict(request.args[1])
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else list(until)
            budget = min(int(options.pop("max_gen_toks", _MAX_GENERATED)), self.max_length - 2)
            if unknown := set(options) - set(_GENERATION_OPTIONS):
                raise UsageError(f"Task asks for unsupported generation options: {', '.join(sorted(unknown))}.")
            if not options.get("do_sample"):
                options = {"do_sample": False}  # temperature 0 and the like mean greedy
            start = [] if self.bos is None else [self.bos]
            ids = start + self.tok_encode(context)[-(self.max_length - budget - len(start)) :]
            prompt = torch.tensor([ids or [self.prefix_token_id]], device=self.model.device)
            stops = {"stop_strings": until, "tokenizer": self.tokenizer} if until else {}
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=budget,
                pad_token_id=self.eot_token_id,
                **stops,
                **options,
            )
            text = str(self.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
            for stop in until:
                text = text.split(stop, 1)[0]
            texts.append(text)
        return texts


class JsonlTask(ConfigurableTask):
    """A task of `LOCAL_TASKS` on items that were read from a local file."""

    def __init__(self, name: str, items: Sequence[Item]) -> None:
        self._rows = [
            {"contexts": item.contexts, "continuations": item.continuations, "gold": item.gold, "group": item.group}
            for item in items
        ]
        completion = all(item.candidates == 1 for item in items)
        by_context = any(len(item.contexts) > 1 for item in items)
        metrics = ["acc", "acc_norm"] if LOCAL_TASKS[name].metric == "acc_norm" else ["acc"]
        config: dict[str, Any] = {
            "task": name,
            "output_type": "loglikelihood" if completion else "multiple_choice",
            "test_split": "test",
            "num_fewshot": 0,
            "doc_to_text": _gold if by_context else _context,
            "doc_to_target": _continuation if completion or by_context else _gold,
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
            "metadata": {"version": 1.0},
        }
        if not completion:
            config["doc_to_choice"] = _contexts if by_context else _continuations
        super().__init__(config=config)

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Called by lm-eval to get the data: it is here already."""
        self.dataset = {"test": Dataset.from_list(self._rows)}

    def build_all_requests(self, **options: Any) -> None:
        """As lm-eval does, without its bar, which lasts a moment."""
        with redirect_stderr(io.StringIO()):
            super().build_all_requests(**options)


def _gold(row: Mapping[str, Any]) -> int:
    return int(row["gold"])


def _context(row: Mapping[str, Any]) -> str:
    return str(row["contexts"][0])


def _contexts(row: Mapping[str, Any]) -> list[str]:
    return list(row["contexts"])


def _continuation(row: Mapping[str, Any]) -> str:
    return str(row["continuations"][0])


def _continuations(row: Mapping[str, Any]) -> list[str]:
    return list(row["continuations"])
