"""Every message survives the wire; nothing else is taken for one."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import messages
from engine.cost import Piece, StepCost
from engine.errors import ProtocolError
from engine.messages import VERSION, Message, decode, encode


def _message_types() -> list[type[Any]]:
    return list(get_args(Message))


def _strategy(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Any value of a message, by its annotations; floats finite, as JSON-like maps travel in `params`."""
    hints = get_type_hints(kind)
    names = (
        kind.__struct_fields__
        if issubclass(kind, msgspec.Struct)
        else [f.name for f in dataclasses.fields(kind)]
    )
    return st.builds(kind, **{name: _values(hints[name]) for name in names})


_terms = st.floats(0.0, 1e3)
_pieces = st.builds(Piece, _terms, st.floats(1e-9, 1e3), _terms)
_costs = st.builds(
    StepCost,
    st.lists(_pieces, min_size=1, max_size=3).map(tuple),
    _terms,
    _terms,
    _terms,
    drift=st.floats(0.1, 9),
)


def _values(hint: Any) -> st.SearchStrategy[Any]:
    if hint is StepCost:
        return _costs
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, msgspec.Struct)):
        return _strategy(hint)
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False, width=64)
    if hint is int:
        return st.integers(-(2**62), 2**62)
    if hint is Any:
        return st.one_of(
            st.none(), st.booleans(), st.text(max_size=5), st.lists(st.integers(0, 99), max_size=3)
        )
    arguments = get_args(hint)
    if arguments and getattr(hint, "__origin__", None) is list:
        return st.lists(_values(arguments[0]), max_size=3)
    if arguments and getattr(hint, "__origin__", None) is dict:
        return st.dictionaries(st.text(max_size=5), _values(arguments[1]), max_size=3)
    if arguments:
        return st.one_of([_values(argument) for argument in arguments])
    return st.from_type(hint)


@pytest.mark.parametrize("kind", _message_types(), ids=lambda kind: kind.__name__)
def test_every_message_survives_the_wire(kind: type[Any]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(_strategy(kind))
    def round_trip(message: Any) -> None:
        assert decode(encode(message)) == message

    round_trip()


def test_another_version_is_refused_by_name() -> None:
    frames = encode(messages.Watch(reports=True))
    frames[0] = frames[0].replace(str(VERSION).encode(), str(VERSION + 1).encode())
    with pytest.raises(ProtocolError, match=f"speaks version {VERSION}"):
        decode(frames)


@pytest.mark.parametrize(
    "frames",
    [[], [b"Watch/1"], [b"Nonsense/1", b""], [b"Watch/1", b"\xc1"], [b"Watch/1", b"\x81\xa1x\x01"]],
)
def test_garbage_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)
