"""``apexsim device``: a profile from a datasheet, and how far such profiles are off, shown on measured devices.

A measured device is left out, its profile built from its datasheet and the others', and compared with its fitted one
over the shapes of served models. Where the new device is of a generation that nobody measured, all devices of the
left-out one's generation stay out too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from apexsim.costs.collectives import CollectiveTable
from apexsim.costs.fitted import AttentionShape, MoeLayer, OperatorCosts
from apexsim.costs.forms.hardware import Array
from apexsim.costs.mla import LatentMixing
from apexsim.errors import BadInput, Unsupported
from apexsim.fitting.mla import HIDDEN, SERVED_HEADS, SIZES
from apexsim.fitting.problems import summary
from apexsim.fitting.relatives import Sheet, carried, generation
from apexsim.fitting.served import expert_shapes, gemm_shapes, head_shapes
from apexsim.specs.device import DeviceProfile, HoldOut

# The sizes at which predictions are compared.
TOKENS = (1, 8, 64, 256, 1024, 8192)
BATCHES = (1, 8, 64, 256)
CONTEXTS = (512, 4096, 32768)
CHUNKS = (128, 512, 2048, 8192)
HISTORIES = (0, 4096)
EXPERT_RANKS = (1, 8)
MOVED_BYTES = (1 << 20, 1 << 24, 1 << 28)
COLLECTIVE_BYTES = tuple(1 << power for power in range(12, 27, 2))
SEQUENCES = (1, 16, 128)
VOCABULARY = 128256
# Heads of a rank of the model whose latent attention was measured.
LATENT_HEADS = (*SERVED_HEADS, 128)

Seconds = Callable[[OperatorCosts, str], Array]


class Error(NamedTuple):
    """Signed relative errors of the operators of one ``kind`` on one ``device``, over all keys that could be lent."""

    device: str
    kind: str
    errors: Array

    @property
    def held_out(self) -> HoldOut:
        """Median and 90th percentile of their size."""
        return summary(np.abs(self.errors))

    @property
    def bias(self) -> float:
        """Median of the errors with their sign."""
        return float(np.median(self.errors))


def profile_from_datasheet(sheet: Sheet, name: str, measured: Sequence[DeviceProfile]) -> DeviceProfile:
    """The profile of an unmeasured device; the quality of its operators is what leaving measured devices out shows.

    ``measured``: two or more profiles. Raises BadInput where there are fewer.
    """
    relatives = _fitted(measured)
    profile = carried(sheet, name, relatives)
    known = any(generation(relative) == sheet.generation for relative in relatives)
    label = "device_left_out" if known else "generation_left_out"
    found = pooled(left_out_errors(measured, whole_generation=not known))
    quality = {error.kind: {label: error.held_out} for error in found}
    operators = {
        kind: {key: op.model_copy(update={"quality": quality.get(kind, {})}) for key, op in by_key.items()}
        for kind, by_key in profile.operators.items()
    }
    return profile.model_copy(update={"operators": operators})


def left_out(
    measured: Sequence[DeviceProfile], *, whole_generation: bool = False
) -> Iterator[tuple[DeviceProfile, DeviceProfile]]:
    """Every measured device with the profile that its datasheet and the others' profiles give.

    ``whole_generation``: the others are those of other generations; a device that has none is passed over.
    """
    devices = _fitted(measured)
    for device in devices:
        others = [other for other in devices if other.name != device.name]
        if whole_generation:
            others = [other for other in others if generation(other) != generation(device)]
        if others:
            yield device, carried(Sheet.of(device), device.name, others)


def left_out_errors(measured: Sequence[DeviceProfile], *, whole_generation: bool = False) -> list[Error]:
    """Errors of every kind of operator on every device left out, in the order of the devices."""
    return [
        Error(device.name, kind, errors)
        for device, guess in left_out(measured, whole_generation=whole_generation)
        for kind, errors in operator_errors(device, guess).items()
    ]


def pooled(errors: Sequence[Error]) -> list[Error]:
    """The errors of every kind of operator over all devices together."""
    kinds = dict.fromkeys(error.kind for error in errors)
    return [Error("any", kind, np.concatenate([e.errors for e in errors if e.kind == kind])) for kind in kinds]


def operator_errors(device: DeviceProfile, guess: DeviceProfile) -> dict[str, Array]:
    """Relative errors of ``guess`` by kind, over the operators that were fitted on ``device`` and that it has too."""
    costs, guessed = OperatorCosts(device), OperatorCosts(guess)
    found = {}
    for kind, by_key in device.operators.items():
        both = [key for key, op in by_key.items() if op.evidence == "fitted" and key in guess.operators.get(kind, {})]
        seconds = GRIDS.get(kind, _curve(kind))
        errors = [seconds(guessed, key) / seconds(costs, key) - 1 for key in both if _answers(costs, kind, key)]
        if errors:
            found[kind] = np.concatenate(errors)
    return found


def _fitted(profiles: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    """The devices whose products were measured on themselves: others have nothing to lend or to be compared with."""
    found = [
        profile
        for profile in profiles
        if any(op.evidence == "fitted" for op in profile.operators.get("gemm", {}).values())
    ]
    if len(found) < 2:
        raise BadInput("two or more measured devices are needed", where="device profiles", got=len(found))
    return found


def _answers(costs: OperatorCosts, kind: str, key: str) -> bool:
    """Whether a kind has sizes to be compared at: forms that only answer inside a step have none."""
    return kind in GRIDS or costs.operator(kind, key).points is not None


def _gemm(costs: OperatorCosts, key: str) -> Array:
    return np.concatenate([costs.gemm_s(TOKENS, n, k, key) for n, k in sorted(gemm_shapes())])


def _shapes(key: str) -> list[AttentionShape]:
    dtype, _, size = key.rpartition("_d")
    return [AttentionShape(heads, kv, int(size), None, dtype) for heads, kv in sorted(head_shapes())]


def _prefill(costs: OperatorCosts, key: str) -> Array:
    chunks, histories = np.meshgrid(CHUNKS, HISTORIES)
    return np.concatenate([costs.prefill_attention(s).many(chunks, histories).ravel() for s in _shapes(key)])


def _decode(costs: OperatorCosts, key: str) -> Array:
    sized = itertools.product(_shapes(key), BATCHES)
    return np.concatenate([costs.decode_attention_s(batch, np.array(CONTEXTS), shape) for shape, batch in sized])


def _moe(costs: OperatorCosts, key: str) -> Array:
    layers = [
        MoeLayer(hidden, inter, topk, experts, ranks, key)
        for (hidden, inter, topk, experts), ranks in itertools.product(sorted(expert_shapes()), EXPERT_RANKS)
    ]
    return np.concatenate([costs.moe_s(TOKENS, layer) for layer in layers])


def _elementwise(costs: OperatorCosts, key: str) -> Array:
    return costs.elementwise_s(np.array(MOVED_BYTES), key)


def _sampling(costs: OperatorCosts, key: str) -> Array:
    return costs.sampling_s(np.array(SEQUENCES), VOCABULARY)


def _latent(key: str) -> list[LatentMixing]:
    return [LatentMixing("attention", SIZES, HIDDEN, heads, key) for heads in LATENT_HEADS]


def _latent_decode(costs: OperatorCosts, key: str) -> Array:
    sized = itertools.product(_latent(key), BATCHES)
    return np.concatenate([mixing.decode_s(costs, batch, np.array(CONTEXTS, dtype=float)) for mixing, batch in sized])


def _latent_prefill(costs: OperatorCosts, key: str) -> Array:
    chunks, histories = np.meshgrid(CHUNKS, HISTORIES)
    return np.concatenate([mixing.chunk_cost(costs).many(chunks, histories).ravel() for mixing in _latent(key)])


def _curve(kind: str) -> Seconds:
    """Seconds of a collective at the sizes of ``COLLECTIVE_BYTES``."""

    def seconds(costs: OperatorCosts, key: str) -> Array:
        points = costs.operator(kind, key).points
        if points is None:
            raise Unsupported(f"{costs.profile.name}: {kind} {key} has no points")
        return CollectiveTable(points)(COLLECTIVE_BYTES)

    return seconds


GRIDS: dict[str, Seconds] = {
    "gemm": _gemm,
    "prefill_attention": _prefill,
    "decode_attention": _decode,
    "moe": _moe,
    "elementwise": _elementwise,
    "sampling": _sampling,
    "mla_decode": _latent_decode,
    "mla_prefill": _latent_prefill,
}
