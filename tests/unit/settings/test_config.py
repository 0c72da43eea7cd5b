"""The configuration tree: presets, overrides, what is refused and in which words, batch arithmetic, round trips."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deberta_xl.base.command_line import build_parser
from deberta_xl.base.errors import ConfigError
from deberta_xl.base.strict import divisors, own_path
from deberta_xl.corpus.reading import expand_inputs
from deberta_xl.data.token_store_format import dataset_paths
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.finetuning import TaskSection
from deberta_xl.settings.presets import accepts_none, load_run_config, preset_names, section_types, to_toml
from deberta_xl.settings.pretraining import ModelSection, RunConfig, RunSection, TrainSection
from deberta_xl.settings.reference import as_markdown

PAPER_PRESETS = ["base", "large", "xlarge", "xxlarge"]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_comes_back_equal_from_the_toml_that_is_written_of_it(name, tmp_path):
    config = load_run_config(name)
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_run_config(tmp_path / "config.toml") == config


@settings(deadline=None)
@given(folder=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_text_comes_back_equal_from_the_toml(folder, tmp_path_factory):
    config = RunConfig(run=RunSection(folder=folder))
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_run_config(path) == config


def test_the_home_is_found_in_every_path_of_a_configuration(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text("[data]\ntrain = '~/data/train'\nvalid = '~/data/valid'")
    config = load_run_config("~/mine.toml", ["run.folder=~/runs/first", "train.init='~/start'"])
    assert config.run.folder == f"{tmp_path}/runs/first"
    assert (config.data.train, config.data.valid) == (f"{tmp_path}/data/train", f"{tmp_path}/data/valid")
    assert config.train.init == f"{tmp_path}/start"
    assert TaskSection(name="~/task.toml", data="~/files") == TaskSection(
        name=f"{tmp_path}/task.toml", data=f"{tmp_path}/files"
    )
    assert RunSection(folder="a~/b").folder == "a~/b"


def test_the_home_is_found_in_what_a_tool_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = build_parser("A tool.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--prefix", type=own_path)
    given = parser.parse_args(["--output=~/x", "--prefix=~/y"])
    assert (given.output, given.prefix) == (tmp_path / "x", f"{tmp_path}/y")
    (tmp_path / "a.txt").touch()
    assert expand_inputs(["~/*.txt"]) == [tmp_path / "a.txt"]
    assert dataset_paths("~/data/train").bin == tmp_path / "data" / "train.bin"


def test_settings_may_begin_with_a_byte_order_mark_and_are_no_utf16(tmp_path):
    text = "[train]\nsteps = 7"
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("utf-8-sig"))
    assert load_run_config(path).train.steps == 7
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ConfigError, match=r"config\.toml is UTF-.*; settings are UTF-8.*iconv -f UTF-"):
            load_run_config(path)


def test_what_no_system_can_take_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.steps"):
        load_run_config("debug", [f"train.steps={'9' * 5000}"])
    (tmp_path / "config.toml").write_text(f"[train]\nsteps = {'9' * 5000}")
    with pytest.raises(ConfigError, match=r"config\.toml is not valid TOML"):
        load_run_config(tmp_path / "config.toml")
    for name in ("x" * 300, "x" * 300 + ".toml", "x\0y"):
        with pytest.raises(ConfigError, match="no such preset or file"):
            load_run_config(name)
    with pytest.raises(ConfigError, match="a path holds no NUL"):
        RunSection(folder="a\0b")


@pytest.mark.parametrize("folder", ["tools", "benchmarks"])
def test_every_script_finds_the_package_of_its_own_checkout(folder):
    root = Path(__file__).parent.parent.parent.parent
    for script in (root / folder).glob("*.py"):
        text = script.read_text()
        if '__name__ == "__main__"' not in text:  # what scripts import, which nobody starts
            continue
        before, imports, _ = text.partition("\nfrom deberta_xl")
        assert imports
        assert "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))" in before, script
        assert "parse_" in script.read_text(), f"{script} does not read its arguments: --help would do its work"


def test_an_override_that_unsets_a_key_comes_back_unset(tmp_path):
    config = load_run_config("base", ["model.vocab_size=none", "train.init=none"])
    assert config.model.vocab_size is None
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_run_config(tmp_path / "config.toml") == config


def test_every_optional_key_is_unset_by_default():
    """What `to_toml` leaves out is None, so the default of such a key must be None, too."""
    for section in section_types().values():
        types = typing.get_type_hints(section)
        defaults = {f.name: f.default for f in dataclasses.fields(section) if accepts_none(types[f.name])}
        assert set(defaults.values()) <= {None}, section


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_a_preset_of_the_paper_trains_as_the_paper_did(name):
    config = load_run_config(name)
    assert config.model.head_size == 64
    assert config.model.attention_size == config.model.embedding_width == config.model.hidden_size
    assert config.model.intermediate_size == 4 * config.model.hidden_size
    assert config.model.relative_reach == 512
    assert config.model.relative_span == 256
    assert config.model.has_position_to_content
    assert config.model.vocab_size == 128100
    assert config.model.conv_kernel_size == (3 if "xlarge" in name else 0)
    assert config.train.global_batch_size * config.model.sequence_length == 2**20
    assert [config.train.gradient_accumulation_steps(ranks) for ranks in (1, 8, 128)] == [256, 32, 2]


@pytest.mark.parametrize("name", ["base", "v3_base"])
def test_a_preset_for_long_texts_is_the_other_with_rows_that_grow(name):
    short, long = load_run_config(name), load_run_config(f"{name}_8k")
    differing = {
        (section, field.name)
        for section in section_types()
        for field in dataclasses.fields(getattr(short, section))
        if getattr(getattr(short, section), field.name) != getattr(getattr(long, section), field.name)
    }
    model = {("model", key) for key in ("sequence_length", "max_position_embeddings", "max_relative_positions")}
    batches = {("train", key) for key in ("lengths", "global_batch_size", "micro_batch_size")}
    assert differing == {*model, *batches, ("evaluation", "max_samples")}
    assert (long.model.relative_reach, long.model.relative_span) == (512, 256)
    tokens = short.train.global_batch_size * short.model.sequence_length
    for stretch, length in zip(long.stretches, (512, 2048, 8192), strict=True):
        assert stretch.length == length
        assert long.train.global_batch_size * stretch.pieces * length == tokens
    assert [round(100 * s.last_step / long.train.steps) for s in long.stretches] == [80, 95, 100]
    assert long.train.gradient_accumulation_steps(128) == tokens // 2**20


def test_the_debug_preset_takes_its_vocabulary_from_the_data():
    model = load_run_config("debug").model
    assert model.vocab_size is None
    assert model.architecture(8100).vocab_size == 8100
    assert type(model.architecture(8100)) is DebertaConfig


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    assert ModelSection(vocab_size=8200).architecture(8100).vocab_size == 8200
    with pytest.raises(ConfigError, match=r"model\.vocab_size=8000 is smaller than the tokenizer's 8100"):
        ModelSection(vocab_size=8000).architecture(8100)


GOOD_OVERRIDES = {
    "train.steps=1_000": ("train", "steps", 1000),
    " train.steps = 1000 ": ("train", "steps", 1000),
    "--train.steps=1000": ("train", "steps", 1000),
    "optimizer.learning_rate=1e-4": ("optimizer", "learning_rate", 1e-4),
    "optimizer.learning_rate=1": ("optimizer", "learning_rate", 1.0),
    "train.deterministic=True": ("train", "deterministic", True),
    "train.deterministic=false": ("train", "deterministic", False),
    "run.folder=2024": ("run", "folder", "2024"),
    "run.folder=a=b c": ("run", "folder", "a=b c"),
    'run.folder="quoted"': ("run", "folder", "quoted"),
    "run.folder=C:\\runs": ("run", "folder", "C:\\runs"),
    "data.masking=original": ("data", "masking", "original"),
    "train.init=none": ("train", "init", None),
    "model.dropout=0": ("model", "attention_dropout", 0.0),
    "model.head_dim=64": ("model", "head_dim", 64),
    "train.profile=10:13": ("train", "profile", "10:13"),
}


@pytest.mark.parametrize("override", GOOD_OVERRIDES)
def test_an_override_sets_its_key(override):
    section, key, value = GOOD_OVERRIDES[override]
    found = getattr(getattr(load_run_config("debug", [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_of_several_overrides_holds_and_dropout_sets_both_kinds():
    model = load_run_config("debug", ["model.dropout=0.3", "model.hidden_dropout=0.2"]).model
    assert (model.hidden_dropout, model.attention_dropout) == (0.2, 0.3)
    model = load_run_config("debug", ["model.hidden_dropout=0.2", "model.dropout=0.3"]).model
    assert (model.hidden_dropout, model.attention_dropout) == (0.3, 0.3)


BAD_OVERRIDES = {
    # Form and names.
    "train.steps": ["not of the form section.key=value", "train.steps=1000"],
    "steps=5": ["'steps=5' is not of the form"],
    "model={}": ["'model={}' is not of the form"],
    "trian.steps=5": ["unknown section 'trian'", "mean 'train'?"],
    "a.b.c=5": ["unknown section 'a'", "known: run, model"],
    "train.stesp=5": ["unknown key train.stesp", "mean 'steps'?"],
    "train.learning_rate=1": ["train.learning_rate", "learning_rate belongs to generator, optimizer"],
    "optimizer.steps=5": ["optimizer.steps", "steps belongs to train"],
    "train.sub.steps=5": ["unknown key train.sub.steps", "mean 'steps'?"],
    # Types.
    "train.steps=": ["train.steps=''", "integer"],
    "train.steps=5.0": ["train.steps=5.0", "integer"],
    "train.steps=1e3": ["train.steps=1000.0", "integer"],
    "train.steps='300'": ["train.steps='300'", "integer"],
    "train.steps=true": ["train.steps=True", "integer"],
    "train.steps=[1, 2]": ["train.steps=[1, 2]", "integer"],
    "train.steps=300\nseed = 3": ["train.steps=", "integer"],
    "train.steps=none": ["train.steps='none'", "integer"],
    "train.deterministic=yes": ["train.deterministic='yes'", "boolean"],
    "train.deterministic=1": ["train.deterministic=1", "boolean"],
    "train.max_grad_norm=none": ["train.max_grad_norm='none'", "number"],
    "optimizer.learning_rate=fast": ["optimizer.learning_rate='fast'", "number"],
    "optimizer.learning_rate=nan": ["optimizer.learning_rate=nan", "finite"],
    "optimizer.learning_rate=inf": ["optimizer.learning_rate=inf", "finite"],
    "run.folder=": ["run.folder=''", "at least 1 character"],
    "data.train=": ["data.train=''", "at least 1 character"],
    "data.masking=Original": ["data.masking='Original'", "'unbiased' or 'original'"],
    "schedule.decay=exponential": ["schedule.decay='exponential'", "'linear', 'cosine' or 'constant'"],
    "model.hidden_act=swish": ["model.hidden_act='swish'", "'tanh' or 'silu'"],
    "model.pos_att_type=p2p": ["model.pos_att_type='p2p'", "'c2p|p2c' or 'none'"],
    # Ranges.
    "train.steps=0": ["train.steps=0", "at least 1"],
    "train.seed=-1": ["train.seed=-1", "at least 0"],
    "train.global_batch_size=0": ["train.global_batch_size=0", "at least 1"],
    "train.profile=10": ["train.profile='10'", "START:STOP"],
    "train.profile=13:10": ["profile='13:10'", "START < STOP"],
    "optimizer.learning_rate=-1": ["optimizer.learning_rate=-1.0", "at least 0"],
    "optimizer.learning_rate=1e39": ["optimizer.learning_rate=1e+39", "at most 1e+30"],
    "optimizer.weight_decay=1e308": ["optimizer.weight_decay=1e+308", "at most 1e+30"],
    "optimizer.epsilon=1e-50": ["optimizer.epsilon=1e-50", "1e-30 … 1e+30"],
    "model.num_layers=1000000000": ["model.num_layers=1000000000", "at most 10000"],
    "optimizer.epsilon=0": ["optimizer.epsilon=0.0", "greater than 0"],
    "optimizer.beta1=1": ["optimizer.beta1=1.0", "0 <= beta1 < 1"],
    "schedule.final_ratio=2": ["schedule.final_ratio=2.0", "between 0 and 1"],
    "schedule.warmup_steps=-1": ["schedule.warmup_steps=-1", "at least 0"],
    "checkpoint.interval=0": ["checkpoint.interval=0", "at least 1"],
    "checkpoint.keep=-1": ["checkpoint.keep=-1", "at least 0"],
    "evaluation.max_samples=-1": ["evaluation.max_samples=-1", "at least 0"],
    "data.mask_probability=0": ["data.mask_probability=0", "0.15"],
    "data.mask_probability=1": ["data.mask_probability=1.0", "below 1"],
    "data.max_ngram=0": ["data.max_ngram=0", "at least 1"],
    "model.dropout=1": ["model.hidden_dropout=1.0", "below 1"],
    "model.vocab_size=0": ["model.vocab_size=0", "at least 1"],
    "model.layer_norm_eps=0": ["model.layer_norm_eps=0.0", "greater than 0"],
    # Contradictions.
    "data.replace_with_mask=0.95": ["replace_with_mask=0.95 and replace_with_random=0.1", "at most 1"],
    "schedule.warmup_steps=1000": ["warmup_steps=1000 is longer than train.steps=300", "to 300 or less"],
    "model.num_heads=5": ["num_heads=5 does not divide hidden_size=128", "[1, 2, 4, 8", "head_dim"],
    "model.embedding_size=64": ["embedding_size=64 differs from hidden_size=128", "unset"],
    "model.conv_kernel_size=4": ["conv_kernel_size=4", "odd"],
    "model.conv_groups=7": ["conv_groups=7 does not divide hidden_size=128"],
    "model.num_layers=1": ["num_layers=1", "layer before the last"],
    "model.decoder_passes=-1": ["model.decoder_passes=-1", "at least 0"],
    "model.decoder_passes=two": ["model.decoder_passes='two'", "integer"],
    "model.decoder_weights=copied": ["model.decoder_weights='copied'", "'shared' or 'own'"],
    "parallel.sequence_parallel=true": ["sequence_parallel=true needs tensor_parallel_size of 2 or more"],
    "model.sequence_length=1024": ["sequence_length=1024", "max_position_embeddings=512"],
    "model.sequence_length=4": ["sequence_length=4", "8 … max_position_embeddings=512"],
    "model.position_buckets=2000": ["position_buckets=2000", "2 … 1023"],
    # Rows that grow longer, up to the preset's 128 tokens.
    "train.lengths=64": ["lengths='64' is not LENGTH:SHARE", "for example 512:0.8"],
    "train.lengths=64:half": ["lengths='64:half' is not LENGTH:SHARE"],
    "train.lengths=64:0.2,32:0.2": ["rows become longer from one length to the next"],
    "train.lengths=4:0.2": ["the least is 8"],
    "train.lengths=64:0": ["each be above 0"],
    "train.lengths=64:nan": ["each be above 0"],
    "train.lengths=32:0.5,64:0.5": ["1 in all", "together below 1", "model.sequence_length"],
    "train.lengths=48:0.5": ["rows of 48 tokens", "model.sequence_length=128", "possible: 8, 16, 32, 64"],
    "train.lengths=128:0.5": ["rows of 128 tokens", "possible: 8, 16, 32, 64"],
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_is_refused_in_words_that_help(override):
    with pytest.raises(ConfigError) as caught:
        load_run_config("debug", [override])
    message = str(caught.value)
    assert [word for word in BAD_OVERRIDES[override] if word not in message] == [], message
    assert "override" in message


def test_a_sequence_that_does_not_divide_over_its_ranks_is_refused_with_lengths_and_sizes_that_do():
    overrides = ["parallel.sequence_parallel=true", "parallel.tensor_parallel_size=4"]
    assert load_run_config("debug", [*overrides, "model.sequence_length=100"]).parallel.sequence_parallel
    with pytest.raises(ConfigError) as caught:
        load_run_config("debug", [*overrides, "model.sequence_length=126"])
    message = str(caught.value)
    assert "model.sequence_length=126 does not divide over parallel.tensor_parallel_size=4 ranks" in message
    assert "possible: model.sequence_length=124 or 128, parallel.tensor_parallel_size one of [2], or" in message
    with pytest.raises(ConfigError, match=r"possible: model\.sequence_length=16, parallel\.sequence_parallel=false"):
        load_run_config("debug", [overrides[0], "parallel.tensor_parallel_size=16", "model.sequence_length=9"])
    with pytest.raises(ConfigError, match=r"over parallel\.tensor_parallel_size=4 ranks; possible: 20 \("):
        load_run_config("debug", [*overrides, "model.sequence_length=100", "train.lengths=50:0.5"])


BAD_FILES = {
    "[trian]\nsteps = 3": ["unknown section 'trian'", "mean 'train'?"],
    "[train]\nstep = 3": ["unknown key train.step", "mean 'steps'?"],
    "[train.sub]\nsteps = 3": ["unknown key train.sub"],
    "steps = 3": ["unknown section 'steps'"],
    "train = 5": ["'train'", "section of keys"],
    "[[train]]\nsteps = 3": ["'train'", "section of keys"],
    "[train\nsteps = 3": ["not valid TOML", "line 1"],
    "[train]\nsteps = 3\nsteps = 4": ["not valid TOML", "overwrite"],
    "[train]\nsteps = three": ["not valid TOML", "line 2"],
    "[train]\nsteps = '3'": ["train.steps='3'", "integer"],
    "[data]\ntrain = 5": ["data.train=5", "string"],
    "[model]\nsequence_length = 1000": ["sequence_length=1000"],
    "[model]\ndropout = 0.2\nhidden_dropout = 0.1": ["both model.dropout and model.hidden_dropout"],
    "[run]\nfolder = '\udcff'": ["not valid TOML", "utf-8"],
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_preset_is_refused_in_words_that_help(text, tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    message = str(caught.value)
    assert [word for word in [str(path), *BAD_FILES[text]] if word not in message] == [], message


@pytest.mark.parametrize("name", ["debgu", "bsae", "no/such/file.toml", ""])
def test_an_unknown_preset_is_answered_with_the_nearest_or_all(name):
    with pytest.raises(
        ConfigError, match=f"--config {name}: no such preset or file; (did you mean|known: base, base_8k)"
    ):
        load_run_config(name)


def test_a_batch_that_does_not_divide_is_answered_with_the_sum_and_the_nearest():
    train = TrainSection(global_batch_size=100, micro_batch_size=8)
    with pytest.raises(ConfigError) as caught:
        train.gradient_accumulation_steps(3)
    message = str(caught.value)
    assert "train.global_batch_size=100 is not a multiple" in message
    assert "8 x 3 = 24; nearest: train.global_batch_size=96 or 120" in message


@settings(deadline=None)
@given(accumulation=st.integers(1, 50), micro=st.integers(1, 50), ranks=st.integers(1, 50), rest=st.integers(0, 2499))
def test_the_nearest_batches_are_valid_and_enclose_the_one_asked_for(accumulation, micro, ranks, rest):
    batch = accumulation * micro * ranks + rest % (micro * ranks)
    train = TrainSection(global_batch_size=batch, micro_batch_size=micro)
    if rest % (micro * ranks) == 0:
        assert train.gradient_accumulation_steps(ranks) == accumulation
        return
    with pytest.raises(ConfigError) as caught:
        train.gradient_accumulation_steps(ranks)
    below, above = (int(text) for text in str(caught.value).rpartition("=")[2].split(" or "))
    assert below < batch < above
    assert (below, above) == (accumulation * micro * ranks, (accumulation + 1) * micro * ranks)


def test_a_batch_smaller_than_one_pass_has_only_one_nearest():
    with pytest.raises(ConfigError, match=r"nearest: train\.global_batch_size=16$"):
        TrainSection(global_batch_size=8, micro_batch_size=8).gradient_accumulation_steps(2)


@settings(deadline=None)
@given(st.integers(1, 5000))
def test_divisors_are_those_that_leave_no_remainder(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_the_tree_is_immutable():
    config = load_run_config("debug")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 5


def test_every_key_has_a_sentence_under_it():
    import ast
    import inspect

    for section in {*section_types().values(), DebertaConfig}:
        (definition,) = ast.parse(inspect.getsource(section)).body
        for statement, following in zip(definition.body, [*definition.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert is_text, f"{section.__name__}.{ast.unparse(statement.target)}"


def test_torch_is_not_imported_for_the_configuration():
    program = (
        "import sys, deberta_xl.settings.presets; print(*sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_page_of_settings_is_what_the_configuration_says():
    page = (Path(__file__).parent.parent.parent.parent / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "write it anew: python tools/settings.py --output docs/settings.md"
