#!/usr/bin/env python3
"""Write a Llama-style bf16 checkpoint of about a given size, with random weights.

Shard by shard and piece by piece, so it takes the same memory whatever the size. Measured
on 2 cores: 3 GB in 7 seconds, the process at 350 MB, most of it python and torch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diskoffload.budget import format_bytes, parse_bytes
from diskoffload.checkpoint.layout import lay_out
from diskoffload.checkpoint.publish import check_space, write_text
from diskoffload.errors import InvalidInputError, OffloadError, OutputExistsError
from diskoffload.store.header import Planned
from diskoffload.store.shard_writer import ShardWriter
from diskoffload.system.files import Files
from diskoffload.system.memory import tensor_bytes

STAMP_NAME = "written-by-write-checkpoint.json"
MAX_SHARD_BYTES = 1_000_000_000
_DTYPE = torch.bfloat16
_SEED = 20240817
_STANDARD_DEVIATION = 0.02  # Llama's own "initializer_range"
# 64 MiB of random numbers are drawn once; every weight takes its rows from them.
_POOL_ELEMENTS = 32 << 20
_PIECE_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model, in elements but for the last three."""

    hidden: int
    intermediate: int
    vocabulary: int
    head: int
    layers: int
    heads: int
    key_value_heads: int

    def tensors(self) -> list[Planned]:
        """List its tensors as a checkpoint names and orders them."""
        key_value = self.key_value_heads * self.head
        matrices = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        norms = ("input_layernorm", "post_attention_layernorm")
        table = (self.vocabulary, self.hidden)
        found: list[Planned] = [("model.embed_tokens.weight", _DTYPE, table)]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found += [(f"{prefix}.{key}.weight", _DTYPE, size) for key, size in matrices.items()]
            found += [(f"{prefix}.{key}.weight", _DTYPE, (self.hidden,)) for key in norms]
        found.append(("model.norm.weight", _DTYPE, (self.hidden,)))
        found.append(("lm_head.weight", _DTYPE, table))
        return found

    def size_bytes(self) -> int:
        """Count the bytes of all tensors."""
        return sum(torch.Size(size).numel() * dtype.itemsize for _, dtype, size in self.tensors())

    def config(self) -> dict[str, Any]:
        """Give the ``config.json`` that transformers 5 writes for such a model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "dtype": "bfloat16",
            "eos_token_id": 2,
            "head_dim": self.head,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": _STANDARD_DEVIATION,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }


def shape_for(size_bytes: int) -> Shape:
    """Choose a model of about that size: TinyLlama's widths from 1 GB on, smaller ones below.

    Raises:
        InvalidInputError: smaller than the smallest, which has one layer.
    """
    for from_bytes, sizes in (
        (1_000_000_000, (2048, 5632, 32_000, 64)),
        (50_000_000, (1024, 2816, 8_000, 64)),
        (0, (256, 768, 2_000, 32)),
    ):
        if size_bytes >= from_bytes:
            hidden, _, _, head = sizes
            heads = hidden // head
            one, two = (Shape(*sizes, layers, heads, heads // 8).size_bytes() for layers in (1, 2))
            break
    layers = 1 + round((size_bytes - one) / (two - one))
    if layers < 1:
        raise InvalidInputError(
            f"cannot write a checkpoint of {size_bytes} bytes: the smallest has {one}; give more"
        )
    return Shape(*sizes, layers, heads, heads // 8)


def write_checkpoint(path: Path, size_bytes: int) -> bool:
    """Write a checkpoint to the folder ``path``, unless that very one is there already.

    It is built in ``PATH.partial`` and renamed when all of it is on the disk. The same size
    gives the same bytes.

    Args:
        path: a folder; its parents are made.
        size_bytes: about how large it shall be, to half a layer.

    Returns:
        Whether it was written now.

    Raises:
        InvalidInputError: a size that is too small.
        OutputExistsError: something else is there.
        NoSpaceError: the disk has too little room; found before anything is written.
    """
    shape = shape_for(size_bytes)
    stamp = {"shape": asdict(shape), "seed": _SEED, "max_shard_bytes": MAX_SHARD_BYTES}
    if path.exists():
        if _read_stamp(path) == stamp:
            return False
        raise OutputExistsError(
            f"cannot write a checkpoint to {path}: it is there, and is not the one that would be "
            "written; remove it, or name another folder"
        )
    check_space(path, shape.size_bytes())
    files = Files()
    partial = path.with_name(path.name + ".partial")
    if partial.exists() and any(partial.iterdir()) and _read_stamp(partial) is None:
        raise OutputExistsError(f"{partial} is there and was not written here; move it away")
    shutil.rmtree(partial, ignore_errors=True)
    files.make_folder(partial)
    write_text(partial / STAMP_NAME, json.dumps(stamp, indent=1) + "\n", files)
    _fill(partial, shape, files)
    files.sync_folder(partial)
    files.rename(partial, path)
    files.sync_folder(path.parent)
    return True


def _read_stamp(path: Path) -> Any:
    try:
        return json.loads((path / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _fill(folder: Path, shape: Shape, files: Files) -> None:
    weights = _Weights()
    layout = lay_out(shape.tensors(), MAX_SHARD_BYTES)
    for file, planned in layout.files.items():
        with ShardWriter(folder / file, planned, files, {"format": "pt"}) as writer:
            for name, _, size in planned:
                weights.write(writer, name, size)
            writer.publish()
    index = layout.index_json()
    if index is not None:
        write_text(folder / layout.index_name, index, files)
    write_text(folder / "config.json", json.dumps(shape.config(), indent=2) + "\n", files)
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n", files)


class _Weights:
    """Cheap random weights: rows from one pool of normal numbers, each row scaled anew."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(_SEED)
        self._pool = torch.empty(_POOL_ELEMENTS, dtype=_DTYPE)
        self._pool.normal_(0.0, _STANDARD_DEVIATION, generator=self._generator)

    def write(self, writer: ShardWriter, name: str, size: tuple[int, ...]) -> None:
        """Draw one tensor, a few rows at a time, and write it; norms are ones."""
        if len(size) == 1:
            writer.write(name, tensor_bytes(torch.ones(size, dtype=_DTYPE)))
            return
        rows, columns = size
        step = max(1, _PIECE_ELEMENTS // columns)
        for top in range(0, rows, step):
            piece = self._draw(min(step, rows - top), columns)
            writer.write_part(name, tensor_bytes(piece))

    def _draw(self, rows: int, columns: int) -> torch.Tensor:
        count = rows * columns
        start = torch.randint(_POOL_ELEMENTS - count + 1, (), generator=self._generator)
        scales = torch.empty(rows, 1).uniform_(0.5, 1.5, generator=self._generator)
        piece = self._pool[int(start) : int(start) + count].view(rows, columns)
        return piece * scales.to(_DTYPE)


def main() -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path, help="the folder to write")
    parser.add_argument("--size", default="3GB", help="about how large (default: %(default)s)")
    options = parser.parse_args()
    started_seconds = time.monotonic()
    try:
        written = write_checkpoint(options.path, parse_bytes(options.size))
    except OffloadError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started_seconds
    size_bytes = sum(path.stat().st_size for path in options.path.glob("*.safetensors"))
    state = f"written in {seconds:.1f} s" if written else "there already"
    print(f"{options.path}: {format_bytes(size_bytes)}, {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
