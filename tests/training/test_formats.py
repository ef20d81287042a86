"""Labels are those that TRL's trainer, or transformers' own way, makes of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pico
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, ViTImageProcessor
from trl import SFTConfig, SFTTrainer, chat_template_utils
from words import CHATS, FORGETFUL, MARKED, UNMARKED, tokenizer

from solidify.errors import DataError
from solidify.training import chats, data, examples, formats, sources
from solidify.training.examples import Reading
from solidify.training.numbering import decide


def conversations() -> datasets.Dataset:
    rows = [[{"role": role, "content": content} for role, content in chat] for chat in CHATS]
    return datasets.Dataset.from_dict({"messages": rows})


def reading(form: str, maker: Any, **more: Any) -> Reading:
    accepts = ("input_ids", "attention_mask", "token_type_ids")
    return Reading(**{"format": form, "max_length": 64, "processor": maker, "accepts": accepts, **more})


def labels(rows: datasets.Dataset, how: Reading) -> list[list[int]]:
    return list(examples.make(rows, how)[0]["labels"])


def trl_examples(rows: datasets.Dataset, maker: Any, directory: Path, **settings: Any) -> Any:
    args = SFTConfig(str(directory), use_cpu=True, report_to="none", dataset_num_proc=None, **settings)
    return SFTTrainer(pico.llama(), args, train_dataset=rows, processing_class=maker).train_dataset


@pytest.mark.parametrize("max_length", [64, 12])
@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_conversations_are_labelled_as_trl_labels_them(tmp_path: Path, loss_on: Any, max_length: int) -> None:
    maker = tokenizer()
    theirs = trl_examples(
        conversations(), maker, tmp_path, max_length=max_length, assistant_only_loss=loss_on == "assistant"
    )
    how = reading("messages", maker, max_length=max_length, chat=chats.open_chat(maker, None, loss_on))
    ours, counted = examples.make(conversations(), how)
    assert ours["input_ids"][:] == theirs["input_ids"][:]
    assert ours["labels"][:] == theirs["labels"][:]
    assert counted is not None
    if max_length == 64:
        assert (counted.cut, counted.lost, counted.silent) == (0, 0, 0)
    else:
        lengths = [len(maker.apply_chat_template(chat)["input_ids"]) for chat in conversations()["messages"]]
        assert counted.lost == sum(max(0, length - 12) for length in lengths)
        assert counted.cut == sum(length > 12 for length in lengths)


def test_a_template_without_marks_is_read_by_rendering_it(tmp_path: Path) -> None:
    """The turns of the assistant are those that marks around them would tell."""
    marked, unmarked = tokenizer(), tokenizer(UNMARKED)
    for loss_on in ("assistant", "last"):
        expected = labels(conversations(), reading("messages", marked, chat=chats.open_chat(marked, None, loss_on)))
        chat = chats.open_chat(unmarked, None, loss_on)
        assert not chat.marked
        assert labels(conversations(), reading("messages", unmarked, chat=chat)) == expected
    last = [label for label in expected[1] if label != -100]
    assert marked.decode(last) == "i j k <end>"


def test_a_template_that_forgets_earlier_turns_is_refused() -> None:
    maker = tokenizer(FORGETFUL)
    how = reading("messages", maker, chat=chats.open_chat(maker, None, "assistant"))
    with pytest.raises(DataError, match="row 1: its turn 2 cannot be told from the others: the chat template has no"):
        labels(conversations(), how)
    everything = labels(conversations(), reading("messages", maker, chat=chats.open_chat(maker, None, "all")))
    assert everything[1] == maker.apply_chat_template(conversations()[1]["messages"])["input_ids"]


def test_a_template_that_is_given_goes_over_the_tokenizers() -> None:
    bare = tokenizer(None)
    with pytest.raises(DataError, match="has no chat template; give one with `chat_template`"):
        chats.open_chat(bare, None, "assistant")
    chat = chats.open_chat(bare, MARKED, "assistant")
    marked = tokenizer()
    expected = labels(conversations(), reading("messages", marked, chat=chats.open_chat(marked, None, "assistant")))
    assert labels(conversations(), reading("messages", bare, chat=chat)) == expected


def test_known_templates_are_read_with_trls_marks(tmp_path: Path, tiny_base: Path) -> None:
    maker = AutoTokenizer.from_pretrained(tiny_base)
    maker.chat_template = chat_template_utils.qwen2_5_chat_template
    maker.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs = trl_examples(conversations(), maker, tmp_path, max_length=200, assistant_only_loss=True)
    chat = chats.open_chat(maker, None, "assistant")
    assert chat.marked
    assert labels(conversations(), reading("messages", maker, max_length=200, chat=chat)) == theirs["labels"][:]


COMPLETIONS: dict[str, list[dict[str, Any]]] = {
    "strings": [{"prompt": "a b", "completion": " c d"}, {"prompt": "e", "completion": " f <end>"}],
    "messages": [
        {
            "prompt": [{"role": "user", "content": "a b"}],
            "completion": [{"role": "assistant", "content": content}],
        }
        for content in ("c d", "e f g")
    ],
}


@pytest.mark.parametrize("kind", COMPLETIONS)
def test_completions_are_labelled_as_trl_labels_them(tmp_path: Path, kind: str) -> None:
    maker, rows = tokenizer(), datasets.Dataset.from_list(COMPLETIONS[kind])
    theirs = trl_examples(rows, maker, tmp_path)
    chat = chats.open_chat(maker, None, "all") if kind == "messages" else None
    ours, _ = examples.make(rows, reading("prompt_completion", maker, chat=chat))
    assert (ours["input_ids"][:], ours["labels"][:]) == (theirs["input_ids"][:], theirs["labels"][:])
    assert any(label == -100 for label in ours["labels"][0])


def bert(head: str, **settings: Any) -> Any:
    return pico.make(head, **{**pico.SIZES, "intermediate_size": 48, "pad_token_id": 0, **settings})


LABELLED: dict[str, tuple[str, list[Any], dict[str, Any], list[Any]]] = {
    "classes": ("classification", [1, 0, 2], {"num_labels": 3}, [1, 0, 2]),
    "names of classes": ("classification", ["no", "yes"], {"id2label": {0: "yes", 1: "no"}}, [1, 0]),
    "numbers": ("regression", [0.5, -2.0], {"num_labels": 1}, [0.5, -2.0]),
    "several": ("multi_label", [[1, 0, 1], [0, 0, 0]], {"num_labels": 3}, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
    "several names": ("multi_label", [["b"], []], {"id2label": {0: "a", 1: "b", 2: "c"}}, [[0.0, 1.0, 0.0], [0.0] * 3]),
}


@pytest.mark.parametrize("kind", LABELLED)
def test_labelled_texts_have_the_loss_of_transformers(kind: str) -> None:
    form, given, settings, expected = LABELLED[kind]
    maker, model = tokenizer(wrapped=True), bert("BertForSequenceClassification", **settings)
    rows = datasets.Dataset.from_dict({"text": [f"a {'b ' * n}" for n in range(len(given))], "label": given})
    assert formats.find(rows.column_names, formats.learned_by(model), rows[0]) == form
    how = reading(form, maker, config=model.config, accepts=examples.accepted(model))
    made, counted = examples.make(rows, how)
    assert made["labels"][:] == expected
    assert made["input_ids"][:] == maker(rows["text"][:])["input_ids"]
    batch = examples.collator(how)([made[n] for n in range(len(made))])
    padded = maker(rows["text"][:], padding=True, return_tensors="pt")
    ours, theirs = model(**batch), model(**padded, labels=torch.tensor(expected))
    assert torch.equal(ours.loss, theirs.loss)
    assert counted is not None
    assert counted.counted == len(given)


def test_pairs_of_texts_are_cut_as_the_tokenizer_cuts_them() -> None:
    maker, model = tokenizer(wrapped=True), bert("BertForSequenceClassification", num_labels=2)
    rows = datasets.Dataset.from_dict({"text": ["a b c d e", "f"], "text_pair": ["g h", "i"], "label": [0, 1]})
    how = reading("classification", maker, config=model.config, max_length=6)
    made, counted = examples.make(rows, how)
    assert made["input_ids"][0] == maker("a b c d e", "g h", truncation=True, max_length=6)["input_ids"]
    assert counted is not None
    assert (counted.cut, counted.lost) == (1, 4)


def test_tags_stand_at_the_first_token_of_each_word() -> None:
    """As transformers' own example does it (token classification: tokenize and align labels)."""
    maker, model = tokenizer(wrapped=True), bert("BertForTokenClassification", id2label={0: "O", 1: "A", 2: "B"})
    rows = datasets.Dataset.from_dict({"words": [["abc", "d"], ["e"]], "tags": [["A", "O"], ["B"]]})
    made, counted = examples.make(rows, reading("token_classification", maker, config=model.config))
    expected = []
    for words, tags in zip([["abc", "d"], ["e"]], [[1, 0], [2]], strict=True):
        previous, aligned = None, []
        for index in maker(words, is_split_into_words=True).word_ids():
            aligned.append(-100 if index is None or index == previous else tags[index])
            previous = index
        expected.append(aligned)
    assert made["labels"][:] == expected == [[-100, 1, -100, -100, 0, -100], [-100, 2, -100]]
    assert counted is not None
    assert counted.counted == 3
    with pytest.raises(DataError, match="row 0: it has 2 words and 1 tags"):
        wrong = datasets.Dataset.from_dict({"words": [["a", "b"]], "tags": [["A"]]})
        examples.make(wrong, reading("token_classification", maker, config=model.config))


def test_an_encoder_decoder_learns_to_write_the_target() -> None:
    maker = tokenizer(wrapped=True)
    rows = datasets.Dataset.from_dict({"source": ["a b c", "d"], "target": ["e", "f g h i j k"]})
    how = reading("seq2seq", maker, max_length=6)
    made, counted = examples.make(rows, how)
    expected = maker(rows["source"][:], text_target=rows["target"][:], truncation=True, max_length=6)
    assert made["input_ids"][:] == expected["input_ids"]
    assert made["labels"][:] == expected["labels"]
    assert counted is not None
    assert (counted.cut, counted.lost) == (1, 2)
    assert examples.collator(how)([made[0], made[1]])["labels"][0].tolist() == [
        4,
        maker.vocab["e"],
        5,
        -100,
        -100,
        -100,
    ]


def test_tokens_are_hidden_by_transformers_collator_and_its_seed() -> None:
    maker, model = tokenizer(wrapped=True), bert("BertForMaskedLM")
    rows = datasets.Dataset.from_dict({"text": ["a b c d e f g h", "", "i j"]})
    how = reading("masked", maker, max_length=6, accepts=examples.accepted(model), seed=3, mask_probability=0.5)
    made, counted = examples.make(rows, how)
    assert [len(ids) - 2 for ids in made["input_ids"]] == [4, 4, 2]  # no letter is lost, and nothing is made of nothing
    assert counted is not None
    assert counted.windows
    listed = [made[n] for n in range(3)]
    theirs = DataCollatorForLanguageModeling(maker, mlm_probability=0.5, seed=3)([dict(row) for row in listed])
    ours = examples.collator(how)(listed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("input_ids", "labels", "attention_mask"))
    hidden = examples.collator(how).hide(listed[0])
    again = examples.collator(how)([hidden])
    assert again["labels"][0].tolist() == hidden["labels"]
    assert again["input_ids"][0].tolist() == hidden["input_ids"]


def test_images_have_the_pixels_of_the_models_processor(tmp_path: Path) -> None:
    Image.new("RGB", (20, 16), "red").save(tmp_path / "a.png")
    Image.new("L", (16, 16)).save(tmp_path / "b.png")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    model = pico.make("ViTForImageClassification", **size, image_size=16, id2label={0: "no", 1: "yes"})
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    rows = datasets.Dataset.from_dict({"image": paths, "label": ["yes", "no"]})
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    how = reading("image_classification", processor, config=model.config)
    made, _ = examples.make(rows, how)
    batch = examples.collator(how)([made[0], made[1]])
    expected = processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert batch["labels"].tolist() == [1, 0]
    wrong = datasets.Dataset.from_dict({"image": paths, "label": ["yes", "maybe"]})
    with pytest.raises(DataError, match="row 1: its label is 'maybe', and the classes are no, yes"):
        examples.make(wrong, how)


def test_all_rows_that_are_wrong_are_listed() -> None:
    maker, model = tokenizer(), bert("BertForSequenceClassification", num_labels=2)
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 2, -1]})
    with pytest.raises(DataError) as caught:
        examples.make(rows, reading("classification", maker, config=model.config))
    assert "row 1: its label is 2, and the model has the classes 0 to 1" in str(caught.value)
    assert "row 2: its label is -1" in str(caught.value)


def test_rows_of_which_nothing_counts_any_more_are_left_out_and_counted() -> None:
    maker = tokenizer()
    rows = datasets.Dataset.from_list([{"prompt": "a b c d e f g h", "completion": " i"}, COMPLETIONS["strings"][0]])
    made, counted = examples.make(rows, reading("prompt_completion", maker, max_length=5))
    assert len(made) == 1
    assert counted is not None
    assert (counted.rows, counted.examples, counted.cut, counted.lost, counted.silent) == (2, 1, 1, 5, 1)
    assert "1 rows were cut and lost 5 tokens, 1 have no counted token left and are left out" in str(counted)
    with pytest.raises(DataError, match="nothing is left to learn from: of 1 rows"):
        examples.make(rows.select([0]), reading("prompt_completion", maker, max_length=5))


@pytest.mark.parametrize(
    ("columns", "head", "expected"),
    [
        (["messages", "id"], "LlamaForCausalLM", "messages"),
        (["text", "label"], "LlamaForCausalLM", "text"),
        (["text", "label"], "BertForSequenceClassification", "classification"),
        (["text", "label"], "BertForMaskedLM", "masked"),
        (["prompt", "completion"], "LlamaForCausalLM", "prompt_completion"),
        (["tokens", "tags"], "BertForTokenClassification", "token_classification"),
    ],
)
def test_what_rows_are_is_found_from_columns_and_head(columns: list[str], head: str, expected: str) -> None:
    settings = {"num_key_value_heads": 2} if head.startswith("Llama") else {}
    model = bert(head, **settings)
    assert formats.find(columns, formats.learned_by(model), {"label": 1}) == expected


def test_a_head_says_what_it_learns_from() -> None:
    model = bert("BertForSequenceClassification")
    with pytest.raises(DataError, match="which make messages, but the model learns from classification"):
        formats.find(["messages"], formats.learned_by(model), {})
    with pytest.raises(
        DataError, match=r"the rows are messages .turns of a conversation., but BertForSequenceClassifi"
    ):
        formats.refuse_unlearned("messages", model)
    with pytest.raises(DataError, match=r"preference .which of two answers is better. is learned by a trainer's own"):
        formats.refuse_unlearned("preference", pico.llama())
    with pytest.raises(DataError, match="BertForNextSentencePrediction has a head that no format here teaches"):
        formats.refuse_unlearned("text", bert("BertForNextSentencePrediction"))


def test_names_decide_where_data_set_and_model_number_their_classes_otherwise(tmp_path: Path) -> None:
    for name, colour in (("no", "red"), ("yes", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "pictures" / name / "a.png")
    rows = sources.read_directory(tmp_path / "pictures")
    assert rows["label"][:] == [0, 1]
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    for names, expected in (({0: "yes", 1: "no"}, [1, 0]), ({0: "LABEL_0", 1: "LABEL_1"}, [0, 1])):
        model = pico.make("ViTForImageClassification", **size, image_size=16, id2label=names)
        processor = ViTImageProcessor(size={"height": 16, "width": 16})
        how = reading("image_classification", processor, config=model.config, names=decide(rows, model.config))
        made, _ = examples.make(rows, how)
        assert made["labels"][:] == expected
        assert examples.collator(how)([made[0], made[1]])["pixel_values"].shape == (2, 3, 16, 16)
    maker = tokenizer(wrapped=True)
    tagged = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[0, 1]]}).cast_column(
        "tags", datasets.List(datasets.ClassLabel(names=["B", "O"]))
    )
    model = bert("BertForTokenClassification", id2label={0: "O", 1: "B"})
    named = decide(tagged, model.config)
    made, _ = examples.make(tagged, reading("token_classification", maker, config=model.config, names=named))
    assert made["labels"][0] == [-100, 1, 0, -100]


def test_a_number_of_a_data_set_that_is_no_class_is_refused() -> None:
    """-1 says that a row has no label; counted from the end it would be the last class."""
    kind = datasets.ClassLabel(names=["neg", "mid", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    named = bert("BertForSequenceClassification", id2label=dict(enumerate(kind.names))).config
    for config in (named, bert("BertForSequenceClassification", num_labels=3).config):
        whole = datasets.Dataset.from_dict({"text": ["a b", "c d"], "label": [0, 2]}, features=features)
        how = reading("classification", tokenizer(wrapped=True), config=config, names=decide(whole, config))
        assert list(examples.make(whole, how)[0]["labels"]) == [0, 2]
        rows = datasets.Dataset.from_dict({"text": ["a b", "c d"], "label": [0, -1]}, features=features)
        with pytest.raises(DataError, match="its label is -1"):
            examples.make(rows, how)


def test_numbers_of_several_classes_are_numbers_where_the_data_set_says_so() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=["x", "y"]))}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [[0, 1], [1], [0, 0]]}, features=features)
    config = bert("BertForSequenceClassification", num_labels=2).config
    how = reading("multi_label", tokenizer(wrapped=True), config=config, names=decide(rows, config))
    made, _ = examples.make(rows, how)
    assert list(made["labels"]) == [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]


def test_conversations_of_from_and_value_are_messages() -> None:
    maker = tokenizer()
    how = reading("messages", maker, chat=chats.open_chat(maker, None, "assistant"))
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [[{"from": names[role], "value": content} for role, content in chat] for chat in CHATS]
    rows = datasets.Dataset.from_dict({"conversations": shared})
    assert formats.find(rows.column_names, formats.NEXT_TOKEN, rows[0]) == "messages"
    assert labels(rows, how) == labels(conversations(), how)


def test_accuracy_is_the_share_of_labels_that_the_largest_logit_is() -> None:
    model = bert("BertForTokenClassification", id2label={0: "O", 1: "B"}).eval()
    rows = datasets.Dataset.from_dict({"tokens": [["a", "b"], ["c", "d", "a"]], "tags": [[0, 1], [1, 1, 0]]})
    how = reading("token_classification", tokenizer(wrapped=True), config=model.config)
    made, _ = examples.make(rows, how)
    right, count = 0, 0
    for row in made:
        ids, wanted = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            found = model(ids).logits[0].double().argmax(-1)
        right, count = right + int(((found == wanted) & (wanted != -100)).sum()), count + int((wanted != -100).sum())
    found = data.measure(model, made, examples.collator(how), batch_size=2)
    assert found["accuracy"] == right / count and found["loss"] > 0
    assert "accuracy" not in data.measure(pico.llama(), text_examples(), pico.collate)


def text_examples() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})
