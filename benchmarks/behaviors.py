"""Print how well the behavior detectors do on labeled sentences, beside two negative controls.

python benchmarks/behaviors.py [FOLDER OF THE REAL DATA]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from behavior_harness import Labeled, always, keywords, own_sentences, real_sentences, score  # noqa: E402

from empg_lite.core.behaviors import BEHAVIORS, detect  # noqa: E402


def main() -> None:
    parts: dict[str, list[Labeled]] = {
        f"own {part}": own_sentences(part) for part in ("dev", "test", "fresh")
    }
    if len(sys.argv) > 1:
        parts |= {f"real {part}": real_sentences(part, Path(sys.argv[1])) for part in ("dev", "test")}
    print("| sentences | behavior | positives | ours P / R | keywords P / R | always P |")
    print("|---|---|---|---|---|---|")
    for part, labeled in parts.items():
        ours, words, yes = (score(detector, labeled) for detector in (detect, keywords, always))
        for name in BEHAVIORS:
            o, w = ours[name], words[name]
            print(
                f"| {part} ({len(labeled)}) | {name} | {o.right + o.missed} "
                f"| {o.precision:.2f} / {o.recall:.2f} "
                f"| {w.precision:.2f} / {w.recall:.2f} | {yes[name].precision:.2f} |"
            )


if __name__ == "__main__":
    main()
