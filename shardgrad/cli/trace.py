"""`shardgrad trace`: one training step in time, on every rank: what computes, what travels, what waits."""

from __future__ import annotations

import json as json_text
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from shardgrad.cli import bench_options, options, style
from shardgrad.cli import ranks as processes

EPILOG = style.examples(
    "shardgrad trace configs/quickstart.yaml",
    "shardgrad trace configs/quickstart.yaml model.layers=1 --ranks 4 --draw step.svg --perfetto step.json",
)
_WARM_UP = 3  # steps before the one that is shown: first calls compare layouts and allocate


def trace(
    config: options.Config = None,
    overrides: options.Overrides = None,
    ranks: options.RanksOfMesh = None,
    draw: options.Draw = None,
    perfetto: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="every event of every rank as JSON, for ui.perfetto.dev or chrome://tracing",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Run a few training steps on random tokens and show the last: products, collectives, what overlaps, what waits."""
    if config is None:
        from shardgrad import shipped

        style.list_shipped(shipped.names(), "what it trains")
        return
    if not processes.inside():
        style.check_file(draw)
        style.check_file(perfetto, "a trace for Perfetto", ())
    ranks = processes.count() or _ranks(config, overrides or [], ranks)
    if not processes.inside():
        bench_options.quiet_profiler()
        processes.start(ranks)
    profiles = _profiles(config, overrides or [], ranks)
    if profiles is None:
        return
    from shardgrad.comm.backend import choose
    from shardgrad.draw.timeline import lanes, merged, summary

    found = lanes(profiles)
    if draw is not None:
        from shardgrad.draw.timeline_picture import draw as draw_step

        how = f"{ranks} rank{'s' if ranks > 1 else ''}, {choose('cpu')}"
        draw_step(found, f"One training step of {config} on {how}", draw)
    if perfetto is not None:
        perfetto.write_text(json_text.dumps(merged(profiles)), encoding="utf-8")
    summaries = [asdict(summary(lane)) for lane in found]
    if json:
        style.print_json({"config": config, "overrides": overrides or [], "unit": "ms", "ranks": summaries})
    else:
        _print(summaries)
        for what, path in (("drawn", draw), ("every event", perfetto)):
            if path is not None:
                style.say(f"{what} in {path}")


def _ranks(config: str, overrides: list[str], ranks: int | None) -> int:
    """How many ranks are started; what is wrong with the configuration on them is told before any is."""
    _, ranks = processes.configured(config, overrides, ranks)
    from shardgrad.cli import training_step
    from shardgrad.train.config import ConfigError

    with style.exit_on(ConfigError):
        training_step.read(config, overrides, ranks)
    return ranks


def _profiles(config_path: str, overrides: list[str], ranks: int) -> list[dict[str, Any]] | None:
    """What torch.profiler recorded of one step, on every rank: on the first rank; None on the others."""
    import gc

    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from shardgrad.cli import training_step
    from shardgrad.comm.agree import gather_texts
    from shardgrad.comm.mesh import mesh_of_all, view
    from shardgrad.comm.timer import comm_timer

    config = training_step.read(config_path, overrides, ranks)
    rank, watch = training_step.join(config)
    step = training_step.make(config)
    for _ in range(_WARM_UP):
        step()
    with comm_timer(named=True):
        step()  # the profiler's own first use is slow as well
        with profile(activities=[ProfilerActivity.CPU]):
            step()
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            dist.barrier()
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        recorded.export_chrome_trace(str(path))
        mine = path.read_text(encoding="utf-8")
    everyone = mesh_of_all("cpu")
    assert everyone is not None
    texts = gather_texts(mine, view(everyone).axis("all"), torch.device("cpu"))  # JSON: no pickle passes between ranks
    watch.leave()
    del step
    dist.destroy_process_group()
    gc.collect()
    return [json_text.loads(text) for text in texts] if rank == 0 else None


_COLUMNS = {
    "step": "step",
    "products": "products",
    "other": "operations",
    "start": "starting",
    "wait": "waiting",
    "travel": "travelling",
    "hidden": "hidden",
}


def _print(summaries: list[dict[str, Any]]) -> None:
    columns = ("rank", *_COLUMNS, "number")
    rows = [
        (str(one["rank"]), *(f"{one[key]:.1f}" for key in _COLUMNS.values()), str(one["collectives"]))
        for one in summaries
    ]
    style.table(columns, rows, title="one training step, in milliseconds", numbers=columns)
    style.say(
        "other: operations that are no products; start, wait: the rank starts a collective, is blocked on one; "
        "travel: some collective is under way; hidden: so while the rank is not blocked; number: of "
        "collectives. The rest of a step is Python."
    )
