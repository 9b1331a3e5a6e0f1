"""Structured output with a real byte-level BPE tokenizer and random logits: whatever is chosen, the text must fit."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import skyline.runner.grammar as grammar_module
from skyline.engine.grammar_check import GrammarError
from skyline.engine.messages import AdmittedRequest
from skyline.engine.sampling_params import GrammarSpec, SamplingParams
from skyline.runner.grammar import GrammarCompiler, Matcher, apply_bitmask, bitmask_width
from skyline.runner.sampler import Sampler

CPU = torch.device("cpu")
EOS = [0, 2]
VOCAB = 437  # wider than the tokenizer's, and no multiple of 32


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    corpus = ['{"name": "Ada Lovelace", "age": 36, "tags": ["math", "poetry"], "ok": true}', "yes no maybe 2024-01-31"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<eos>", "<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus * 20, trainer)
    return made


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.to_str(), VOCAB, EOS)


def allowed(matcher: Matcher) -> set[int]:
    row = torch.zeros(bitmask_width(VOCAB), dtype=torch.int32)
    matcher.fill_mask(row)
    masked = apply_bitmask(torch.zeros(1, VOCAB), row[None])
    return set(masked[0].isfinite().nonzero().flatten().tolist())


def make_sampler(compiler: GrammarCompiler | None, slots: int = 2, length: int = 400) -> Sampler:
    return Sampler(
        vocab_size=VOCAB,
        max_slots=slots,
        device=CPU,
        token_ids=torch.zeros((slots, length), dtype=torch.int32),
        eos_token_ids=EOS,
        grammar_compiler=compiler,
    )


def generate(
    compiler: GrammarCompiler,
    params: SamplingParams,
    count: int,
    steps: int = 250,
    preempt: Callable[[int], bool] = lambda step: False,
) -> list[list[int]]:
    """`count` requests side by side on random logits that lean to EOS, each until its EOS (which is left out)."""
    sampler = make_sampler(compiler, slots=count)
    tokens: dict[int, list[int]] = {slot: [5] for slot in range(count)}
    for slot in tokens:
        sampler.admit(AdmittedRequest(slot, "", [5], 1, params, 1000 + slot))
    done: dict[int, list[int]] = {}
    for step in range(steps):
        running = [slot for slot in tokens if slot not in done]
        if not running:
            break
        logits = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(step)) * 2
        logits[:, EOS] += 4.0
        if preempt(step):
            for slot in running:
                sampler.release(slot)
                sampler.admit(AdmittedRequest(slot, "", list(tokens[slot]), 1, params, 1000 + slot))
        result = sampler.sample(logits[running], running, [len(tokens[slot]) for slot in running])
        assert result.errors == {}
        for slot, token in zip(running, result.host_token_ids(), strict=True):
            if token in EOS:
                done[slot] = tokens[slot][1:]
            tokens[slot].append(token)
            sampler._token_ids[slot, len(tokens[slot]) - 1] = token
    assert len(done) == count, f"{count - len(done)} texts did not end"
    return [done[slot] for slot in range(count)]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["math", "poetry", "ä"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "maybe", "yes!", 'ä 😀\n\t"quoted" \\ / &']


def fits_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        {"name", "age"} <= set(value) <= {"name", "age", "tags", "ok"}
        and len(value["name"]) <= 12
        and 0 <= value["age"] <= 150
        and len(value.get("tags", [])) <= 3
        and set(value.get("tags", [])) <= {"math", "poetry", "ä"}
        and value.get("ok", True) in (True, False)
    )


def is_sum(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,3}( \+ [0-9]{1,3})*", text) is not None


KINDS: dict[str, tuple[GrammarSpec, Callable[[str], Any]]] = {
    "json_schema": (GrammarSpec("json_schema", json.dumps(SCHEMA)), fits_schema),
    "regex": (
        GrammarSpec("regex", r"(19|20)[0-9]{2}-[01][0-9](-[0-9]{2})? .{0,5}"),
        lambda text: re.fullmatch(r"(19|20)[0-9]{2}-[01][0-9](-[0-9]{2})? .{0,5}", text),
    ),
    "choice": (GrammarSpec("choice", json.dumps(CHOICES)), lambda text: text in CHOICES),
    "lark": (GrammarSpec("lark", 'start: NUM (" + " NUM)*\nNUM: /[0-9]{1,3}/'), is_sum),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_text_fits_the_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer, kind: str, temperature: float) -> None:
    spec, fits = KINDS[kind]
    count = 60 if temperature else 5
    texts = [
        tokenizer.decode(ids)
        for ids in generate(compiler, SamplingParams(temperature=temperature, grammar=spec), count)
    ]
    assert all(fits(text) for text in texts), texts
    if temperature:
        assert len(set(texts)) >= min(4, count)


def test_json_object(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Brackets are biased, or random text would nest without end."""
    closing = {token: 6.0 for token in range(3, tokenizer.get_vocab_size()) if tokenizer.id_to_token(token)[0] in '"}]'}
    params = SamplingParams(grammar=GrammarSpec("json_object"), logit_bias=closing)
    for ids in generate(compiler, params, 60):
        assert isinstance(json.loads(tokenizer.decode(ids)), dict)


def test_eos_is_allowed_exactly_at_valid_ends(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(GrammarSpec("regex", "ab?c{0,2}"))
    ends = {"a", "ab", "ac", "abc", "acc", "abcc"}
    text = ""
    for letter in "abcc":
        assert (set(EOS) <= allowed(matcher)) == (text in ends) == matcher.accepting
        matcher.accept(tokenizer.encode(letter).ids[0])
        text += letter
    assert matcher.finished and allowed(matcher) == set(EOS)
    matcher.accept(EOS[1])
    assert matcher.finished and allowed(matcher) == set(EOS)
    with pytest.raises(GrammarError, match="does not fit"):
        matcher.accept(tokenizer.encode("a").ids[0])


@pytest.mark.parametrize("kind", KINDS)
def test_preemption_changes_nothing(compiler: GrammarCompiler, kind: str) -> None:
    params = SamplingParams(grammar=KINDS[kind][0])
    plain = generate(compiler, params, 10)
    assert plain == generate(compiler, params, 10, preempt=lambda step: step in (1, 2, 9, 30))


def test_a_forbidden_token_is_an_error_and_stays_one(compiler: GrammarCompiler) -> None:
    for token in (430, 1, 40):  # beyond the tokenizer, a special token, an ordinary one
        matcher = compiler.compile(GrammarSpec("regex", "[0-9]+"))
        with pytest.raises(GrammarError) as caught:
            matcher.accept(token)
        assert "<state>" not in str(caught.value)
        with pytest.raises(GrammarError):
            matcher.fill_mask(torch.zeros(bitmask_width(VOCAB), dtype=torch.int32))


def test_only_tokens_of_the_tokenizer_are_allowed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    found = allowed(compiler.compile(GrammarSpec("regex", "(?s:.)*")))
    assert set(EOS) <= found and 1 not in found and max(found) < tokenizer.get_vocab_size()


def test_bitmask_is_applied_bit_by_bit() -> None:
    rows = torch.randint(-(2**31), 2**31 - 1, (3, bitmask_width(VOCAB)), dtype=torch.int32)
    masked = apply_bitmask(torch.ones(3, VOCAB), rows)
    for row in range(3):
        for token in range(VOCAB):
            bit = (int(rows[row, token // 32]) >> (token % 32)) & 1
            assert masked[row, token] == (1.0 if bit else float("-inf"))


def test_a_bad_bitmask_is_refused(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(GrammarSpec("json_object"))
    for row in (torch.zeros(3, dtype=torch.int32), torch.zeros(bitmask_width(VOCAB), dtype=torch.int64)):
        with pytest.raises(ValueError, match="contiguous int32"):
            matcher.fill_mask(row)


# --- in the sampler --------------------------------------------------------------------------------------------------


def test_a_bad_grammar_fails_its_own_request_only(compiler: GrammarCompiler) -> None:
    sampler = make_sampler(compiler)
    sampler.admit(AdmittedRequest(0, "", [5], 1, SamplingParams(grammar=GrammarSpec("regex", "(")), 0))
    sampler.admit(AdmittedRequest(1, "", [5], 1, SamplingParams(temperature=0), 0))
    logits = torch.zeros(2, VOCAB)
    logits[:, 9] = 1.0
    result = sampler.sample(logits.clone(), [0, 1], [1, 1])
    assert list(result.errors) == [0] and "unclosed" in result.errors[0]
    assert int(result.token_ids[1]) == 9
    sampler.release(0)
    sampler.admit(AdmittedRequest(0, "", [5], 1, SamplingParams(temperature=0), 0))
    assert sampler.sample(logits.clone(), [0, 1], [1, 1]).errors == {}


def test_no_compiler_and_no_eos_are_clear_errors(tokenizer: Tokenizer) -> None:
    sampler = make_sampler(None)
    sampler.admit(AdmittedRequest(0, "", [5], 1, SamplingParams(grammar=GrammarSpec("json_object")), 0))
    assert "no tokenizer" in sampler.sample(torch.zeros(1, VOCAB), [0], [1]).errors[0]
    for bad in (GrammarCompiler(tokenizer.to_str(), VOCAB, []), GrammarCompiler("{}", VOCAB, EOS)):
        with pytest.raises(GrammarError, match="not available"):
            bad.compile(GrammarSpec("json_object"))
    with pytest.raises(GrammarError, match="vocab size"):
        GrammarCompiler(tokenizer.to_str(), 100, EOS).compile(GrammarSpec("json_object"))


def test_replaying_tokens_that_do_not_fit_is_reported(compiler: GrammarCompiler) -> None:
    sampler = make_sampler(compiler)
    sampler.admit(AdmittedRequest(0, "", [5, 40], 1, SamplingParams(grammar=GrammarSpec("regex", "[0-9]+")), 0))
    assert "grammar" in sampler.sample(torch.zeros(1, VOCAB), [0], [2]).errors[0]


def test_when_other_rules_forbid_all_the_grammar_allows_the_text_ends(compiler: GrammarCompiler) -> None:
    spec = GrammarSpec("choice", '["yes"]')
    sampler = make_sampler(compiler)
    sampler.admit(AdmittedRequest(0, "", [5], 1, SamplingParams(grammar=spec, allowed_token_ids=[200, 201]), 0))
    result = sampler.sample(torch.randn(1, VOCAB), [0], [1])
    assert result.errors == {} and int(result.token_ids[0]) in EOS
    sampler.admit(AdmittedRequest(1, "", [5], 1, SamplingParams(grammar=spec, min_tokens=300), 0))
    tokens = [5]
    for _ in range(12):
        result = sampler.sample(torch.randn(1, VOCAB), [1], [len(tokens)])
        assert result.errors == {}
        tokens += result.host_token_ids()
    assert tokens[-1] in EOS and tokens[-2] in EOS


def test_nan_in_a_constrained_row(compiler: GrammarCompiler) -> None:
    sampler = make_sampler(compiler)
    sampler.admit(AdmittedRequest(0, "", [5], 1, SamplingParams(grammar=GrammarSpec("json_object")), 0))
    sampler.admit(AdmittedRequest(1, "", [5], 1, SamplingParams(grammar=GrammarSpec("json_object")), 0))
    logits = torch.zeros(2, VOCAB)
    logits[0] = float("nan")
    result = sampler.sample(logits, [0, 1], [1, 1])
    assert list(result.errors) == [0] and "not finite" in result.errors[0]


# --- cost ------------------------------------------------------------------------------------------------------------

HOSTILE = [
    GrammarSpec("regex", "(a{1000}){100}"),
    GrammarSpec("regex", "a{1,100000}"),
    GrammarSpec("regex", "((a|a)*){1,1000}"),
    GrammarSpec("regex", "(((a*)*)*)*b"),
    GrammarSpec("regex", "(a|b)*a(a|b){30}"),
    GrammarSpec("regex", "(.{0,100}){100}"),
    GrammarSpec("regex", r"(\w{1,300}\s?){1,300}"),
    GrammarSpec("regex", "|".join(f"word{i}" for i in range(8000))),
    GrammarSpec("lark", 'start: start start start | "a" | "b" | /./'),
    GrammarSpec("lark", 'start: x{1000}\nx: y{1000}\ny: z{1000}\nz: "a"'),
    GrammarSpec("lark", 'start: "a" start'),
    GrammarSpec("json_schema", '{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}}}'),
    GrammarSpec("json_schema", '{"type":"array","items":{"type":"string"},"minItems":100000,"maxItems":1000000}'),
    GrammarSpec("json_schema", '{"type":"string","maxLength":1000000000}'),
    GrammarSpec(
        "json_schema",
        json.dumps(
            {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}}] * 20}}}
        ),
    ),
    GrammarSpec(
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(10)]} for i in range(10)]}),
    ),
    GrammarSpec("json_schema", json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(1000)}})),
]


@pytest.mark.parametrize("spec", HOSTILE, ids=lambda spec: spec.text[:30])
def test_hostile_grammars_neither_hang_nor_break_anything(compiler: GrammarCompiler, spec: GrammarSpec) -> None:
    start = time.process_time()  # of this process alone: other tests run beside it
    try:
        matcher = compiler.compile(spec)
        for step in range(30):
            tokens = sorted(allowed(matcher) - set(EOS)) or EOS
            matcher.accept(tokens[step * 7919 % len(tokens)])
    except GrammarError as error:
        assert len(str(error)) < 700
    assert time.process_time() - start < 5.0


def test_a_compilation_that_does_not_end_fails_its_request_only(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(tokenizer.to_str(), VOCAB, EOS)
    kept = compiler.compile(GrammarSpec("json_object"))
    release = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(grammar_module, "COMPILE_SECONDS", 0.05)
        patch.setattr(grammar_module, "LLMatcher", lambda *args, **kwargs: release.wait())
        for pattern in ("a", "b"):
            with pytest.raises(GrammarError, match="takes longer"):
                compiler.compile(GrammarSpec("regex", pattern))
        with pytest.raises(GrammarError, match="try again later"):
            compiler.compile(GrammarSpec("regex", "c"))
        assert allowed(compiler.compile(GrammarSpec("json_object"))) == allowed(kept)
        release.set()
    deadline = time.monotonic() + 5
    while any(thread.is_alive() for thread in compiler._overdue) and time.monotonic() < deadline:
        time.sleep(0.01)
    compiler.compile(GrammarSpec("regex", "c"))


def test_requests_with_one_grammar_share_the_compilation_and_nothing_else(compiler: GrammarCompiler) -> None:
    spec = GrammarSpec("regex", "[0-9]{3}")
    first, second = compiler.compile(spec), compiler.compile(spec)
    before = allowed(second)
    token = next(iter(allowed(first)))
    first.accept(token)
    first.accept(EOS[0])
    assert allowed(second) == before == allowed(compiler.compile(spec))


def test_many_threads_build_one_tokenizer(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer.to_str(), VOCAB, EOS)
    found: list[set[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(allowed(compiler.compile(GrammarSpec("json_object")))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(entry == found[0] for entry in found)
