"""The embedding store: nothing finished is lost, nothing broken is passed on, and many writers share one folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from datamodules.durable import BusyError, CorruptFileError, DiskFullError
from datamodules.embedding_shards import write_shard
from datamodules.embedding_store import EmbeddingMeta, EmbeddingStore, StoredEmbedding, StoreMismatchError
from datamodules.records import Concept

SHAPES = {"merger": (4, 3), "deepstack.0": (2, 5)}
CONCEPT = Concept("repaint a chair", "activity", "a person is repainting a chair", "How do I do this activity?")


def embedding(id: str, seed: int = 0, **meta: object) -> StoredEmbedding:
    generator = torch.Generator().manual_seed(seed)
    E = {path: torch.randn(shape, generator=generator) for path, shape in SHAPES.items()}
    return StoredEmbedding(id, E, EmbeddingMeta(**{"harmful": True, "concept": CONCEPT, "loss": 0.25, **meta}))


def create(path: Path, **options: object) -> EmbeddingStore:
    return EmbeddingStore.create_or_open(path, "model@abc", SHAPES, **options)


def names(path: Path, pattern: str) -> list[str]:
    return sorted(file.name for file in path.glob(pattern))


# ---------------------------------------------------------------------------------------------------- contents
def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    first = embedding(
        "b", 1, style="sketch", scenario="fraud", settings_hash="9f", steps=31, seconds=1.5, revision="abc"
    )
    failed = StoredEmbedding(
        "c", None, EmbeddingMeta(harmful=False, status="failed", reason="step limit", loss=float("nan"))
    )
    with create(tmp_path) as store:
        store.append([first, failed])
        store.append([embedding("a", 2, source="real", media="img/1.png", concept=None)])
    store = EmbeddingStore.open(tmp_path, model_key="model@abc")
    assert store.ids() == ["a", "b", "c"]
    assert len(store) == 3
    assert "b" in store
    assert "d" not in store
    got = store.get("b")
    assert got.meta == first.meta
    assert all(torch.equal(got.E[path], first.E[path]) for path in SHAPES)
    assert store.get("c").E is None
    assert store.meta("c").reason == "step limit"
    assert store.meta("c").loss is None
    batch = store.batch(["a", "b"])
    assert {path: tuple(value.shape) for path, value in batch.items()} == {
        "merger": (2, 4, 3),
        "deepstack.0": (2, 2, 5),
    }
    assert torch.equal(batch["merger"][1], first.E["merger"])
    assert (store.ids(status="ok"), store.ids(source="real"), store.ids(harmful=False)) == (["a", "b"], ["a"], ["c"])
    with pytest.raises(ValueError, match=r"'c' has no E.*step limit"):
        store.batch(["c"])
    with pytest.raises(ValueError, match=r"no embedding 'zzz'"):
        store.batch(["zzz"])
    with pytest.raises(ValueError, match=r"opened for reading"):
        store.append([embedding("x")])


def test_latest_mark_counts(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append([embedding("a"), embedding("b", 1), embedding("c", 2)])
        store.mark("a", verified=False, answer="A chair.", judge="phrase")
        store.mark("b", verified=True, answer="Somebody repaints a chair.", judge="phrase")
        store.mark("a", verified=True, answer="A person repaints a chair.", judge="local")
        with pytest.raises(ValueError, match=r"no embedding 'zzz' to mark"):
            store.mark("zzz", verified=True)
    store = EmbeddingStore.open(tmp_path)
    assert store.ids(verified=True) == ["a", "b"]
    assert store.ids(verified=False) == []
    meta = store.meta("a")
    assert (meta.verified, meta.answer, meta.judge) == (True, "A person repaints a chair.", "local")
    assert store.meta("c").verified is None
    assert store.verify().verified == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_disk(tmp_path: Path, dtype: str) -> None:
    with create(tmp_path, dtype=dtype) as store:
        store.append([embedding("a", 3)])
        read = store.get("a").E["merger"]
        assert read.dtype == getattr(torch, dtype)
        assert torch.equal(read, embedding("a", 3).E["merger"].to(read.dtype))
        with safe_open(tmp_path / names(tmp_path, "shard-*")[0], "pt") as file:
            assert file.get_tensor("merger").dtype == read.dtype


def test_a_failed_embedding_may_be_replaced_but_not_a_good_one(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append(
            [StoredEmbedding("a", embedding("a").E, EmbeddingMeta(harmful=True, status="failed", reason="slow"))]
        )
        store.append([embedding("a", 5)])
        assert store.meta("a").status == "ok"
        assert store.ids(status="failed") == []
        with pytest.raises(ValueError, match=r"'a' is stored already"):
            store.append([embedding("a", 6)])
        with pytest.raises(ValueError, match=r"'n' is stored already"):
            store.append([embedding("n", 6), embedding("n", 7)])
        assert torch.equal(store.get("a").E["merger"], embedding("a", 5).E["merger"])
        assert store.verify().unused_rows == 1
        assert "n" not in store


# ------------------------------------------------------------------------------------------------ bad embeddings
def broken(change: str) -> StoredEmbedding:
    entry = embedding("bad")
    E, meta = dict(entry.E), entry.meta
    if change == "nan":
        E["merger"][1, 2] = float("nan")
    elif change == "inf":
        E["deepstack.0"][0, 0] = float("-inf")
    elif change == "large":
        E["merger"][0, 0] = 1e6
    elif change == "shape":
        E["merger"] = E["merger"][:3]
    elif change == "path":
        E.pop("merger")
    elif change == "no values":
        return StoredEmbedding("bad", None, meta)
    elif change == "no reason":
        meta = EmbeddingMeta(harmful=True, status="failed")
    elif change == "loss":
        meta = EmbeddingMeta(harmful=True, loss=float("inf"))
    return StoredEmbedding("bad", E, meta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", "1 values at merger are NaN or infinite"),
        ("inf", "1 values at deepstack.0 are NaN or infinite"),
        ("large", "1e\\+06 at merger is too large for torch.float16"),
        ("shape", r"shape \(3, 3\) at merger, expected \(4, 3\)"),
        ("path", r"values for \['deepstack.0'\], expected \['deepstack.0', 'merger'\]"),
        ("no values", "status 'ok' without values"),
        ("no reason", "needs a reason"),
        ("loss", "loss inf"),
    ],
)
def test_a_bad_embedding_is_refused_and_nothing_of_its_batch_is_stored(
    tmp_path: Path, change: str, message: str
) -> None:
    with create(tmp_path, dtype="float16") as store:
        with pytest.raises(ValueError, match=f"embedding 'bad': .*{message}"):
            store.append([embedding("good"), broken(change)])
        assert len(store) == 0
        assert names(tmp_path, "shard-*") == []
        store.append([embedding("good")])
        assert store.verify().embeddings == 1


def test_another_model_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    create(tmp_path).close()
    with pytest.raises(StoreMismatchError, match=r"store.json: model_key is 'model@abc', but 'model@def'"):
        EmbeddingStore.create_or_open(tmp_path, "model@def", SHAPES)
    with pytest.raises(StoreMismatchError, match=r"store.json: model_key"):
        EmbeddingStore.open(tmp_path, model_key="other@abc")
    with pytest.raises(StoreMismatchError, match=r"store.json: shapes"):
        EmbeddingStore.create_or_open(tmp_path, "model@abc", {"merger": (4, 3)})
    with pytest.raises(StoreMismatchError, match=r"store.json: dtype"):
        create(tmp_path, dtype="float16")
    with pytest.raises(ValueError, match=r"no embedding store here"):
        EmbeddingStore.open(tmp_path / "none")


# ------------------------------------------------------------------------------------------------ damage on disk
def damaged(tmp_path: Path, change: str) -> tuple[Path, EmbeddingStore]:
    with create(tmp_path) as store:
        store.append([embedding("a"), embedding("b", 1)])
    shard = next(tmp_path.glob("shard-*"))
    data = bytearray(shard.read_bytes())
    if change == "truncated":
        shard.write_bytes(data[:-7])
    elif change == "missing":
        shard.unlink()
    else:  # overwrite the first value of the first tensor
        start = 8 + int.from_bytes(data[:8], "little")
        data[start : start + 4] = b"\x00\x00\xc0\x7f" if change == "nan" else b"\x00\x00\x80\x3f"
        shard.write_bytes(data)
    return shard, EmbeddingStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", "expected .* truncated"),
        ("missing", "missing"),
        ("nan", "SHA-256 differs"),
        ("value", "SHA-256 differs"),
    ],
)
def test_verify_names_the_damaged_shard(tmp_path: Path, change: str, message: str) -> None:
    shard, store = damaged(tmp_path, change)
    with pytest.raises(CorruptFileError, match=f"{shard}.*{message}"):
        store.verify()


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (["b", "a"], {}, "row 0 is not 'a'"),
        (["a", "b"], {"merger": torch.full((2, 4, 3), float("nan"))}, r"NaN or infinity in merger of .*'a', 'b'"),
        (["a", "b"], {"merger": torch.zeros(2, 3, 4)}, "expected .*merger"),
        (["a", "b"], {"merger": torch.zeros(2, 4, 3, dtype=torch.float16)}, "expected .*merger"),
        (["a"], {}, "holds 1 ids"),
    ],
    ids=["swapped", "nan", "shape", "dtype", "ids"],
)
def test_verify_looks_behind_a_hash_that_agrees(
    tmp_path: Path, ids: list[str], values: dict[str, torch.Tensor], message: str
) -> None:
    shard, _ = damaged(tmp_path, "value")
    sound = {path: torch.zeros(2, *shape) for path, shape in SHAPES.items()}
    written = write_shard(tmp_path, shard.name, ids, {**sound, **values})
    (journal,) = tmp_path.glob("index-*.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    known = {"sha256": written.sha256, "bytes": written.bytes}
    journal.write_text("".join(json.dumps(e | known if e["op"] == "shard" else e) + "\n" for e in lines))
    with pytest.raises(CorruptFileError, match=f"{shard}.*{message}"):
        EmbeddingStore.open(tmp_path).verify()


@pytest.mark.parametrize(
    ("change", "message"), [("truncated", "truncated"), ("missing", "missing"), ("nan", "holds NaN")]
)
def test_reading_names_the_damaged_shard(tmp_path: Path, change: str, message: str) -> None:
    shard, store = damaged(tmp_path, change)
    with pytest.raises(CorruptFileError, match=f"{shard}.*{message}"):
        store.batch(["a", "b"])


def test_damage_is_not_laundered_by_merging(tmp_path: Path) -> None:
    shard, _ = damaged(tmp_path, "value")
    with create(tmp_path) as store:
        store.append([embedding("c", 2)])
        with pytest.raises(CorruptFileError, match=f"{shard}.*SHA-256"):
            store.compact()


def test_lost_journal_does_not_cost_the_shards(tmp_path: Path) -> None:
    with create(tmp_path, writer="w") as store:
        for i in range(10):
            store.append([embedding(str(i), i)])
    (tmp_path / "index-w.jsonl").unlink()
    with pytest.raises(CorruptFileError, match=r"index-w.jsonl: does not know 10 shards"):
        create(tmp_path, writer="w")
    assert len(names(tmp_path, "shard-*")) == 10


# --------------------------------------------------------------------------------------------------------- merging
def test_number_of_files_stays_bounded_and_readers_follow(tmp_path: Path) -> None:
    reader = None
    with create(tmp_path, merge_every=4) as store:
        for i in range(70):
            store.append([embedding(f"{i:02d}", i)])
            if i == 9:
                reader = EmbeddingStore.open(tmp_path)
        assert len(names(tmp_path, "shard-*")) == 1 + 0 + 1 + 2  # 70 = 1 * 64 + 0 * 16 + 1 * 4 + 2
        assert store.verify().embeddings == 70
    # This reader's index is from before the merges: the files it knows are gone.
    for one in (reader, EmbeddingStore.open(tmp_path)):
        values = one.batch(["09", "00", "05"])["merger"]
        assert all(torch.equal(v, embedding("", i).E["merger"]) for v, i in zip(values, (9, 0, 5), strict=True))


def test_shards_do_not_outgrow_their_limit(tmp_path: Path) -> None:
    limit = 2500
    with create(tmp_path, merge_every=3, shard_bytes=limit) as store:
        store.append([embedding(f"big{i:02d}", i) for i in range(30)])
        for i in range(60):
            store.append([embedding(f"{i:02d}", i)])
        assert (
            max(file.stat().st_size for file in tmp_path.glob("shard-*")) <= limit * 1.3
        )  # header and ids come on top
        assert store.verify().embeddings == 90
        assert torch.equal(store.get("big29").E["merger"], embedding("", 29).E["merger"])


def test_compact_merges_all_writers_and_sweeps_up(tmp_path: Path) -> None:
    stores = [create(tmp_path, writer=name) for name in ("rank0", "rank1")]
    for i in range(6):
        stores[i % 2].append([embedding(str(i), i)])
    with pytest.raises(BusyError, match=r"index-rank1.jsonl"):
        stores[0].compact()
    stores[1].close()
    (tmp_path / ".tmp-shard-rank1-000099.safetensors.abc").write_bytes(b"torn")
    (tmp_path / "shard-rank1-000099.safetensors").write_bytes(b"renamed, but never in the journal")
    stores[0].compact()
    assert len(names(tmp_path, "shard-*")) == 1
    assert names(tmp_path, ".tmp-*") == []
    stores[0].close()
    with create(tmp_path, writer="rank1") as again:  # whose shards another has merged
        again.append([embedding("6", 6)])
        assert again.verify().embeddings == 7
        assert all(torch.equal(again.get(str(i)).E["merger"], embedding("", i).E["merger"]) for i in range(7))


# -------------------------------------------------------------------------------------------------------- crashes
def test_torn_journal_line_is_ignored_then_cut_away(tmp_path: Path) -> None:
    with create(tmp_path, writer="w") as store:
        store.append([embedding("a")])
        store.append([embedding("b", 1)])
    journal = tmp_path / "index-w.jsonl"
    whole = journal.read_bytes()
    for torn in (b'{"op":"shard","file":"x', b"\x00" * 50, b'\x00\x00"id":"z"}\n'):
        journal.write_bytes(whole + torn)
        assert EmbeddingStore.open(tmp_path).ids() == ["a", "b"]
        assert journal.read_bytes() == whole + torn
        create(tmp_path, writer="w").close()
        assert journal.read_bytes() == whole
    journal.write_bytes(whole[: len(whole) // 2] + b"###\n" + whole[len(whole) // 2 :])
    with pytest.raises(CorruptFileError, match=r"index-w.jsonl: byte \d+: not a journal line"):
        EmbeddingStore.open(tmp_path)


def test_only_its_own_writer_sweeps_up_after_a_crash(tmp_path: Path) -> None:
    create(tmp_path, writer="a").close()
    left = [tmp_path / ".tmp-shard-a-000000.safetensors.1f", tmp_path / "shard-a-000000.safetensors"]
    for path in left:
        path.write_bytes(b"torn")
    create(tmp_path, writer="b").close()
    assert all(path.exists() for path in left)
    with create(tmp_path, writer="a") as store:
        assert not any(path.exists() for path in left)
        store.append([embedding("x")])
        assert store.verify().embeddings == 1


def _append_forever(path: str, start: int, ready: multiprocessing.connection.Connection) -> None:
    store = create(Path(path), merge_every=5)
    for i in range(start, start + 100_000):
        store.append([embedding(f"{i:06d}-{k}", 2 * i + k) for k in range(1 + i % 2)])
        ready.send_bytes(b"%d" % i)


def test_kill_9_loses_nothing_that_was_reported(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("forkserver")  # a clean process that imports torch once, then forks
    fork.set_forkserver_preload(["datamodules.embedding_store", "pytest"])
    rng = random.Random(0)
    reported: list[int] = []
    for _ in range(10):
        ours, theirs = fork.Pipe(duplex=False)
        child = fork.Process(
            target=_append_forever, args=(str(tmp_path), reported[-1] + 1000 if reported else 0, theirs)
        )
        child.start()
        theirs.close()
        reported.append(int(ours.recv_bytes()))
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        with contextlib.suppress(EOFError):  # what was in the pipe before the kill counts as reported too
            while True:
                reported.append(int(ours.recv_bytes()))
        store = EmbeddingStore.open(tmp_path)
        assert all(f"{i:06d}-0" in store for i in reported)
    with create(tmp_path) as store:
        summary = store.verify()
        for i in reported:
            for k in range(1 + i % 2):
                assert torch.equal(store.get(f"{i:06d}-{k}").E["merger"], embedding("", 2 * i + k).E["merger"])
        assert summary.embeddings == len(store)
        assert summary.writers == 1
        assert len(reported) > 10
        assert names(tmp_path, ".tmp-shard-*") == []
        assert len(names(tmp_path, "shard-*")) == summary.shards < 60


# ------------------------------------------------------------------------------------------------- several writers
def test_writers_without_a_name_take_free_numbers(tmp_path: Path) -> None:
    first, second = create(tmp_path), create(tmp_path)
    first.append([embedding("a")])
    second.append([embedding("b", 1)])
    first.refresh()
    assert first.ids() == ["a", "b"]
    assert torch.equal(first.get("b").E["merger"], embedding("", 1).E["merger"])
    with pytest.raises(BusyError, match=r"index-1.jsonl: another process writes here"):
        create(tmp_path, writer="1")
    first.close()
    third = create(tmp_path)
    assert names(tmp_path, "index-*") == ["index-0.jsonl", "index-1.jsonl"]
    with pytest.raises(ValueError, match=r"writer '../up'"):
        create(tmp_path, writer="../up")
    third.append([embedding("c", 2)])
    assert third.verify().embeddings == 3
    second.close()
    third.close()


def _append_some(path: str, writer: str) -> None:
    with create(Path(path), writer=writer, merge_every=4) as store:
        for i in range(30):
            store.append([embedding(f"{writer}-{i:02d}", i)])
            store.refresh()


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("forkserver")
    children = [fork.Process(target=_append_some, args=(str(tmp_path), f"task{n}")) for n in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    store = EmbeddingStore.open(tmp_path)
    assert store.verify().embeddings == 90
    assert store.verify().duplicates == 0
    assert torch.equal(store.get("task1-17").E["merger"], embedding("", 17).E["merger"])


def test_the_same_id_from_two_writers_is_counted_and_one_kept(tmp_path: Path) -> None:
    first, second = create(tmp_path, writer="a"), create(tmp_path, writer="b")
    second.append([embedding("x", 2)])
    first.append([embedding("x", 1)])
    first.close()
    second.close()
    store = EmbeddingStore.open(tmp_path)
    assert store.verify().duplicates == 1
    assert torch.equal(store.get("x").E["merger"], embedding("", 1).E["merger"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_cannot_write_and_does_not_hold_the_lock(tmp_path: Path) -> None:
    store = create(tmp_path, writer="w")
    store.append([embedding("a")])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # stands for a loader worker; it must not outlive its parent's claim to the name
        with contextlib.suppress(BaseException):
            try:
                store.mark("a", verified=True)
            except ValueError as error:
                os.write(write, str(error).encode())
        signal.pause()
    os.close(write)
    try:
        message = os.read(read, 1000).decode()
        store.close()
        create(tmp_path, writer="w").close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
    assert "closed for writing" in message


# ------------------------------------------------------------------------------------------------------ full disk
@contextlib.contextmanager
def file_size_limit(bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(store: EmbeddingStore) -> None:
    for i in itertools.count():
        store.append([embedding(str(i), i)])


def test_a_shard_that_does_not_fit_is_named_with_the_bytes_needed(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        store.append([embedding("a")])
        before = names(tmp_path, "*")
        with file_size_limit(200), pytest.raises(DiskFullError, match=r"no room for \d+ bytes.*shard-0-000001"):
            store.append([embedding("b", 1)])
        assert names(tmp_path, "*") == before
        assert names(tmp_path, ".*") == []
        assert "b" not in store
        store.append([embedding("b", 1)])
        assert store.verify().embeddings == 2


def test_a_journal_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    with create(tmp_path) as store:
        for i in range(4):
            store.append([embedding(str(i), i)])
        journal = tmp_path / "index-0.jsonl"
        whole = journal.read_bytes()
        with (
            file_size_limit(len(whole) + 40),
            pytest.raises(DiskFullError, match=r"no room for \d+ bytes.*index-0.jsonl"),
        ):
            store.append([embedding("x", 9)])
        assert journal.read_bytes() == whole
        assert len(names(tmp_path, "shard-*")) == 4
        store.append([embedding("x", 9)])
    assert EmbeddingStore.open(tmp_path).verify().embeddings == 5


def test_a_real_full_disk_costs_nothing_that_was_stored(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with create(disk / "store") as store:
            with pytest.raises(DiskFullError, match=r"no room for .* lost: make room"):
                fill(store)
            stored = len(store)
        assert stored > 10
        assert EmbeddingStore.open(disk / "store").verify().embeddings == stored
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        with create(disk / "store") as store:
            store.append([embedding(str(stored), stored)])
            assert store.verify().embeddings == stored + 1
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------------------------------------------------- scale
def test_a_large_index_opens_without_reading_shards(tmp_path: Path) -> None:
    create(tmp_path, writer="w").close()
    rows = 20_000
    with (tmp_path / "index-w.jsonl").open("w") as file:
        for i in range(rows):
            if i % 4 == 0:
                shard = {
                    "op": "shard",
                    "file": f"shard-w-{i:06d}.safetensors",
                    "rows": 4,
                    "bytes": 999,
                    "sha256": "0" * 64,
                }
                file.write(json.dumps(shard) + "\n")
            line = {"op": "add", "id": f"id-{i:06d}", "shard": shard["file"], "row": i % 4, "harmful": True, "steps": i}
            file.write(json.dumps(line) + "\n")
    start = time.process_time()
    store = EmbeddingStore.open(tmp_path)
    assert time.process_time() - start < 5  # 0.2 s when nothing else runs
    assert len(store) == rows
    assert store.meta("id-012345").steps == 12345
