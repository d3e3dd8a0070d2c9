import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from specforge_core.data import packed_file, shards
from specforge_core.data.shards import (
    Document,
    FeatureWriter,
    Shard,
    load_index,
    load_target_config,
    load_target_head,
    plan_shards,
    save_target,
    teaching_in_document,
)
from specforge_core.drafts.base import TargetHead
from specforge_core.targets import TargetFeatures
from tests.data.feature_files import INDEX, damaged_shards, make_document, make_features, teaching, write_features

LENGTHS = (7, 5, 20, 1, 3)


def test_shards_hold_whole_documents_up_to_the_limit():
    # 7 + 5 = 12 fits exactly; 20 is over the limit and stands alone; 1 + 3 share the rest.
    assert plan_shards(LENGTHS, 12) == [range(2), range(2, 3), range(3, 5)]
    assert plan_shards(LENGTHS, 1000) == [range(5)]
    assert plan_shards(LENGTHS, 1) == [range(i, i + 1) for i in range(5)]


def test_every_document_is_read_back_as_it_was_captured(tmp_path: Path):
    write_features(tmp_path, LENGTHS, tokens_per_shard=12)
    shards = [Shard(tmp_path / record.name) for record in load_index(tmp_path).shards]
    assert [shard.lengths for shard in shards] == [[7, 5], [20], [1, 3]]
    number = 0
    for shard in shards:
        for i, length in enumerate(shard.lengths):
            document, features = make_document(number, length), make_features(number, length)
            stored = shard.read(i, length)
            assert shard.document_ids[i] == document.id
            assert torch.equal(stored.input_ids, document.input_ids_T.int())
            assert torch.equal(stored.loss_mask, document.loss_mask_T)
            assert torch.equal(stored.aux_hidden, features.aux_hidden_TLD.bfloat16())
            assert torch.equal(stored.last_hidden, features.last_hidden_UD.bfloat16())
            assert torch.equal(stored.target_argmax, features.argmax_U)
            assert torch.equal(stored.target_logsumexp, features.logsumexp_U)
            assert stored.aux_scale is None
            assert stored.last_scale is None
            number += 1
    assert number == len(LENGTHS)


def test_a_token_teaches_if_the_next_one_is_an_answer_s_token_of_its_document():
    assert teaching_in_document(torch.tensor([1, 0, 1, 1, 0, 1]) == 1).tolist() == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]
    assert teaching_in_document(torch.tensor([True])).tolist() == [False]


def test_a_document_can_be_read_in_part_and_its_last_token_teaches_no_more(tmp_path: Path):
    write_features(tmp_path, LENGTHS, tokens_per_shard=12)
    shard = Shard(tmp_path / "shard-00000.safetensors")
    # Of five tokens 0, 1 and 3 teach, of the first four 0 and 1, of the first two 0.
    assert teaching(5) == [0, 1, 3]
    for num_tokens, num_teaching in ((5, 3), (4, 2), (2, 1), (1, 0)):
        stored, features = shard.read(1, num_tokens), make_features(1, 5)
        assert stored.input_ids.tolist() == list(range(100, 100 + num_tokens))
        assert torch.equal(stored.aux_hidden, features.aux_hidden_TLD[:num_tokens].bfloat16())
        assert torch.equal(stored.last_hidden, features.last_hidden_UD[:num_teaching].bfloat16())
        assert torch.equal(stored.target_argmax, features.argmax_U[:num_teaching])


def test_what_is_read_is_the_mapped_file_itself_and_no_copy(tmp_path: Path):
    write_features(tmp_path, LENGTHS, tokens_per_shard=12)
    shard = Shard(tmp_path / "shard-00000.safetensors")
    whole, again = shard.read(1, 5), shard.read(1, 5)
    assert whole.aux_hidden.data_ptr() == again.aux_hidden.data_ptr()
    assert whole.last_hidden.data_ptr() == again.last_hidden.data_ptr()


def test_float8_features_are_stored_with_a_scale_for_each_vector(tmp_path: Path):
    features = TargetFeatures(
        # Largest elements 448, 896, 0, 7: scales 1, 2, none, 1/64.
        aux_hidden_TLD=torch.tensor([[[448.0, 1.0, -17.0, 0.0], [896.0, 2.0, -2.25, 0.0]],
                                     [[0.0, 0.0, 0.0, 0.0], [-7.0, 0.5, 0.25, 0.0]]]),
        last_hidden_UD=torch.tensor([[224.0, 0.0, 0.0, -1.0]]),
        argmax_U=torch.tensor([3], dtype=torch.int32),
        logsumexp_U=torch.tensor([0.5]),
    )  # fmt: skip
    document = Document("only", torch.tensor([5, 6]), torch.tensor([False, True]))
    FeatureWriter(tmp_path, INDEX.model_copy(update={"dtype": "float8"})).write([document], [features])
    stored = Shard(tmp_path / "shard-00000.safetensors").read(0, 2)
    assert stored.aux_hidden.dtype == stored.last_hidden.dtype == torch.float8_e4m3fn
    assert stored.aux_scale is not None
    assert stored.last_scale is not None
    # Between 16 and 32 the format has steps of 2: 17 is a tie, which goes to the even 16.
    assert stored.aux_hidden.float().tolist() == [
        [[448.0, 1.0, -16.0, 0.0], [448.0, 1.0, -1.125, 0.0]],
        [[0.0, 0.0, 0.0, 0.0], [-448.0, 32.0, 16.0, 0.0]],
    ]
    assert stored.aux_scale[:, 1].tolist() == [2.0, 2**-6]
    assert stored.aux_scale[0, 0] == 1.0
    assert stored.last_hidden.float().tolist() == [[448.0, 0.0, 0.0, -2.0]]
    assert stored.last_scale.tolist() == [0.5]


@pytest.mark.parametrize("is_followed", [False, True])
def test_the_record_has_the_sha256_of_the_file_whether_it_is_hashed_as_it_grows_or_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_followed: bool
) -> None:
    monkeypatch.setattr(packed_file, "HASH_BLOCK_BYTES", 100)
    monkeypatch.setattr(packed_file, "SYNC_BYTES", 50)
    # Two documents of 6 tokens or one of 20 are written at once.
    monkeypatch.setattr(shards, "WRITE_TOKENS", 12)
    lengths = (6, 6, 20, 1, 3, 5, 6, 6, 6, 6)
    documents = [make_document(i, length) for i, length in enumerate(lengths)]
    features = (make_features(i, length) for i, length in enumerate(lengths))
    writer = FeatureWriter(tmp_path, INDEX)
    record = writer.finish(writer.fill(0, documents, features, is_followed=is_followed))
    content = (tmp_path / record.name).read_bytes()
    assert (record.sha256, record.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    stored = Shard(tmp_path / record.name)
    for i, length in enumerate(lengths):
        assert torch.equal(stored.read(i, length).aux_hidden, make_features(i, length).aux_hidden_TLD.bfloat16())
        assert torch.equal(stored.read(i, length).last_hidden, make_features(i, length).last_hidden_UD.bfloat16())


def test_a_file_is_written_from_its_front_while_documents_come(tmp_path: Path) -> None:
    write_features(tmp_path, LENGTHS, tokens_per_shard=1000)
    with (tmp_path / "shard-00000.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    begins = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    in_order = sorted(begins, key=begins.__getitem__)
    assert in_order[:4] == ["document_offsets", "teaching_offsets", "aux_hidden", "last_hidden"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_features_on_a_gpu_are_stored_as_those_on_the_cpu(tmp_path: Path, dtype: str):
    documents = []
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        features = TargetFeatures(*(tensor.to(device) for tensor in make_features(0, 7)))
        writer = FeatureWriter(tmp_path / device, INDEX.model_copy(update={"dtype": dtype}))
        writer.write([make_document(0, 7)], [features])
        documents.append(Shard(tmp_path / device / "shard-00000.safetensors").read(0, 7))
    for on_gpu, on_cpu in zip(*documents, strict=True):
        if on_cpu is not None:
            # Divisions on a GPU may round otherwise, and then a tie falls to its other neighbour.
            tolerance = 1 / 8 if on_cpu.dtype == torch.float8_e4m3fn else 1e-6
            torch.testing.assert_close(on_gpu.float(), on_cpu.float(), rtol=tolerance, atol=0)


def test_the_file_format_is_what_the_module_says(tmp_path: Path):
    write_features(tmp_path, LENGTHS, tokens_per_shard=12)
    tensors = load_file(tmp_path / "shard-00000.safetensors")
    assert {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "input_ids": ("torch.int32", (12,)),
        "loss_mask": ("torch.bool", (12,)),
        "aux_hidden": ("torch.bfloat16", (12, 2, 4)),
        "last_hidden": ("torch.bfloat16", (7, 4)),
        "target_argmax": ("torch.int32", (7,)),
        "target_logsumexp": ("torch.float32", (7,)),
        "document_offsets": ("torch.int64", (3,)),
        "teaching_offsets": ("torch.int64", (3,)),
    }
    assert tensors["document_offsets"].tolist() == [0, 7, 12]
    # Before 1, 2, 4 and 5 of the first document, and 1, 2 and 4 of the second.
    assert tensors["teaching_offsets"].tolist() == [0, 4, 7]


def test_the_index_counts_what_its_shards_hold(tmp_path: Path):
    write_features(tmp_path, LENGTHS, tokens_per_shard=12)
    records = load_index(tmp_path).shards
    # Tokens 0, 3, 6 of a document are a prompt's: 7 - 3 and 5 - 2 answers; 20 - 7; 1 - 1 and 3 - 1.
    assert [(r.num_documents, r.num_tokens, r.num_loss_tokens) for r in records] == [(2, 12, 7), (1, 20, 13), (2, 4, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", *(record.name for record in records)]


def test_a_writer_goes_on_behind_the_finished_shards(tmp_path: Path):
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    for directory in (whole, interrupted):
        directory.mkdir()
    write_features(whole, LENGTHS, tokens_per_shard=12)
    write_features(interrupted, LENGTHS[:2], tokens_per_shard=12)
    # What a kill can leave: a shard that is written but not in the index, and a part of another.
    (interrupted / "shard-00001.safetensors").write_bytes(b"not in the index")
    (interrupted / ".shard-00002.safetensors.partial").write_bytes(b"half")
    writer = FeatureWriter(interrupted, INDEX)
    assert len(writer.index.shards) == 1
    for numbers in ((2,), (3, 4)):
        writer.write([make_document(i, LENGTHS[i]) for i in numbers], [make_features(i, LENGTHS[i]) for i in numbers])
    assert {path.name: path.read_bytes() for path in interrupted.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_a_directory_of_other_features_is_not_gone_on_with(tmp_path: Path):
    write_features(tmp_path, LENGTHS, tokens_per_shard=12)
    with pytest.raises(ValueError, match="begun with other features"):
        FeatureWriter(tmp_path, INDEX.model_copy(update={"layers": (1, 2)}))


def test_features_that_do_not_fit_their_documents_are_refused_and_leave_no_shard(tmp_path: Path):
    writer = FeatureWriter(tmp_path, INDEX)
    with pytest.raises(ValueError, match="zip"):
        writer.write([make_document(0, 5), make_document(1, 3)], [make_features(0, 5)])
    assert list(tmp_path.iterdir()) == []


def test_features_of_other_tokens_than_those_that_teach_are_refused(tmp_path: Path):
    features = make_features(0, 5)
    with pytest.raises(AssertionError, match="document-0: 1 rows of last_hidden for 3 tokens"):
        FeatureWriter(tmp_path, INDEX).write(
            [make_document(0, 5)], [features._replace(last_hidden_UD=features.last_hidden_UD[:1])]
        )


def test_features_of_an_older_format_are_refused_with_a_way_out(tmp_path: Path):
    write_features(tmp_path, LENGTHS, tokens_per_shard=12)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format_version": 1}))
    with pytest.raises(ValueError, match="features in format 1, this version reads 2; delete it and capture again"):
        load_index(tmp_path)


@pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 100)], ids=["gone", "cut short"])
def test_a_missing_or_short_shard_is_noticed_when_the_index_is_read(tmp_path: Path, damage):
    write_features(tmp_path, LENGTHS, tokens_per_shard=12)
    damage(tmp_path / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors has (0|100) bytes, its index says"):
        load_index(tmp_path)


def test_the_index_has_the_checksums_of_what_was_written(tmp_path: Path):
    write_features(tmp_path, LENGTHS, tokens_per_shard=12)
    assert damaged_shards(tmp_path) == []


def test_a_file_of_another_kind_is_no_shard(tmp_path: Path):
    (tmp_path / "shard-00000.safetensors").write_bytes(b"\x80\x04pickle, for example")
    with pytest.raises(SafetensorError):
        Shard(tmp_path / "shard-00000.safetensors")


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_target_head_is_read_back_and_a_tied_one_is_stored_once(tmp_path: Path, is_tied: bool):
    embedding_VD = torch.randn(10, 4).bfloat16()
    lm_head_VD = embedding_VD if is_tied else torch.randn(10, 4).bfloat16()
    norm_D = None if is_tied else torch.rand(4).bfloat16()
    save_target(tmp_path, {"model_type": "llama", "hidden_size": 4}, TargetHead(embedding_VD, lm_head_VD, norm_D))
    head = load_target_head(tmp_path)
    assert torch.equal(head.embedding_VD, embedding_VD)
    assert torch.equal(head.lm_head_VD, lm_head_VD)
    assert head.final_norm_D is None if norm_D is None else torch.equal(head.final_norm_D, norm_D)
    assert (head.lm_head_VD is head.embedding_VD) == is_tied
    assert load_target_config(tmp_path) == {"model_type": "llama", "hidden_size": 4}
    stored = load_file(tmp_path / "target_head.safetensors")
    assert set(stored) == ({"embedding"} if is_tied else {"embedding", "lm_head", "final_norm"})
