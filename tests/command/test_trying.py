"""`generate`: a text goes on, or a chat; with artifacts, stock models, and several adapters side by side."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import solidify
from solidify.__main__ import main

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*words: object, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["solidify", "generate", *map(str, words), "--max-new-tokens", "6"])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a chat template, an artifact of it, two adapters of that, and two of plain PEFT."""
    root = tmp_path_factory.mktemp("made")
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2, "user": 3, "assistant": 4, "system": 5}
    words |= {f"w{number}": number for number in range(6, 128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    wrapped.chat_template = TEMPLATE
    pico.llama(eos_token_id=2).save_pretrained(root / "base")
    wrapped.save_pretrained(root / "base")
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    pico.artifact(model, solidify.replace(model, "**.mlp", pico.wrappers.Scaled), root / "artifact")
    for number, name in enumerate(("one", "two"), 1):
        peft_model = solidify.attach(solidify.load(root / "artifact"), lora={"r": 2, "target_modules": ["**.q_proj"]})
        moved(peft_model, number)
        solidify.save_adapter(peft_model, root / name / "adapter")
        plain = get_peft_model(
            AutoModelForCausalLM.from_pretrained(root / "base"), LoraConfig(target_modules=["q_proj"])
        )
        moved(plain, number)
        plain.save_pretrained(root / f"plain_{name}")
    return root


def moved(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=2.0)


@pytest.mark.parametrize("name", ["artifact", "base"])
def test_a_text_goes_on(made: Path, run: Run, name: str) -> None:
    code, out, err = run(made / name, "--prompt", "w7 w8")
    assert code == 0, err
    assert out.startswith("w7 w8 w") and "--chat would put it into" in err


@pytest.mark.parametrize("name", ["artifact", "base"])
def test_a_chat_passes_through_the_template(made: Path, run: Run, name: str) -> None:
    code, out, err = run(made / name, "--chat", "--prompt", "w7 w8", "--system", "w9")
    assert code == 0, err
    _, whole, _ = run(made / name, "--prompt", "system w9 </s> user w7 w8 </s> assistant")
    assert whole.strip().endswith(out.strip()) and "w7 w8" not in out


def test_each_line_is_a_message_and_what_was_said_counts(made: Path, run: Run) -> None:
    code, out, err = run(made / "artifact", "--chat", typed="w7\n\nw8\n")
    assert code == 0, err
    first, second = out.splitlines()
    _, whole, _ = run(made / "artifact", "--prompt", f"user w7 </s> assistant {first} </s> user w8 </s> assistant")
    assert whole.strip().endswith(second)


@pytest.mark.parametrize(
    ("model", "adapters"), [("artifact", ("one/adapter", "two/adapter")), ("base", ("plain_one", "plain_two"))]
)
def test_several_adapters_answer_side_by_side(made: Path, run: Run, model: str, adapters: tuple[str, str]) -> None:
    words = (made / model, "--prompt", "w7 w8")
    alone = [run(*words)[1], *(run(*words, "--adapter", made / each)[1] for each in adapters)]
    assert len(set(alone)) == 3
    code, out, err = run(*words, *(word for each in adapters for word in ("--adapter", made / each)))
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "without an adapter" and lines[2] == adapters[0] and lines[4] == adapters[1]
    assert [f"{line}\n" for line in lines[1::2]] == alone
    code, out, _ = run(made / model, "--chat", "--adapter", made / adapters[0], typed="w7\n")
    assert code == 0 and len(out.splitlines()) == 1


def test_what_cannot_be_said_is_refused(made: Path, run: Run, tmp_path: Path) -> None:
    assert run(made / "artifact")[0] == 2
    assert "give a text to continue (--prompt), or talk to it (--chat)" in run(made / "artifact")[2]
    assert "give --chat too" in run(made / "artifact", "--prompt", "w7", "--system", "x")[2]
    pico.llama().save_pretrained(tmp_path / "base")
    code, _, err = run(tmp_path / "base", "--prompt", "w7")
    assert code == 2 and "has no tokenizer" in err
    AutoModelForCausalLM.from_pretrained(made / "base").save_pretrained(tmp_path / "mute")
    saved = PreTrainedTokenizerFast.from_pretrained(made / "base")
    saved.chat_template = None
    saved.save_pretrained(tmp_path / "mute")
    code, _, err = run(tmp_path / "mute", "--chat", typed="w7\n")
    assert code == 2 and "has no chat template" in err
    code, _, err = run(made / "base", "--prompt", "w7", "--adapter", made / "nowhere")
    assert code == 2 and "nowhere" in err


def test_an_adapter_of_a_plain_run_speaks_on_its_base_alone(made: Path, run: Run, tmp_path: Path) -> None:
    """It is ours: its files are compared with its manifest, and its base with the one that it was trained on."""
    peft_model = solidify.attach(
        AutoModelForCausalLM.from_pretrained(made / "base"), lora={"r": 2, "target_modules": ["**.q_proj"]}
    )
    moved(peft_model, 1)
    adapter = solidify.save_adapter(peft_model, tmp_path / "adapter")
    code, out, err = run(made / "base", "--prompt", "w7 w8", "--adapter", adapter)
    assert code == 0, err
    assert out != run(made / "base", "--prompt", "w7 w8")[1]
    other = AutoModelForCausalLM.from_pretrained(made / "base")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    shutil.copytree(made / "base", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    code, out, err = run(tmp_path / "other", "--prompt", "w7 w8", "--adapter", adapter)
    assert (code, out) == (2, "")
    assert "was trained on another base than" in err and "the weights differ" in err
    weights = adapter / "adapter_model.safetensors"
    save_file({key: tensor * 2 for key, tensor in load_file(weights).items()}, weights)
    code, out, err = run(made / "base", "--prompt", "w7 w8", "--adapter", adapter)
    assert (code, out) == (2, "") and "is not what was written" in " ".join(err.split())


def test_no_regular_expression_of_an_adapter_s_file_is_run(
    made: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It becomes the names of what the file has tensors for, before PEFT sees it; the answer is the same."""
    shutil.copytree(made / "plain_one", tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    config["target_modules"] = r".*\.(q)_proj"
    (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps(config))
    expected = run(made / "base", "--prompt", "w7 w8", "--adapter", made / "plain_one")
    seen: list[object] = []
    inject = LoraModel.inject_adapter

    def watched(self: LoraModel, model: torch.nn.Module, name: str, *args: object, **kwargs: object) -> None:
        seen.append(self.peft_config[name].target_modules)
        inject(self, model, name, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "inject_adapter", watched)
    code, out, err = run(made / "base", "--prompt", "w7 w8", "--adapter", tmp_path / "plain")
    assert (code, out) == (0, expected[1]), err
    assert seen == [{f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}]
    assert "whether it was trained on these weights was not looked at" in " ".join(err.split())


def test_the_layout_of_experts_that_was_found_is_printed(made: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(made / "base", tmp_path / "base")
    base = pico.olmoe(eos_token_id=2)
    base.save_pretrained(tmp_path / "base")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(base, LoraConfig(r=3, target_modules=[], target_parameters=targets))
    moved(model, 1)
    model.save_pretrained(tmp_path / "experts")
    for words, layout in (((), "PEFT's fused layout (nothing marks"), (("--layout", "grouped"), "grouped by expert")):
        code, _, err = run(tmp_path / "base", "--prompt", "w7", "--adapter", tmp_path / "experts", *words)
        assert code == 0 and "its experts have" in err and layout in " ".join(err.split()), err
