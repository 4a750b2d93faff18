"""Zero-shot tasks through EleutherAI's lm-eval (the extra `eval`); see `run_tasks`."""

from mergequant.integrations.lm_eval.local import LOCAL_TASKS
from mergequant.integrations.lm_eval.run import require_lm_eval, run_tasks

__all__ = ["LOCAL_TASKS", "require_lm_eval", "run_tasks"]
