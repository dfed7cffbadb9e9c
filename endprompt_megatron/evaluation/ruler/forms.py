"""The forms of RULER's synthetic tasks. Each form writes a prompt for a given haystack size. The task rules are RULER's (arXiv 2404.06654,
section 3 and appendix B), but the sentences are our own. Compare the scores between models, not with published RULER scores.

Every form draws its random numbers such that a larger haystack extends a smaller one. The number of tokens therefore grows evenly with the
size.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.ruler.words import ADJECTIVES, NOUNS, WORDS, compounds

# Source: pass-key retrieval of landmark attention (arXiv 2305.16300). RULER uses the same five sentences.
NOISE_SENTENCES = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NUM_DEPTHS = 40  # RULER places its needles at this many evenly spaced depths, 0 and 1 included
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Draft:
    """A prompt, including the answer prefix, with its references and depth; see samples.RulerSample."""

    prompt: str
    references: tuple[str, ...]
    depth: float | None = None


@dataclass(frozen=True)
class RulerHaystack:
    """Text in which facts are hidden.

    Attributes:
        label: content of the haystack, for tables.
        units: sentences or words. They are repeated if a haystack has more units.
        boundaries: ascending indices of the units before which a fact may stand without splitting a sentence, including 0 and len(units);
            None allows all indices.
    """

    label: str
    units: tuple[str, ...]
    boundaries: np.ndarray | None = None

    def with_facts(self, size: int, facts: Sequence[tuple[float, str]], *, joint: str = " ") -> str:
        """Return the first `size` units as text, with each fact inserted at the unit that `place` returns for its depth."""
        rounds = -(-size // len(self.units))
        units = list(self.units * rounds)[:size]
        parts, written = [], 0
        for depth, fact in sorted(facts):
            place = self.place(depth, size)
            parts += [*units[written:place], fact]
            written = place
        return joint.join([*parts, *units[written:]])

    def place(self, depth: float, size: int) -> int:
        """Return the number of units before a fact at `depth` (0 = start, 1 = end) in a haystack of `size` units. The number is rounded to
        the nearest boundary."""
        target = depth * size
        if self.boundaries is None:
            return round(target)
        start = int(target // len(self.units)) * len(self.units)
        allowed = np.append(self.boundaries[start + self.boundaries <= size] + start, size)
        return int(allowed[np.abs(allowed - target).argmin()])


NOISE = RulerHaystack("noise", NOISE_SENTENCES)


def prose(label: str, texts: Sequence[str]) -> RulerHaystack:
    """Return a haystack of concatenated documents, with words as units. Facts stand between sentences or at the end of the haystack.

    Raises:
        DataError: the documents contain no words.
    """
    words = tuple(word for text in texts for word in text.split())
    if not words:
        raise DataError(f"haystack {label!r} contains no words. Use a text with words, or no text for noise sentences.")
    ends = [index + 1 for index, word in enumerate(words) if word.rstrip("\"')]”’").endswith((".", "!", "?"))]
    return RulerHaystack(label, words, np.unique([0, *ends, len(words)]))


# (random generator, haystack size in units, haystack, maximum length in tokens) -> draft
Writer = Callable[[np.random.Generator, int, RulerHaystack, int], Draft]


@dataclass(frozen=True)
class Needles:
    """A form that hides keys with values in a haystack. The question is about the values of the first keys.

    Attributes:
        keys: number of keys.
        values: number of values per key.
        queried: number of keys that the question names.
        kind: (kind of the keys, kind of the values). Keys are "words", "numbers" (of 7 digits) or "uuids"; values are "numbers" or "uuids".
        only_needles: whether the haystack consists of further keys and values instead of text.
    """

    keys: int = 1
    values: int = 1
    queried: int = 1
    kind: tuple[str, str] = ("words", "numbers")
    only_needles: bool = False

    def __call__(self, random: np.random.Generator, size: int, haystack: RulerHaystack, length: int) -> Draft:
        """Write a prompt; see Writer for the arguments."""
        key_kind, value_kind = self.kind
        thing = "number" if value_kind == "numbers" else "uuid"
        taken: set[str] = set()
        needles = {_new(random, key_kind, taken): [_new(random, value_kind, taken) for _ in range(self.values)] for _ in range(self.keys)}
        depths = random.choice(NUM_DEPTHS, size=self.keys * self.values, replace=False) / (NUM_DEPTHS - 1)
        queried = list(needles)[: self.queried]
        sentences = [f"A secret {thing} of {key} is {value}." for key, values in needles.items() for value in values]
        if self.only_needles:
            others = (f"A secret {thing} of {_new(random, key_kind, taken)} is {_new(random, value_kind, taken)}." for _ in range(size))
            haystack = RulerHaystack("needles", tuple(others))
        context = haystack.with_facts(size, list(zip(depths.tolist(), sentences, strict=True)), joint="\n" if self.only_needles else " ")
        several = self.queried * self.values > 1
        names, are = ", ".join(queried[:-1]) + " and " * (len(queried) > 1) + queried[-1], "s" if several else ""
        prompt = (
            f"Secret {thing}s are hidden in the text below. Memorize them, because you will be asked for them afterwards.\n{context}\n"
            f"Question: Which secret {thing}{are} of {names} did the text above mention? "
            f"Answer: The secret {thing}{are} of {names} in the text above {'are' if several else 'is'}"
        )
        depth = None if several else haystack.place(float(depths[0]), size) / size
        return Draft(prompt, tuple(value for key in queried for value in needles[key]), depth)


def _new(random: np.random.Generator, kind: str, taken: set[str]) -> str:
    """Draw a key or value that is not in `taken`, add it to `taken`, and return it."""
    while True:
        if kind == "words":
            made = f"{ADJECTIVES[random.integers(len(ADJECTIVES))]}-{NOUNS[random.integers(len(NOUNS))]}"
        elif kind == "numbers":
            made = str(random.integers(10**6, 10**7))
        else:
            made = str(uuid.UUID(bytes=random.bytes(16), version=4))
        if made not in taken:
            taken.add(made)
            return made


_HOPS = 4
_EXAMPLE_SENTENCES = 10  # in the worked example of variable_tracking


def variable_tracking(random: np.random.Generator, size: int, haystack: RulerHaystack, length: int) -> Draft:
    """Write a prompt with a chain of five variables. Each variable is assigned from the previous one. The question is which variables hold
    the value. A worked example with short names comes first."""
    example, names = _chain(random, _EXAMPLE_SENTENCES, NOISE, letters=3)
    prompt, references = _chain(random, size, haystack, letters=5)
    return Draft(f"{example} {' '.join(names)}\n\n{prompt}", tuple(references))


def _chain(random: np.random.Generator, size: int, haystack: RulerHaystack, *, letters: int) -> tuple[str, list[str]]:
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(random.choice(list(_LETTERS.upper()), letters))
        names += [name] if name not in names else []
    value = str(random.integers(10**4, 10**5))
    assigned = [value, *(f"VAR {name}" for name in names[:-1])]
    depths = np.sort(random.random(len(names)))
    facts = [(float(depth), f"VAR {name} = {what}.") for depth, name, what in zip(depths, names, assigned, strict=True)]
    prompt = (
        f"Variables are assigned in the text below. Keep track of what each of them holds.\n{haystack.with_facts(size, facts)}\n"
        f"Question: Which variables hold the value {value}, directly or through other variables? "
        f"Answer: The {len(names)} variables that hold the value {value} are"
    )
    return prompt, names


NUM_COMMON_WORDS = 10
# (minimum length in tokens, (repetitions of a common word, of another word) in the list, the same pair for the worked example, number of
# words in the worked example). The first row has RULER's values, the second row has RULER's values for short lengths, and the third row is
# our choice, which leaves room for a list.
_FREQUENCIES = ((4096, (30, 3), (10, 3), 40), (1024, (6, 1), (3, 1), 20), (0, (3, 1), (2, 1), 11))
_TOKENS_A_WORD = 8  # a distinct word takes at least 8 tokens at lengths >= 4096: it occurs three times or more, each time with a number


def common_words(random: np.random.Generator, size: int, haystack: RulerHaystack, length: int) -> Draft:
    """Write a prompt with a shuffled list of `size` words. Ten of the words are more frequent, and the question is which ten. A worked
    example comes first."""
    times, example_times, example_size = next(row[1:] for row in _FREQUENCIES if length >= row[0])
    words = _word_order(random, size + example_size, at_least=length // _TOKENS_A_WORD)
    example, common = _word_list(random, words[:example_size], example_times)
    prompt, references = _word_list(random, words[example_size:], times)
    answer = " ".join(f"{number}. {word}" for number, word in enumerate(common, 1))
    return Draft(f"{example} {answer}\n\n{prompt}", tuple(references))


def _word_order(random: np.random.Generator, count: int, *, at_least: int) -> list[str]:
    """Return the first `count` words of a random order. The order starts with a shuffled part that has at least `at_least` words: all WORDS
    and, if these are too few, as many compounds as are missing. The other compounds follow."""
    plain = len(WORDS)
    rest = plain + random.permutation(len(ADJECTIVES) * len(NOUNS))
    mixed = max(at_least - plain, 0)
    order = np.append(random.permutation(np.append(np.arange(plain), rest[:mixed])), rest[mixed:])[:count]
    made = compounds() if order.max() >= plain else []
    return [WORDS[index] if index < plain else made[index - plain] for index in order]


def _word_list(random: np.random.Generator, words: list[str], times: tuple[int, int]) -> tuple[str, list[str]]:
    """Return a word list with a question, and the answer. Words that contain a common word, or are contained in one, are left out, because
    scoring by string match cannot distinguish them."""
    common: list[str] = []
    others: list[str] = []
    for word in words:
        if any(word in other or other in word for other in common):
            continue
        (common if len(common) < NUM_COMMON_WORDS else others).append(word)
    listed = common * times[0] + others * times[1]
    order = random.permutation(len(listed))
    context = " ".join(f"{number}. {listed[index]}" for number, index in enumerate(order, 1))
    count = NUM_COMMON_WORDS
    prompt = (
        f"Some words come more often than others in the numbered list below. Memorize those.\n{context}\n"
        f"Question: Which {count} words are the most common in the list above? Answer: The {count} most common words are:"
    )
    return prompt, common


_ZETA_OF_TWO = math.pi**2 / 6
_CODED_LETTERS = 6
_TOKENS_A_CODED_WORD = 50  # the vocabulary has one coded word per 50 tokens of the length


def frequent_words(random: np.random.Generator, size: int, haystack: RulerHaystack, length: int) -> Draft:
    """Write a prompt with a text of coded words. The k-th word occurs size / (zeta(2) k^2) times, rounded down. The first word is "...",
    and the next three words are the answer."""
    coded: dict[str, None] = {}
    while len(coded) < length // _TOKENS_A_CODED_WORD:
        coded["".join(random.choice(list(_LETTERS), _CODED_LETTERS))] = None
    vocabulary = ["...", *coded]
    counts = [int(size / (_ZETA_OF_TWO * rank**2)) for rank in range(1, len(vocabulary) + 1)]
    text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
    context = " ".join(text[index] for index in random.permutation(len(text)))
    prompt = (
        f"The text below is made of coded words. Count how often each of them appears and find the three most frequent ones. {context}\n"
        f"Question: Leave out the dots '...'. Which three coded words appear most often in the text above? "
        f"Answer: The three coded words that appear most often in the text above are:"
    )
    return Draft(prompt, tuple(vocabulary[1:4]))


# the smallest size at which the third coded word occurs three times; the fourth then occurs once
SMALLEST_TEXT = math.ceil(3 * _ZETA_OF_TWO * 16)
