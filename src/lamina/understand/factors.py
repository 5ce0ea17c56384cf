"""Any LoRA adapter in PEFT's format, read matrix by matrix without its model, and written again at a lower rank.

Which module an update belongs to is in the names of the tensors, and its scale in the config; so nothing here depends on the
base, nor on whether Lamina computes its family.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lamina.adapter import LoRA
from lamina.adapter_files import CONFIG, WEIGHTS, read_config, write_tensors
from lamina.errors import AdapterError, ConfigError
from lamina.model.merged import free_place
from lamina.understand.spectrum import Spectrum, spectrum

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_DRAWING = (
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
)  # how A and B were drawn; these are drawn anew


@dataclass(frozen=True)
class Factors:
    """One update s·B·A: A [R, in] and B [out, R] as they are stored, and the path of their module in the model."""

    path: str
    a: Tensor
    b: Tensor
    scale: float

    def spectrum(self) -> Spectrum:
        """Singular values and directions of the update."""
        return spectrum(self.a, self.b, self.scale)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk whose names, ranks and shapes fit together.

    Attributes:
        shapes: (out, in) of every adapted matrix by its module's path, in the order of layers.
        base: fingerprint of the base it was trained on; None where the file does not say.
    """

    folder: Path
    lora: LoRA
    shapes: dict[str, tuple[int, int]]
    base: str | None

    @property
    def rank(self) -> int:
        """The largest rank of a matrix."""
        return max(self.lora.rank_of(path) for path in self.shapes)

    def factors(self) -> Iterator[Factors]:
        """Reads the updates one after the other.

        Raises:
            AdapterError: a non-finite number.
        """
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            for path in self.shapes:
                a, b = (file.get_tensor(_key(path, factor)) for factor in "AB")
                for factor, tensor in (("A", a), ("B", b)):
                    if not tensor.isfinite().all():
                        raise AdapterError(
                            f"{self.folder}: {_key(path, factor)} holds non-finite numbers; the training that wrote it had "
                            "diverged: take an earlier save, or train it anew"
                        )
                yield Factors(path, a, b, self.lora.scale_of(path))


@dataclass(frozen=True)
class Shrunk:
    """An adapter that was written at a lower rank.

    Attributes:
        folder: where, an absolute path.
        energy: share of ‖ΔW‖², over all matrices, that it keeps.
    """

    folder: Path
    rank: int
    energy: float


def open_adapter(folder: Path) -> AdapterFile:
    """Reads an adapter's config and the header of its weights.

    Raises:
        AdapterError: no adapter there, features that are not computed, a damaged file, or tensors that are not the pairs
            A and B of the rank that the config names (all of them).
    """
    lora = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{folder}: found no {WEIGHTS}; copy it from where the adapter was written")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            base = (file.metadata() or {}).get("lamina_base")
    except SafetensorError as error:
        raise AdapterError(
            f"{path}: damaged or incomplete ({error}); copy it again from where it was written"
        ) from None
    shapes, problems = _shapes(stored, lora)
    if problems or not shapes:
        what = f"{len(problems)} misfits: {'; '.join(problems)}" if problems else "it is empty"
        raise AdapterError(f"{path}: expected the factors A and B of a LoRA adapter, of the rank in {CONFIG} ({what})")
    return AdapterFile(folder, lora, shapes, base)


def save_truncated(adapter: AdapterFile, rank: int, out: Path) -> Shrunk:
    """Writes an adapter anew at a lower rank, in PEFT's format: the config is its own but for ranks and scales.

    Args:
        out: a new or empty folder.

    Raises:
        ConfigError: a rank above the adapter's, or none.
        CheckpointError: something is in ``out``, or it cannot be written.
    """
    if not 1 <= rank <= adapter.rank:
        raise ConfigError(f"rank: found {rank}, expected 1 to {adapter.rank}, the rank of {adapter.folder}")
    out = free_place(out)
    kept, squares, held = {}, 0.0, 0.0
    for factors in adapter.factors():
        found = factors.spectrum()
        kept[factors.path] = found.factors(rank)
        squares += found.norm**2
        held += found.norm**2 * found.energy(rank)
    # s = 1 is alpha = rank in every module, also in those whose rank is lower; ^ for the whole path, and not an end of others.
    lower = {f"^{re.escape(path)}": len(a) for path, (a, _) in kept.items() if len(a) < rank}
    config: dict[str, Any] = json.loads((adapter.folder / CONFIG).read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _DRAWING}
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": lower, "alpha_pattern": lower, "use_rslora": False}
    config["init_lora_weights"] = True
    out.mkdir(parents=True, exist_ok=True)
    tensors = {_key(path, name): factor for path, pair in kept.items() for name, factor in zip("AB", pair, strict=True)}
    write_tensors(out / WEIGHTS, tensors, {"format": "pt"} | ({"lamina_base": adapter.base} if adapter.base else {}))
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Shrunk(out, rank, held / squares if squares else 1.0)


def _key(path: str, factor: str) -> str:
    return f"base_model.model.{path}.lora_{factor}.weight"


def _shapes(stored: dict[str, tuple[int, ...]], lora: LoRA) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """(out, in) of every module by its path, and what does not fit."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    problems = []
    for name, shape in stored.items():
        if match := _KEY.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = shape
        else:
            problems.append(f"unexpected {name}")
    shapes = {}
    for path in sorted(found, key=_natural):
        rank, pair = lora.rank_of(path), found[path]
        problems += [f"missing {_key(path, factor)}" for factor in "AB" if factor not in pair]
        match pair:
            case {"A": (first, inputs), "B": (outputs, second)} if first == second == rank and inputs and outputs:
                shapes[path] = (outputs, inputs)
            case {"A": a, "B": b}:
                problems.append(f"{path} has A {list(a)} and B {list(b)}, expected [{rank}, in] and [out, {rank}]")
    return shapes, problems


def _natural(path: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10; modules of a layer by their names."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
