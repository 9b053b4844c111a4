"""Language models of Hugging Face as tasks: data, scores, checkpoints, and what is refused."""

import json
import math
import random

import pytest
import torch

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.tasks import texts, vocabulary
from prunefront.runners.tasks.hf_causal_lm import hf_causal_lm
from prunefront.runners.tasks.hf_text_classification import hf_text_classification
from prunefront.spaces.errors import ConfigError

transformers = pytest.importorskip("transformers")

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
BERT = LLAMA | {"model_type": "bert"}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "red", "house", "by", "sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of two domains, and tables of sentences with or without a number."""
    folder, drawn = tmp_path_factory.mktemp("texts"), random.Random(0)
    for name, words in {"web": WORDS, "books": WORDS[:6], "test": WORDS}.items():
        lines = [" ".join(drawn.choices(words, k=12)) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    rows = [(" ".join(drawn.choices(WORDS, k=1 + i % 9)) + (" 7 7 7" if i % 3 else ""), i % 3 > 0) for i in range(240)]
    (folder / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": t, "label": "some" if n else "none"}) for t, n in rows)
    )
    for suffix, mark in ((".csv", ","), (".tsv", "\t")):
        table = [f"said{mark}kind", *(f'"{t}"{mark}{"some" if n else "none"}' for t, n in rows[:90])]
        (folder / f"test{suffix}").write_text("\n".join(table))
    return folder


def language(folder, **options):
    return hf_causal_lm(**{"config": LLAMA, "train": str(folder / "web.txt"), "sequence_length": 16, **options})


def test_scores_are_those_of_transformers(folder):
    task = language(folder, test=str(folder / "test.txt"), score="log_likelihood")
    model = task.make_model()
    tokens = torch.tensor(list((folder / "test.txt").read_bytes()))
    sequences = tokens[: len(tokens) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        output = model(input_ids=sequences, labels=sequences)
    expected = output.loss.item()
    right = (output.logits[:, :-1].argmax(-1) == sequences[:, 1:]).float().mean().item()
    assert task.test(model) == pytest.approx(-expected, rel=1e-5)
    for score, value in (("perplexity", -math.exp(expected)), ("accuracy", right)):
        assert language(folder, test=str(folder / "test.txt"), score=score).test(model) == pytest.approx(
            value, rel=1e-4
        )
    batch = {"input_ids": sequences, "use_cache": False}
    assert task.loss(model(**batch), batch).item() == pytest.approx(expected, rel=1e-5)


def test_splits_share_no_sequence_and_epochs_have_each_once(folder):
    files = {name: str(folder / f"{name}.txt") for name in ("web", "books")}
    task = language(folder, train=files, held_out=0.25, calibration_sequences=8)
    whole = {
        name: texts.packed(
            (folder / f"{name}.txt").read_text(), vocabulary.make_vocabulary("bytes", None, 0, []), 16, name
        )
        for name in files
    }
    training = [batch["input_ids"] for batch in task.training(1)]
    searched = [batch["input_ids"] for batch in task.score.batches]
    kept = [rows[: len(rows) - round(len(rows) / 4)] for rows in whole.values()]
    expected = [row for rows in kept for row in rows.tolist()]
    assert sorted(torch.cat(training).tolist()) == sorted(expected)
    assert len(torch.cat(training)) + len(torch.cat(searched)) == sum(map(len, whole.values()))
    assert not torch.equal(training[0], next(iter(task.training(2)))["input_ids"])
    assert sum(len(batch["input_ids"]) for batch in task.calibration) == 8


def test_a_new_model_is_trained_on_the_spot_and_reproducibly(folder):
    options = {"epochs": 2, "lr": 1e-2, "tokenizer": "bpe", "vocab_size": 280, "test": str(folder / "test.txt")}
    first, second = (language(folder, **options) for _ in range(2))
    model, plain = first.make_model(), language(folder, **options | {"epochs": 0}).make_model()
    assert first.test(model) > 0.5 * first.test(plain) and model.config.vocab_size == 280
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.make_model().parameters(), strict=True))


def test_bpe_tokens_decode_to_the_text(folder):
    text = (folder / "web.txt").read_text() + "\n \u00fcber <unk> 7 @.@ 5\n"
    learnt = vocabulary.make_vocabulary("bpe", None, 300, [text])
    tokens = [token for part in learnt.tokens(text) for token in part]
    assert (
        learnt.tokenizer.decode(tokens) == text
        and len(tokens) < len(text.encode())
        and max(tokens) < learnt.size == 300
    )


def test_a_checkpoint_brings_its_model_and_tokenizer(folder, tmp_path):
    task = language(folder, tokenizer="bpe", vocab_size=270)
    model = task.make_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no tokenizer .* bytes, bpe"):
        hf_causal_lm(str(tmp_path), train=str(folder / "web.txt"), sequence_length=16)
    vocabulary.make_vocabulary("bpe", None, 270, [(folder / "web.txt").read_text()]).tokenizer.save_pretrained(tmp_path)
    loaded = hf_causal_lm(str(tmp_path), train=str(folder / "web.txt"), sequence_length=16)
    assert torch.equal(loaded.example_inputs["input_ids"], task.example_inputs["input_ids"])
    with torch.no_grad():
        assert torch.equal(loaded.make_model()(**task.example_inputs).logits, model(**task.example_inputs).logits)


def test_pickles_and_foreign_checkpoints_are_refused(folder, tmp_path):
    task = language(folder)
    model = task.make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    options = {"config": None, "model": str(tmp_path), "tokenizer": "bytes"}
    with pytest.raises(ConfigError, match="safetensors"):
        language(folder, **options).make_model()
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, "model_type": "mine"}
    (tmp_path / "config.json").write_text(json.dumps(config | code))
    (tmp_path / "code.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ConfigError, match=r"cannot|no checkpoint"):
        language(folder, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"train": None}, "names no text"),
        ({"train": "missing.txt"}, "no file missing.txt"),
        ({"sequence_length": 100_000, "config": LLAMA}, r"tokens, and one sequence needs 100000"),
        ({"config": LLAMA | {"vocab_size": 100}}, "256 tokens and the model's vocabulary 100"),
        ({"config": LLAMA | {"max_position_embeddings": 8}}, "longer than the model's 8 positions"),
        ({"config": LLAMA | {"width": 3}}, "no width"),
        ({"config": {"model_type": "nothing"}}, "unknown to transformers"),
        ({"config": None}, "either task.model"),
        ({"model": "somewhere"}, "either task.model"),
        ({"model": "./nowhere", "config": None, "tokenizer": "bytes"}, "no checkpoint"),
        ({"score": "bleu"}, "perplexity, log_likelihood, accuracy"),
        ({"held_out": 1e-9}, "cannot be held out"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "at least 258"),
        ({"autocast": "int8"}, "bfloat16, float16"),
        ({"train": {"dataset": "x", "name": "y"}}, "a data set has column, config, dataset, split"),
        ({"batch_size": 0}, "task.batch_size must be at least 1"),
    ],
)
def test_bad_language_tasks(folder, options, told):
    with pytest.raises(ConfigError, match=told):
        language(folder, **options)


def test_one_text_for_two_splits_is_refused(folder):
    with pytest.raises(ConfigError, match=r"task.train and task.test both read .*web.txt"):
        language(folder, test=str(folder / "*.txt"))


def test_a_missing_library_of_data_sets_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"prunefront\[datasets\]"):
        language(folder, train={"dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"})


def test_a_data_set_is_read_like_a_file(folder):
    pytest.importorskip("datasets")
    (folder / "set").mkdir()
    (folder / "set" / "train.txt").write_text((folder / "web.txt").read_text())
    task = language(folder, train={"dataset": str(folder / "set"), "column": "text"})
    assert torch.equal(task.example_inputs["input_ids"], language(folder).example_inputs["input_ids"])


def classification(folder, **options):
    defaults = {"config": BERT, "train": str(folder / "rows.jsonl"), "tokenizer": "bytes", "sequence_length": 32}
    return hf_text_classification(**{**defaults, **options})


def test_padding_changes_no_answer_and_accuracy_counts_them(folder):
    task = classification(folder, epochs=8, lr=1e-2, held_out=0.25)
    model = task.make_model()
    right = total = 0
    for batch in task.score.batches:
        for row in range(len(batch["labels"])):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            assert ids[0] == 257 and 0 not in ids  # starts with the special token, and has no padding
            with torch.no_grad():
                answer = model(input_ids=ids[None]).logits.argmax(-1).item()
            right, total = right + (answer == batch["labels"][row].item()), total + 1
    assert total == 60 and task.score(model) == pytest.approx(right / total) and right / total > 0.75
    assert model.config.label2id == {"none": 0, "some": 1}


@pytest.fixture(scope="module")
def sentiments(tmp_path_factory):
    """A checkpoint whose classes are not in the order of their names."""
    folder = tmp_path_factory.mktemp("sentiments")
    names = dict(enumerate(["POSITIVE", "NEUTRAL", "NEGATIVE"]))
    sizes = {key: value for key, value in BERT.items() if key != "model_type"}
    config = transformers.BertConfig(
        **sizes, vocab_size=258, max_position_embeddings=8, id2label=names, label2id={n: i for i, n in names.items()}
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def table(path, labels, texts=("red", "blue", "green"), encoding="utf-8"):
    """Ten rows a label."""
    rows = [f"{text},{label}" for text, label in zip(texts, labels, strict=False)]
    path.write_text("\n".join(["text,label", *rows * 10]), encoding=encoding)
    return str(path)


@pytest.mark.parametrize(
    ("labels", "classes"), [(("positive", "neutral", "Negative"), [0, 1, 2]), (("negative", "positive"), [2, 0]),
                            (("2", "0", "1"), [2, 0, 1])],
)  # fmt: skip
def test_classes_of_a_trained_checkpoint_keep_their_names(sentiments, tmp_path, labels, classes):
    task = classification(
        tmp_path, config=None, model=str(sentiments), train=table(tmp_path / "a.csv", labels), sequence_length=8
    )
    assert task.make_model().config.id2label == {0: "POSITIVE", 1: "NEUTRAL", 2: "NEGATIVE"}
    seen = {bytes(row[1:4].tolist()): label for batch in task.training(0) for row, label in by_row(batch)}
    assert [seen[text] for text in (b"red", b"blu", b"gre")[: len(classes)]] == classes


def by_row(batch):
    return zip(batch["input_ids"], batch["labels"].tolist(), strict=True)


def test_labels_that_do_not_tell_the_classes_are_refused(sentiments, tmp_path):
    options = {"config": None, "model": str(sentiments), "sequence_length": 8}
    for labels in (("good", "so-so", "awful"), ("good", "awful"), ("4", "1", "2")):
        with pytest.raises(ConfigError, match=r"the model 3 classes \(POSITIVE, NEUTRAL, NEGATIVE\): which is which"):
            classification(tmp_path, train=table(tmp_path / "a.csv", labels), **options)
    with pytest.raises(ConfigError, match=r"2 labels \(a, b\), and the model 3 classes \(LABEL_0"):
        classification(tmp_path, train=table(tmp_path / "a.csv", "ab"), config=BERT | {"num_labels": 3})


def test_tables_of_spreadsheets_long_texts_and_rare_labels(tmp_path):
    train = table(tmp_path / "a.csv", "ab", ("red " * 40_000, "blue"), encoding="utf-8-sig")
    assert len(classification(tmp_path, train=train).score.batches) == 1
    (tmp_path / "rare.csv").write_text((tmp_path / "a.csv").read_text("utf-8-sig") + "\ngreen,rare")
    for seed in range(20):  # one of which holds the rare row out
        task = classification(tmp_path, train=str(tmp_path / "rare.csv"), seed=seed)
    assert task.make_model().config.num_labels == 3


GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize("pad", [None, 1, 5])
def test_texts_are_padded_with_what_the_model_takes_for_padding(folder, tmp_path, pad):
    """GPT-2's tokenizer has no padding token; its classifiers read the last token before the padding."""
    learnt = vocabulary.make_vocabulary("bpe", None, 270, [(folder / "web.txt").read_text()]).tokenizer
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=learnt.backend_tokenizer, eos_token="[CLS]")
    plain.save_pretrained(tmp_path)
    sizes = {key: value for key, value in GPT2.items() if key != "model_type"}
    config = transformers.GPT2Config(vocab_size=270, n_positions=32, pad_token_id=pad, **sizes)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    task = classification(folder, config=None, model=str(tmp_path), tokenizer=None)
    check_padding(task, 1 if pad is None else pad)
    new = classification(folder, config=LLAMA, tokenizer=str(tmp_path))
    check_padding(new, 1)


def check_padding(task, pad):
    """Texts with padding have the logits of the texts alone."""
    model, batch = task.make_model(), task.score.batches[0]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert model.config.pad_token_id == pad and set(ids[mask == 0].tolist()) == {pad}
    with torch.no_grad():
        alone = torch.cat([model(row[kept.bool()][None]).logits for row, kept in zip(ids, mask, strict=True)])
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_new_roberta_has_positions_for_whole_texts(folder, tokenizer, tmp_path):
    """It counts positions from behind the padding id on."""
    config = BERT | {"model_type": "roberta"}
    options = {"config": config, "tokenizer": tokenizer, "vocab_size": 262, "sequence_length": 12}
    task = classification(folder, **options)
    model = task.make_model()
    assert max(batch["input_ids"].shape[1] for batch in task.score.batches) == 12 and task.score(model) >= 0
    assert model.config.max_position_embeddings == 13
    model.save_pretrained(tmp_path)
    given = options | {"config": None, "model": str(tmp_path), "tokenizer": "bytes"}
    with pytest.raises(ConfigError, match="longer than the model's 12 positions"):
        classification(folder, **given | {"sequence_length": 13})
    text = language(folder, config=config)
    assert text.make_model().config.max_position_embeddings == 16 + 2  # its own padding id is 1
    assert math.isfinite(text.score(text.make_model()))


def test_a_byte_of_zero_is_no_padding():
    read = vocabulary.make_vocabulary("bytes", None, 0, [], whole_texts=True)
    assert read.encode(["a\0\xff"]) == [[97, 256, 195, 191]] and read.padding == 0


def test_other_names_of_what_the_data_imply_are_the_users(folder):
    assert language(folder, config=GPT2 | {"n_positions": 64}).make_model().config.n_positions == 64
    assert language(folder, config=GPT2).make_model().config.n_positions == 16


def test_a_new_model_of_low_precision_is_what_its_checkpoint_loads(folder, tmp_path):
    """Its rotary frequencies stay in full precision."""
    task = language(folder, dtype="bfloat16")
    model = task.make_model()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.dtype == loaded.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(**task.example_inputs).logits, loaded(**task.example_inputs).logits)
    assert prunefront.discover(model, task.example_inputs, uniform=True).groups


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_name_their_columns(folder, suffix):
    options = {"train": str(folder / f"test{suffix}"), "text_column": "said", "label_column": "kind"}
    batch = next(iter(classification(folder, **options).training(0)))
    assert set(batch["labels"].tolist()) == {0, 1} and batch["input_ids"].shape == batch["attention_mask"].shape
    with pytest.raises(ConfigError, match=r"no text and no label; it has said, kind: set task.text_column"):
        classification(folder, train=options["train"])


def test_bad_classification_tasks(folder, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "a", "label": "many"}')
    with pytest.raises(ConfigError, match=r"task.test has labels .* many"):
        classification(folder, test=str(tmp_path / "other.jsonl"))
    (tmp_path / "bad.jsonl").write_text("text,label")
    with pytest.raises(ConfigError, match="no CSV"):
        classification(folder, train=str(tmp_path / "bad.jsonl"))
    with pytest.raises(ConfigError, match="names no data"):
        classification(folder, train=None)
    with pytest.raises(ConfigError, match=r"2 labels .* model 1 classes"):
        classification(folder, config=BERT | {"num_labels": 1})


def overrides(folder, task):
    config = [f"task.config.{key}={value}" for key, value in (LLAMA if task == "hf_causal_lm" else BERT).items()]
    return [f"task={task}", *config, "task.sequence_length=16"]


def test_a_language_model_from_the_command_line(folder, tmp_path, capsys):
    run = tmp_path / "run"
    domains = [f"task.train.web={folder}/web.txt", f"task.train.books={folder}/books.txt"]
    options = [*overrides(folder, "hf_causal_lm"), *domains, f"task.test={folder}/test.txt", "task.epochs=1"]
    assert main(["space", *options, "space=uniform", "--json"]) == 0
    assert "model.layers" in json.loads(capsys.readouterr().out)["dimensions"]
    assert main(["search", *options, "n_trials=3", "tracker=none", "budget.params=60%", f"run_dir={run}"]) == 0
    assert "-perplexity" in capsys.readouterr().out
    assert main(["search", f"resume={run}", "n_trials=4"]) == 0
    assert main(["finetune", str(run), "finetune=adamw", "finetune.epochs=1", "finetune.distill.weight=0.5"]) == 0
    (tuned,) = run.glob("front/*/finetuned/adamw")
    found = json.loads((tuned / "metrics.json").read_text())
    assert found["score"] > found["score_before"]
    assert prunefront.load(tuned)(torch.zeros(1, 16, dtype=torch.long)).logits.shape == (1, 16, 256)
    assert main(["load-check", str(tuned)]) == 0


def test_a_classifier_from_the_command_line(folder, tmp_path):
    run = tmp_path / "run"
    options = [*overrides(folder, "hf_text_classification"), f"task.train={folder}/rows.jsonl", "task.epochs=1"]
    assert main(["search", *options, "n_trials=2", "tracker=none", "space.kinds=[head,neuron]", f"run_dir={run}"]) == 0
    distill = ["finetune.distill.weight=0.5", "finetune.distill.hidden=0.1"]
    assert main(["finetune", str(run), "finetune=adamw", "finetune.epochs=1", *distill]) == 0
    assert main(["load-check", str(run)]) == 0
