"""From a command line to a finished run, on every rank that torchrun started, or alone without it."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from rich.markup import escape
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardgrad import checkpoint
from shardgrad.comm.agree import agree, text_of_first
from shardgrad.comm.ask import lost_store
from shardgrad.comm.backend import choose
from shardgrad.comm.mesh import view
from shardgrad.comm.rendezvous import Arrival, start_process_group
from shardgrad.comm.watch import Watch
from shardgrad.errors import CollectiveError, DisagreementError, VerificationError
from shardgrad.files import replace_text
from shardgrad.nn.shardings import named_shardings
from shardgrad.ops.exact import set_exact
from shardgrad.train import corpus, folder
from shardgrad.train.build import build_model, mesh_shape
from shardgrad.train.causal_lm import CausalLM
from shardgrad.train.config import Config, ConfigError, check_ranks, keys, load, pieces
from shardgrad.train.corpus import Corpus
from shardgrad.train.data import DataError
from shardgrad.train.environment import environment
from shardgrad.train.first_step import CheckError, check_first_step
from shardgrad.train.foreign import tokenizer_note, with_tokenizer
from shardgrad.train.generate import generate
from shardgrad.train.history import History
from shardgrad.train.language_model import LanguageModel
from shardgrad.train.late import TrainingError
from shardgrad.train.loop import held_out_loss, train
from shardgrad.train.memory import check_memory
from shardgrad.train.metrics import Metrics, check_board
from shardgrad.train.model_folder import write_model
from shardgrad.train.optimizer import make_optimizer
from shardgrad.train.page import write_page
from shardgrad.train.prepare import Start, prepare
from shardgrad.train.report import Report
from shardgrad.train.resume import Keeper, restore
from shardgrad.train.signals import Stop
from shardgrad.train.stages import stages

_MEMORY = (
    "More ranks hold less each (mesh.tp, mesh.fully_sharded), and so do a smaller train.batch, model.seq_len or model"
)
_GRACE_S = 10.0  # how long the other ranks leave the first one to print what is wrong, and torchrun to end them all


def main(arguments: Sequence[str]) -> int:
    """Train as the configuration says; returns the exit status: 0, or 2 if the configuration cannot be used.

    What goes wrong after the ranks have met ends the process at once, with status 1: threads of the backend may still
    wait for a rank that is gone, and would keep the interpreter from ending.
    """
    arrival = Arrival()
    rank, ranks = arrival.rank, arrival.ranks
    try:
        config_path, overrides = _parse(arguments, rank)
        config = check_ranks(load(config_path, overrides), ranks)
        arrival.start = config.mesh.start_s
        _check_device(config)
        check_memory(config, ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
        if config.run.tensorboard:
            check_board()
        first, *later = stages(config, ranks)
        first, start = _ready(first, rank)
    except (ConfigError, DataError, OSError) as error:
        arrival.refuse(str(error))
        _tell_once(error, rank)
        return 2
    watch: Watch | None = None
    try:
        watch = start_process_group(choose(config.mesh.device), timedelta(seconds=config.mesh.timeout_s), arrival)
        finished = run(_mesh(config), first, start)
        for stage in later if finished else ():
            stage, start = _ready(stage, rank)
            run(_mesh(stage), stage, start)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        _end(CollectiveError(f"rank {rank}: {lost_store(error)}"), watch)
    except (CollectiveError, dist.DistError) as error:  # every rank knows something else
        _end(error, watch)
    except (CheckError, TrainingError, VerificationError, DisagreementError, DataError, OSError, ValueError) as error:
        if watch is not None:
            watch.tell(str(error))
        _tell_once(error, rank)
        _end()
    except Exception as error:
        if not out_of_memory(error):
            traceback.print_exc()
            _end(None, watch, f"{type(error).__name__}: {error}")
        _end(error, watch, f"it ran out of memory: {error}", _MEMORY)
    watch.leave()
    # Threads of the backend end with the process group's last reference; one alive at exit may abort the interpreter.
    dist.destroy_process_group()
    gc.collect()
    return 0


def _ready(config: Config, rank: int) -> tuple[Config, Start | None]:
    """The configuration with its model's tokenizer, and on the first rank what a run begins with.

    Raises:
        ConfigError, DataError, OSError: the run cannot begin; says why.
    """
    config = with_tokenizer(config)
    if rank == 0:
        return config, prepare(config)
    if not corpus.is_encoded(config.data):
        corpus.open_corpus(config.data, config.model.seq_len)  # each node has the files, or says so now
    return config, None


def out_of_memory(error: Exception) -> bool:
    """Also of torch's CPU allocator, which raises a RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _tell_once(error: Exception, rank: int) -> None:
    """Print what all ranks have found: the first at once; the others later, if the first did not end them by ending."""
    if rank:
        time.sleep(_GRACE_S)
    print(error, file=sys.stderr, flush=True)


def _end(error: Exception | None = None, watch: Watch | None = None, told: str = "", remedy: str = "") -> NoReturn:
    """End this rank alone. watch: tells the others why. told: in other words than the error's own."""
    if watch is not None:
        if (heard := watch.heard()) and error is not None:
            print(heard, file=sys.stderr)
        watch.tell(told or str(error))
    if error is not None:
        print(f"rank {os.environ.get('RANK', '0')}: {told}. {remedy}" if remedy else error, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def _parse(arguments: Sequence[str], rank: int) -> tuple[str, list[str]]:
    described = []
    for key, field in keys():
        default = "required" if field.is_required() else f"default {field.default!r}"
        described.append(f"  {key:<20} {field.description} ({default})")
    parser = _Parser(
        usage="torchrun --standalone --nproc-per-node N -m shardgrad.train CONFIG.yaml [section.key=value ...]",
        description="Train a GPT, a Llama or a model of transformers, tensor, sequence and data parallel over N ranks.",
        epilog="keys:\n" + "\n".join(described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("config", nargs="?", help="a YAML file, or the name of a shipped one, such as quickstart")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values instead of the file's")
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    given = parser.parse_intermixed_args(arguments)
    if given.help:
        if rank == 0:
            parser.print_help()
        sys.exit(0)
    if given.config is None:
        parser.error("the configuration is missing")
    return given.config, given.overrides


def _check_device(config: Config) -> None:
    if config.mesh.device == "cuda":
        here = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.device_count() <= here:
            raise ConfigError(
                f"mesh.device = cuda, but there are {torch.cuda.device_count()} GPUs for local rank {here}"
            )
        torch.cuda.set_device(here)


def _mesh(config: Config) -> DeviceMesh:
    shape = mesh_shape(config)
    return init_device_mesh(config.mesh.device, tuple(shape.values()), mesh_dim_names=tuple(shape))


def run(mesh: DeviceMesh, config: Config, start: Start | None) -> bool:
    """All of a run; called on every rank. start: what `prepare` returned, on the first rank.

    Returns:
        Whether it came to its end, and was not stopped by a signal.
    """
    report = Report(shown=start is not None)
    mesh_view = view(mesh)
    settings = config.run
    begun = Start.from_text(text_of_first(start.to_text() if start is not None else "", mesh_view))
    found = corpus.open_corpus(config.data, config.model.seq_len, begun.folder)
    meant = f"{config.to_yaml()}text {found.text.digest}"
    for axis in mesh_view.axes.values():
        agree(mesh_view, axis, lambda: meant, "the configuration or the text")
    torch.manual_seed(settings.seed)
    model = build_model(config, found.text.vocab, mesh)
    foreign = model if isinstance(model, CausalLM) else None
    base = foreign.about.digest() if foreign is not None and foreign.adapted else None
    if config.train.exact is not None:
        torch.set_num_threads(1)  # torchrun gives one rank alone all cores, and several ranks one each
    set_exact(mesh, pieces(config))
    optimizer = make_optimizer(model, config.train)
    history = History()
    saved = None
    if begun.checkpoint is not None:
        saved = restore(begun.checkpoint, model, optimizer, history, base, begun.seal)
    path, board = (begun.folder / name for name in (folder.METRICS, folder.TENSORBOARD))
    with (
        Metrics(path if start is not None else None, history.step, board if settings.tensorboard else None) as metrics,
        Stop(f"{begun.folder} {history.step}") as stop,
    ):
        report.say(f"run folder: {begun.folder}")
        report.layouts(model)
        sizes = [
            (prod(p.shape if s is None else s.global_shape), p.requires_grad) for _, p, s in named_shardings(model)
        ]
        count, trained = sum(size for size, _ in sizes), sum(size for size, needed in sizes if needed)
        report.corpus(count, trained, found.text)
        if foreign is not None:
            report.foreign(foreign.about.dropout, [tokenizer_note(config, foreign.about)])
        metrics.write(
            "start",
            step=history.step,
            mesh=mesh_view.shape,
            parameters=count,
            trained=trained,
            vocab=found.text.vocab,
            unit=found.text.unit,
            tokens=len(found.text.train),
            held_out=len(found.text.held_out),
            environment=environment(mesh_view.device),
        )
        for told in start.passed_over if start else ():
            report.say(f"[yellow]a damaged checkpoint was passed over:[/yellow] {escape(told)}")
        if saved is not None:
            changed = [] if saved["text"] == found.text.digest else ["the text is another one"]
            if config.train.exact is not None and saved["torch"] != torch.__version__:
                changed.append(f"torch was {saved['torch']}, and is {torch.__version__}, which may round otherwise")
            notes = [*(start.notes if start else ()), *changed]
            report.going_on(begun.checkpoint, saved, mesh_view.shape, notes, config.train.exact is not None)
        if saved is None or saved["mesh"] != mesh_view.shape:  # the same mesh was compared when the run began
            check_first_step(model, config, found.text, report, metrics, history.step)
        if foreign is not None and foreign.about.folder is not None and history.step == 0:
            _begin(model, config, found, history, report, metrics)
        keeper = Keeper(begun.folder, config, found.text.digest, model, optimizer, mesh, metrics, stop, base)
        train(model, optimizer, config, found.text, report, metrics, history, keeper.after_step)
        if keeper.stopped is not None:
            metrics.write("stopped", step=history.step, signal=keeper.stopped)
            report.stopped(keeper.stopped, history.step, begun.folder)
            return False
        _finish(model, config, found, history, report, metrics, begun.folder)
    return True


def _begin(
    model: LanguageModel, config: Config, found: Corpus, history: History, report: Report, metrics: Metrics
) -> None:
    """What a pretrained model knows of the text before it is trained on it."""
    value = held_out_loss(model, found.text, config.train.batch, config.train.eval_batches)
    history.held_out.append((0, value))
    metrics.write("held_out", step=0, loss=value)
    report.say(f"held-out loss {value:.3f} nats a {found.text.unit} before training")


def _finish(
    model: LanguageModel, config: Config, found: Corpus, history: History, report: Report, metrics: Metrics, where: Path
) -> None:
    """A sample, the model's folder, the last line of metrics, the page."""
    settings = config.sample
    sample = ""
    if settings.tokens:
        encoder = found.tokenizer
        # A file of tokens without a tokenizer: the sample goes on where the held-out part begins, in numbers.
        prompt = encoder.encode(settings.prompt) if encoder else found.text.held_out[: config.model.seq_len].tolist()
        ids = generate(
            model,
            prompt,
            settings.tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=config.run.seed,
        )
        sample = encoder.decode(ids) if encoder else " ".join(map(str, ids))
        report.sample(sample)
    if isinstance(model, CausalLM):
        write_model(model, where, found.tokenizer)
    held_out = history.held_out[-1][1]
    digest = {}
    if config.train.exact is not None and metrics.writes:
        digest = {"digest": checkpoint.digest(folder.checkpoints(where)[-1][1])}
        report.digest(digest["digest"])
    metrics.write(
        "end",
        **digest,
        step=history.step,
        held_out=held_out,
        tokens_per_second=history.tokens_per_second,
        communication_share=history.communication_share,
        seconds=report.elapsed(),
    )
    if metrics.writes:
        replace_text(where / folder.SAMPLE, sample)
        write_page(where)
    report.say(
        f"held-out loss [bold]{held_out:.3f}[/bold] nats a {found.text.unit} after {history.step} steps in "
        f"{report.elapsed():.0f} s: {history.tokens_per_second:,.0f} tokens/s, "
        f"{history.communication_share:.0%} of the training time communicating"
    )
    if metrics.writes:
        report.left(where, sorted(entry.name for entry in where.iterdir() if not entry.name.startswith(".")))
