"""Streams: text as it becomes certain, stop texts, several at once."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
from paged_fake import ByteTokenizer, FakeExecutable, ScriptedExecutable, greedy

from graphopt.errors import RequestError
from graphopt.runtime import Engine, SamplingParams, TokenEvent

END = 256


def scripted(text: str, prompt: str = "ask", end: bool = True) -> Engine:
    script = [*text.encode(), *([END] if end else []), *b"never seen"]
    return Engine(ScriptedExecutable(script, len(prompt)), ByteTokenizer(), (END,))


def texts(events: list[TokenEvent]) -> list[str]:
    assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
    return [e.text or "" for e in events]


def test_multibyte_text_arrives_in_whole_characters() -> None:
    text = "aé漢👩b"
    events = list(scripted(text).stream("ask"))
    assert texts(events) == [
        piece for c in text for piece in [""] * (len(c.encode()) - 1) + [c]
    ] + [""]
    assert [e.token for e in events] == [*text.encode(), END]
    assert events[-1].finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_stream_equals_generate_wherever_it_is_cut(max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    events = list(scripted("aé漢👩b").stream("ask", params))
    (done,) = scripted("aé漢👩b").generate(["ask"], params)
    assert "".join(texts(events)) == done.text
    assert done.text == bytes(done.tokens).decode(errors="replace")
    assert done.finish_reason == events[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "stop", "result", "tokens"),
    [
        ("one STOP two", "STOP", "one ", 8),
        ("é漢 end", "漢 e", "é", 7),
        ("STOP", "STOP", "", 4),
        ("ends in STO", "STOP", "ends in STO", 12),
    ],
)
def test_stop_text(text: str, stop: str, result: str, tokens: int) -> None:
    engine = scripted(text)
    params = SamplingParams(stop=(stop,), max_tokens=50)
    (done,) = engine.generate(["ask"], params)
    assert (done.text, len(done.tokens), done.finish_reason) == (result, tokens, "stop")
    events = list(scripted(text).stream("ask", params))
    assert "".join(texts(events)) == result
    assert engine.stats.blocks_used == 0
    assert not engine.has_work


def test_stop_text_in_the_last_allowed_token_counts_as_stop() -> None:
    engine = scripted("ab STOP")
    (done,) = engine.generate(["ask"], SamplingParams(stop=("STOP",), max_tokens=7))
    assert (done.text, done.finish_reason) == ("ab ", "stop")


@pytest.mark.parametrize("last", [2, 3])
def test_stop_text_hidden_by_half_a_character(last: int) -> None:
    """A token may end in the middle of a character: the stop text before it is seen late."""

    class Pieces(ByteTokenizer):
        def decode(self, token_ids: Any, *_: Any, **__: Any) -> str:
            pieces = {1: b"ab ST", 2: b"OP\xc3", 3: b"\xa9", 4: b"Q"}
            return b"".join(pieces[t] for t in token_ids).decode(errors="replace")

    engine = Engine(ScriptedExecutable([1, 2, 3, 4], 1), Pieces())
    (done,) = engine.generate([[4]], SamplingParams(stop=("STOP",), max_tokens=last))
    assert (done.text, done.tokens, done.finish_reason) == ("ab ", (1, 2, 3)[:last], "stop")


def test_held_back_text_is_given_at_the_end() -> None:
    params = SamplingParams(stop=("STOP",), max_tokens=5)
    events = list(scripted("ab STxx", end=False).stream("ask", params))
    assert texts(events) == ["a", "b", " ", "", "ST"]


def test_cancel_gives_the_held_back_text() -> None:
    engine = scripted("ab STxx")
    request_id = engine.submit("ask", SamplingParams(stop=("STOP",)))
    for _ in range(5):
        engine.step()
    event = engine.cancel(request_id)
    assert (event.text, event.finish_reason) == ("ST", "cancelled")


def test_end_token_is_no_text_even_if_it_has_one() -> None:
    engine = Engine(ScriptedExecutable(list(b"abc"), 3), ByteTokenizer(), (ord("c"),))
    (done,) = engine.generate(["ask"])
    assert (done.text, done.tokens) == ("ab", tuple(b"abc"))


def test_several_streams_and_a_batch_at_once() -> None:
    engine = Engine(FakeExecutable())
    params = SamplingParams(max_tokens=9)
    asked = [[1, 2, 3], [4], [5, 6]]
    streams = [engine.stream(prompt, params) for prompt in asked]
    got: list[list[Any]] = [[], [], []]
    for turn in range(9):
        for index in (0, 1, 2) if turn % 2 else (2, 0, 1):
            got[index].append(next(streams[index]).token)
        if turn == 4:
            (done,) = engine.generate([[7, 8]], params)
            assert list(done.tokens) == greedy([7, 8], 9)
    for prompt, stream, tokens in zip(asked, streams, got, strict=True):
        assert next(stream, None) is None
        assert tokens == greedy(prompt, 9)


def test_closing_a_stream_cancels_it() -> None:
    engine = Engine(FakeExecutable())
    stream = engine.stream([1, 2])
    next(stream)
    assert engine.stats.blocks_used > 0
    stream.close()
    assert not engine.has_work
    assert engine.stats.blocks_used == 0


def test_a_stream_closed_or_dropped_before_it_began_is_cancelled() -> None:
    engine = Engine(FakeExecutable())
    stream = engine.stream([1, 2])
    dropped = engine.stream([3])
    assert engine.stats.waiting == 2
    assert engine.stats.steps == 0
    stream.close()
    assert engine.stats.waiting == 1
    del dropped
    gc.collect()
    assert not engine.has_work


def test_a_stream_cancelled_from_outside_ends_with_that_event() -> None:
    engine = Engine(FakeExecutable())
    stream = engine.stream([1, 2])
    first = next(stream)
    engine.cancel(first.request_id)
    assert [e.finish_reason for e in stream] == ["cancelled"]


def test_prompt_text_is_encoded_and_an_empty_one_refused() -> None:
    engine = scripted("x")
    (done,) = engine.generate(["ask"])
    assert done.prompt_tokens == tuple(b"ask")
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.submit("")


def test_submitted_requests_find_what_streams_and_generate_computed() -> None:
    engine = Engine(FakeExecutable())
    params = SamplingParams(max_tokens=4)
    mine = engine.submit([1, 2, 3], params)
    list(engine.stream([4, 5], SamplingParams(max_tokens=8)))
    engine.generate([[7]], params)
    assert engine.has_work
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    assert [e.request_id for e in events] == [mine] * 4
    assert [e.token for e in events] == greedy([1, 2, 3], 4)
    assert engine.step() == []


def test_an_engine_in_use_says_so_to_other_threads() -> None:
    told: list[str] = []

    class Meddling(FakeExecutable):
        """Its step is in the way of another thread."""

        def __call__(self, *args: Any, **inputs: Any) -> Any:
            def work() -> None:
                for call in (engine.step, lambda: engine.submit([1]), lambda: engine.cancel(0)):
                    try:
                        call()
                    except RequestError as error:
                        told.append(str(error))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return super().__call__(*args, **inputs)

    engine = Engine(Meddling())
    (done,) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert list(done.tokens) == greedy([1, 2, 3], 2)
    assert len(told) == 6
    assert all("another thread is using this engine" in text for text in told)


def test_a_step_gives_no_events_of_streams() -> None:
    """Each stream gives them itself: nothing comes twice."""
    engine = Engine(FakeExecutable())
    stream = engine.stream([1, 2], SamplingParams(max_tokens=3))
    mine = engine.submit([4], SamplingParams(max_tokens=3))
    stepped = [event for _ in range(3) for event in engine.step()]
    assert [(event.request_id, event.token) for event in stepped] == [
        (mine, token) for token in greedy([4], 3)
    ]
    assert [event.token for event in stream] == greedy([1, 2], 3)
    assert not engine.has_work


def test_tokens_of_a_cancelled_request_that_a_stream_computed_are_given() -> None:
    engine = Engine(FakeExecutable())
    mine = engine.submit([4], SamplingParams(max_tokens=9))
    stream = engine.stream([1, 2], SamplingParams(max_tokens=2))
    assert len(list(stream)) == 2
    assert engine.cancel(mine).finish_reason == "cancelled"
    assert engine.has_work
    assert [event.token for event in engine.step()] == greedy([4], 2)
    assert not engine.has_work
