import json
import re
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from hub import Hub
from tiny import write_tiny

from lamina.errors import ConfigError, ModelError
from lamina.model.checkpoint import stored_tensors
from lamina.model.locate import locate
from lamina.model.weights import ModelSettings, load_model

LOCATE = """
import sys
from lamina.errors import ModelError
from lamina.model.locate import locate
try:
    print(locate({name!r}, {revision!r}))
except ModelError as error:
    sys.exit("ModelError " + str(error))
"""


def vocabulary(done: CompletedProcess[str]) -> int:
    """Of the model in the folder that the client has printed."""
    assert done.returncode == 0, done.stderr
    return load_model(done.stdout.strip(), "fp32", "cpu").architecture.vocabulary


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", shards=2)


def find(name: str = "owner/model", revision: str | None = None) -> str:
    return LOCATE.format(name=name, revision=revision)


def test_local_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(model) == locate(str(model)) == model
    monkeypatch.setenv("HOME", str(model.parent))
    assert locate("~/model") == model


def test_local_folder_has_no_revision(model: Path) -> None:
    with pytest.raises(ModelError, match="model: a local folder has no revision 'v1'; leave --revision out"):
        locate(model, "v1")


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "three/part/name", "model", "owner/.."])
def test_neither_folder_nor_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such folder, and not an id on the hub \(owner/name\); check the name"):
        locate(name)


def test_nothing_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="model: nothing is named, expected a folder or an id on the hub"):
        locate("")
    with pytest.raises(ConfigError, match="^model: found '', expected text of at least one character$"):
        ModelSettings(model="")


def test_slip_in_a_folders_name(model: Path) -> None:
    folder = model.parent / "runs"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"runs/demo-9: no such folder; .*runs holds no folder$"):
        locate(folder / "demo-9")
    for number in range(1, 9):
        (folder / f"demo-{number}").mkdir()
    with pytest.raises(ModelError, match=r"runs holds demo-1, demo-2, .*, demo-8$"):
        locate(folder / "demo-9")
    (folder / "own-1").mkdir()
    with pytest.raises(ModelError, match=r", demo-8 and 1 more$"):
        locate(folder / "demo-9")


def test_download_takes_only_what_is_needed(hub: Hub, model: Path, tmp_path: Path) -> None:
    for extra in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "LICENSE.txt", "tokenizer.model"):
        (model / extra).write_text("x")
    commit = hub.publish("owner/model", model)
    done = hub.run(find(), tmp_path / "home")
    assert vocabulary(done) == 64
    folder = Path(done.stdout.strip())
    assert folder.name == commit
    assert {path.name for path in folder.iterdir()} == {
        "LICENSE.txt",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    }


def test_pinned_revision_stays_when_the_branch_moves(hub: Hub, model: Path, tmp_path: Path) -> None:
    first = hub.publish("owner/model", model, tag="v1")
    write_tiny(model, vocab_size=96)
    second = hub.publish("owner/model", model)
    for revision, commit, size in ((first, first, 64), ("v1", first, 64), (None, second, 96)):
        done = hub.run(find(revision=revision), tmp_path / "home")
        assert vocabulary(done) == size
        assert Path(done.stdout.strip()).name == commit


def test_complete_download_serves_without_the_hub(hub: Hub, model: Path, tmp_path: Path) -> None:
    commit = hub.publish("owner/model", model)
    assert hub.run(find(), tmp_path / "home").returncode == 0
    asked = len(hub.requests)
    offline = hub.run(find(), tmp_path / "home", online=False)
    unreachable = hub.run(find(), tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    pinned = hub.run(find(revision=commit), tmp_path / "home")
    assert [vocabulary(done) for done in (offline, unreachable, pinned)] == [64, 64, 64]
    assert len(hub.requests) == asked


def test_offline_without_the_model(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.publish("owner/model", model)
    done = hub.run(find(), tmp_path / "home", online=False)
    assert done.stderr.splitlines()[-1] == (
        "ModelError owner/model: HF_HUB_OFFLINE is set and the model is not in the cache; "
        "run once with a connection, or name a local folder instead"
    )
    assert not hub.requests


def test_hub_that_cannot_be_reached(hub: Hub, tmp_path: Path) -> None:
    done = hub.run(find(), tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")  # the discard port: nobody answers
    assert "ModelError owner/model: the hub cannot be reached and the model is not in the cache; run" in done.stderr


def test_unknown_repository(hub: Hub, tmp_path: Path) -> None:
    for token in ({}, {"HF_TOKEN": "hf_some"}):
        done = hub.run(find("owner/absent"), tmp_path / "home", **token)
        assert "ModelError owner/absent: no such folder and no such model on the hub, or it is private" in done.stderr


def test_unknown_revision(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.publish("owner/model", model)
    done = hub.run(find(revision="v9"), tmp_path / "home")
    assert "ModelError owner/model: the model has no revision 'v9' on the hub; check --revision" in done.stderr


@pytest.mark.parametrize("token", ["", "hf_some"])
def test_gated_model(hub: Hub, model: Path, tmp_path: Path, token: str) -> None:
    """Without a token the hub answers 401, with one that has not accepted the licence 403."""
    hub.publish("owner/model", model)
    hub.gated.add("owner/model")
    done = hub.run(find(), tmp_path / "home", HF_TOKEN=token)
    assert done.stderr.splitlines()[-1] == (
        "ModelError owner/model: access is restricted; accept the licence at huggingface.co/owner/model, "
        "then run: hf auth login"
    )


def test_connection_cut_inside_a_file_goes_on_there(hub: Hub, tmp_path: Path) -> None:
    """huggingface_hub keeps what it has received in pieces of 10 MiB; the file has 14 MB."""
    hub.publish("owner/model", write_tiny(tmp_path / "model", vocab_size=54000))
    hub.cuts["model.safetensors"] = [12_000_000]
    done = hub.run(find(), tmp_path / "home")
    assert vocabulary(done) == 54000
    asked = [request.split("/")[-1] for request in hub.requests if request.startswith("GET /owner")]
    assert set(asked) == {"config.json", "model.safetensors", f"model.safetensors bytes={10 * 2**20}-"}


@pytest.mark.slow
def test_cut_run_keeps_complete_files(hub: Hub, model: Path, tmp_path: Path) -> None:
    """The hub fails inside one shard: a clear message; offline then says partly; the next run asks for that shard only."""
    shard, home = "model-00001-of-00002.safetensors", tmp_path / "home"
    hub.publish("owner/model", model)
    hub.failing.add(shard)
    done = hub.run(find(), home)
    assert "ModelError owner/model: the hub answered 418; run again later: complete files are kept" in done.stderr
    offline = hub.run(find(), home, online=False)
    assert "ModelError owner/model: HF_HUB_OFFLINE is set and the model is only partly in the cache" in offline.stderr
    kept = {
        path.name for path in home.rglob("snapshots/*/*")
    }  # downloads run side by side: others may have been under way
    hub.failing.clear()
    hub.requests.clear()
    again = hub.run(find(), home)
    assert vocabulary(again) == 64
    asked = [request.split("/")[-1] for request in hub.requests if request.startswith("GET /owner")]
    assert shard in asked and kept and kept.isdisjoint(asked)


def test_connection_that_is_reset(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.publish("owner/model", model)
    hub.resets.add("model-00001-of-00002.safetensors")
    done = hub.run(find(), tmp_path / "home")
    assert "ModelError owner/model: the connection to the hub failed (" in done.stderr
    assert "run again: complete files are kept" in done.stderr


def test_cache_that_cannot_be_written(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.publish("owner/model", model)
    (tmp_path / "home").write_text("a file where the cache's folder should be")
    done = hub.run(find(), tmp_path / "home")
    assert "ModelError owner/model: the download cannot be kept (Not a directory); HF_HOME sets where" in done.stderr


def test_model_published_only_as_pickle(hub: Hub, model: Path, tmp_path: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")
    hub.publish("owner/model", model)
    done = hub.run(find(), tmp_path / "home")
    assert "ModelError owner/model: published only as pickles, which can run code when read; choose a " in done.stderr
    assert "from_pretrained('owner/model').save_pretrained('converted')" in done.stderr


@pytest.mark.slow
def test_model_published_without_weights(hub: Hub, model: Path, tmp_path: Path) -> None:
    """What is missing is told by whoever reads it; offline nobody can ask what else the repository holds."""
    for file in model.glob("model*"):
        file.unlink()
    hub.publish("owner/model", model)
    for online in (True, False):
        done = hub.run(find(), tmp_path / "home", online=online)
        with pytest.raises(
            ModelError, match=r"no model.safetensors and no model.safetensors.index.json; choose a model"
        ):
            vocabulary(done)


OUTLINE = """
import json, sys
from lamina.errors import ModelError
from lamina.model.checkpoint import stored_tensors
from lamina.model.outline import outline
try:
    folder = outline("owner/model")
except ModelError as error:
    sys.exit("ModelError " + str(error))
tensors = sorted((t.name, t.code, list(t.shape), t.file.name, t.size) for t in stored_tensors(folder).values())
print(json.dumps([str(folder), tensors, sorted(path.name for path in folder.iterdir())]))
"""


def outlined(hub: Hub, home: Path) -> tuple[Path, list[list[object]], list[str]]:
    """The folder without weights, what its headers say, and what is in it."""
    done = hub.run(OUTLINE, home)
    assert done.returncode == 0, done.stderr
    folder, tensors, files = json.loads(done.stdout)
    return Path(folder), tensors, files


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_outline_has_the_headers_and_fetches_no_weights(hub: Hub, tmp_path: Path, shards: int) -> None:
    model = write_tiny(tmp_path / "model", shards=shards)
    hub.publish("owner/model", model)
    folder, tensors, files = outlined(hub, tmp_path / "home")
    assert str(folder).endswith("/owner/model"), "what a message names"
    expected = stored_tensors(model).values()
    assert tensors == sorted([t.name, t.code, list(t.shape), t.file.name, t.size] for t in expected)
    assert files == sorted(path.name for path in model.iterdir())
    asked = [re.fullmatch(r"GET .*\.safetensors (.*)", request) for request in hub.requests]
    assert [match[1] for match in asked if match] == ["bytes=0-100000"] * shards
    assert not folder.parents[1].exists(), "the temporary folder outlives its process"
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.slow
def test_an_outline_of_a_model_in_the_cache_is_its_snapshot(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.publish("owner/model", model)
    whole = hub.run(find(), tmp_path / "home")
    assert str(outlined(hub, tmp_path / "home")[0]) == whole.stdout.strip()


@pytest.mark.slow
def test_what_is_stored_quantised_is_downloaded_to_be_outlined(hub: Hub, model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    hub.publish("owner/model", model)
    folder, *_ = outlined(hub, tmp_path / "home")
    for path in model.glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_after_an_outline_the_weights_are_still_to_come(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.publish("owner/model", model)
    outlined(hub, tmp_path / "home")
    for code in (find(), OUTLINE):
        offline = hub.run(code, tmp_path / "home", online=False)
        assert (
            "ModelError owner/model: HF_HUB_OFFLINE is set and the model is only partly in the cache" in offline.stderr
        )
    assert vocabulary(hub.run(find(), tmp_path / "home")) == 64


@pytest.mark.slow
def test_an_outline_of_what_is_not_there(hub: Hub, model: Path, tmp_path: Path) -> None:
    assert "no such folder and no such model on the hub" in hub.run(OUTLINE, tmp_path / "home").stderr
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")
    hub.publish("owner/model", model)
    assert "published only as pickles" in hub.run(OUTLINE, tmp_path / "home").stderr


@pytest.mark.slow
def test_an_outline_leaves_what_is_in_the_cache_as_it_is(hub: Hub, model: Path, tmp_path: Path) -> None:
    """A download that was cut off left one of two shards."""
    hub.publish("owner/model", model)
    hub.failing.add("model-00002-of-00002.safetensors")
    assert hub.run(find(), tmp_path / "home").returncode == 1
    hub.failing.clear()
    (kept,) = (tmp_path / "home").rglob("model-00001-of-00002.safetensors")
    assert hub.run(OUTLINE, tmp_path / "home").returncode == 0
    assert kept.read_bytes() == (model / kept.name).read_bytes()
