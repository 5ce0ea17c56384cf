"""The errors a user can cause, each told in one line: what was found, what was expected, where, and the next step.

Error
├── ConfigError      a setting, flag or job file
├── DataError        a dataset, row or chat template
├── ModelError       a base model: its config, its weights, its tokenizer
├── AdapterError     an adapter that does not fit, or fits another base
├── CheckpointError  a run folder: its lock, its saved state, its version
├── TrainingError    a run that must not go on: non-finite numbers, matrices without a gradient
└── OutOfMemoryError the memory of the machine or of its GPU ran out

Anything that is not an ``Error`` is a bug of ours and ends with its traceback.
"""

import contextlib
from collections.abc import Iterator

_NO_MEMORY = (
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "allocate memory", "bad_alloc"),
    *("could not create a memory object", "could not create a primitive"),
)
"""How CUDA, cuBLAS, torch's allocator on a CPU, C++ and oneDNN say it, all of them in a RuntimeError."""


class Error(Exception):
    """Says what the user can mend; the command line prints it in one line and exits with status 2."""


class ConfigError(Error):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class DataError(Error):
    """A dataset cannot be read, or a row cannot be rendered."""


class ModelError(Error):
    """A base model is absent, damaged, or uses a feature that the decoder does not compute."""


class AdapterError(Error):
    """An adapter does not fit the model: all misfits in one message."""


class CheckpointError(Error):
    """A run folder is in use, incomplete, or written by a newer version."""


class TrainingError(Error):
    """Training met a number or a gradient with which it must not go on."""


class OutOfMemoryError(Error):
    """Memory ran out, of the machine or of its GPU."""


@contextlib.contextmanager
def memory_told(advice: str) -> Iterator[None]:
    """Turns the end of the memory into an error of ours, which says what to do.

    Raises:
        OutOfMemoryError: memory ran out; torch reports it as a RuntimeError, whose wording depends on where.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise OutOfMemoryError(f"out of memory; {advice}") from None


def first_line(error: Exception) -> str:
    """The first line of another library's message; its class, where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
