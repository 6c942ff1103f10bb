"""What the recordings of several batches have in common, and which kept outputs are still of use."""

from __future__ import annotations

from collections import Counter

import torch

from bgd_plugin.calibration.pieces import Pieces, freed, kept, revived
from bgd_plugin.calibration.recording import ANSWER, Recording


def _recording(order: list[str], contents: dict[str, set[str]], **fields: object) -> Recording:
    """Modules "block" and the like, each of which ran once."""
    parts: dict[str, object] = {
        "order": order,
        "contents": contents,
        "counts": Counter(order),
        "calls": Counter(list(contents)),
        "parents": {path: path.rpartition(".")[0] for path in contents},
    }
    return Recording(**(parts | fields))  # type: ignore[arg-type]


CONTENTS = {"one": {"one.a", "one.b"}, "one.a": {"one.a"}, "one.b": {"one.b"}, "two": {"two.a"}, "two.a": {"two.a"}}
ORDER = ["one.a", "one.b", "two.a"]
READERS = {"one.a": {"one.b"}, "one.b": {"one"}, "one": {"two.a", "two"}, "two.a": {"two"}, "two": {ANSWER}}


def _pieces(**fields: object) -> Pieces:
    return Pieces([_recording(ORDER, CONTENTS, **({"readers": READERS} | fields))])


def test_orders_are_merged_and_a_name_seen_twice_stands_where_it_was_first() -> None:
    first = _recording(["a", "c", "a"], {"": {"a", "c"}})
    second = _recording(["z", "a", "b", "c", "d"], {"": {"a"}})
    assert Pieces([first, second]).order == ["z", "a", "b", "c", "d"]


def test_a_piece_is_finished_after_its_last_layer() -> None:
    pieces = _pieces()
    assert pieces.last == {"one": 1, "one.a": 0, "one.b": 1, "two": 2, "two.a": 2}
    assert pieces.finished(0) == set()
    assert pieces.finished(1) == {"one.a"}
    assert pieces.finished(3) == set(CONTENTS)


def test_contents_are_those_of_all_batches() -> None:
    other = _recording(["one.a", "one.c"], {"one": {"one.a", "one.c"}})
    pieces = Pieces([_recording(ORDER, CONTENTS), other])
    assert pieces.contents["one"] == {"one.a", "one.b", "one.c"}
    assert pieces.last["one"] == pieces.order.index("one.b")


def test_the_whole_network_and_what_runs_twice_or_is_unfit_in_any_batch_is_no_piece() -> None:
    assert "one" not in _pieces(unfit={"one"}).last
    assert "one" not in _pieces(calls=Counter({"one": 2, "two": 1})).last
    assert "" not in Pieces([_recording(ORDER, CONTENTS | {"": set(ORDER)})]).last
    fit, unfit = _recording(ORDER, CONTENTS), _recording(ORDER, CONTENTS, unfit={"two"})
    for recordings in ([fit, unfit], [unfit, fit]):
        assert "two" not in Pieces(recordings).last


def test_the_parent_is_the_next_piece_around() -> None:
    pieces = _pieces()
    assert (pieces.parent(0, "one.a"), pieces.parent(0, "one")) == ("one", "")
    assert _pieces(unfit={"one"}).parent(0, "one.a") == ""
    nested = _recording(["x.y.z"], {"x": {"x.y.z"}, "x.y": {"x.y.z"}, "x.y.z": {"x.y.z"}}, unfit={"x.y"})
    assert Pieces([nested]).parent(0, "x.y.z") == "x"


def test_readers_that_are_no_pieces_pass_on_to_their_own() -> None:
    found = _pieces(unfit={"two", "one.b"}, readers=READERS | {"two.a": {"two"}})
    assert set(found.readers(0, "two.a")) == {ANSWER}
    assert set(found.readers(0, "one.a")) == {"one"}
    assert found.readers(0, "not there") == ()


def test_readers_in_a_circle_end() -> None:
    found = _pieces(unfit={"two"}, readers={"one": {"two"}, "two": {"one", ANSWER, "two"}})
    assert set(found.readers(0, "one")) == {ANSWER}


def test_layers_with_one_input_go_together_if_they_do_in_every_batch() -> None:
    fields = {"shares": {"k": "q", "v": "k"}}
    yes = _recording(["q", "k", "v", "out"], {}, **fields)
    assert Pieces([yes]).together("q") == ["q", "k", "v"]
    assert Pieces([yes]).together("k") == ["k", "v"]
    absent = _recording([], {})
    assert Pieces([yes, absent]).together("q") == ["q", "k", "v"]
    alone = _recording(["q", "k", "v", "out"], {}, shares={"k": "q"})
    twice = _recording(["q", "k", "v", "k"], {}, **fields)
    half = _recording(["q"], {})
    assert Pieces([yes, alone]).together("q") == ["q", "k"]
    for other in (twice, half):
        assert Pieces([yes, other]).together("q") == ["q"]


def test_blocks_are_the_largest_pieces_with_few_enough_layers() -> None:
    pieces = _pieces()
    assert pieces.blocks(ORDER, 2) == ["one", "two"]
    assert pieces.blocks(ORDER, 1) == ["one.a", "one.b", "two"]
    assert pieces.blocks(["one.b"], 1) == ["one"]
    assert pieces.blocks([], 5) == []
    assert [pieces.first(path) for path in ("one", "one.b", "two")] == [0, 1, 2]


def test_outputs_are_kept_as_copies_and_revived_as_copies() -> None:
    x = torch.ones(2, requires_grad=True)
    output = kept({"x": x, "n": 3})
    with torch.no_grad():
        x += 1
    assert output["n"] == 3 and not output["x"].requires_grad
    revived(output, {})["x"].zero_()
    assert torch.equal(revived(output, {})["x"], torch.ones(2))


def test_what_nobody_reads_any_more_loses_its_values_and_what_a_kept_piece_contains_goes() -> None:
    pieces = _pieces()
    outputs = {path: torch.full((2,), 7.0) for path in ("one.a", "one.b", "one")}
    found = freed(pieces, 0, outputs, done={"one.a", "one.b"}, stored={"one", "one.a", "one.b"})
    assert list(found) == ["one"] and torch.equal(found["one"], outputs["one"])
    found = freed(pieces, 0, outputs, done={"one.a", "one.b"}, stored={"one.a", "one.b"})
    assert list(found) == ["one.a", "one.b", "one"]
    blanks: dict[object, torch.Tensor] = {}
    assert not revived(found["one.a"], blanks).any()
    assert torch.equal(revived(found["one.b"], blanks), torch.full((2,), 7.0))  # "one" reads it, and is not kept
    later = freed(pieces, 0, {"one": outputs["one"]}, done={*ORDER, "two"}, stored={"one"})
    again = freed(pieces, 0, later, done=set(), stored=set())  # what has lost its values has lost them
    assert revived(again["one"], blanks).shape == (2,) and not revived(again["one"], blanks).any()
    assert len(blanks) == 1 and revived(later["one"], blanks) is revived(again["one"], blanks)
