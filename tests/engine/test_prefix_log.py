"""Who follows a prefix log knows what it holds, however seldom he asks; names do not depend on block sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import prefix_log
from engine.prefix import PREFIX_BLOCK_TOKENS, number_after, numbers_of_blocks, prefix_hashes
from engine.prefix_log import PrefixLog

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "discard"]), st.lists(st.integers(0, 9), max_size=4)),
        st.tuples(st.sampled_from(["clear", "ask"]), st.none()),
    ),
    max_size=40,
)


@pytest.mark.parametrize("most_changes", [1, 3, 4096])
@given(operations=OPERATIONS)
def test_who_follows_the_changes_holds_what_the_log_holds(
    operations: list[tuple[str, list[int] | None]], most_changes: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_log, "MOST_CHANGES", most_changes)
        log, truth, followed, version = PrefixLog(), set[int](), set[int](), 0
        for operation, names in [*operations, ("ask", None)]:
            match operation, names:
                case "add", [*some]:
                    log.add(some)
                    truth |= {*some}
                case "discard", [*some]:
                    log.discard(some)
                    truth -= {*some}
                case "clear", _:
                    log.clear()
                    truth.clear()
                case "ask", _:
                    changes = log.since(version)
                    followed = set() if changes.whole else followed - {*changes.gone}
                    followed |= {*changes.added}
                    version = changes.version
                    assert followed == truth
        assert len(log) == len(truth)
        assert all(name in log for name in truth)


def test_one_that_knows_a_version_of_another_life_is_told_all() -> None:
    log = PrefixLog()
    log.add([1, 2])
    changes = log.since(77)
    assert changes.whole
    assert sorted(changes.added) == [1, 2]


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=3 * PREFIX_BLOCK_TOKENS), st.integers(1, 64))
def test_the_number_of_a_prefix_is_the_same_by_blocks_of_any_size(tokens: list[int], block: int) -> None:
    number = 0
    for token in tokens:
        number = number_after(number, token)
    by_blocks = numbers_of_blocks(0, tokens, block)
    rest = tokens[len(by_blocks) * block :]
    found = by_blocks[-1] if by_blocks else 0
    for token in rest:
        found = number_after(found, token)
    assert found == number


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4 * PREFIX_BLOCK_TOKENS), st.data())
def test_another_token_makes_other_names_from_there_on(tokens: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [token + 1 if place == at else token for place, token in enumerate(tokens)]
    same = at // PREFIX_BLOCK_TOKENS
    one, two = prefix_hashes(tokens), prefix_hashes(other)
    assert one[:same] == two[:same]
    assert not {*one[same:]} & {*two[same:]}
