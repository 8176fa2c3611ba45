from dataclasses import dataclass
@dataclass(frozen=True)
class Demo:
    "d"
    x: int = 0
    def run(self): raise RuntimeError("x")
