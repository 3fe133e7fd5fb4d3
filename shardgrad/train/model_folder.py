"""What a finished run of a model of transformers leaves: a folder that plain transformers, or peft, loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from shardgrad.comm.agree import text_of_first
from shardgrad.comm.mesh import view
from shardgrad.models.pretrained_save import save_pretrained
from shardgrad.train import tokenizer
from shardgrad.train.causal_lm import CausalLM
from shardgrad.train.folder import MODEL
from shardgrad.train.foreign import TOKENIZER
from shardgrad.train.tokenizer import Tokenizer

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json")


def write_model(model: CausalLM, run: Path, encoder: Tokenizer | None) -> None:
    """Write `model` into a run's folder, in place of an earlier one; called on every rank.

    Of a model with adapters these alone, as peft reads them. The tokenizer lies beside.

    Raises:
        OSError: on every rank, if it cannot be written.
    """
    mesh_view = view(model.mesh)
    first = not any(mesh_view.coordinate.values())
    target = run / MODEL
    partial = target.with_name(f".{MODEL}.partial")
    done = ""
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    _set(model.lm.config, model.about.dropout)
    save_pretrained(model.lm, partial, mesh=model.mesh)
    _set(model.lm.config, dict.fromkeys(model.about.dropout, 0.0))
    if first:
        try:
            _write_tokenizer(encoder, model.about.folder if model.about.tokenizer else None, partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except OSError as error:
            done = f"cannot write the model to {target}: {error}"
    done = text_of_first(done, mesh_view)
    if done:
        raise OSError(done)


def _set(config: Any, values: Any) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _write_tokenizer(encoder: Tokenizer | None, origin: Path | None, folder: Path) -> None:
    """origin: the folder that the tokenizer is from, whose other files of it are taken along."""
    if encoder is None:
        return
    text = encoder.json if isinstance(encoder, tokenizer.Vocabulary) else tokenizer.bytes_json()
    (folder / TOKENIZER).write_text(text, encoding="utf-8")
    beside = [] if origin is None else [origin / name for name in _BESIDE if (origin / name).is_file()]
    for path in beside:
        shutil.copyfile(path, folder / path.name)
    if not (folder / "tokenizer_config.json").exists():
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
