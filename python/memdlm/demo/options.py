"""What `memdlm demo` can be told. Apart from the demo, so that its help answers at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoOptions:
    """What the demo runs.

    Attributes:
        steps: training steps of each arm, at least 1.
        out: folder of the report, made if it is not there.
        seed: of data, masks and fast weights.

    Raises:
        ValueError: an option outside its range.
    """

    steps: int = 300
    out: str = "runs/demo"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
