"""Children's stories from the grammar in grammar.txt: the stand-in for TinyStories where there is no network."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

Grammar = dict[str, list[list[str]]]  # section -> beats -> variants


def stories(count: int = 6000, seed: int = 0) -> Iterator[str]:
    """`count` stories, the same ones for the same seed; so many are possible that no two are equal."""
    grammar, chance = read_grammar(), random.Random(seed)
    for _ in range(count):
        yield story(grammar, chance)


def read_grammar() -> Grammar:
    grammar = {}
    for line in Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            beats = grammar[line[2:]] = [[]]
        elif line == "-":
            beats.append([])
        elif line and not line.startswith("#"):
            beats[-1].append(line)
    return grammar


def story(grammar: Grammar, chance: random.Random) -> str:
    """One story: an opening, every beat of a plot, and an ending, in three paragraphs."""
    plot, *beats = grammar[chance.choice([section for section in grammar if section.startswith("plot")])]
    words = dict(line.split(": ") for line in grammar["words"][0] + plot)
    words = {slot: choices.split(" | ") for slot, choices in words.items()}
    slots = {slot: chance.choice(choices) for slot, choices in words.items()} | cast(words, chance)
    parts = [expand(chance.choice(beat), slots, chance) for beat in (*grammar["openings"], *beats, *grammar["endings"])]
    first, second = sorted(chance.sample(range(1, len(parts)), 2))
    return "\n\n".join(" ".join(paragraph) for paragraph in (parts[:first], parts[first:second], parts[second:]))


def cast(words: dict[str, list[str]], chance: random.Random) -> dict[str, str]:
    """The slots that must agree or differ: the hero and another child with their pronouns, two animals, two colors."""
    slots = {}
    for suffix in ("", "2"):
        child, *pronouns = chance.choice([("girl", "she", "her", "her"), ("boy", "he", "his", "him")])
        names = [name for name in words[child] if name != slots.get("hero")]
        slots |= {f"child{suffix}": child, f"hero{suffix}": chance.choice(names)}
        slots |= {f"{slot}{suffix}": word for slot, word in zip(("he", "his", "him"), pronouns, strict=True)}
    slots["animal"], slots["animal2"] = chance.sample(words["animal"], 2)
    slots["color"], slots["color2"] = chance.sample(words["color"], 2)
    return slots


def expand(template: str, slots: dict[str, str], chance: random.Random) -> str:
    """Make the choices, fill the slots and mend the articles."""
    text = re.sub(r"\[([^]]*)\]", lambda match: chance.choice(match[1].split("|")), template)
    text = re.sub(r"\{(\w+)\}", lambda match: fill(match[1], slots), text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def fill(slot: str, slots: dict[str, str]) -> str:
    value = slots[slot.lower()]
    return value[0].upper() + value[1:] if slot[0].isupper() else value
