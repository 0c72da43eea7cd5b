"""What a released configuration says is computed, or refused by name: compared with transformers on small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from deberta_xl.base.errors import ConfigError
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.model.task_model import TaskModel
from deberta_xl.public.finetuned import DebertaForTask
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.weights.foreign_config import from_foreign_config, to_huggingface_config, to_microsoft_config
from deberta_xl.weights.foreign_heads import Pooling
from deberta_xl.weights.initial_encoder import peek_pooling
from deberta_xl.weights.names import to_microsoft

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 48, "relative_attention": True, "pos_att_type": "c2p|p2c", "initializer_range": 0.4,
}  # fmt: skip
V2 = {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": True}
IDS = torch.randint(3, 40, (2, 20), generator=torch.Generator().manual_seed(0))


def save(folder: Path, name: str, **fields: object) -> transformers.PreTrainedModel:
    """A random model of transformers' class `name`, in evaluation mode."""
    family = "Deberta" if name.startswith("DebertaFor") else "DebertaV2"
    config = getattr(transformers, f"{family}Config")(**SIZES | (V2 if family == "DebertaV2" else {}) | fields)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():  # zeros would hide a bias, and a projection that is left out
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        *({"hidden_act": name} for name in ("gelu_new", "gelu_fast", "swish")),
        *(pytest.param({"hidden_act": name}, marks=pytest.mark.full) for name in ("gelu_pytorch_tanh", "relu", "tanh")),
        {"conv_kernel_size": 3, "conv_act": "gelu_new"},
        {"conv_kernel_size": 3},
        {"layer_norm_eps": 0.3},
        {"position_biased_input": False},
        {"norm_rel_ebd": "none"},
        {"norm_rel_ebd": " Layer_Norm | none"},
        {"max_relative_positions": 0},
        {"max_relative_positions": 24},
        {"position_buckets": -1},
        {"pos_att_type": " C2P | p2c "},
        {"pos_att_type": ["p2c", "c2p"], "share_att_key": False},
        {"type_vocab_size": 3},
        {"attention_head_size": 8},
        {"embedding_size": 8},
        {"legacy": False},
        {"output_hidden_states": True, "is_decoder": True, "license": "mit", "dataset_size": 10, "train_batch_size": 3},
    ],
    ids=str,
)
def test_a_stated_setting_is_computed_as_transformers_computes_it(tmp_path, fields):
    theirs = save(tmp_path, "DebertaV2ForMaskedLM" if "embedding_size" not in fields else "DebertaV2Model", **fields)
    convert(tmp_path, tmp_path / "native", Conversion(to="native"))
    ours = DebertaForMaskedLM.from_pretrained(tmp_path / "native")
    with torch.no_grad():
        expected, found = theirs(IDS, output_hidden_states=True), ours(IDS, output_hidden_states=True)
    # float32 sums in another order.
    torch.testing.assert_close(found.hidden_states[-1], expected.hidden_states[-1], rtol=0, atol=2e-5)
    if ours.config.position_biased_input and "embedding_size" not in fields:  # no enhanced mask decoder there
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [24, 25, 48])
def test_a_model_of_transformers_keeps_its_rule_beyond_the_reach(tmp_path, length):
    theirs = save(tmp_path / "theirs", "DebertaV2ForTokenClassification", max_relative_positions=24)
    ours = DebertaForTask.from_pretrained(tmp_path / "theirs")
    ids = torch.arange(length).unsqueeze(0) % 37 + 3
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=5e-5)


def test_the_rule_beyond_the_reach_survives_every_way(tmp_path, caplog):
    save(tmp_path / "theirs", "DebertaV2ForMaskedLM", max_relative_positions=24)
    convert(tmp_path / "theirs", tmp_path / "native", Conversion(to="native"))
    assert "values" not in caplog.text
    convert(tmp_path / "native", tmp_path / "original", Conversion(to="microsoft"))
    assert "more than max_relative_positions=24 tokens, from 25 on" in caplog.text
    caplog.clear()
    convert(tmp_path / "original", tmp_path / "back", Conversion(to="huggingface"))
    assert "values" not in caplog.text
    assert DebertaForMaskedLM.from_pretrained(tmp_path / "back").config.bucket_rule == "transformers"


def test_only_what_transformers_saved_follows_its_rule():
    released = SIZES | V2 | {"model_type": "deberta-v2"}
    assert from_foreign_config(released).bucket_rule == "original"
    assert from_foreign_config(released | {"transformers_version": "4.40.0"}).bucket_rule == "transformers"
    assert (
        from_foreign_config(released | {"transformers_version": "4.4", "position_buckets": -1}).bucket_rule
        == "original"
    )
    config = from_foreign_config(released)
    assert from_foreign_config(to_huggingface_config(config)).bucket_rule == "original"


@pytest.mark.parametrize(("buckets", "reach", "level"), [(0, 16, None), (8, 16, "WARNING"), (8, 32, "INFO")])
def test_an_export_says_from_which_length_on_it_differs_only_where_it_does(tmp_path, caplog, buckets, reach, level):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    config = DebertaConfig(**sizes, max_position_embeddings=32, max_relative_positions=reach, position_buckets=buckets)
    DebertaForMaskedLM(config, seed=1).save_pretrained(tmp_path / "ours")
    caplog.set_level("INFO")
    caplog.clear()
    convert(tmp_path / "ours", tmp_path / "theirs", Conversion(to="huggingface", with_card=True))
    said = [record.levelname for record in caplog.records if f"from {reach + 1} on" in record.getMessage()]
    assert said == ([level] if level else [])
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert (f"sequences of more than {reach} tokens" in card) == bool(level)


ACTIVATIONS = ("gelu", "tanh", "relu", "gelu_new", "silu")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *(("DebertaV2ForSequenceClassification", {"pooler_hidden_act": act}) for act in ACTIVATIONS),
        ("DebertaV2ForSequenceClassification", {"problem_type": "multi_label_classification", "num_labels": 4}),
        ("DebertaV2ForSequenceClassification", {"problem_type": "regression", "num_labels": 1}),
        ("DebertaV2ForSequenceClassification", {"pooler_dropout": 0.3, "cls_dropout": 0.2}),
        ("DebertaV2ForMultipleChoice", {"pooler_hidden_act": "tanh"}),
        ("DebertaV2ForTokenClassification", {"num_labels": 5, "pooler_hidden_act": "mish"}),
        ("DebertaV2ForQuestionAnswering", {}),
        ("DebertaForSequenceClassification", {"pooler_hidden_act": "tanh"}),
        ("DebertaForTokenClassification", {}),
        ("DebertaForQuestionAnswering", {}),
    ],
)
def test_a_head_of_transformers_gives_its_logits(tmp_path, name, fields):
    theirs, is_choice = save(tmp_path, name, **fields), name.endswith("Choice")
    ours = DebertaForTask.from_pretrained(tmp_path)
    with torch.no_grad():
        output = theirs(IDS.unsqueeze(0) if is_choice else IDS)
        found = ours(IDS, num_options=2)
    expected = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)
    torch.testing.assert_close(found, expected.view(found.shape), rtol=0, atol=2e-5)
    assert ours.head.dropout == fields.get("cls_dropout", 0.0 if "Question" in name else 0.1)
    assert ours.head.pooler_dropout == fields.get("pooler_dropout", 0.0)


def test_the_activation_behind_cls_goes_along_into_fine_tuning_and_out_again(tmp_path):
    save(tmp_path / "theirs", "DebertaV2ForSequenceClassification", pooler_hidden_act="tanh", pooler_dropout=0.2)
    model = DebertaForTask.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "theirs", tmp_path / "native", Conversion(to="native"))
    for name in ("theirs", "ours", "native"):
        assert peek_pooling(tmp_path / name, model.config) == Pooling("tanh", 0.2), name


def original_folder(folder: Path, *, num_labels: int, section: dict[str, object] | None) -> TaskModel:
    """A classifier as the original saves it."""
    config = from_foreign_config(SIZES | V2 | {"hidden_act": "relu"})
    model = TaskModel(
        config, HeadConfig(kind="classification", num_labels=num_labels, pooler_act="tanh"), seed=1
    ).eval()
    folder.mkdir()
    torch.save({to_microsoft(n): p.detach() for n, p in model.named_parameters()}, folder / "pytorch_model.bin")
    fields = to_microsoft_config(config) | ({} if section is None else {"pooling": section})
    (folder / "model_config.json").write_text(json.dumps(fields))
    return model


def test_the_originals_classifier_is_computed_with_its_pooling(tmp_path):
    model = original_folder(tmp_path / "tanh", num_labels=3, section={"hidden_act": "tanh", "dropout": 0.1})
    ours = DebertaForTask.from_pretrained(tmp_path / "tanh")
    assert ours.head.pooler_dropout == 0.1
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS), rtol=0, atol=0)
    original_folder(tmp_path / "unsaid", num_labels=3, section=None)
    # Without a section, the original's pooler takes the encoder's activation.
    assert DebertaForTask.from_pretrained(tmp_path / "unsaid").head.pooler_act == "relu"
    original_folder(tmp_path / "one", num_labels=1, section=None)
    with pytest.raises(CheckpointError, match="a regression or a choice"):
        DebertaForTask.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("Sequence", {"pooler_hidden_act": "quick_gelu"}, "pooler_hidden_act='quick_gelu'"),
        ("Sequence", {"pooling": {"hidden_act": "tanh"}}, "which one was it trained with"),
        ("Sequence", {"pooling": {"hidden_act": "gelu", "type": "mean"}}, "pooling.type='mean'"),
        ("Sequence", {"problem_type": "ordinal"}, "problem_type='ordinal'"),
        ("Sequence", {"problem_type": "regression", "num_labels": 3}, "regression"),
        ("Sequence", {"id2label": {"0": "no", "1": "yes", "2": "maybe"}}, "id2label names the classes 0, 1, 2"),
        ("Token", {"id2label": {"0": "O", "2": "B-X"}}, "id2label"),
    ],
)
def test_a_head_that_we_do_not_compute_is_refused_by_name(tmp_path, name, fields, words):
    save(tmp_path, f"DebertaV2For{name}Classification", num_labels=fields.get("num_labels", 2))
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | fields))
    with pytest.raises(CheckpointError, match=words):
        DebertaForTask.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "quick_gelu"},
        {"hidden_act": "gelu_10"},
        {"conv_act": "mish", "conv_kernel_size": 3},
        {"talking_head": True},
        {"pad_token_id": 1},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"tie_word_embeddings": False, "architectures": ["DebertaV2ForMaskedLM"], "model_type": "deberta-v2"},
        {"norm_rel_ebd": "rms_norm"},
        {"pos_att_type": "c2p|p2c|p2p"},
        {"pos_att_type": ["c2p", "c2p", "p2c"]},
        {"position_embedding_type": "rotary"},
        {"rope_theta": 10000.0},
        {"attention_window": 64},
        {"num_key_value_heads": 1, "num_kv_heads": 1},
        {"attentionScale": 2},
        {"lora_rank": 8},
        {"relative_attention": "false"},
        {"pruned_heads": {"0": [1]}},
        {"ffn_bias": True},
        {"model_type": "deberta", "conv_kernel_size": 3},
        {"model_type": "deberta", "norm_rel_ebd": "layer_norm"},
        {"bucket_rule": "linear"},
    ],
    ids=str,
)
def test_a_field_that_says_what_we_do_not_compute_is_refused_by_name(fields):
    with pytest.raises((ConfigError, ValueError), match=next(iter(fields))):
        from_foreign_config(SIZES | V2 | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"talking_head": False, "attention_window": -1, "rope_scaling": None, "adapters": {}, "pruned_heads": {}},
        {"num_labels": 3, "id2label": {"0": "a"}, "problem_type": "regression", "summary_activation": "tanh"},
        {"conv_act": "mish", "conv_kernel_size": 0},
        {"author": "me", "trained_on": ["news"], "learning_rate": 1e-4, "layer_decay": 0.9, "max_length": 20},
        {"pooler_hidden_act": "quick_gelu", "classifiers_size": [3, 2], "task_specific_params": {"a": 1}},
        {"pad_token_id": 0, "padding_idx": 0, "position_embedding_type": "absolute", "z_steps": 2, "use_cache": True},
        {"sep_token_id": 2, "tokenizer_class": "DebertaV2Tokenizer", "doc_stride": 64, "api_key_name": "x"},
        {"tie_word_embeddings": False, "architectures": ["DebertaV2ForSequenceClassification"]},
        {"bos_token_id": 1, "model_max_length": 512, "wandb_run_hidden": "abc", "_attn_implementation": "eager"},
    ],
    ids=str,
)
def test_a_field_that_changes_no_output_is_no_reason_to_refuse(fields):
    assert from_foreign_config(SIZES | V2 | fields) == from_foreign_config(SIZES | V2)


@pytest.mark.parametrize(("stated", "length"), [(24, 24), (100, 100), (10**30, 48), (None, 48)])
def test_a_head_reads_texts_as_long_as_its_tokenizer_says(tmp_path, stated, length):
    save(tmp_path, "DebertaV2ForSequenceClassification", position_biased_input=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": stated}))
    assert DebertaForTask.from_pretrained(tmp_path).facts.sequence_length == length


def test_what_transformers_assumes_for_absent_sizes_is_assumed():
    fields = {"relative_attention": True, "pos_att_type": "c2p|p2c", "model_type": "deberta-v2"}
    config = from_foreign_config(fields)
    theirs = transformers.DebertaV2Config()
    assert (config.num_heads, config.hidden_size, config.num_layers) == (24, 1536, theirs.num_hidden_layers)


def test_what_the_original_cannot_run_is_refused_or_written_in_the_form_that_it_reads(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    v1 = {"position_buckets": 0, "share_att_key": False, "normalize_relative_table": False, "pos_att_type": "c2p"}
    configs = {"wide": {"head_dim": 12}, "new_gelu": {"hidden_act": "gelu_tanh"}, "c2p": v1}
    for name, options in configs.items():
        model = DebertaForMaskedLM(
            DebertaConfig(**sizes, **{"max_position_embeddings": 16, "position_buckets": 4} | options)
        )
        model.save_pretrained(tmp_path / name)
    with pytest.raises(CheckpointError, match="2 heads of 12 make 24, not hidden_size=16: the original has a square"):
        convert(tmp_path / "wide", tmp_path / "out", Conversion(to="microsoft"))
    with pytest.raises(CheckpointError, match="gelu_tanh, which the original does not have"):
        convert(tmp_path / "new_gelu", tmp_path / "out", Conversion(to="microsoft"))
    convert(tmp_path / "c2p", tmp_path / "out", Conversion(to="microsoft"))
    names = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert "deberta.encoder.layer.0.attention.self.key_proj.bias" in names
    assert not any("in_proj" in name for name in names)


def test_a_classifier_of_ours_takes_its_activation_to_transformers(small_dataset, tmp_path):
    save(tmp_path / "theirs", "DebertaV2ForSequenceClassification", pooler_hidden_act="tanh", vocab_size=600)
    from deberta_xl.conversion.task_export import export_task

    model = DebertaForTask.from_pretrained(tmp_path / "theirs")
    small_dataset.tokenizer.save(tmp_path / "tokenizer")
    model.facts = model.facts._replace(sequence_length=32)
    model.save_pretrained(tmp_path / "ours", tokenizer=tmp_path / "tokenizer")
    export_task(tmp_path / "ours", tmp_path / "exported")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(IDS).logits, model(IDS), rtol=0, atol=2e-5)
    # What it was trained on, not what its tables would take.
    assert json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())["model_max_length"] == 32
