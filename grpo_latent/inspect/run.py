"""A training run as it lies on disk, which is never written to.

Config, metrics, rollout dumps, evaluations, checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf

from grpo_latent.common.step_folders import NO_STEP, TRACKER_FILE, read_tracker, step_folders
from grpo_latent.data.files import RowKeys
from grpo_latent.errors import CheckpointError, DataError, GrpoLatentError
from grpo_latent.eval.dumps import Dump, read_dump
from grpo_latent.inspect.evaluation import ablation_rows
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE

CONFIG_FILE, METRICS_FILE, DUMP_FOLDER = "config.yaml", "metrics.jsonl", "rollouts"
# in keys that may differ between runs of one family
NO_MATTER = ("seed", "val_", "test_freq", "save_freq", "dump", "logger", "resume")

Metrics = dict[str, tuple[list[int], list[float]]]  # name -> (steps, values)
# what is being done, how many of it are, and of how many; 0 of 0 where that is not known
OnProgress = Callable[[str, int, int], None]
Read = TypeVar("Read")


def no_progress(what: str, done: int, total: int) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Run:
    """A run as it was read.

    Attributes:
        name: of its folder.
        config: resolved, as nested dicts; empty where there is none.
        metrics: as logged.
        evaluations: file name -> report of `grpo_latent.evaluate`.
        checkpoint: newest folder that `load_latent_model` reads, or None.
        data_files: of the prompts that the dump is of.
        problems: what could not be read; shown on the page.
    """

    name: str
    folder: Path
    config: dict
    metrics: Metrics
    dump: Dump
    evaluations: dict[str, dict]
    checkpoint: Path | None
    data_files: list[Path]
    problems: list[GrpoLatentError | OSError]

    @property
    def keys(self) -> RowKeys:
        """Names of the columns of prompts and images in `data_files`."""
        section = lookup(self.config, "data")
        return RowKeys.of(section if isinstance(section, dict) else {})


def label_runs(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Labels each run (name, family): names differ, runs of a family differ by seed only.

    They may also differ by what watches them.

    A run without a config is judged by its name.
    """
    names = [run.name for run in runs]
    for depth in range(2, 6):  # folders of one name, such as seed1/grpo and seed2/grpo
        if len(set(names)) == len(names):
            break
        names = ["/".join(run.folder.resolve().parts[-depth:]) for run in runs]
    stems = [_without_seed(name) for name in names]
    families: dict[str, str] = {}
    for run, stem in zip(runs, stems, strict=True):
        families.setdefault(_without_seeds(run.config) or stem, stem)
    taken: dict[str, int] = {}
    for key, stem in families.items():
        taken[stem] = taken.get(stem, 0) + 1
        families[key] = stem if taken[stem] == 1 else f"{stem} ({taken[stem]})"
    return [
        (name, families[_without_seeds(run.config) or stem])
        for run, name, stem in zip(runs, names, stems, strict=True)
    ]


def _without_seed(name: str) -> str:
    """Strips seeds: `seed1/grpo` -> `grpo`, `lvr_s0` -> `lvr`; the name where nothing is left."""
    folders = [
        re.sub(r"(?:^|[-_.])(?:seed|s)[-_=]?\d+$", "", folder) for folder in name.split("/")
    ]
    return "/".join(folder for folder in folders if folder) or name


def _without_seeds(config: dict, prefix: str = "") -> str:
    """Writes the config as text without seeds, places on disk and what only watches training.

    Empty without a config.
    """
    lines = []
    for key, value in sorted((str(key), value) for key, value in config.items()):
        if isinstance(value, dict):
            lines.append(_without_seeds(value, f"{prefix}{key}."))
        elif not any(word in key for word in NO_MATTER) and "/" not in str(value):
            lines.append(f"{prefix}{key}={value}")
    return "\n".join(line for line in lines if line)


def run_folders(folder: Path) -> list[Path]:
    """Finds the runs that a folder stands for: itself, or those at most two folders below it.

    A recipe's folder holds its run beside data and SFT. A folder without any run stands for
    itself: it may hold evaluations.
    """
    if is_run(folder):
        return [folder]
    for pattern in ("*/", "*/*/"):
        found = sorted(path for path in folder.glob(pattern) if is_run(path))
        if found:
            return found
    return [folder]


def is_run(folder: Path) -> bool:
    """Tells a run of RL: SFT writes neither of these."""
    return (folder / CONFIG_FILE).is_file() or (folder / DUMP_FOLDER).is_dir()


def read_run(
    folder: str | Path,
    checkpoint: Path | None = None,
    data_files: list[Path] | None = None,
    progress: OnProgress = no_progress,
) -> Run:
    """Reads what there is of a run.

    Args:
        checkpoint, data_files: instead of the run's own.

    Raises:
        DataError: no such folder, or nothing of a run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            "no such run", where=str(folder), expected="the output_dir of a training run"
        )
    problems: list[GrpoLatentError] = []
    config: dict = _attempt(problems, lambda: read_config(folder / CONFIG_FILE), {})
    metrics: Metrics = _attempt(problems, lambda: read_metrics(folder / METRICS_FILE), {})
    # a run that was moved keeps its dumps beside its config, not where the config says
    configured = lookup(config, "latent.dump_dir")
    own = folder / DUMP_FOLDER
    dump = read_dump(
        Path(str(configured)) if configured and not own.is_dir() else own,
        lambda done, total: progress(f"{folder}: reading rollouts of steps", done, total),
    )
    start = lookup(config, "actor_rollout_ref.model.path")
    evaluations = read_evaluations(folder, problems, Path(str(start)) if start else None)
    if not (config or metrics or dump.trajectories or dump.problems or evaluations):
        raise DataError(
            "nothing to inspect",
            where=str(folder),
            got=sorted(path.name for path in folder.iterdir())[:10],
            expected=f"{CONFIG_FILE}, {METRICS_FILE}, {DUMP_FOLDER}/step_<n>.jsonl or an "
            "evaluation's JSON",
            fix="Pass latent.output_dir of the training run.",
        )
    files = lookup(config, "data.train_files") or []
    return Run(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        metrics=metrics,
        dump=dump,
        evaluations=evaluations,
        checkpoint=checkpoint or find_checkpoint(folder, config, problems),
        data_files=data_files
        or [find_file(str(f), folder) for f in (files if isinstance(files, list) else [files])],
        problems=[*problems, *dump.problems],
    )


def read_config(path: Path) -> dict:
    """Reads the resolved config; {} without a file."""
    if not path.is_file():
        return {}
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # yaml and omegaconf have no common base
        raise DataError(
            "not readable", where=str(path), got=str(error), expected="a resolved config"
        ) from error
    return config if isinstance(config, dict) else {}


def read_metrics(path: Path) -> Metrics:
    """Reads verl's file logger, {"step": n, "data": {name: value}} a line.

    The last line may be half written.

    Raises:
        DataError: a malformed line before the last.
    """
    if not path.is_file():
        return {}
    by_step: dict[str, dict[int, float]] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record["step"])
            values = numbers_of(record["data"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            if number == len(lines):
                break
            raise DataError(
                "malformed metrics",
                where=f"{path} line {number}",
                got=line[:100],
                expected='{"step", "data"}',
            ) from error
        for name, value in values.items():
            by_step.setdefault(name, {})[step] = value
    return {
        name: (sorted(values), [values[s] for s in sorted(values)])
        for name, values in sorted(by_step.items())
    }


def numbers_of(data: dict) -> dict[str, float]:
    """Picks the numbers of logged values, as floats."""
    return {
        k: float(v)
        for k, v in data.items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    }


def read_evaluations(
    folder: Path, problems: list[GrpoLatentError], start: Path | None = None
) -> dict[str, dict]:
    """Reads reports of `grpo_latent.evaluate`, by file.

    They lie in the run's folder, in a folder `eval*` of it, and beside it those whose
    checkpoint is the run's, or the one that it started from.

    Args:
        start: that one.
    """
    reports = {}
    beside = list(folder.resolve().parent.glob("*.json"))
    for path in sorted([*folder.glob("*.json"), *folder.glob("eval*/*.json"), *beside]):
        try:
            # JSON knows no NaN, and a page could not show it
            report = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
        except (ValueError, OSError) as error:
            if path in beside:  # some other file
                continue
            problems.append(
                DataError(
                    "not readable", where=str(path), got=str(error), expected="a JSON report"
                )
            )
            continue
        if (
            not isinstance(report, dict)
            or not isinstance(report.get("ablations"), dict)
            or "greedy" not in report
        ):
            continue
        if path in beside and not _is_of(folder, start, str(report.get("checkpoint"))):
            continue
        name = path.name if path in beside else str(path.relative_to(folder))
        try:
            ablation_rows(name, report)
        except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
            got = f"{type(error).__name__}: {error}"
            expected = "a report of grpo_latent.evaluate"
            problems.append(
                DataError("malformed evaluation", where=str(path), got=got, expected=expected)
            )
            continue
        reports[name] = report
    return reports


def _is_of(folder: Path, start: Path | None, checkpoint: str) -> bool:
    """Tells a report of the run's checkpoints or of its start by their last folders.

    The whole experiment may have been moved since.
    """
    if f"/{folder.resolve().name}/checkpoints/" in checkpoint:
        return True
    return start is not None and Path(checkpoint).parts[-2:] == start.parts[-2:]


def find_checkpoint(folder: Path, config: dict, problems: list[GrpoLatentError]) -> Path | None:
    """Finds the run's newest saved model, else the one that it started from.

    It lies in `global_step_<n>/actor/huggingface`. Newer folders than the one that the tracker
    names are half of a save, or of a branch that has been left.
    """
    root = folder / "checkpoints"
    if not root.is_dir():
        root = Path(str(lookup(config, "trainer.default_local_dir") or root))
    newest = _attempt(problems, lambda: read_tracker(root), None)
    tracker = root / TRACKER_FILE
    # then the only folder is half of the first save
    is_none_complete = tracker.is_file() and tracker.read_text(errors="replace") == NO_STEP
    folders = {} if is_none_complete else step_folders(root)
    for step, path in reversed(folders.items()):
        saved = path / "actor" / "huggingface"
        if (newest is None or step <= newest) and (saved / LATENT_CONFIG_FILE).is_file():
            return saved
    start = lookup(config, "actor_rollout_ref.model.path")
    marker = find_file(f"{start}/{LATENT_CONFIG_FILE}", folder) if start else None
    return marker.parent if marker is not None and marker.is_file() else None


def find_file(file: str, folder: Path) -> Path:
    """Finds a file of the run's config; a relative path starts where the run was started.

    That is here or above its folder.
    """
    for base in (Path(), *folder.resolve().parents):
        if (base / file).is_file():
            return base / file
    return Path(file)


def lookup(config: dict, key: str) -> object:
    """Looks up the value at a dotted key; None where there is none."""
    value: object = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _attempt(problems: list[GrpoLatentError], read: Callable[[], Read], default: Read) -> Read:
    try:
        return read()
    except (DataError, CheckpointError) as error:
        problems.append(error)
        return default
