"""Arithmetic word problems with worked steps: the training data and the accuracy gate of the demo model.

A problem is a short story with a few small numbers; its solution has one line ``a op b = c`` for each step and ends in
``#### N``, the answer format of GSM8K (Cobbe et al., 2021, "Training Verifiers to Solve Math Word Problems").  Operands
are kept to what a model of a few million parameters can compute in one step: sums and differences below 1000, products
of one digit and at most two, exact quotients by one digit.  All integers are nonnegative.

Held-out problems are separated by content, not by luck: the hash of (template, numbers) puts one problem in twenty into
the held-out bucket, and training skips that bucket.  No held-out combination of story and numbers is ever trained on,
under whatever names and objects.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator

from skyline.demo.draft import Draft, Problem
from skyline.demo.stories import TEMPLATES

HELDOUT_ONE_IN = 20
HELDOUT_SEED = 20_240_607
_TEMPLATE_LIST = tuple(TEMPLATES.items())


def _finish(name: str, question: str, draft: Draft) -> Problem:
    answer = int(draft.steps[-1].rpartition(" = ")[2])
    solution = "\n".join([*draft.steps, f"#### {answer}"])
    return Problem(question, solution, answer, name, tuple(draft.numbers))


def generate(rng: random.Random) -> Problem:
    """Draw one word problem, from the held-out bucket or not; the same state of `rng` gives the same problem."""
    name, write = rng.choice(_TEMPLATE_LIST)
    draft = Draft(rng)
    return _finish(name, write(draft), draft)


def expression(rng: random.Random) -> Problem:
    """Draw a bare expression such as "What is 17 + 25?": one step, no story."""
    d = Draft(rng)
    op = rng.choice("+-*/")
    if op == "+":
        a, b = d.n(0, 499), d.n(0, 499)
        d.add(a, b)
    elif op == "-":
        b = d.n(0, 499)
        a = b + d.n(0, 499)
        d.sub(a, b)
    elif op == "*":
        a, b = d.n(1, 9), d.n(0, 99)
        if rng.random() < 0.3:
            a, b = b, a
        d.mul(a, b)
    else:
        b = d.n(1, 9)
        a = b * d.n(0, 99)
        d.div(a, b)
    ask = rng.choice(
        ("What is {}?", "Compute {}.", "{} = ?", "How much is {}?", "Calculate {}", "{}", "Please work out {}.")
    )
    return _finish(f"expression{op}", ask.format(f"{a} {op} {b}"), d)


def is_heldout(problem: Problem) -> bool:
    """True if the problem's (template, numbers) falls into the bucket that training never sees."""
    key = f"{problem.template}:{','.join(map(str, problem.numbers))}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % HELDOUT_ONE_IN == 0


def training(rng: random.Random, draw: Callable[[random.Random], Problem] = generate) -> Problem:
    """Draw one problem outside the held-out bucket."""
    while is_heldout(problem := draw(rng)):
        pass
    return problem


def heldout(count: int = 500, seed: int = HELDOUT_SEED) -> Iterator[Problem]:
    """Yield `count` different word problems from the held-out bucket."""
    rng = random.Random(seed)
    seen: set[tuple[str, tuple[int, ...]]] = set()
    while len(seen) < count:
        problem = generate(rng)
        key = (problem.template, problem.numbers)
        if is_heldout(problem) and key not in seen:
            seen.add(key)
            yield problem


_ANSWER = re.compile(r"####\s*\$?(-?\d[\d,]*)")


def extract_answer(text: str) -> int | None:
    """The integer after the last ``####``, or None where there is none."""
    found = _ANSWER.findall(text)
    return int(found[-1].replace(",", "")) if found else None
