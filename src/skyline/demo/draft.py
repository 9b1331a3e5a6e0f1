"""What a problem is drawn with: names and objects, random numbers, and worked steps."""

import random
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Alan Alice Amir Anna Ben Carla Chen Clara Dana David Elena Emma Felix Fatima Grace Hugo Ines Ivan Jack Jana "
    "Kofi Laila Leo Lina Lucas Maria Mei Mia Nina Noah Nora Olga Omar Oscar Paul Priya Ravi Rosa Ruth Sam Sara Sofia "
    "Tara Theo Tom Vera Wei Yara Zoe"
)
ITEMS = _words(
    "apples oranges pears lemons plums peaches marbles stickers pencils books cards coins stamps shells buttons beads "
    "cookies muffins eggs balloons flowers candles ribbons tickets toys photos stones blocks badges crayons"
)
PLACES = _words("shop market library school garden museum park bakery station farm")
VEHICLES = _words("car bus train truck cyclist boat van tram")
CONTAINERS = _words("box bag basket jar crate packet tray drawer")
_PLURAL = {"box": "boxes"}


@dataclass(frozen=True)
class Problem:
    """One problem; ``template`` and ``numbers`` identify it apart from its wording."""

    question: str
    solution: str
    answer: int
    template: str = ""
    numbers: tuple[int, ...] = ()


class Draft:
    """Draws the random parts of one problem and writes its solution down step by step."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.numbers: list[int] = []
        self.steps: list[str] = []

    def n(self, low: int, high: int) -> int:
        """A number that belongs to the identity of the problem, uniform in [low, high]."""
        value = self.rng.randint(low, high)
        self.numbers.append(value)
        return value

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    def name(self) -> str:
        return self.rng.choice(NAMES)

    def names(self, count: int) -> list[str]:
        return self.rng.sample(NAMES, count)

    def item(self) -> str:
        return self.rng.choice(ITEMS)

    def items(self, count: int) -> list[str]:
        return self.rng.sample(ITEMS, count)

    def container(self) -> tuple[str, str]:
        """A container's name in the singular and in the plural."""
        one = self.rng.choice(CONTAINERS)
        return one, _PLURAL.get(one, one + "s")

    def add(self, a: int, b: int) -> int:
        return self._step(a, "+", b, a + b)

    def sub(self, a: int, b: int) -> int:
        return self._step(a, "-", b, a - b)

    def mul(self, a: int, b: int) -> int:
        return self._step(a, "*", b, a * b)

    def div(self, a: int, b: int) -> int:
        if a % b:
            raise ValueError(f"{a} is not divisible by {b}")
        return self._step(a, "/", b, a // b)

    def _step(self, a: int, op: str, b: int, c: int) -> int:
        if min(a, b, c) < 0 or max(a, b, c) > 999:
            raise ValueError(f"{a} {op} {b} = {c} leaves the range 0..999")
        self.steps.append(f"{a} {op} {b} = {c}")
        return c
