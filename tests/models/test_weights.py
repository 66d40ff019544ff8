"""Weights to files and back: tied tensors, foreign nestings, misfits, damage, crashes while writing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.models import create, load_weights, save_weights
from limbeck.models import weights as weights_room


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class Tied(nn.Module):
    """A language model's tied embedding, and a view into a larger tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("part", torch.arange(12.0).view(3, 4)[:, 1:3])
        self.part: Tensor


def test_tied_tensors_and_views(tmp_path: Path) -> None:
    net = Tied()
    save_weights(net, tmp_path / "net.safetensors", metadata={"name": "tied"})
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert set(file.keys()) == {"embed.weight", "part"}
        assert file.metadata() == {"format": "pt", "name": "tied"}
    again = Tied()
    again.part = torch.zeros(3, 2)
    assert load_weights(again, tmp_path / "net.safetensors") == ([], [])
    assert same(net, again)
    assert again.head.weight is again.embed.weight


def test_one_tied_name_is_not_enough_for_an_untied_model(tmp_path: Path) -> None:
    save_weights(Tied(), tmp_path / "net.safetensors")
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(ModelError, match=r"1 missing: head\.weight"):
        load_weights(untied, tmp_path / "net.safetensors")


@pytest.mark.parametrize("suffix", ["pt", "pth"])
@pytest.mark.parametrize("nest", [None, "state_dict", "model_state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_torch_files(tmp_path: Path, suffix: str, nest: str | None, prefix: str) -> None:
    net, again = small(), small()
    state: dict[str, object] = {prefix + key: tensor for key, tensor in net.state_dict().items()}
    content = {nest: state, "epoch": 3, "best": torch.tensor(0.5)} if nest else state
    torch.save(content, tmp_path / f"net.{suffix}")
    load_weights(again, tmp_path / f"net.{suffix}")
    assert same(net, again)


def test_a_model_whose_own_names_start_with_module(tmp_path: Path) -> None:
    net, again = nn.Module(), nn.Module()
    net.module, again.module = nn.Linear(2, 2), nn.Linear(2, 2)
    save_weights(net, tmp_path / "net.safetensors")
    load_weights(again, tmp_path / "net.safetensors")
    assert same(net, again)


def test_folders(tmp_path: Path) -> None:
    hub, student, again = small(), small(), small()
    save_weights(hub, tmp_path / "model.safetensors")
    load_weights(again, tmp_path)
    assert same(hub, again)
    save_weights(student, tmp_path / "student.safetensors")
    load_weights(again, str(tmp_path))
    assert same(student, again)


def test_old_files_without_step_counters(tmp_path: Path) -> None:
    net, again = small(), small()
    state = {key: tensor for key, tensor in net.state_dict().items() if "num_batches_tracked" not in key}
    torch.save(state, tmp_path / "net.pt")
    assert load_weights(again, tmp_path / "net.pt") == ([], [])
    assert same(net, again)


def test_misfits_are_listed_in_one_message_and_change_nothing(tmp_path: Path) -> None:
    state = small().state_dict()
    state["extra"] = torch.zeros(1)
    del state["1.running_mean"]
    state["2.weight"] = torch.zeros(3, 4)
    torch.save(state, tmp_path / "net.pt")
    net = small()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(net, tmp_path / "net.pt")
    message = str(caught.value)
    assert "missing: 1.running_mean" in message
    assert "1 unexpected: extra" in message
    assert "1 of another shape: 2.weight [3, 4] in the file, [2, 4] in the model" in message
    assert "num_classes" in message
    assert "\n" not in message
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_long_lists_are_cut(tmp_path: Path) -> None:
    save_weights(create("resnet20"), tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match=r"216 missing: .*, \.\.\.") as caught:
        load_weights(create("resnet56"), tmp_path / "net.safetensors")
    assert len(str(caught.value)) < 600


def test_option_a_weights_say_so(tmp_path: Path) -> None:
    save_weights(create("resnet20_a"), tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match="option A shortcuts: write resnet"):
        load_weights(create("resnet20"), tmp_path / "net.safetensors")


def test_lenient_loading_reports_what_it_passed_over(tmp_path: Path) -> None:
    body, net = nn.Sequential(nn.Linear(3, 4)), small()
    save_weights(body, tmp_path / "body.safetensors")
    misfits = load_weights(net, tmp_path / "body.safetensors", strict=False)
    assert misfits.unexpected == []
    assert "2.weight" in misfits.missing
    assert torch.equal(net[0].weight, body[0].weight)
    with pytest.raises(ModelError, match="of another shape"):
        load_weights(nn.Sequential(nn.Linear(3, 5)), tmp_path / "body.safetensors", strict=False)
    with pytest.raises(ModelError, match="unexpected: 0.bias, 0.weight"):  # nothing in common is no success
        load_weights(nn.Embedding(2, 2), tmp_path / "body.safetensors", strict=False)


def test_whole_models_are_not_unpickled(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="more than tensors.*state_dict"):
        load_weights(small(), tmp_path / "net.pt")


def test_what_is_no_weights_file(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "log.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "net.onnx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "empty.pt").touch()
    for name, said in {
        "log.pt": "no weights in this file; found keys epoch, lr",
        "list.pt": "found list",
        "net.onnx": r"found \.onnx; wanted \.safetensors",
        "empty": "found nothing; wanted student.safetensors or model.safetensors",
        "absent.pt": "no such file",
        "empty.safetensors": "damaged or truncated",
        "empty.pt": "damaged or truncated",
    }.items():
        with pytest.raises(ModelError, match=said):
            load_weights(small(), tmp_path / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_weights(small(), folder / "whole.safetensors")
    torch.save(small().state_dict(), folder / "whole.pt")
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files(files: Path, kind: str, share: float) -> None:
    whole = (files / f"whole.{kind}").read_bytes()
    (files / f"cut.{kind}").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelError):
        load_weights(small(), files / f"cut.{kind}")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@settings(max_examples=150)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_flipped_bits_give_a_limbeck_error_or_fitting_weights(files: Path, kind: str, share: float, bit: int) -> None:
    whole = bytearray((files / f"whole.{kind}").read_bytes())
    whole[int(share * len(whole))] ^= 1 << bit
    (files / f"flipped.{kind}").write_bytes(whole)
    net = small()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    try:
        misfits = load_weights(net, files / f"flipped.{kind}")
    except ModelError:
        assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    else:
        assert misfits == ([], [])


@pytest.mark.parametrize("header", [b"{}", b"[]", b'{"a": 1}', b"\xff\xfe", b'{"a": {"dtype": "F32"}}'])
def test_odd_headers(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError):
        load_weights(small(), tmp_path / "odd.safetensors")


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = small()
    save_weights(old, tmp_path / "net.safetensors")

    def stop(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(weights_room.os, "replace", stop)
    with pytest.raises(ModelError, match="cannot be written: the disk is full"):
        save_weights(small(), tmp_path / "net.safetensors")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    again = small()
    load_weights(again, tmp_path / "net.safetensors")
    assert same(old, again)


def test_writing_makes_folders_and_readable_files(tmp_path: Path) -> None:
    save_weights(small(), tmp_path / "a" / "b" / "net.safetensors")
    assert (tmp_path / "a" / "b" / "net.safetensors").stat().st_mode & 0o644 == 0o644
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot be written"):
        save_weights(small(), tmp_path / "file" / "net.safetensors")


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"count": 3}

    with pytest.raises(ModelError, match="_extra_state: safetensors holds only tensors; found dict"):
        save_weights(Extra(2, 2), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
