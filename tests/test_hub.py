"""Uploads: what goes to the hub, the card of each, and what is refused."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pages import ROOT, write_files
from transformers import AutoModelForCausalLM

import effllm
from effllm.checkpoint import resolve
from effllm.errors import EffllmError, UsageError

PAGE = ROOT / "docs" / "integrations.md"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a packed model and the page's own files."""
    folder = tmp_path_factory.mktemp("stage")
    effllm.compress_folder("demo", folder / "demo-uniform-4bit", "uniform-4bit", check=False)
    write_files(PAGE, folder)
    return folder


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as an upload needs; keeps the files of the last commit."""

    files: dict[str, bytes] = {}

    def do_GET(self) -> None:
        self.answer(404, {}, "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        lines = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        address = f"http://{self.headers['Host']}/me/model"
        if "/preupload/" in self.path:
            names = [file["path"] for file in lines[0]["files"]]
            self.answer(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            files = [line["value"] for line in lines if line["key"] == "file"]
            Hub.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{address}/commit/{'1' * 40}"})
        else:
            self.answer(200, {"url": address})

    def answer(self, status: int, value: dict, error: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    """A hub on this machine that huggingface_hub talks to."""
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    Hub.files = {}
    yield Hub
    server.shutdown()


def test_push_of_a_folder_keeps_its_card(hub, stage, monkeypatch) -> None:
    monkeypatch.chdir(stage)
    exec((stage / "push.py").read_text())
    folder = stage / "demo-uniform-4bit"
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    card = hub.files["README.md"].decode()
    assert "license: apache-2.0" in card and "| plan | uniform-4bit |" in card and "| base model | demo |" in card


def test_push_of_a_live_model_writes_a_card(hub, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(shutil.copytree(resolve("demo"), tmp_path / "my-model"))
    effllm.compress(model, "uniform-8bit")
    effllm.push_to_hub(model, "me/model")
    card = hub.files["README.md"].decode()
    size = len(hub.files["model.safetensors"])
    for line in ("license: apache-2.0", "| base model | my-model |", "| plan | uniform-8bit |", "| bits per weight | 8.19 |",
                 f"| weight files | {size:,} bytes", "effllm.load('me/model')"):  # fmt: skip
        assert line in card
    assert "base_model:" not in card and "perplexity" not in card and "KL" not in card
    model.save_pretrained(tmp_path / "saved")
    effllm.push_to_hub(tmp_path / "saved", "me/model", base_model="me/original")
    assert "base_model: me/original\n" in hub.files["README.md"].decode()
    model.push_to_hub("me/model")
    assert "- effllm" in hub.files["README.md"].decode()


def test_push_refuses_what_is_not_a_finished_packed_folder(hub, stage, llama_folder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not packed"):
        effllm.push_to_hub(llama_folder, "me/model")
    with pytest.raises(UsageError, match="not packed"):
        effllm.push_to_hub(AutoModelForCausalLM.from_pretrained(llama_folder), "me/model")
    broken = shutil.copytree(stage / "demo-uniform-4bit", tmp_path / "broken")
    next(broken.glob("model-00002*")).unlink()
    with pytest.raises(EffllmError, match="model-00002"):
        effllm.push_to_hub(broken, "me/model")
    unfinished = shutil.copytree(stage / "demo-uniform-4bit", tmp_path / "unfinished")
    (unfinished / "journal.jsonl").write_text("")
    with pytest.raises(EffllmError, match="unfinished"):
        effllm.push_to_hub(unfinished, "me/model")
    assert not hub.files
