"""What a model directory is called: models/README.md explains the convention to people, this is it for programs."""

import re
from dataclasses import dataclass

SIZE_WORDS = ("tiny", "small", "base", "medium", "large")
TRAINING_TYPES = ("pretrain", "lora", "ft", "merged", "merged-ft")


@dataclass(frozen=True)
class ModelName:
    """`{architecture}-{size}-{dataset}-{training_type}[-{version}]`, as models/README.md explains it.

    `dataset` may have hyphens, and is `source-to-target` after fine-tuning. Raises ValueError for what does not fit.
    """

    architecture: str
    size: str
    dataset: str
    training_type: str
    version: str = ""

    def __post_init__(self):
        rules = {
            "architecture": (r"[a-z][a-z0-9_.]*", "a lower-case word such as gpt"),
            "size": (
                rf"\d+(\.\d+)?[KMBT]|{'|'.join(SIZE_WORDS)}",
                f"a count such as 38M or one of {', '.join(SIZE_WORDS)}",
            ),
            "dataset": (r"[a-z0-9_.]+(-[a-z0-9_.]+)*", "lower-case words joined by hyphens"),
            "training_type": ("|".join(TRAINING_TYPES), f"one of {', '.join(TRAINING_TYPES)}"),
            "version": (r"(v\d+(\.\d+)*|\d{8})?", "v1, v2, ... or a date such as 20231213"),
        }
        for part, (pattern, words) in rules.items():
            if not re.fullmatch(pattern, getattr(self, part)):
                raise ValueError(f"{part} {getattr(self, part)!r} of a model name must be {words}")
        tokens = self.dataset.split("-")
        if tokens.count("to") > 1 or tokens[0] == "to" or tokens[-1] == "to":
            raise ValueError(f"dataset {self.dataset!r} of a model name must be NAME or SOURCE-to-TARGET")
        if self.parse_parts(str(self)) != tuple(vars(self).values()):
            raise ValueError(f"{self} would be read as another name: rename the dataset {self.dataset!r}")

    @staticmethod
    def parse_parts(name: str) -> tuple[str, ...]:
        pattern = rf"([^-]+)-([^-]+)-(.+?)-({'|'.join(TRAINING_TYPES)})(?:-(v[\d.]+|\d{{8}}))?"
        match = re.fullmatch(pattern, name)
        if match is None:
            raise ValueError(
                f"{name!r} is not {{architecture}}-{{size}}-{{dataset}}-{{training_type}}[-{{version}}] "
                f"with a training type of {', '.join(TRAINING_TYPES)}"
            )
        return match.groups(default="")

    @classmethod
    def parse(cls, name: str) -> "ModelName":
        return cls(*cls.parse_parts(name))

    def __str__(self) -> str:
        return "-".join(filter(None, (self.architecture, self.size, self.dataset, self.training_type, self.version)))

    def fits(self, count: int) -> bool:
        """Whether a model of `count` parameters may bear this name. A word such as `small` promises no count."""
        return self.size in SIZE_WORDS or self.size == size_label(count)


def size_label(count: int) -> str:
    """A parameter count as people write it: 38M, 124M, 1.8M, 1.1B."""
    for power, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        scaled = count / power
        if scaled >= 0.9995:  # 999,600 is 1M, not 1000K
            return (f"{scaled:.1f}".removesuffix(".0") if scaled < 9.95 else f"{scaled:.0f}") + unit
    return f"{count / 1e3:.1f}K"
