"""Checkpoints opened where they lie, held in every way, give what transformers gives."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from linux_only import linux_only
from models import load
from safetensors.torch import load_file, save_file

import diskoffload
from diskoffload.store.stored import ShardTensor

IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def assert_same_values(model: Any, other: Any) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
    buffers = dict(other.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@torch.no_grad()
def assert_same_outputs(model: Any, other: Any) -> None:
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), other.generate(IDS, **options))


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("way", ["opened", "dispatched", "offloaded", "rewritten"])
def test_values_and_outputs(
    checkpoint: Path, way: str, compression: str | None, tmp_path: Path
) -> None:
    reference = load(checkpoint)
    options: dict[str, Any] = {"offload_dir": tmp_path / "off", "compression": compression}
    if way in ("opened", "dispatched"):
        model = diskoffload.open_checkpoint(checkpoint, align=True, **options)
    else:
        model = load(checkpoint)
        diskoffload.offload_model(model, "cpu", "disk", **options)
    if way == "dispatched":
        diskoffload.dispatch_model(model, max_memory={"cpu": "600KB"}, **options)
        places = {str(offload) for _, offload in diskoffload.get_device_map(model).values()}
        assert places == {"cpu", "disk"}
    if way == "rewritten":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0)
        model.model.embed_tokens._parameters.sync()
    assert_same_values(model, reference)
    assert_same_outputs(model, reference)


def test_opening_maps_and_writes_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints["mixtral"]
    script = f"""
import os, pathlib
import diskoffload
folder = pathlib.Path({str(checkpoint)!r})
model = diskoffload.open_checkpoint(folder, offload_dir={str(tmp_path / "off")!r})
mapped = [line for line in open("/proc/self/maps") if str(folder) in line]
print(len(mapped), os.listdir({str(tmp_path / "off")!r}))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split(" ", 1)[0] == "0"  # nothing is even mapped yet
    assert run.stdout.split(" ", 1)[1].strip() == "['diskoffload.lock']"


def test_weights_alias_one_mapping_a_shard(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = diskoffload.open_checkpoint(checkpoints["llama"], offload_dir=tmp_path / "off")
    for parameter in model.parameters():
        parameter.sum()
    gc.collect()  # models of earlier tests
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mapped = [line for line in maps if str(checkpoints["llama"]) in line]
    assert len(mapped) == len(list(checkpoints["llama"].glob("*.safetensors")))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.untyped_storage().nbytes() == weight.nbytes


def test_a_dtype_converts_at_each_onload(checkpoint: Path, tmp_path: Path) -> None:
    reference = load(checkpoint, dtype=torch.float32)
    model = diskoffload.open_checkpoint(
        checkpoint, offload_dir=tmp_path / "off", dtype=torch.float32
    )
    assert_same_values(model, reference)
    assert_same_outputs(model, reference)
    residency = model.lm_head._parameters.residency
    with diskoffload.disable_offloading():
        model(IDS)
        kept = residency.loaded_bytes
        loads = residency.loaded_count
        model(IDS)
        assert residency.loaded_count == loads  # every second fetch was a hit
    assert kept > 4 * 128 * 256
    assert residency.loaded_bytes < kept


def test_kept_values_stay_within_the_budget(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    budget = 300_000  # the largest tensor, an embedding in fp32, takes 128 KiB
    model = diskoffload.open_checkpoint(
        checkpoints["llama"],
        offload_dir=tmp_path / "off",
        dtype=torch.float32,
        max_memory=budget,
    )
    reference = load(checkpoints["llama"], dtype=torch.float32)
    residency = model.lm_head._parameters.residency
    names = [name for name, _ in reference.named_parameters()]
    with diskoffload.disable_offloading(), torch.no_grad():
        # Not named_parameters(): torch's own loop holds every parameter it has given out.
        for name in names:
            model.get_parameter(name).mul_(2)
            assert residency.loaded_bytes <= budget, name
        assert residency.evicted_count > 0
        model.lm_head._parameters.sync()
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], 2 * value), name


def test_a_users_own_model_is_bound_by_name(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    opened = diskoffload.open_checkpoint(
        tmp_path / "m.safetensors", model=model, offload_dir=tmp_path / "off"
    )
    assert opened is model
    assert model(torch.ones(1, 2)).tolist() == [[2.0, 2.0, 2.0]]
    assert model[0].weight.requires_grad


def test_a_misfit_is_one_error_that_names_everything(tmp_path: Path) -> None:
    save_file(
        {"0.weight": torch.ones(3, 9), "1.bias": torch.zeros(3), "odd": torch.zeros(1)},
        tmp_path / "model.safetensors",
    )
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 3))
    with pytest.raises(diskoffload.CheckpointMismatchError) as caught:
        diskoffload.open_checkpoint(tmp_path, model=model, offload_dir=tmp_path / "off")
    text = str(caught.value)
    assert "2 missing: 0.bias, 1.weight" in text
    assert "0.weight ([3, 9] in the checkpoint, [3, 2] in the model)" in text
    assert "1 unexpected: odd" in text
    assert not (tmp_path / "off").exists()
    assert model[0].weight.is_meta


def test_hub_symlinks_and_a_folder_one_may_not_write(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    cache = tmp_path / "snapshots"
    cache.mkdir()
    for file in checkpoints["llama"].iterdir():
        (cache / file.name).symlink_to(file)
    cache.chmod(0o555)
    model = diskoffload.open_checkpoint(cache, offload_dir=tmp_path / "off")
    assert_same_values(model, load(checkpoints["llama"]))
    cache.chmod(0o755)


def _broken(folder: Path, source: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def _shard_gone(folder: Path) -> None:
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()


def _shard_cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 10)


def _index_lies(folder: Path) -> None:
    index = _index(folder)
    index["weight_map"]["made.up.weight"] = next(iter(index["weight_map"].values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_leaves_the_folder(folder: Path) -> None:
    index = _index(folder)
    index["weight_map"]["made.up.weight"] = "../../etc/passwd"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def _unknown_class(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["NobodysModel"]}')


@pytest.mark.parametrize(
    ("breakage", "error", "message"),
    [
        (_shard_gone, diskoffload.CheckpointError, "is missing"),
        (_shard_cut, diskoffload.DamagedFileError, "truncated"),
        (_index_lies, diskoffload.CheckpointError, "made.up.weight"),
        (_index_leaves_the_folder, diskoffload.CheckpointError, "not the name of a file"),
        (_no_weights, diskoffload.CheckpointError, "is not a checkpoint"),
        (_unknown_class, diskoffload.CheckpointError, "config"),
    ],
)
def test_bad_checkpoints_are_refused_before_anything_is_written(
    breakage: Any, error: type, message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = _broken(tmp_path / "broken", checkpoints["llama"])
    breakage(folder)
    with pytest.raises(error, match=message):
        diskoffload.open_checkpoint(folder, offload_dir=tmp_path / "off")
    assert not (tmp_path / "off").exists()


def test_no_such_folder_and_odd_arguments(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(diskoffload.CheckpointError, match="does not exist"):
        diskoffload.open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(diskoffload.InvalidInputError):
        diskoffload.open_checkpoint(checkpoints["llama"], max_memory="much")
    with pytest.raises(diskoffload.InvalidInputError, match="unknown compression"):
        diskoffload.open_checkpoint(
            checkpoints["llama"], compression="rar", offload_dir=tmp_path / "off"
        )


@linux_only("nobody says which file system is in memory")
def test_an_offload_dir_in_memory_is_named_in_a_warning(
    checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(f"/dev/shm/diskoffload-test-{os.getpid()}")
    if not folder.parent.is_dir():
        pytest.skip("this machine has no /dev/shm")
    model = diskoffload.open_checkpoint(checkpoints["llama"], offload_dir=folder)
    assert "that is memory, not disk" in caplog.text
    del model


def test_without_an_offload_dir_a_temporary_one_is_named_and_goes(
    checkpoints: dict[str, Path],
) -> None:
    script = f"""
import logging; logging.basicConfig(level=logging.INFO)
import diskoffload
model = diskoffload.open_checkpoint({str(checkpoints["llama"])!r})
print(model.lm_head._parameters.offload_dir)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    folder = run.stdout.strip()
    assert folder in run.stderr
    assert not Path(folder).exists()


def test_save_copies_what_did_not_change(checkpoint: Path, tmp_path: Path) -> None:
    model = diskoffload.open_checkpoint(checkpoint, offload_dir=tmp_path / "off")
    model(IDS)
    residency = model.lm_head._parameters.residency
    loads = residency.loaded_count
    diskoffload.save_checkpoint(model, tmp_path / "out", max_shard_size="300KB")
    assert residency.loaded_count == loads  # fused experts too are copied from where they lie
    before, after = _stored(checkpoint), _stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert_same_values(load(tmp_path / "out"), load(checkpoint))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("saver", ["save_checkpoint", "save_pretrained", "written first"])
@torch.no_grad()
def test_save_sees_every_kind_of_change(checkpoint: Path, saver: str, tmp_path: Path) -> None:
    model = diskoffload.open_checkpoint(checkpoint, offload_dir=tmp_path / "off")
    reference = load(checkpoint)
    for one in (model, reference):
        one.model.embed_tokens.weight.data.mul_(2)
        layer = one.model.layers[0]
        layer.self_attn.q_proj.weight = torch.nn.Parameter(
            layer.self_attn.q_proj.weight * 3, requires_grad=False
        )
        layer.input_layernorm.weight[0] = 5
        for name, parameter in layer.mlp.named_parameters():
            if "experts" in name:
                parameter[1].add_(1)
    if saver == "written first":
        del one, layer, parameter
        for _ in range(2):  # the second finds the written values settled in their new place
            model.model.embed_tokens._parameters.sync()
    if saver == "save_pretrained":
        model.save_pretrained(tmp_path / "out")
    else:
        diskoffload.save_checkpoint(model, tmp_path / "out")
    assert_same_values(load(tmp_path / "out"), reference)


@torch.no_grad()
def test_save_over_the_folder_it_came_from(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = _broken(tmp_path / "mine", checkpoints["llama"])
    (folder / "NOTES.md").write_text("keep me")
    model = diskoffload.open_checkpoint(folder, offload_dir=tmp_path / "off")
    model.lm_head.weight.zero_()
    with pytest.raises(diskoffload.OutputExistsError, match="overwrite=True"):
        diskoffload.save_checkpoint(model, folder)
    diskoffload.save_checkpoint(model, folder, overwrite=True)
    assert not load(folder).lm_head.weight.any()
    assert (folder / "NOTES.md").read_text() == "keep me"
    assert not list(tmp_path.glob(".*"))  # no sibling was left
    assert_same_values(model, load(folder))  # and the open model still reads its own files


def test_saved_files_have_the_users_permissions(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = diskoffload.open_checkpoint(checkpoints["llama"], offload_dir=tmp_path / "off")
    old = os.umask(0o027)
    try:
        diskoffload.save_checkpoint(model, tmp_path / "out")
    finally:
        os.umask(old)
    modes = {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").glob("model*")}
    assert modes == {"0o640"}


def test_opened_entries_are_ranges_of_the_users_files(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = diskoffload.open_checkpoint(checkpoints["llama"], offload_dir=tmp_path / "off")
    for held in model.lm_head._parameters.residency.entries():
        stored = getattr(held.backing, "stored", None)
        if isinstance(stored, ShardTensor):
            assert stored.shard.path.parent != tmp_path / "off"
