"""Steps with prompts on a GPU as recorded pieces: what lies between two looks at the requests is one launch.

The device computes a step of some hundred tokens in less time than the host needs to launch it call by call. What a
call launches depends on the requests in a few calls alone: those that are given the batch, as attention is, and those
behind the choice of the rows that become logits. All others go by the number of tokens. Runs of these are recorded as
CUDA graphs, for numbers of tokens with little padding between them, and a step replays them with the others, which are
launched, in between.

A recording reads where it was recorded to read. So inputs and what launched calls give are copied to buffers that all
recordings share. What recordings give to launched calls stays in their memory, which is one for all recordings and is
used again within a step as soon as nobody reads it; rows of padding compute something that nobody reads.

The rule: a step that is not of decodes alone, with up to MOST_TOKENS tokens, is replayed once its size is recorded.
That is between two steps, after as many steps of that size as recording it costs, or earlier, when the engine has
nothing to do. What was recorded is then replayed once, and compared with what the calls compute one by one. If any of
this fails, it is reported once and all such steps run call by call. A size whose pieces the device
computes for longer than the host launches them gains nothing, and loses what padding costs: it is not replayed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skyline.graph import Call, Program
from skyline.graph.capture import INPUTS
from skyline.kernels import triton
from skyline.ops import AttentionBatch
from skyline.runner.decode_graphs import WORTH, recordable
from skyline.runner.recording import Recording, borrowed, record_part, recording_stream, replay_seconds

_LOG = logging.getLogger(__name__)

# Of the root mean square, between what is replayed and what the calls compute: the same kernels do both.
_TOLERANCE = 0.02

# Above it, a device computes for longer than the host launches.
MOST_TOKENS = 2048

_IDS, _POSITIONS, _BATCH, _LOGIT_ROWS = range(len(INPUTS))


def padded(tokens: int) -> int:
    """The size that a step of so many tokens is recorded in: at most an eighth of it, or 15 tokens, is padding."""
    step = max(16, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


@dataclass(slots=True)
class Piece:
    """Calls one after the other that are all recorded, or all launched. What follows are numbers of slots.

    reads: what recorded calls are given from outside, but for what is the same in every step. results: what is read
    behind the piece; crossing: of those, what the other kind of pieces reads. frees: what nobody reads any more.
    """

    recorded: bool
    calls: list[Call]
    reads: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    crossing: list[int] = field(default_factory=list)
    frees: list[int] = field(default_factory=list)

    def results_of(self, view: Call) -> set[int]:
        """Of a call that makes views: their slots, and those of views of them in this piece."""
        found = set(view.results)
        for call in self.calls:
            if call.is_view and call.arguments[0] in found:
                found.update(call.results)
        return found


def cut(program: Program) -> list[Piece]:
    """A step's calls. Where views are all that could be recorded, they are launched, which costs nothing."""
    behind_rows = {_LOGIT_ROWS}
    kinds = []
    for call in program.calls:
        if behind_rows.intersection(call.arguments):
            behind_rows.update(call.results)
            kinds.append(False)
        else:
            kinds.append(_BATCH not in call.arguments and recordable(call))
    pieces: list[Piece] = []
    for call, recorded in zip(program.calls, kinds, strict=True):
        if not pieces or pieces[-1].recorded != recorded:
            pieces.append(Piece(recorded, []))
        pieces[-1].calls.append(call)
    joined: list[Piece] = []
    for piece in pieces:
        recorded = piece.recorded and not all(call.is_view for call in piece.calls)
        if joined and joined[-1].recorded == recorded:
            joined[-1].calls += piece.calls
        else:
            joined.append(Piece(recorded, piece.calls))
    _connect(joined, program.output)
    return joined


def _connect(pieces: list[Piece], output: int) -> None:
    made = {_IDS: -1, _POSITIONS: -1}  # by slot, the piece
    readers: dict[int, set[int]] = {output: {len(pieces)}}
    for index, piece in enumerate(pieces):
        for call in piece.calls:
            for slot in call.arguments:
                if slot in made:
                    readers.setdefault(slot, set()).add(index)
            made.update(dict.fromkeys(call.results, index))
        piece.frees = [slot for call in piece.calls for slot in call.frees]
    for index, piece in enumerate(pieces):
        inside = [slot for call in piece.calls for slot in call.results]
        piece.results = [slot for slot in inside if any(reader > index for reader in readers.get(slot, ()))]
        piece.reads = [slot for slot, by in readers.items() if index in by and made[slot] < index]
        piece.crossing = [
            slot
            for slot in piece.results
            if any(reader < len(pieces) and pieces[reader].recorded != piece.recorded for reader in readers[slot])
        ]


def why_not_in_pieces(program: Program, pieces: Sequence[Piece]) -> str | None:
    """None if what goes from one kind of pieces to the other has a row for each token, and all else is in order."""
    for call in program.calls:
        if not recordable(call) and _BATCH not in call.arguments:
            return f"{call.op.name} runs in {call.kernel.provider}, which looks at values on the host"
    for piece in pieces:
        inside = {slot for call in piece.calls for slot in call.results}
        for call in piece.calls:
            # Its base's memory goes to somebody else by the base's own readers.
            if (
                call.is_view
                and call.arguments[0] not in inside
                and not piece.results_of(call).isdisjoint(piece.results)
            ):
                return f"{call.name} is a part of what another piece gives, and read by a third"
    crossing = {slot for piece in pieces for slot in piece.crossing}
    for tokens in (33, 47):  # numbers that are no size of a model
        for slot, value in _described(program, tokens).items():
            if slot in crossing and (value.dim() == 0 or value.shape[0] != tokens):
                return f"what is {tuple(value.shape)} for {tokens} tokens has not a row for each"
    return None if any(piece.recorded for piece in pieces) else "no call goes by the number of tokens alone"


def _described(program: Program, tokens: int) -> dict[int, Tensor]:
    """The results of a step's calls, on the meta device."""
    found: dict[int, Tensor] = {}

    def visit(call: Call, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> None:
        found.update(zip(call.results, results, strict=True))

    program.trace_sizes(tokens, 1, visit)
    return found


def _vocabulary(program: Program) -> int:
    for call in program.calls:
        if call.op.name == "embedding":
            return int(program.constant(call.arguments[1]).shape[0])
    return 1


@dataclass(slots=True)
class _Recorded:
    """Of one size. parts: of the recorded pieces, in their order. given: by slot, what those give to launched calls."""

    uses: int = 0  # steps that ran call by call
    worth: bool = True  # as far as is known
    parts: list[Recording[list[Any]]] = field(default_factory=list)
    given: dict[int, Tensor] = field(default_factory=dict)


class PromptGraphs:
    """Takes the place of a Program's call. Not thread-safe: one thread calls it, in the order of the plans."""

    def __init__(self, program: Program, device: torch.device, most: int = MOST_TOKENS, reserve: int = 0) -> None:
        """most: tokens. reserve: bytes that recordings may take at once, kept for them when the first one is made."""
        self._program = program
        self._device = device
        self._pieces = cut(program)
        self.why_not = why_not_in_pieces(program, self._pieces)
        self._record = self.why_not is None
        self._most = most
        self._reserve = reserve
        self._holds: Any = None  # the memory that all recordings share
        self._inputs = torch.zeros((2, padded(most)), dtype=torch.int64, device=device)
        # Until a step brings others: the same tokens would all go to the same experts.
        self._inputs[_IDS].random_(_vocabulary(program))
        # Now, so that the memory for the KV cache is counted without them.
        self._buffers = self._make_buffers() if self._record else {}
        self._known: dict[int, _Recorded] = {}
        self._due: list[int] = []  # sizes
        self.replayed = False  # whether the last step was

    @property
    def recorded(self) -> list[int]:
        """Sizes there are recordings for. Any thread may ask."""
        return sorted(size for size, known in list(self._known.items()) if known.parts)

    @property
    def due(self) -> bool:
        """Whether `record_due` has something to record."""
        return bool(self._due)

    def __call__(self, input_ids: Tensor, positions: Tensor, batch: AttentionBatch, logit_rows: Tensor) -> Tensor:
        self.replayed, tokens = False, input_ids.shape[0]
        if not self._record or not 0 < tokens <= self._most or self._program.observed:
            return self._program(input_ids, positions, batch, logit_rows)
        size = padded(tokens)
        known = self._known.setdefault(size, _Recorded())
        if known.parts:
            return self._replay(known, tokens, (input_ids, positions, batch, logit_rows))
        known.uses += 1
        if known.uses == WORTH:
            self._due.append(size)
        return self._program(input_ids, positions, batch, logit_rows)

    def record_next(self) -> bool:
        """Record one size more that has occurred. Call it between steps; False if none is left."""
        missing = [size for size, known in self._known.items() if known.uses and known.worth and not known.parts]
        if not self._record or not missing:
            return False
        self._record_size(max(missing, key=lambda size: self._known[size].uses))
        return self._record and len(missing) > 1

    def record_due(self) -> None:
        """Record the sizes that the load needs. Call it between steps."""
        while self._due and self._record:
            self._record_size(self._due.pop())

    def _replay(self, known: _Recorded, tokens: int, inputs: tuple[Any, ...]) -> Tensor:
        self._inputs[_IDS, :tokens], self._inputs[_POSITIONS, :tokens] = inputs[_IDS], inputs[_POSITIONS]
        slots = self._program.slots(inputs)
        parts = iter(known.parts)
        for piece in self._pieces:
            if piece.recorded:
                next(parts).graph.replay()
                for slot in piece.crossing:
                    slots[slot] = known.given[slot][:tokens]
                for slot in piece.frees:
                    slots[slot] = None
            else:
                _compute(piece.calls, slots)
                for slot in piece.crossing:
                    self._buffers[slot][:tokens] = slots[slot]
        self.replayed = True
        logits = slots[self._program.output]
        assert isinstance(logits, Tensor)
        return logits

    @torch.inference_mode()
    def _record_size(self, size: int) -> None:
        known = self._known.get(size)
        if known is None or known.parts or not known.worth:
            return
        try:
            launching = self._launch_seconds(size, known)
            with recording_stream(self._device):
                given = self._walk(size, known, recording=True)
            if self._differs(size, known, given):
                raise RuntimeError("what is replayed is not what the calls compute")
            known.worth = self._seconds(known) < launching
        except Exception as error:
            self._record = False
            self._due.clear()
            self._known.clear()
            self._holds, self._buffers = None, {}
            cause = "" if error.__context__ is None else f" ({error.__context__})"
            _LOG.warning("steps with prompts are not recorded: of %d tokens, that failed: %s%s", size, error, cause)
            return
        if not known.worth:
            known.parts, known.given = [], {}

    def _launch_seconds(self, size: int, known: _Recorded) -> float:
        """That the host takes for the recorded pieces' calls, all of which are compiled then."""
        before = triton.fallbacks
        self._walk(size, known, recording=False)
        if triton.fallbacks != before:
            raise RuntimeError("torch takes a kernel's place, and would look at values on the host")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # or the host might wait for it
        began = time.perf_counter()
        self._walk(size, known, recording=False)
        return time.perf_counter() - began

    def _seconds(self, known: _Recorded) -> float:
        """That the device takes for the recorded pieces."""
        if self._device.type != "cuda":
            return 0.0
        return replay_seconds(_Together([part.graph for part in known.parts]), 3)

    def _held(self, size: int) -> dict[int, Any]:
        """What recorded pieces are given from outside, by slot."""
        inputs = {_IDS: self._inputs[_IDS, :size], _POSITIONS: self._inputs[_POSITIONS, :size]}
        return inputs | {slot: buffer[:size] for slot, buffer in self._buffers.items()}

    def _differs(self, size: int, known: _Recorded, given: dict[int, Tensor]) -> bool:
        """Whether something that recorded pieces give is another when it is read than it should be."""
        values, parts = self._held(size), iter(known.parts)
        wrong = torch.zeros((), dtype=torch.bool, device=self._device)
        for piece in self._pieces:
            if piece.recorded:
                next(parts).graph.replay()
                results = self._results(piece, {slot: values[slot] for slot in piece.reads})
                values.update(zip(piece.results, results, strict=True))
            for slot in piece.results if piece.recorded else piece.reads:
                if slot in given:
                    wrong |= _far(given[slot], values[slot])
            for slot in piece.frees:
                values.pop(slot, None)
        return bool(wrong)

    def _walk(self, size: int, known: _Recorded, recording: bool) -> dict[int, Tensor]:
        """Compute, or record, all recorded pieces, on whatever the buffers hold; the memory of recorded results."""
        parts: list[Recording[list[Any]]] = []
        given: dict[int, Tensor] = {}
        values = self._held(size)
        if recording and self._holds is None:
            # One piece of memory from which all later ones are cut, whatever sizes come first.
            zeros = partial(torch.zeros, self._reserve + 1, dtype=torch.uint8, device=self._device)
            self._holds = record_part(lambda: zeros().shape)
        for piece in self._pieces:
            if piece.recorded:
                run = partial(self._results, piece, {slot: values[slot] for slot in piece.reads})
                for slot in piece.frees:  # from here on only `run` holds them, until they have been read
                    values.pop(slot, None)
                if recording:
                    parts.append(record_part(run, self._holds.graph.pool()))
                    parts[-1].result, results = [], parts[-1].result
                else:
                    results = run()
                values.update(zip(piece.results, results, strict=True))
                del run, results  # or what they hold could not be used again by the next piece
                if recording:
                    given |= {slot: borrowed(values[slot]) for slot in piece.results}
                continue
            for slot in piece.frees:
                values.pop(slot, None)
        if recording:
            crossing = {slot for piece in self._pieces if piece.recorded for slot in piece.crossing}
            known.parts, known.given = parts, {slot: given[slot] for slot in crossing}
        return given

    def _results(self, piece: Piece, given: dict[int, Any]) -> list[Any]:
        slots = self._program.slots()
        for slot in list(given):
            slots[slot] = given.pop(slot)
        _compute(piece.calls, slots)
        return [slots[slot] for slot in piece.results]

    def _make_buffers(self) -> dict[int, Tensor]:
        """For what launched calls give to recorded ones: the same for several, if never two of them are read later."""
        described = _described(self._program, padded(self._most))
        last = {slot: index for index, piece in enumerate(self._pieces) if piece.recorded for slot in piece.reads}
        found: dict[int, Tensor] = {}
        idle: dict[tuple[Any, ...], list[Tensor]] = {}
        busy: list[tuple[int, tuple[Any, ...], Tensor]] = []
        for index, piece in enumerate(self._pieces):
            for until, kind, buffer in busy:
                if until < index:
                    idle.setdefault(kind, []).append(buffer)
            busy = [entry for entry in busy if entry[0] >= index]
            for slot in [] if piece.recorded else piece.crossing:
                value = described[slot]
                kind = (tuple(value.shape), value.dtype)
                free = idle.get(kind)
                buffer = free.pop() if free else torch.zeros(value.shape, dtype=value.dtype, device=self._device)
                if buffer.is_floating_point():
                    buffer.normal_()
                found[slot] = buffer
                busy.append((last[slot], kind, buffer))
        return found


def _far(found: Tensor, expected: Tensor) -> Tensor:
    """On the device. Where both are no number, they are the same."""
    given, wanted = (torch.nan_to_num(part.float(), 0.0, 0.0, 0.0) for part in (found, expected))
    return (given - wanted).square().mean() > _TOLERANCE**2 * wanted.square().mean()


class _Together(list[Any]):
    """Graphs as one."""

    def replay(self) -> None:
        for graph in self:
            graph.replay()


def _compute(calls: Iterable[Call], slots: list[Any]) -> None:
    """As a Program does it."""
    for call in calls:
        value = call.kernel.run(*[slots[slot] for slot in call.arguments])
        if len(call.results) == 1:
            slots[call.results[0]] = value
        else:
            for slot, part in zip(call.results, value or (), strict=True):
                slots[slot] = part
        for slot in call.frees:
            slots[slot] = None
