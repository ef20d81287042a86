"""LLaVA's case: a new projector with its own learning rate, LoRA in the language model, rows with and without images.

What a plain script does wrong comes first; then one recipe does it all, and what it made is looked at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llava
import pico
import pytest
import torch
from llava import IMAGE_TOKENS, PROJECTOR, QUERIES
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, Trainer, ViTImageProcessorPil
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

import solidify
from solidify.artifact import loading
from solidify.errors import DataError, ModelError, RecipeError
from solidify.objective.objective import Objective, Term
from solidify.recipe import datasets, dry_run, schema, stages, trainers
from solidify.training import batching, data, images
from solidify.training.trainer import ObjectiveTrainer
from training import arguments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "llava.yaml"
LORA = {"r": 2, "target_modules": [QUERIES]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava.base(tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rows")
    llava.data(directory, 7, "held_out.jsonl")
    return llava.data(directory, 24)


def loaded(base: Path, rows: Path, *more: str) -> schema.Recipe:
    """The example, on the tiny model."""
    return schema.load(
        EXAMPLE,
        [
            f"base={{model: {base}}}",
            "surgery.0.arguments.width=24",
            "adapter.lora.r=2",
            f"data.train={rows}",
            f"data.eval={rows.parent / 'held_out.jsonl'}",
            "data.max_length=64",
            "training={learning_rate: 2.5e-4, num_train_epochs: 2, per_device_train_batch_size: 2, logging_steps: 1,"
            " gradient_accumulation_steps: 2, lr_scheduler_type: cosine, warmup_steps: 1}",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def run(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    stages.run(loaded(base, rows), directory)
    return directory


def examples(rows: Path, max_length: int = 64) -> Any:
    return images.tokenize(data.read(rows, "text", "image"), llava.processor(), text="text", max_length=max_length)


def attached(**declared: Any) -> Any:
    torch.manual_seed(1)
    plain = llava.model(llava.processor())
    return llava.awake(solidify.attach(plain, **(declared or {"lora": LORA, "train": [PROJECTOR]})))


def trainer(model: Any, directory: Path, rows: Any, collate: Any, **more: Any) -> ObjectiveTrainer:
    return ObjectiveTrainer(
        model=model,
        args=arguments(directory, 4, 1, **more),
        train_dataset=rows,
        data_collator=collate,
        objective=Objective([Term("model")]),
    )


# What goes wrong without.


def test_a_trainer_takes_the_images_away_and_the_model_says_nothing(rows: Path, tmp_path: Path) -> None:
    """Columns that the forward pass does not take are removed by default; image tokens are then read as words."""
    made = examples(rows)
    processor = llava.processor()

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        places = [place for row in batch for place in row.get("images", ())]
        pixels = processor.image_processor([Image.open(p) for p in places], return_tensors="pt") if places else {}
        texts = [{name: row[name] for name in ("input_ids", "labels")} for row in batch]
        return {**data.collator(processor.tokenizer)(texts), **pixels}

    plain = Trainer(attached(), arguments(tmp_path, 4, 1, remove_unused_columns=True), collate, made)
    batch = next(iter(plain.get_train_dataloader()))
    assert (batch["input_ids"] == processor.image_token_id).any()
    assert "pixel_values" not in batch
    plain.train()  # not a word
    kept = Trainer(attached(), arguments(tmp_path, 4, 1, remove_unused_columns=False), collate, made)
    assert "pixel_values" in next(iter(kept.get_train_dataloader()))
    ours = Trainer(attached(), arguments(tmp_path, 4, 1, remove_unused_columns=True), images.Collator(processor), made)
    with pytest.raises(DataError, match=r"4 tokens of images and 0 images; keep the column 'images'"):
        ours.train()


def test_the_labels_of_trl_have_the_model_predict_image_tokens() -> None:
    processor = llava.processor()
    batch = DataCollatorForVisionLanguageModeling(processor, dataset_text_field="text")(
        [{"text": "<image> a red square", "images": [llava.image()]}]
    )
    assert (batch["labels"] == processor.image_token_id).sum() == IMAGE_TOKENS


def test_a_tokenizer_alone_cuts_through_an_image() -> None:
    """And leaves one token where the model needs as many as the image has patches."""
    processor = llava.processor()
    model = llava.model(processor)
    pixels = processor.image_processor(llava.image(), return_tensors="pt")["pixel_values"]
    bare = processor.tokenizer("<image> a red square", return_tensors="pt")
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**bare, pixel_values=pixels)
    with pytest.raises(ValueError, match="Mismatch in `image` token count"):
        processor(text="<image> a red square", images=llava.image(), truncation=True, max_length=3)


def test_without_the_language_model_a_batch_of_text_stops_the_training(rows: Path, base: Path, tmp_path: Path) -> None:
    """As in LLaVA's first stage, where the projector alone is trained: a recipe is refused before it trains."""
    made = examples(rows)
    text = made.select([place for place, kind in enumerate(batching.modalities(made)) if not kind])
    model, collate = attached(train=[PROJECTOR]), images.Collator(llava.processor())
    with pytest.raises(RuntimeError, match="does not require grad"):
        Trainer(model, arguments(tmp_path, 4, 1), collate, text).train()
    plan = loaded(base, rows, f"adapter={{train: [{PROJECTOR}]}}")
    with pytest.raises(DataError, match=r"rows without images \(example 2 is one\) reach nothing that is trained"):
        trainers.make_trainer(plan, tmp_path, attached_base(base), loading.load_base(str(base)).processor)


def attached_base(base: Path) -> Any:
    return solidify.attach(loading.load_base(str(base)).model, train=[PROJECTOR])


# Data.


def test_image_tokens_and_padding_are_no_targets(rows: Path) -> None:
    made = examples(rows)
    processor = llava.processor()
    assert len(made) == 24
    batch = images.Collator(processor)([made[0], made[3], made[2]])
    assert {name: value.ndim for name, value in batch.items()} == {
        "input_ids": 2,
        "attention_mask": 2,
        "labels": 2,
        "pixel_values": 4,
    }
    assert batch["pixel_values"].shape == (2, 3, llava.SIDE, llava.SIDE)  # the third row has none
    expected = processor.image_processor([Image.open(made[0]["images"][0])], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(batch["pixel_values"][0], expected)
    marks = batch["input_ids"] == processor.image_token_id
    assert marks.sum(1).tolist() == [IMAGE_TOKENS, IMAGE_TOKENS, 0]
    hidden = marks | (batch["attention_mask"] == 0)
    assert torch.equal(batch["labels"] == -100, hidden)
    assert torch.equal(batch["labels"][~hidden], batch["input_ids"][~hidden])
    for row in made:  # the end of a text is learned
        assert row["labels"][-1] == processor.tokenizer.eos_token_id
    assert "pixel_values" not in images.Collator(processor)([made[2], made[5]])


def test_the_mean_loss_sees_the_images(base: Path, rows: Path) -> None:
    """Against the cross entropy in float64, row by row."""
    model, made, collate = loading.load_base(str(base)).model, examples(rows), images.Collator(llava.processor())
    total, count = 0.0, 0
    for row in made:
        batch = collate([row])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1].double()
        total -= sum(float(torch.log_softmax(logits[i], -1)[t]) for i, t in enumerate(labels) if t != -100)
        count += int((labels != -100).sum())
    assert data.mean_loss(model, made, collate, batch_size=5) == pytest.approx(total / count, rel=1e-6)


def test_rows_with_images_are_kept_whole_or_refused_by_name(rows: Path) -> None:
    words = r"row 0 \(green_0\.png\): \d+ tokens, 4 of them of images, and max_length is 20; a row with images is never"
    with pytest.raises(DataError, match=words):
        examples(rows, max_length=20)
    read = data.read(rows, "text", "image")
    text = read.filter(lambda row: not row["images"])
    made = images.tokenize(text, llava.processor(), text="text", max_length=20)
    assert len(made) > len(text)  # text alone is cut into windows, and nothing of it is lost
    whole = images.tokenize(text, llava.processor(), text="text", max_length=1024)
    assert sum(map(len, made["input_ids"])) == sum(map(len, whole["input_ids"]))


def test_a_row_may_have_several_images(tmp_path: Path) -> None:
    for color in llava.COLORS:
        llava.image(color).save(tmp_path / f"{color}.png")
    written = [
        {"text": "<image> or <image>?", "images": ["red.png", "blue.png"]},
        {"text": "none", "images": []},
        {"text": "also none", "images": None},
        {"text": "<image>", "images": ["green.png"]},
    ]
    path = tmp_path / "several.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    made = images.tokenize(data.read(path, "text", "images"), llava.processor(), text="text", max_length=64)
    assert [len(row["images"]) for row in made] == [2, 0, 0, 1]
    batch = images.Collator(llava.processor())(list(made))
    assert len(batch["pixel_values"]) == 3
    red, blue = batch["pixel_values"][0].mean((1, 2)), batch["pixel_values"][1].mean((1, 2))
    assert red.argmax() == 0
    assert blue.argmax() == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "<image>", "image": "gone.png"}, r"names images that do not exist: row 1: .*gone\.png"),
        ({"text": "<image>", "image": "broken.png"}, "row 1: UnidentifiedImageError: cannot identify image file"),
        ({"text": "no place", "image": "red.png"}, "row 1: .*Found total 0 <image> tokens and 1 images"),
        ({"text": "<image> <image>", "image": "red.png"}, "row 1: .*Found total 2 <image> tokens and 1 images"),
        ({"text": "<image>", "image": None}, "row 1: ValueError: Found 1 <image> tokens in the text but no images"),
    ],
)
def test_rows_that_do_not_fit_their_images_are_refused_by_number(tmp_path: Path, row: Any, words: str) -> None:
    llava.image().save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ({"text": "<image>", "image": "red.png"}, row)))
    with pytest.raises(DataError, match=words):
        examples(path)


def test_images_may_come_late_in_a_long_file(tmp_path: Path) -> None:
    """After megabytes of text alone, from which a reader in pieces would conclude that there are none."""
    llava.image().save(tmp_path / "red.png")
    path = tmp_path / "late.jsonl"
    written = [{"text": "x" * 200_000, "image": None}] * 60 + [{"text": "<image>", "image": "red.png"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    assert [bool(row["images"]) for row in data.read(path, "text", "image")] == [False] * 60 + [True]


def test_a_column_that_is_not_there_is_named(rows: Path) -> None:
    with pytest.raises(DataError, match="has no column 'picture'; it has: text, image"):
        data.read(rows, "text", "picture")


# The processor travels with the model.


def test_what_prepares_images_alone_travels_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = pico.make("ViTForImageClassification", image_size=28, patch_size=14, **sizes)
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "vit")
    read = loading.load_base(str(tmp_path / "vit"))
    assert read.tokenizer is None
    edits = solidify.replace(read.model, "vit.layers.0.mlp", pico.wrappers.Scaled)
    pico.artifact(read.model, edits, tmp_path / "artifact", tokenizer=read.processor)
    again = loading.load_processor(tmp_path / "artifact")
    pixels = again(llava.image(), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, read.processor(llava.image(), return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("name", ["NoSuchProcessor", "Qwen2VLProcessor"])
def test_a_processor_that_cannot_be_loaded_is_not_dropped(base: Path, copy_of: Any, name: str) -> None:
    """Qwen2-VL's has a video processor, which this directory lacks."""
    spoiled = copy_of(base)
    for file in ("processor_config.json", "tokenizer_config.json"):
        values = json.loads((spoiled / file).read_text())
        (spoiled / file).write_text(json.dumps({**values, "processor_class": name}))
    with pytest.raises(ModelError, match=r"has a processor_config\.json that cannot be loaded, .* would be lost"):
        loading.load_base(str(spoiled))


# One recipe.


def test_every_check_of_the_recipe_holds(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["passed"]
    found = {f["name"]: f["passed"] for stage in report["stages"].values() for f in stage}
    for name in (
        *("trainable set exact", "gradients reach what is trained", "frozen tensors unchanged"),
        *("gradient does not depend on accumulation", "adapter reload exact", "merged equals attached"),
        *("only what was trained changed", "loads without us", "wrong base refused"),
    ):
        assert found[name] is True, name
    assert report["measured"]["heldout_loss_trained"] < report["measured"]["heldout_loss_artifact"]


def test_the_projector_has_its_own_learning_rate(run: Path) -> None:
    history = json.loads((run / "report.json").read_text())["measured"]["history"]
    assert len(history) == 12
    for logs in history:  # 1e-3 by its group, four times that of the rest
        assert logs[f"learning_rate/{PROJECTOR}"] == pytest.approx(4 * logs["learning_rate"])
    assert json.loads((run / "adapter" / "solidify.json").read_text())["recipe"]["parameter_groups"] == [
        {"parameters": PROJECTOR, "learning_rate": 1e-3, "weight_decay": 0.0, "optimizer": {}}
    ]


def test_the_adapter_holds_what_was_trained_and_nothing_else(run: Path) -> None:
    held = load_file(run / "adapter" / "adapter_model.safetensors")
    numbers = sum(tensor.numel() for tensor in held.values())
    projector = 2 * (16 * 24 + 24) + 24 * 32 + 32
    lora = 2 * 2 * (2 * 32 + 32 * 2)  # two layers, queries and values: A is 2 x 32; of q, B is 32 x 2 ...
    assert numbers == projector + lora - 2 * 2 * (32 - 16)  # ... and of v 16 x 2
    size = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < 4 * numbers + 200 * len(held)
    assert size < 0.15 * (run / "artifact" / "model.safetensors").stat().st_size


def test_all_that_was_made_carries_the_processor(run: Path, base: Path) -> None:
    wanted = AutoProcessor.from_pretrained(base)(images=llava.image(), text="<image> this", return_tensors="pt")
    for name in ("artifact", "merged"):
        made = loading.load_processor(run / name)(images=llava.image(), text="<image> this", return_tensors="pt")
        assert all(torch.equal(made[key], wanted[key]) for key in wanted)
        assert (run / name / "processor_config.json").is_file()
    assert loading.load_tokenizer(run / "artifact").eos_token == "</s>"


FRESH = """
import json, sys
sys.modules["solidify"] = sys.modules["peft"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
directory, picture = sys.argv[1:]
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
inputs = processor(images=Image.open(picture), text="USER: <image> What is this? ASSISTANT:", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1].tolist()
    said = model.generate(**inputs, max_new_tokens=5, do_sample=False)
print(json.dumps([logits, said[0].tolist()]))
"""


def test_the_merged_model_looks_at_an_image_in_a_fresh_process(run: Path, tmp_path: Path) -> None:
    """Processor and model from the directory alone, against the artifact with its adapter here."""
    llava.image("blue").save(tmp_path / "blue.png")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, str(run / "merged"), str(tmp_path / "blue.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    logits, said = json.loads(done.stdout.splitlines()[-1])
    model = solidify.load(run / "artifact", adapter=run / "adapter").eval()
    prompt = "USER: <image> What is this? ASSISTANT:"
    inputs = loading.load_processor(run / "artifact")(
        images=Image.open(tmp_path / "blue.png"), text=prompt, return_tensors="pt"
    )
    with torch.no_grad():
        here = model(**inputs).logits[0, -1]
        other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(1)}).logits[0, -1]
        assert model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist() == said
    assert torch.allclose(here, torch.tensor(logits), atol=2e-6)
    assert float((here - other).abs().max()) > 1e-3  # it does look at the image


def test_the_recipes_batches_are_of_one_kind(base: Path, rows: Path, tmp_path: Path) -> None:
    plan = loaded(base, rows)
    read = loading.load_base(str(base))
    model = solidify.attach(read.model, lora=LORA, train=[PROJECTOR])
    made, found = trainers.make_trainer(plan, tmp_path, model, read.processor)
    kinds, lengths = batching.modalities(found), batching.lengths(found)
    order = list(made._get_train_sampler())
    steps = [order[start : start + 4] for start in range(0, 24, 4)]
    assert sorted(order) == list(range(24))
    assert [len({kinds[row] for row in step}) for step in steps] == [1] * 6  # 16 rows with images, 8 without
    assert max(lengths) in [lengths[row] for row in steps[0]]
    with_images = [("pixel_values" in batch) for batch in made.get_train_dataloader()]
    assert with_images.count(True) == 8
    assert len(with_images) == 12
    probes = datasets.ragged(found, 2)
    assert [bool(probe.get("images")) for probe in probes] == [True] * 4 + [False] * 4
    assert len({len(probe["input_ids"]) for probe in probes}) > 2
    made.data_collator(probes)  # no image is cut


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parameter_groups.0.lr=1.0", r"parameter_groups\.0\.lr: unknown key; .*known here: parameters, learning_rate"),
        ("parameter_groups.0.learning_rate=-1", r"parameter_groups\.0\.learning_rate: .* greater than or equal to 0"),
        ("data.group_by=[size]", r"data\.group_by\.0: .*'modality' or 'length'"),
        ("data.images=image", r"data\.images: unknown key; did you mean 'image'"),
        ("adapter=null", "`training` needs an `adapter`"),
    ],
)
def test_a_recipe_is_strict_about_groups_and_images(base: Path, rows: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        loaded(base, rows, override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data={train: builtin:pydoc, group_by: [modality]}", r"data\.group_by: modality tells rows with images from"),
        ("training.packing=true", r"training\.packing is TRL's, whose trainer makes its batches itself"),
        ("training.remove_unused_columns=true", "would remove the images"),
        (
            "training.train_sampling_strategy=group_by_length",
            r"looks for lengths in pixel_values; write data\.group_by",
        ),
        ("parameter_groups.0.parameters=model.vision_tower", "'model.vision_tower' names nothing that is trained"),
    ],
)
def test_a_plan_says_what_does_not_go_with_images(base: Path, rows: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        dry_run.plan(loaded(base, rows, override))


def test_a_plan_says_that_a_base_cannot_put_images_among_tokens(base: Path, rows: Path, copy_of: Any) -> None:
    (bare := copy_of(base)).joinpath("processor_config.json").unlink()
    with pytest.raises(RecipeError, match=r"data\.image: .* has no processor that can be loaded"):
        dry_run.plan(loaded(bare, rows))


# Batches without images, on one process and on several.


@pytest.mark.parametrize("tower", [True, False])
def test_a_step_on_text_alone_leaves_what_looks_at_images_as_it_is(rows: Path, tmp_path: Path, tower: bool) -> None:
    """No gradient, no decay, no momentum: whether the vision tower is trained or not."""
    train = [PROJECTOR, *(["model.vision_tower.encoder.layers.1.mlp"] if tower else [])]
    model = attached(lora=LORA, train=train)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    made = examples(rows)
    text = made.select([place for place, kind in enumerate(batching.modalities(made)) if not kind])
    trainer(model, tmp_path, text, images.Collator(llava.processor()), weight_decay=0.5, max_steps=2).train()
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora" in name}
    with_images = made.select([0, 1, 3, 4])
    trainer(model, tmp_path, with_images, images.Collator(llava.processor()), max_steps=1).train()
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == set(before)


def test_two_processes_share_rows_with_and_without_images(tmp_path: Path) -> None:
    """One has images in its batch and the other none; the step is that of one process. Cut, they go on as if not."""
    llava.data(tmp_path)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests" / "support"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    script = [str(ROOT / "tests" / "support" / "grouped_processes.py"), str(tmp_path)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    for command in ([*launcher, *script, "2"], [sys.executable, *script, "1"]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 2))
    assert set(one) == set(two)
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    assert all(float((one[name] - two[name]).abs().max()) < 5e-6 * largest for name in one)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for rank in (first, second):
        assert rank["equal"]  # of what is trained, after all
        assert rank["again"] == rank["whole"][-len(rank["again"]) :]
        assert len(rank["whole"]) == 12
    for epoch in (slice(0, 6), slice(6, 12)):
        seen = [row for rank in (first, second) for batch in rank["whole"][epoch] for row in batch]
        assert sorted(seen) == list(range(24))
    kinds = [row["image"] is not None for row in llava.texts(24)]
    for mine, theirs in zip(first["whole"], second["whole"], strict=True):
        assert len({kinds[row] for row in (*mine, *theirs)}) == 1
    assert first["rates"][f"learning_rate/{PROJECTOR}"] == pytest.approx(10 * first["rates"]["learning_rate"])
