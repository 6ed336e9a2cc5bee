"""Models of the Hugging Face Hub, by name: what is downloaded, and what is said."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from qjax import checkpoints, cli
from tests.checkpoints import hub_server

SHIPPED = Path("examples/llm/checkpoint")


def reach(address, monkeypatch):
    """Has the Hub at an address, as HF_ENDPOINT would have in a new process."""
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + files)
    monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Folders of two branches, and the names of the files that were downloaded."""
    folders = {}
    for branch in hub_server.BRANCHES:
        folders[branch] = tmp_path / "hub" / branch
        folders[branch].mkdir(parents=True)
    with hub_server.serve(folders) as (address, asked):
        reach(address, monkeypatch)
        cache = str(tmp_path / "cache")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        yield folders, asked


def fill(folder):
    """The shipped model, and what qjax does not read."""
    shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
    for name in ("pytorch_model.bin", "modeling.py", "original/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of no use")


def test_a_directory_is_what_load_reads_and_no_more(hub):
    folders, asked = hub
    fill(folders["main"])
    directory = checkpoints.download(hub_server.NAME)
    wanted = {
        f.name for f in SHIPPED.iterdir() if f.suffix in (".json", ".safetensors")
    }
    assert {file.name for file in directory.rglob("*")} == wanted == {*asked}
    assert len(checkpoints.lazy(directory)) == 30
    asked.clear()
    assert checkpoints.download(f"{hub_server.NAME}@main") == directory
    assert asked == []


def test_the_index_says_which_shards(hub, monkeypatch):
    folders, asked = hub
    fill(folders["main"])
    shard = "model-00001-of-00001.safetensors"
    (folders["main"] / "model.safetensors").rename(folders["main"] / shard)
    (folders["main"] / "consolidated.safetensors").write_text("the same once more")
    names = [*checkpoints.shards.scan(SHIPPED)]
    index = json.dumps({"weight_map": dict.fromkeys(names, shard)})
    (folders["main"] / "model.safetensors.index.json").write_text(index)
    directory = checkpoints.download(hub_server.NAME)
    assert shard in asked
    assert "consolidated.safetensors" not in asked
    # What is there is used without a network.
    reach("http://127.0.0.1:9", monkeypatch)
    assert checkpoints.download(hub_server.NAME) == directory
    assert len(checkpoints.lazy(directory)) == 30


def test_revisions_and_files_of_other_names(hub):
    folders, _ = hub
    fill(folders["4.0bpw"])
    (folders["4.0bpw"] / "model.safetensors").rename(
        folders["4.0bpw"] / "output.safetensors"
    )
    directory = checkpoints.download(hub_server.NAME, revision="4.0bpw")
    assert len(checkpoints.lazy(directory)) == 30
    assert checkpoints.locate(f"{hub_server.NAME}@4.0bpw") == directory


def test_gguf_files_and_all_parts_of_split_ones(hub):
    folders, asked = hub
    parts = [f"model-{i:05}-of-00002.gguf" for i in (1, 2)]
    (folders["main"] / "q4").mkdir()
    for name in ("other.gguf", *(f"q4/{part}" for part in parts)):
        (folders["main"] / name).write_text(name)
    found = checkpoints.locate(f"{hub_server.NAME}/q4/{parts[1]}")
    assert found.name == parts[1]
    assert sorted(file.name for file in found.parent.iterdir()) == parts
    assert sorted(asked) == parts
    with pytest.raises(FileNotFoundError, match=r"org/model has no file 'none\.gguf'"):
        checkpoints.download("org/model/none.gguf")
    with pytest.raises(FileNotFoundError, match=r"name one: 'org/model/file\.gguf'"):
        checkpoints.download("org/model")


def test_commands_take_names(hub, tmp_path):
    fill(hub[0]["main"])
    runner = CliRunner()
    result = runner.invoke(cli.app, ["inspect", hub_server.NAME, "--json"])
    assert "/snapshots/" in json.loads(result.stdout)["directory"]
    target = tmp_path / "target"
    args = ["convert", hub_server.NAME, str(target), "--to", "gptq_v2"]
    assert runner.invoke(cli.app, args).exit_code == 0
    # Files, and no links into the cache.
    assert not any(file.is_symlink() for file in target.iterdir())
    assert {file.name for file in target.iterdir()} >= {"tokenizer.json", "config.json"}
    result = runner.invoke(cli.app, ["inspect", "org/other"])
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert "'org/other' is no path here, and not to be had" in said


@pytest.mark.parametrize(
    ("name", "keywords", "error", "message"),
    [
        ("model", {}, ValueError, "name='model' must be 'organization/model"),
        ("a/b/c", {}, ValueError, "must be 'organization/model"),
        ("a/b@1", {"revision": "2"}, ValueError, "revision='2' is another"),
        ("org/other", {}, FileNotFoundError, "'org/other' is no path here, and not to"),
        ("org/model@3.0bpw", {}, FileNotFoundError, "Not Found"),
    ],
)
def test_names_that_are_none(hub, name, keywords, error, message):
    with pytest.raises(error, match=message):
        checkpoints.download(name, **keywords)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="install huggingface_hub"):
        checkpoints.download("org/model")


def test_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert checkpoints.locate("org/model") == Path("org/model")
    for path in (tmp_path / "none", "none", "a/b/c", "./a/b"):
        assert checkpoints.locate(path) == Path(path)
