"""What every Store must do. Subclass `StoreSuite` for an implementation and give it `open`.

The checks use the protocol only, so that an engine is exchanged without a change above it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.errors import Conflict, StoreError
from sandbox.store.base import Change, Store


class Number(msgspec.Struct, frozen=True):
    n: int


class Name(msgspec.Struct, frozen=True):
    name: str


_KEYS = ("a", "a/x", "a/y", "a/y/z", "ab", "b/x")
_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("txn"),
            st.dictionaries(st.sampled_from(_KEYS), st.integers(0, 9), max_size=3),
            st.sets(st.sampled_from(_KEYS), max_size=2),
        ),
        st.tuples(st.just("compact"), st.integers(0, 5), st.none()),
        st.tuples(st.just("reopen"), st.none(), st.none()),
    ),
    max_size=20,
)


@pytest.mark.trio
class StoreSuite:
    def open(self, directory: Path) -> Store:
        """Open the store in `directory`, making it when there is none."""
        raise NotImplementedError

    @asynccontextmanager
    async def opened(self, directory: Path) -> AsyncIterator[Store]:
        store = self.open(directory)
        try:
            yield store
        finally:
            await store.aclose()

    async def test_a_new_store_is_empty_at_revision_zero(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            assert store.revision == 0
            assert store.get("a", Number) is None
            assert list(store.list("", Number)) == []
            assert list(store.keys("")) == []

    async def test_a_value_is_read_back_with_the_revision_that_wrote_it(
        self, tmp_path: Path
    ) -> None:
        async with self.opened(tmp_path) as store:
            first = await store.txn({"a/x": Number(1)})
            second = await store.txn({"a/y": Number(2)}, durable=False)
            found = store.get("a/x", Number)
            assert found is not None
            assert (found.key, found.rev, found.value) == ("a/x", first, Number(1))
            assert second == first + 1 == store.revision

    async def test_the_keys_of_a_transaction_share_its_revision(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            rev = await store.txn({"a/x": Number(1), "a/y": Number(2)})
            assert [found.rev for found in store.list("a/", Number)] == [rev, rev]

    async def test_what_is_posted_is_written_in_order_and_seen_one_by_one(
        self, tmp_path: Path
    ) -> None:
        async with self.opened(tmp_path) as store:
            for number in range(20):
                store.post({"a/x": Number(number)})
            await store.txn({}, durable=False)
            found = store.get("a/x", Number)
            assert found is not None
            assert (found.rev, found.value) == (20, Number(19))
            changes = store.watch("a/", 0)
            seen = [(await anext(changes)).value for _ in range(20)]
            assert seen == [msgspec.json.encode(Number(number)) for number in range(20)]

    async def test_a_list_has_what_is_under_its_prefix_by_key(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            await store.txn({key: Number(0) for key in ("b", "a/y", "ab/x", "a/x", "a0", "a")})
            assert [found.key for found in store.list("a/", Number)] == ["a/x", "a/y"]
            assert list(store.keys("a/")) == ["a/x", "a/y"]
            assert list(store.keys("")) == ["a", "a/x", "a/y", "a0", "ab/x", "b"]

    async def test_a_prefix_without_its_slash_is_refused(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            with pytest.raises(ValueError, match="slash"):
                store.keys("a")

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a\0b", "a\ud800"])
    async def test_what_is_no_key_is_refused(self, tmp_path: Path, key: str) -> None:
        async with self.opened(tmp_path) as store:
            with pytest.raises(ValueError):
                await store.txn({key: Number(1)})
            assert store.revision == 0

    async def test_a_deleted_key_is_gone_and_may_come_back(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            await store.txn({"a": Number(1)})
            await store.txn({}, delete=["a"])
            assert store.get("a", Number) is None
            assert list(store.keys("")) == []
            await store.txn({"a": Number(2)}, expect={"a": 0})
            found = store.get("a", Number)
            assert found is not None
            assert found.value == Number(2)

    async def test_what_changes_nothing_makes_no_revision(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            rev = await store.txn({"a": Number(1)})
            assert await store.txn({}) == rev
            assert await store.txn({}, delete=["b"]) == rev
            assert store.revision == rev

    async def test_a_moved_revision_refuses_the_whole_transaction(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            first = await store.txn({"a": Number(1), "b": Number(1)})
            second = await store.txn({"a": Number(2)}, expect={"a": first})
            with pytest.raises(Conflict) as conflict:
                await store.txn({"b": Number(9)}, delete=["a"], expect={"b": first, "a": first})
            refused = conflict.value
            assert (refused.key, refused.expected, refused.actual) == ("a", first, second)
            assert [found.value.n for found in store.list("", Number)] == [2, 1]
            assert store.revision == second

    async def test_a_key_that_must_not_exist_is_made_once(self, tmp_path: Path) -> None:
        made: list[int] = []

        async def make(store: Store, n: int) -> None:
            try:
                await store.txn({"only": Number(n)}, expect={"only": 0})
                made.append(n)
            except Conflict as conflict:
                assert conflict.expected == 0

        async with self.opened(tmp_path) as store:
            async with trio.open_nursery() as nursery:
                for n in range(20):
                    nursery.start_soon(make, store, n)
            found = store.get("only", Number)
            assert found is not None
            assert made == [found.value.n]

    async def test_counting_by_compare_and_retry_loses_nothing(self, tmp_path: Path) -> None:
        async def count(store: Store) -> None:
            for _ in range(10):
                while True:
                    found = store.get("n", Number)
                    rev, n = (found.rev, found.value.n) if found else (0, 0)
                    try:
                        await store.txn({"n": Number(n + 1)}, expect={"n": rev}, durable=False)
                        break
                    except Conflict:
                        continue

        async with self.opened(tmp_path) as store:
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(count, store)
            found = store.get("n", Number)
            assert found is not None
            assert found.value.n == 80

    async def test_a_value_of_another_kind_is_an_error_that_names_the_key(
        self, tmp_path: Path
    ) -> None:
        async with self.opened(tmp_path) as store:
            await store.txn({"a/x": Number(1)})
            with pytest.raises(StoreError, match="a/x is no Name"):
                store.get("a/x", Name)

    async def test_what_was_posted_is_read_at_once(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            store.post({"a/x": Number(1)})
            store.post({"a/x": Number(2)})
            found = store.get("a/x", Number)
            assert found is not None
            assert (found.rev, found.value) == (2, Number(2))
            store.post({"a/x": Number(3)})
            store.flush()
            store.flush()
            assert store.revision == 3

    async def test_a_change_is_read_as_what_it_wrote_then(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            for n in (1, 2):
                await store.txn({"a/x": Number(n)})
            seen = await _take(store.watch("a/", 0), 2)
            assert [store.value(change, Number) for change in seen] == [Number(1), Number(2)]

    # Watching

    async def test_a_watch_tells_what_followed_a_revision_in_order(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            first = await store.txn({"a/x": Number(1)})
            await store.txn({"b/x": Number(2)})
            third = await store.txn({"a/x": Number(3), "a/y": Number(4)})
            fourth = await store.txn({}, delete=["a/y"])
            seen = await _take(store.watch("a/", first), 3)
            assert [(change.rev, change.key, change.value) for change in seen] == [
                (third, "a/x", b'{"n":3}'),
                (third, "a/y", b'{"n":4}'),
                (fourth, "a/y", None),
            ]
            assert all(change.at > 0 for change in seen)

    async def test_a_watch_wakes_for_its_prefix_only(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            seen: list[str] = []

            async def watch(prefix: str) -> None:
                async for change in store.watch(prefix, 0):
                    seen.append(f"{prefix} {change.key}")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, "a/")
                nursery.start_soon(watch, "a/deep/")
                await trio.testing.wait_all_tasks_blocked(0.01)
                for key in ("b", "ab/x", "a", "a/deep/x", "a/y"):
                    await store.txn({key: Number(0)})
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.cancel_scope.cancel()
            assert sorted(seen) == ["a/ a/deep/x", "a/ a/y", "a/deep/ a/deep/x"]

    async def test_a_slow_watch_misses_nothing(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            changes = store.watch("a/", 0)
            await store.txn({"a/0": Number(0)})
            assert (await _take(changes, 1))[0].value == b'{"n":0}'
            for n in range(1, 300):
                await store.txn({f"a/{n % 7}": Number(n)}, durable=False)
            seen = [await _take(changes, 1) for _ in range(1, 300)]
            assert [change.value for (change,) in seen] == [
                f'{{"n":{n}}}'.encode() for n in range(1, 300)
            ]

    async def test_every_key_of_a_large_transaction_is_seen(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            keys = [f"a/{n:03}" for n in range(200)]
            await store.txn({key: Number(0) for key in keys})
            assert [change.key for change in await _take(store.watch("a/", 0), 200)] == keys

    async def test_a_cancelled_watch_goes_on_where_it_was(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            changes = store.watch("a/", 0)
            with trio.move_on_after(0.01):
                await _take(changes, 1)
            await store.txn({"a/x": Number(1)})
            assert [change.key for change in await _take(changes, 1)] == ["a/x"]

    async def test_a_watch_from_the_future_is_refused(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            with pytest.raises(StoreError, match="revision 1 was never written"):
                store.watch("", 1)

    # Compaction

    async def test_compaction_keeps_the_heads_and_the_newest_revisions(
        self, tmp_path: Path
    ) -> None:
        async with self.opened(tmp_path) as store:
            for n in range(10):
                await store.txn({f"a/{n}": Number(n)})
            assert store.compacted == 0
            await store.compact(3)
            assert store.compacted == store.revision - 3
            assert [found.rev for found in store.list("a/", Number)] == list(range(1, 11))
            assert [change.rev for change in await _take(store.watch("", 7), 3)] == [8, 9, 10]
            with pytest.raises(StoreError, match=f"asked after is {store.compacted}"):
                await _take(store.watch("", 6), 1)
            assert await store.txn({"a/x": Number(0)}) == 11

    async def test_a_revision_is_never_given_twice(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            await store.txn({"a": Number(1)})
            rev = await store.txn({}, delete=["a"])
            await store.compact(0)
        async with self.opened(tmp_path) as store:
            assert store.revision == rev
            assert await store.txn({"a": Number(1)}) == rev + 1

    async def test_a_watch_that_compaction_overtook_is_told(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            behind = store.watch("a/", 0)
            for n in range(10):
                await store.txn({"a/x": Number(n)})
            await store.compact(1)
            with pytest.raises(StoreError, match=f"asked after is {store.compacted}"):
                await _take(behind, 1)

    async def test_a_sleeping_watch_survives_the_compaction_of_other_keys(
        self, tmp_path: Path
    ) -> None:
        async with self.opened(tmp_path) as store:
            seen: list[Change] = []

            async def watch() -> None:
                seen.extend(await _take(store.watch("quiet/", 0), 1))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                await trio.testing.wait_all_tasks_blocked(0.01)
                for n in range(10):
                    await store.txn({"noisy/x": Number(n)})
                await store.compact(1)
                await store.txn({"quiet/x": Number(1)})
            assert [change.key for change in seen] == ["quiet/x"]

    # Cancelling, closing, opening again

    async def test_cancelled_before_it_began_a_transaction_writes_nothing(
        self, tmp_path: Path
    ) -> None:
        async with self.opened(tmp_path) as store:
            with trio.CancelScope() as scope:
                scope.cancel()
                await store.txn({"a": Number(1)})
            assert scope.cancelled_caught
            assert store.get("a", Number) is None

    async def test_a_cancelled_transaction_ends_with_a_known_outcome(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            scope = trio.CancelScope()

            async def write() -> None:
                with scope:
                    await store.txn({"a": Number(1)})

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await _one_turn()
                scope.cancel()
            found = store.get("a", Number)
            await trio.sleep(0.05)
            assert store.get("a", Number) == found

    async def test_who_waits_for_the_disk_when_it_is_closed_is_told_the_truth(
        self, tmp_path: Path
    ) -> None:
        acknowledged: list[int] = []

        async def write(store: Store, n: int) -> None:
            with contextlib.suppress(StoreError):
                await store.txn({f"a/{n}": Number(n)})
                acknowledged.append(n)

        store = self.open(tmp_path)
        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(write, store, n)
                if n == 10:
                    nursery.start_soon(store.aclose)
        await store.aclose()
        async with self.opened(tmp_path) as store:
            found = {each.value.n for each in store.list("a/", Number)}
            assert found == set(acknowledged)

    async def test_what_was_written_is_there_again(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store:
            await store.txn({"a": Number(1), "b": Number(2)})
            await store.txn({"a": Number(3)}, delete=["b"], durable=False)
        async with self.opened(tmp_path) as store:
            assert store.revision == 2
            assert [(v.key, v.rev, v.value.n) for v in store.list("", Number)] == [("a", 2, 3)]
            assert [change.rev for change in await _take(store.watch("", 0), 4)] == [1, 1, 2, 2]

    async def test_a_closed_store_refuses_and_may_be_closed_again(self, tmp_path: Path) -> None:
        store = self.open(tmp_path)
        failed: list[str] = []

        async def watch() -> None:
            try:
                await _take(store.watch("", 0), 1)
            except StoreError as error:
                failed.append(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await store.aclose()
        assert len(failed) == 1
        with pytest.raises(StoreError, match="closed"):
            store.get("a", Number)
        with pytest.raises(StoreError, match="closed"):
            await store.txn({"a": Number(1)})
        await store.aclose()

    async def test_closing_finishes_what_was_begun(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as store, trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(store.txn, {f"a/{n:02}": Number(n)})
            await _one_turn()
            await store.aclose()
        async with self.opened(tmp_path) as store:
            assert len(store.keys("a/")) == store.revision == 20


class StoreModel:
    """Any sequence of operations leaves what a dictionary and a list of changes hold."""

    def open(self, directory: Path) -> Store:
        raise NotImplementedError

    @given(operations=_OPERATIONS)
    @settings(max_examples=40, deadline=None)
    def test_it_is_a_dictionary_with_a_history(
        self, operations: list[tuple[str, object, object]]
    ) -> None:
        with tempfile.TemporaryDirectory() as directory:
            trio.run(self._follow, Path(directory), operations)

    async def _follow(self, directory: Path, operations: list[tuple[str, object, object]]) -> None:
        store = self.open(directory)
        heads: dict[str, tuple[int, int]] = {}
        log: list[tuple[int, str, int | None]] = []
        rev = floor = 0
        for operation, argument, other in operations:
            match operation, argument, other:
                case "txn", dict(put), set(names):
                    delete = names - put.keys()
                    gone = delete & heads.keys()
                    expect = {key: heads.get(key, (0, 0))[0] for key in put}
                    got = await store.txn(
                        {key: Number(n) for key, n in put.items()}, delete=delete, expect=expect
                    )
                    rev += bool(put or gone)
                    assert got == rev
                    heads = {k: v for k, v in heads.items() if k not in gone}
                    heads |= {key: (rev, n) for key, n in put.items()}
                    changed = {**put, **dict.fromkeys(gone)}
                    log += [(rev, key, changed[key]) for key in sorted(changed)]
                case "compact", int(keep), _:
                    await store.compact(keep)
                    floor = max(floor, rev - keep)
                    log = [entry for entry in log if entry[0] > floor]
                case _:
                    await store.aclose()
                    store = self.open(directory)
            assert store.revision == rev
            for prefix in ("", "a/", "a/y/"):
                under = {k: v for k, v in heads.items() if k.startswith(prefix)}
                found = {v.key: (v.rev, v.value.n) for v in store.list(prefix, Number)}
                assert found == under
                assert list(store.keys(prefix)) == sorted(under)
        history = await _take(store.watch("", floor), len(log))
        assert [
            (c.rev, c.key, msgspec.json.decode(c.value, type=Number).n if c.value else None)
            for c in history
        ] == log
        await store.aclose()


async def _take(changes: AsyncIterator[Change], count: int) -> list[Change]:
    with trio.fail_after(5):
        return [await anext(changes) for _ in range(count)]


async def _one_turn() -> None:
    """Every task that was started by now has run until it waited for something."""
    for _ in range(2):  # trio shuffles the tasks of a turn, this one too
        await trio.lowlevel.cancel_shielded_checkpoint()
