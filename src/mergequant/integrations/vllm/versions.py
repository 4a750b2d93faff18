"""The releases of vLLM that this plugin is written for."""

import re
from importlib.metadata import PackageNotFoundError, version

from mergequant.errors import VersionError

__all__ = ["SUPPORTED", "require_supported", "unsupported"]

SUPPORTED = ">=0.26.0,<0.27"
SERIES = (0, 26)


def unsupported(found: str | None) -> str | None:
    """Why a release of vLLM ("0.26.0", "0.26.1+cu130") does not serve checkpoints; None if it does."""
    if found is None:
        return f"vLLM is not installed; run pip install 'vllm{SUPPORTED}'"
    match = re.match(r"(\d+)\.(\d+)", found)
    if match and (int(match[1]), int(match[2])) == SERIES:
        return None
    return (
        f"vLLM {found} is installed; mergequant's plugin uses interfaces of vLLM {SUPPORTED}, which change between "
        f"releases: pip install 'vllm{SUPPORTED}', or a release of mergequant for your vLLM"
    )


def require_supported() -> None:
    """Raise VersionError unless the vLLM at hand is one of `SUPPORTED`."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = None
    if reason := unsupported(found):
        raise VersionError(reason)
