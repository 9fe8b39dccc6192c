"""The state of a maker as entries of an optimizer's state: tensors, integers and floats in nested dicts, by parameter.

Torch's distributed state dicts keep only what belongs to a parameter, flatten nested dicts with dots, and know no other types
than these. A name of a list is an entry of its own, for every name that may be in the list, so that a fresh optimizer shows
all keys. A mark at the end of a key says what the value was; `%` and the dot are escaped in names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from hashlib import blake2b
from itertools import chain
from typing import Any

from torch import Tensor, nn

from gradmaker.checkpoint import held_tensors
from gradmaker.step.protocol import MakerOfSteps

__all__ = ["KEY", "pack", "unpack"]

KEY = "gradmaker"
"""The entry of a parameter's state that holds what belongs to the maker."""
TEXT, NAMES, LIST, EMPTY, NONE = "%s", "%n", "%l", "%e", "%z"
"""Marks of keys: of a string, a list of names, another list, an empty dict, None."""
CHUNK = 200
"""Bytes of a string in one integer; `torch.load` with ``weights_only=True`` reads integers of up to 255 bytes."""
FINGERPRINT = "%h"
"""The key of a number that changes with the names and shapes of the tensors that were saved together."""

Packed = dict[str, Any]


def pack(state: Mapping[str, Any], maker: MakerOfSteps, held: Set[nn.Parameter]) -> dict[nn.Parameter, Packed]:
    """What a maker's `state_dict` holds, by parameter: a site's with its first one that the optimizer holds.

    held: the parameters of the optimizer
    """
    own = [p for p in maker.model.parameters() if p in held]
    owners = {s.name: next((p for p in s.parameters.values() if p in held), own[0]) for b in maker.plan.blocks for s in b.sites}
    names = _names(maker)
    found: dict[nn.Parameter, Packed] = {p: {} for p in own}
    for site, tree in state["sites"].items():
        sites = found[owners.get(site, own[0])].setdefault("sites", {})
        sites[_escape(site)] = _fingerprinted(tree, names)
    rest = {k: v for k, v in state.items() if k not in ("sites", "holds")}
    found[own[0]]["maker"] = _fingerprinted(rest, names)
    return found


def unpack(packed: Iterable[Packed]) -> dict[str, Any]:
    """A maker's `state_dict` from what `pack` made of it. ValueError for one that is not there, or not as it was saved."""
    entries = list(packed)
    makers = [entry["maker"] for entry in entries if "maker" in entry]
    if len(makers) != 1:
        raise ValueError(
            f"load_state_dict: this state holds the states of {len(makers)} makers under {KEY!r}, expected one: load the state "
            "of an optimizer alone into base_optimizer, and one that a PreconditionedOptimizer has saved here"
        )
    state = _checked("the maker", makers[0])
    sites = chain.from_iterable(entry.get("sites", {}).items() for entry in entries)
    state["sites"] = {_plain(key): _checked(_plain(key), tree) for key, tree in sites}
    return {**state, "holds": sorted(held_tensors(state))}


def _names(maker: MakerOfSteps) -> dict[str, Sequence[str]]:
    """The names that may be in a list, by the key of the list; under the empty key, those of all other lists."""
    blocks, parameters = maker.plan.blocks, [name for name, _ in maker.model.named_parameters()]
    return {"": [s.name for b in blocks for s in b.sites], "due": list(maker.plan.methods), "unseen": parameters}


# ---------------------------------------------------------------- whether all is there
def _fingerprinted(tree: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> Packed:
    return {**_encode(tree, names), FINGERPRINT: _fingerprint(tree)}


def _fingerprint(tree: Any) -> int:
    entries = "\n".join(sorted(held_tensors(tree)))
    return int.from_bytes(blake2b(entries.encode(), digest_size=7).digest(), "big")


def _checked(what: str, packed: Packed) -> dict[str, Any]:
    """The decoded tree. ValueError if it has other tensors than it had."""
    tree = _decode({key: value for key, value in packed.items() if key != FINGERPRINT})
    if packed.get(FINGERPRINT) != _fingerprint(tree):
        raise ValueError(
            f"load_state_dict: tensors of {what} were saved and are not in this state, or have other shapes there: what loads "
            "into a state_dict() fills only the keys that it has, as torch's distributed checkpoints do, and a maker knows "
            "those of some tensors only when it has measured. Where names or shapes depend on that, save with torch.save"
        )
    return tree


# ---------------------------------------------------------------- types
def _encode(tree: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> Packed:
    found: Packed = {}
    for name, value in tree.items():
        mark, encoded = _encode_value(name, value, names)
        found[_escape(name) + mark] = encoded
    return found


def _encode_value(name: str, value: Any, names: Mapping[str, Sequence[str]]) -> tuple[str, Any]:
    """The mark of the key, and the value in the types that are allowed."""
    if isinstance(value, (Tensor, int, float)):
        return "", value
    if value is None:
        return NONE, 0
    if isinstance(value, str):
        return TEXT, _integers(value)
    if isinstance(value, Mapping):
        return ("", _encode(value, names)) if value else (EMPTY, 0)
    if all(isinstance(entry, str) for entry in value):
        known = () if name == "shares" else names.get(name, names[""])
        return NAMES, {_escape(entry): entry in value for entry in (*known, *value)} or {"%": False}
    return LIST, _encode({str(j): entry for j, entry in enumerate(value)}, names)


def _decode(packed: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in packed.items():
        name, mark = (key[:-2], key[-2:]) if key[-2:] in MARKS else (key, "")
        found[_plain(name)] = _decode_value(mark, value)
    return found


def _decode_value(mark: str, value: Any) -> Any:
    if mark in (NONE, EMPTY):
        return None if mark == NONE else {}
    if mark == TEXT:
        return _text(value)
    if mark == NAMES:
        return sorted(_plain(key) for key, chosen in value.items() if chosen)
    if mark == LIST:
        return [entry for _, entry in sorted(_decode(value).items(), key=lambda item: int(item[0]))]
    return _decode(value) if isinstance(value, Mapping) else value


MARKS = (TEXT, NAMES, LIST, EMPTY, NONE)


def _integers(text: str) -> dict[str, int]:
    """A string as integers, each with a leading one."""
    raw = text.encode()
    chunks = [raw[start : start + CHUNK] for start in range(0, max(len(raw), 1), CHUNK)]
    return {str(j): int.from_bytes(b"\1" + chunk, "big") for j, chunk in enumerate(chunks)}


def _text(numbers: Mapping[str, int]) -> str:
    values = [numbers[str(j)] for j in range(len(numbers))]
    return b"".join(n.to_bytes((n.bit_length() + 7) // 8, "big")[1:] for n in values).decode()


def _escape(name: str) -> str:
    return name.replace("%", "%25").replace(".", "%2E") or "%"


def _plain(key: str) -> str:
    return "" if key == "%" else key.replace("%2E", ".").replace("%25", "%")
