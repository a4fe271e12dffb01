"""Packed folders in programs that do not know effllm: by `run`, by `autoload`, with lm-eval, Trainer and peft."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from pages import ROOT, blocks, write_files
from torch import nn
from transformers import AutoModelForCausalLM

import effllm
from effllm.checkpoint import resolve
from effllm.data.text import packaged_text
from effllm.errors import EffllmError
from effllm.integrations import autoload

PAGE = ROOT / "docs" / "integrations.md"
LOAD = "from transformers import LlamaForCausalLM as L; print(type(L.from_pretrained('demo-uniform-4bit').lm_head))"
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft: pip install peft")
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'effllm[eval]'"
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that docs/integrations.md takes as given: a packed model, a text, an lm-eval task, its own files."""
    folder = tmp_path_factory.mktemp("stage")
    effllm.compress_folder("demo", folder / "demo-uniform-4bit", "uniform-4bit", check=False)
    text = packaged_text("evaluation.txt").read_text(encoding="utf-8")
    (folder / "my-text.txt").write_text(text, encoding="utf-8")
    write_files(PAGE, folder)
    write_task(folder / "tasks", [text[start : start + 300] for start in (0, 5000, 10000)])
    return folder


def write_task(folder: Path, texts: list[str]) -> None:
    """An lm-eval task `novel`: the perplexity of a few texts in a local file."""
    folder.mkdir()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    task = {
        "task": "novel",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}, "cache_dir": str(folder / "cache")},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    (folder / "novel.yaml").write_text(json.dumps(task), encoding="utf-8")


def page_command(beginning: str) -> str:
    """The command of the page that begins with `beginning`."""
    (found,) = [c for block in blocks(PAGE) if block.not_run for c in block.commands() if c.startswith(beginning)]
    return found


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in `folder`, with this interpreter's `effllm`, `python` and `lm_eval`."""
    words = shlex.split(command)
    words = [sys.executable, "-m", "effllm.cli", *words[1:]] if words[0] == "effllm" else words
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, check=False)


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment of its own that sees this one's packages and effllm; returns its interpreter."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    packages = next((tmp_path / "venv" / "lib").glob("*/site-packages"))
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (packages / "checkout.pth").write_text(f"{ROOT}\n")
    return tmp_path / "venv" / "bin" / "python"


def test_importing_effllm_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import effllm; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {"effllm", "effllm.integrations", "effllm.integrations.registration", "effllm.methods"}
    assert set(done.stdout.split()) <= ours | {"__future__"}


CHILD = "import sys, sitecustomize, transformers; print('effllm' in sys.modules, sitecustomize.MARK)"
PROGRAM = f"""
import subprocess, sys
import transformers
print("effllm" in sys.modules, [entry for entry in sys.path if entry.endswith("startup")], flush=True)
subprocess.run([sys.executable, "-c", {CHILD!r}])
sys.exit(7)
"""


def test_run_reaches_children_and_the_own_sitecustomize(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("MARK = 'the own one'\n")
    (tmp_path / "transformers.py").write_text("")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = shell("effllm run -- python program.py --model hf", tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.splitlines() == ["True []", "True the own one"]


def test_run_passes_on_options_and_is_silent_without_a_sitecustomize(tmp_path: Path) -> None:
    done = shell("effllm run python -c 'import sys; print(sys.argv[1:])' --help", tmp_path, PYTHONPATH="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "['--help']\n", "")


def test_run_names_a_command_that_is_not_there(tmp_path: Path) -> None:
    done = shell("effllm run -- lm_evil --tasks x", tmp_path)
    assert done.returncode == 2
    assert "'lm_evil'" in done.stderr and len(done.stderr.splitlines()) == 1


def test_run_starts_an_interpreter_without_effllm(environment: Path, tmp_path: Path) -> None:
    for file in environment.parent.parent.glob("lib/*/site-packages/*.pth"):
        file.unlink()
    (tmp_path / "transformers.py").write_text("print('its own')\n")
    done = shell(f"effllm run -- {environment} -c 'import transformers'", tmp_path, PYTHONPATH="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "its own\n", "")


def test_autoload(environment: Path, stage: Path) -> None:
    """The page's commands, in an environment of its own: on, loading without an import, off; gone with effllm."""
    effllm_command = f"{environment} -m effllm.cli"
    on, status, off = (page_command(f"effllm autoload {action}").replace("effllm", effllm_command, 1)
                       for action in ("on", "status", "off"))  # fmt: skip
    file = next(environment.parent.parent.glob("lib/*/site-packages")) / autoload.NAME
    assert shell(status, stage).stdout == "off\n"
    assert shell(on, stage).stdout == f"on: {file}\n"
    assert shell(status, stage).stdout == f"on: {file}\n"
    assert len(file.read_text().splitlines()) == 1
    loaded = shell(f'{environment} -c "{LOAD}"', stage)
    assert "CodecLinear" in loaded.stdout, loaded.stderr
    (file.parent / "checkout.pth").unlink()  # as after `pip uninstall effllm`
    (stage / "elsewhere").mkdir()
    (stage / "elsewhere" / "transformers.py").write_text("print('its own')\n")
    gone = shell(f"{environment} -c 'import transformers'", stage / "elsewhere", PYTHONPATH="")
    assert (gone.returncode, gone.stdout, gone.stderr) == (0, "its own\n", "")
    (file.parent / "checkout.pth").write_text(f"{ROOT}\n")
    assert shell(off, stage).stdout == f"off: {file} removed\n"
    assert not file.exists()
    assert shell(off, stage).returncode == 0


def test_autoload_replaces_another_versions_line_and_refuses_a_foreign_file(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    file = tmp_path / autoload.NAME
    file.write_text(f"import effllm  {autoload.MARK}\n")
    assert "another version" in autoload.status()
    assert "replaced" in autoload.turn_on() and file.read_text() == autoload.LINE
    assert autoload.turn_on().startswith("already on")
    file.write_text("import something\n")
    for action in (autoload.turn_on, autoload.turn_off, autoload.status):
        with pytest.raises(EffllmError, match="did not write"):
            action()
    assert file.read_text() == "import something\n"


def test_autoload_names_a_folder_that_cannot_be_written(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(EffllmError, match=r"cannot write .*nowhere.* effllm run"):
        autoload.turn_on()
    assert autoload.turn_off() == "off: there was no file"


def test_a_library_that_does_not_fit_ends_in_a_warning(tmp_path: Path) -> None:
    """A peft without the class that ours extends, as another version may be."""
    package = tmp_path / "peft" / "tuners"
    package.mkdir(parents=True)
    for file in (package / "__init__.py", package.parent / "__init__.py", package / "tuners_utils.py"):
        file.write_text("")
    done = shell(
        "effllm run -- python -c 'import peft.tuners.tuners_utils; print(1)'", tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert "RuntimeWarning: effllm does not work with this peft" in done.stderr


@needs_lm_eval
def test_lm_eval_command_equals_the_model_in_memory(stage: Path, tmp_path: Path, monkeypatch) -> None:
    command = page_command("effllm run -- lm_eval") + f" --device cpu --output_path {tmp_path / 'out.json'}"
    done = shell(command, stage)
    assert done.returncode == 0 and "RuntimeWarning: effllm" not in done.stderr, done.stderr
    (written,) = tmp_path.glob("out*.json")

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(stage)
    model = effllm.load("demo-uniform-4bit", dtype=torch.float32)
    tasks = TaskManager(include_path=str(stage / "tasks"), include_defaults=False)
    found = simple_evaluate(HFLM(pretrained=model, batch_size=1), tasks=["novel"], task_manager=tasks)
    results = json.loads(written.read_text())["results"]["novel"]
    assert results == json.loads(json.dumps(found["results"]["novel"], default=str))
    assert 1 < results["bits_per_byte,none"] < 2


@pytest.mark.slow
@needs_lm_eval
def test_lm_eval_without_effllm_fails(stage: Path) -> None:
    done = shell(page_command("effllm run -- lm_eval").partition("-- ")[2] + " --device cpu", stage)
    assert done.returncode != 0 and "effllm" in done.stderr.splitlines()[-1]


@needs_peft
def test_trainer_script_that_does_not_know_effllm(stage: Path, tokens: torch.Tensor) -> None:
    import peft

    done = shell(page_command("effllm run -- python"), stage)
    assert done.returncode == 0 and "RuntimeWarning: effllm" not in done.stderr, done.stderr
    model = effllm.load(stage / "demo-uniform-4bit")
    expected = model(tokens).logits
    adapted = peft.PeftModel.from_pretrained(model, stage / "adapter")
    assert not torch.equal(adapted(tokens).logits, expected)


def adapted(model: nn.Module, **settings) -> nn.Module:
    """`model` with LoRA adapters whose weights are random, so that they change its output."""
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def packed(stage: Path) -> nn.Module:
    return effllm.load(stage / "demo-uniform-4bit", dtype=torch.float32)


@needs_peft
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "down_proj"]], ids=["all-linear", "embedding"])
def test_adapters_train_save_and_reload_equal(targets, packed, stage, tokens, tmp_path: Path) -> None:
    import peft

    base = packed(tokens).logits
    model = adapted(packed, target_modules=targets)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(trained) > 15 and all(p.grad is not None and bool(p.grad.any()) for p in trained)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    expected = model(tokens).logits
    assert (expected - base).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    fresh = effllm.load(stage / "demo-uniform-4bit", dtype=torch.float32)
    assert torch.equal(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()(tokens).logits, expected)
    other = effllm.load(stage / "demo-uniform-4bit", dtype=torch.float32)
    other.load_adapter(tmp_path / "adapter")
    assert torch.equal(other.eval()(tokens).logits, expected)


@needs_peft
@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens"]], ids=["all-linear", "embedding"])
def test_merging_is_refused_in_words(targets, packed, tokens) -> None:
    model = adapted(packed, target_modules=targets)
    expected = model(tokens).logits
    layer = r"layers\.0\.self_attn\.q_proj is packed as quantize:bits=4"
    layer = r"model\.embed_tokens is packed as quantize:bits=8" if "embed_tokens" in targets else layer
    for merge in (model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True), model.merge_adapter):
        with pytest.raises(EffllmError, match=rf"{layer}.*dequantize\(\) first"):
            merge()
    assert torch.equal(model(tokens).logits, expected)


@needs_peft
def test_initialisations_that_change_the_base_weight_are_refused(packed) -> None:
    for start in ("pissa", "olora"):
        with pytest.raises(EffllmError, match="packed as quantize:bits=4"):
            adapted(packed, target_modules=["q_proj"], init_lora_weights=start)


@needs_peft
def test_dora_and_two_adapters_compute_as_on_the_decoded_model(packed, tokens) -> None:
    import peft

    results = []
    for model in (copy.deepcopy(packed), packed.dequantize()):
        model = adapted(model, target_modules=["q_proj", "down_proj"], use_dora=True)
        results.append([model(tokens).logits])
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=True))
        for adapter in ("second", "default"):
            model.set_adapter(adapter)
            results[-1].append(model(tokens).logits)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert not torch.equal(results[0][0], results[0][1])


@needs_peft
def test_merging_after_decoding(packed, tokens) -> None:
    model = adapted(packed, target_modules="all-linear")
    expected = model(tokens).logits
    model.dequantize()
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-3, atol=1e-3)


@needs_peft
def test_adapters_on_dense_layers_of_a_packed_model_merge(tokens) -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve("demo"), dtype=torch.float32)
    effllm.compress(model, {"steps": [{"sites": ["*.up_proj"], "use": "quantize:bits=8"}]})
    model = adapted(model, target_modules=["q_proj"])
    expected = model(tokens).logits
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, expected, rtol=1e-3, atol=1e-3)
