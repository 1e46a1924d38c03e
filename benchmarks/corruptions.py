"""`python benchmarks/corruptions.py`: damage to every file that is read back, and who notices.

Each file of a trained model, of checkpoints of SFT and RL, of rollout dumps and of an evaluation's
journal is damaged in each way that fits it, drawn from a seed, and the folder is read as the
commands read it. Damage counts as named where one of our errors ends the reading whose message has
the file's name, and as harmless where what was read is equal to the bit. Prints all else, the
figure, and seconds of digesting.

    python benchmarks/corruptions.py [--seed 0] [--num 60]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from corruption_cases import CASES, STEPS, Case  # noqa: E402
from kills import differences  # noqa: E402
from result_file import write_result  # noqa: E402

from grpo_latent.common import manifest  # noqa: E402
from grpo_latent.errors import GrpoLatentError  # noqa: E402

NAMED, HARMLESS = "named", "harmless"
FLIPS = 3  # of each file
OLDER = f"global_step_{STEPS[0]}/"  # not read: the tracker names the newer one


@dataclass(frozen=True)
class Damage:
    """One corruption: of a file of a case, with what is drawn from the seed."""

    case: str
    kind: str
    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.case}: {self.kind} {self.name} (seed {self.seed})"


def flipped(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    changed = content[place] ^ draw.randrange(1, 256)
    return content[:place] + bytes([changed]) + content[place + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(1, len(content))]


def cut_at_a_line(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(lines[: draw.randrange(1, len(lines))])


def doubled(content: bytes, draw: random.Random) -> bytes:
    """One line twice, or, where there are no lines, the whole twice."""
    lines = content.splitlines(keepends=True)
    if not is_text(content) or len(lines) < 2:
        return content + content
    place = draw.randrange(len(lines))
    return b"".join([*lines[: place + 1], *lines[place:]])


def is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


CONTENTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped byte in": flipped,
    "cut": cut,
    "cut at a line's end": cut_at_a_line,
    "emptied": lambda content, draw: b"",
    "doubled": doubled,
}


def damages(case: str, whole: Path, seed: int) -> Iterator[Damage]:
    """All of a case."""
    draw = random.Random(f"{case}/{seed}")
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        name = path.relative_to(whole).as_posix()
        if name.startswith(OLDER):
            continue
        has_lines = is_text(path.read_bytes()) and len(path.read_bytes().splitlines()) > 1
        kinds = [*CONTENTS, "deleted", "swapped", "of another run:"]
        kinds += ["flipped byte in"] * (FLIPS - 1)
        for kind in kinds:
            if kind != "cut at a line's end" or has_lines:
                yield Damage(case, kind, name, draw.randrange(2**31))
    for name in CASES[case].foreign:
        yield Damage(case, "added", name, draw.randrange(2**31))


def apply(damage: Damage, folder: Path, other: Path) -> set[str]:
    """Damages a folder; returns the names of the files that changed, none where nothing did.

    Args:
        other: the same case of another seed.
    """
    draw = random.Random(damage.seed)
    path = folder / damage.name
    if damage.kind == "added":
        source = draw.choice(sorted(p for p in other.rglob("*") if p.suffix == path.suffix))
        shutil.copy(source, path)
        return {path.name}
    content = path.read_bytes()
    if damage.kind == "deleted":
        path.unlink()
    elif damage.kind == "swapped":
        beside = [p for p in path.parent.iterdir() if p.is_file() and p != path]
        if not beside:
            return set()
        partner = draw.choice(sorted(beside))
        path.write_bytes(partner.read_bytes())
        partner.write_bytes(content)
        return {path.name, partner.name} if path.read_bytes() != content else set()
    elif damage.kind == "of another run:":
        shutil.copy(other / damage.name, path)
    else:
        path.write_bytes(CONTENTS[damage.kind](content, draw))
    return set() if path.is_file() and path.read_bytes() == content else {path.name}


def verdict(case: Case, folder: Path, names: set[str], expected: Any) -> str:
    """NAMED, HARMLESS, or what was seen instead."""
    try:
        found = case.read(folder)
    except GrpoLatentError as error:
        is_named = any(name in str(error) for name in names)
        return NAMED if is_named else f"named another file: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    differing = list(differences(expected, found))
    return HARMLESS if not differing else f"read as something else: {differing[:3]}"


def grid(folder: Path, seed: int, num: int | None = None) -> list[tuple[Damage, str]]:
    """Damage with verdicts; `num` of them drawn at random, or all."""
    found: list[tuple[Damage, str]] = []
    chosen: dict[str, list[Damage]] = {}
    for name, case in CASES.items():
        for number, part in enumerate(("whole", "other")):
            case.write(folder / name / part, number)
        chosen[name] = list(damages(name, folder / name / "whole", seed))
    if num is not None:
        every = [damage for several in chosen.values() for damage in several]
        drawn = set(random.Random(seed).sample(every, num))
        chosen = {name: [d for d in several if d in drawn] for name, several in chosen.items()}
    for name, several in chosen.items():
        whole, other = folder / name / "whole", folder / name / "other"
        # read where the damaged copies will lie: some of what is read says where from
        place = folder / name / "copy"
        shutil.copytree(whole, place)
        expected = CASES[name].read(place)
        for damage in several:
            shutil.rmtree(place)
            shutil.copytree(whole, place)
            changed = apply(damage, place, other)
            if changed:
                found.append((damage, verdict(CASES[name], place, changed, expected)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, help="of all, drawn at random")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = grid(Path(folder), options.seed, options.num)
        started = time.perf_counter()
        num_bytes = sum(e.num_bytes for e in manifest.digests(folder).values())
        seconds = time.perf_counter() - started
    for damage, said in found:
        if said not in (NAMED, HARMLESS):
            print(f"{damage}: {said}")
    counts = Counter(said if said in (NAMED, HARMLESS) else "missed" for _, said in found)
    by_case = Counter(damage.case for damage, _ in found)
    print(f"{len(found)} corruptions: {dict(counts)}; {dict(by_case)}")
    print(f"digests: {num_bytes / 1e6:.0f} MB in {seconds:.2f} s")
    result = {"corruptions": len(found), "found": counts, "by_case": by_case}
    write_result(options.json, result, options.seed)
    return 1 if counts["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
