"""``live``: serve a workload for real with the reference engine, and write what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apexsim.cli.options import with_flags
from apexsim.errors import BadInput
from kernels_profiling.serving_flags import MOST_SEATS, MOST_TOKENS, LoadFlags, ModelFlags

if TYPE_CHECKING:
    import torch

    from apexsim.specs.engine import SchedulerDefaults
    from apexsim.specs.model import ModelSpec
    from apexsim.specs.workload import Requests
    from kernels_profiling.engine import EngineSettings, LiveEngine

# Of the device memory that weights leave free, the share that is not kept for activations and workspaces.
_CACHE_SHARE = 0.7


@dataclass(frozen=True)
class EngineFlags:
    """How the engine is set; what is not given is as its profile says."""

    engine: Annotated[str, typer.Option(help="Engine profile: name or YAML.")] = "reference"
    kv_blocks: Annotated[int | None, typer.Option(min=1, help="KV blocks; else all that could be used and fit.")] = None
    max_num_seqs: Annotated[int | None, typer.Option(min=1, max=MOST_SEATS, help="Most requests at a time.")] = None
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST_TOKENS, help="Most tokens of a step.")
    ] = None
    swiftkv_layers: Annotated[
        int | None, typer.Option(help="Only so many layers see every prompt token; later ones keys and values alone.")
    ] = None
    graphs: Annotated[bool, typer.Option("--graphs/--no-graphs", help="CUDA graphs replay decodes.")] = True

    def limits(self, context: int) -> SchedulerDefaults:
        """The scheduler's settings, all of them numbers. Raises BadInput for what the engine does not do."""
        from apexsim import catalog

        limits = catalog.load("engine", self.engine).scheduler
        given = {"max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": self.max_num_batched_tokens}
        limits = limits.model_copy(update={key: value for key, value in given.items() if value is not None})
        undone = [key for key, plain in _PLAIN.items() if getattr(limits, key) != plain]
        if undone:
            said = f"the live engine works without {', '.join(undone)}; take --engine reference"
            raise BadInput(said, where="--engine", got=self.engine)
        return limits.model_copy(update={"max_num_batched_tokens": limits.max_num_batched_tokens or context})


# Settings of a scheduler that the live engine has one value of.
_PLAIN = {
    "lookahead_steps": 0, "prefix_caching": False, "stream_interval": 1, "receive_interval": 1,
    "token_budget_rule": None, "max_model_len": None,
}  # fmt: skip


@with_flags
def live(
    out: Annotated[Path, typer.Option(help="Folder: a row is added to its runs.csv.")],
    model_flags: ModelFlags,
    load_flags: LoadFlags,
    engine_flags: EngineFlags,
    profile: Annotated[
        str | None, typer.Option(help="Device profile (name or YAML) that the row names; else the device's own name.")
    ] = None,
) -> None:
    """Serve a workload with random weights, for real; ``apexsim validate OUT/runs.csv`` simulates the same."""
    from apexsim.atomic import make_folder
    from kernels_profiling.engine import LiveEngine, check_servable
    from kernels_profiling.records import check_folder, write_run

    check_folder(make_folder(out), model_flags.model)
    load, place = load_flags.read(), model_flags.place()
    settings = settings_for(model_flags.spec(), load, engine_flags, place)
    what = what_ran(out, settings, model_flags, engine_flags, profile)
    check_servable(settings, load)  # before a warm-up that would seem to be at fault
    engine = LiveEngine(settings)
    engine.serve(warm_up_load(load, settings.scheduler))
    run_id = write_run(out, serve_metered(engine, load), what)
    typer.echo(f"{out}/runs.csv: {run_id}")


def settings_for(model: ModelSpec, load: Requests, flags: EngineFlags, place: torch.Tensor) -> EngineSettings:
    """The settings of an engine for a load, on the device and in the dtype of ``place``."""
    from kernels_profiling.engine import EngineSettings

    limits = flags.limits(model.max_context)
    longest = int((load.prompt_tokens + load.output_tokens).max())
    return EngineSettings(
        model=model,
        scheduler=limits,
        kv_blocks=flags.kv_blocks or _blocks(model, limits, longest, place),
        longest=longest,
        device=str(place.device),
        dtype=place.dtype,
        swiftkv_layers=flags.swiftkv_layers,
        graphs=flags.graphs,
    )


def warm_up_load(load: Requests, limits: SchedulerDefaults) -> Requests:
    """Requests like those of a load, few and short of output: a batch of every size up to the largest there can be."""
    import numpy as np

    from apexsim.specs.workload import Requests

    count = min(len(load), limits.max_num_seqs, load.concurrency or len(load))
    # The k-th leaves k steps after the first, so that decode batches shrink one by one.
    outputs = np.minimum(np.arange(count) + 2, load.output_tokens[:count])
    return Requests(
        name=load.name, prompt_tokens=load.prompt_tokens[:count], output_tokens=outputs, arrival_s=np.zeros(count)
    )


def serve_metered(engine: LiveEngine, load: Requests) -> Any:
    """Serve a load, a GPU's power being read meanwhile."""
    import torch

    from apexsim.serving.request_rows import columns_of
    from kernels_profiling.machine import meter_of
    from kernels_profiling.records import Served

    meter, power_w, found = meter_of(torch.device(engine.settings.device)), None, []
    if meter is None:
        found.append(engine.serve(load))
    else:
        power_w = meter.during(lambda: found.append(engine.serve(load))).power_w
    requests, recorder = found[0]
    return Served(
        load=load,
        requests=columns_of(requests, 0),
        gaps=recorder.inter_token_gaps(),
        steps=recorder.steps(),
        power_w=power_w,
    )


def device_cell(out: Path, device: torch.device, profile: str | None) -> str:
    """How a row names its device: by the profile given, or the one of the device, else by the device's own name."""
    from apexsim import catalog
    from kernels_profiling.machine import KNOWN, device_name
    from kernels_profiling.records import profile_cell

    if profile is None:
        name = device_name(device)
        return KNOWN.get(name, name.lower().replace(" ", "-"))
    cell = profile_cell(out, "device", profile, "--profile")
    catalog.load("device", profile)  # a file that is no profile is told now
    return cell


def what_ran(
    out: Path, settings: EngineSettings, model: ModelFlags, engine: EngineFlags, profile: str | None
) -> dict[str, Any]:
    """The columns of a row that say what ran."""
    from apexsim import __version__
    from kernels_profiling.records import profile_cell

    layers = settings.swiftkv_layers
    # The simulator knows no SwiftKV: such a run is kept out of scores.
    exclude = "" if layers in (None, settings.model.layers) else f"SwiftKV behind layer {layers}"
    name = profile_cell(out, "engine", engine.engine, "--engine")
    return {"engine": name, "engine_version": __version__, "exclude": exclude} | ran_on(
        out, settings, model, profile, "live"
    )


def ran_on(out: Path, settings: EngineSettings, model: ModelFlags, profile: str | None, command: str) -> dict[str, Any]:
    """The columns that say where a run of ``command`` took place and within which limits, whatever the engine."""
    import torch

    limits = settings.scheduler
    return {
        "source": f"kernels_profiling {command}, torch {torch.__version__}, {torch.get_num_threads()} threads",
        "model": model.model,
        "device": device_cell(out, torch.device(settings.device), profile),
        "weight_dtype": model.dtype,
        "kv_dtype": model.dtype,
        **dict.fromkeys(("replicas", "gpus", "tensor", "pipeline", "attention_data", "expert"), 1),
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "chunked_prefill": limits.chunked_prefill,
        "prefix_caching": limits.prefix_caching,
        "block_size": limits.block_size,
        "kv_blocks": settings.kv_blocks,
        "notes": f"seed {settings.seed}",
    }


def _blocks(model: ModelSpec, limits: SchedulerDefaults, longest: int, place: torch.Tensor) -> int:
    """As many blocks as all seats could use, or as fit beside the weights on a GPU."""
    import torch

    used = limits.max_num_seqs * -(-longest // limits.block_size)
    if place.device.type == "cpu":
        return used
    width = place.dtype.itemsize
    block_bytes = 2 * model.layers * model.kv_heads * model.head_dim * width * limits.block_size
    free_bytes = torch.cuda.mem_get_info(place.device)[0] - model.params * width
    if free_bytes < block_bytes:
        raise BadInput(f"{model.name} needs {model.params * width:.3g} bytes for its weights alone", where="--model")
    return min(used, max(1, int(_CACHE_SHARE * free_bytes / block_bytes)))
