"""Write the problems of ``smollm2-135m-gym`` into files: ``gpu.py`` trains on them where the library is not.

    python benchmarks/gym_entries.py FOLDER

FOLDER gets ``train.jsonl`` and ``test.jsonl``; needs Reasoning Gym (``pip install '.[gym]'``). The task's
answers are numbers: on the other machine the package's own reward judges them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from empg_lite.data.gym import SPLITS, gym_problems
from empg_lite.recipe.file import load_recipe


def main(folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    source = str(load_recipe("smollm2-135m-gym").data.source)
    for split in SPLITS:
        problems, _ = gym_problems(source, split)
        rows = [json.dumps({"question": p.question, "answer": p.gold}) + "\n" for p in problems]
        (folder / f"{split}.jsonl").write_text("".join(rows), "utf-8")
        print(f"{len(rows)} problems: {folder / f'{split}.jsonl'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
