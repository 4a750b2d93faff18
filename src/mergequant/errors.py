"""Every error that mergequant raises on purpose.

    MergeQuantError
    |- UsageError                 an argument, option or combination that cannot work (exit status 2)
    |  `- RecipeError             unknown recipe, misspelt key, value outside its range
    |- ModelError                 a model folder that cannot be read
    |  |- WeightsError            missing, truncated, corrupt or non-finite weights; config and tensors disagree
    |  `- StructureError          a block or site that could not be found or proven
    |- DataError                  text that is missing, empty, too short, not UTF-8, ...
    |  `- OverlapError            calibration, held-out and evaluation tokens share windows
    |- NumericsError              the first non-finite value, with layer, tensor and channel
    |- KernelError                an op was called with a dtype, shape, stride or device that it does not take
    |- InputError                 a quantized model was called in a way that it cannot serve (missing prefix, mask kind)
    `- CheckpointError            a checkpoint that cannot be written or must not be loaded
       |- VersionError            unknown major format version
       `- VerifyError             reloading gave something else than was saved

A message says what (with the layer's full name), why, and what to do next.
"""

__all__ = [
    "CheckpointError",
    "DataError",
    "InputError",
    "KernelError",
    "MergeQuantError",
    "ModelError",
    "NumericsError",
    "OverlapError",
    "RecipeError",
    "StructureError",
    "UsageError",
    "VerifyError",
    "VersionError",
    "WeightsError",
]


class MergeQuantError(Exception):
    """Root of all errors raised on purpose by this package."""


class UsageError(MergeQuantError):
    """An argument, an option or their combination cannot work."""


class RecipeError(UsageError):
    """A recipe is unknown, misspelt, or holds a value outside its range."""


class ModelError(MergeQuantError):
    """A model folder cannot be read."""


class WeightsError(ModelError):
    """Weights are missing, truncated, corrupt, non-finite, or disagree with the config."""


class StructureError(ModelError):
    """A block or a site could not be found, or its numeric proof failed."""


class DataError(MergeQuantError):
    """Text or token data is missing, empty, too short or not readable."""


class OverlapError(DataError):
    """Calibration, held-out and evaluation tokens overlap."""


class NumericsError(MergeQuantError):
    """A value became NaN or infinite."""


class KernelError(MergeQuantError):
    """An op was called with a tensor that it does not take."""


class InputError(MergeQuantError):
    """A quantized model was called in a way that it cannot serve."""


class CheckpointError(MergeQuantError):
    """A checkpoint cannot be written, or must not be loaded."""


class VersionError(CheckpointError):
    """The checkpoint has a format version that this release does not know."""


class VerifyError(CheckpointError):
    """A saved checkpoint does not give back what was in memory."""
