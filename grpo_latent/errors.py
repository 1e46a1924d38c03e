"""Every error that this package raises on purpose.

Each one says what went wrong, where, what was got, what was expected and how to fix it; each is
also a subclass of the standard-library error that a caller would expect; each survives pickling,
because Ray sends errors between processes.
"""

from __future__ import annotations


class GrpoLatentError(Exception):
    """Base of all errors of this package.

    Args:
        what: one clause that names the problem.
        where: file, row, field, config key, process or step.
        got: the offending value; kept as a short text of one line.
        expected: what would have been right, in words.
        fix: what the user can do now.
    """

    MAX_GOT_CHARS = 300

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.fix = fix
        # its text: the value itself may not survive pickling
        self.got = None if got is None else _short(got, self.MAX_GOT_CHARS)
        super().__init__(self._message())

    def _message(self) -> str:
        clauses = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.got is not None:
            clauses.append(f"got {self.got}")
        if self.expected is not None:
            clauses.append(f"expected {self.expected}")
        message = "; ".join(clauses) + "."
        return message if self.fix is None else f"{message} {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:
        # the default would call the class with the finished message as `what`
        return _rebuild, (type(self), self.what, self.where, self.got, self.expected, self.fix)


def _short(value: object, limit: int) -> str:
    text = value if isinstance(value, str) and value.strip() else repr(value)
    # a command's error is one line, whatever a library has to say
    text = " ".join(line.strip() for line in text.splitlines())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _rebuild(
    cls: type[GrpoLatentError],
    what: str,
    where: str | None,
    got: str | None,
    expected: str | None,
    fix: str | None,
) -> GrpoLatentError:
    return cls(what, where=where, got=got, expected=expected, fix=fix)


class ConfigError(GrpoLatentError, ValueError):
    """A configuration value, or a combination of them, is not usable."""


class DataError(GrpoLatentError, ValueError):
    """A row or file of a data set is malformed."""


class BadBoxError(DataError):
    """A box of a data set lies outside its image, or has no area."""


class CheckpointError(GrpoLatentError, ValueError):
    """A checkpoint folder lacks something, or disagrees with itself."""


class LatentMismatchError(GrpoLatentError, RuntimeError):
    """Recorded latents do not fit the positions they are meant for."""


class RolloutError(GrpoLatentError, RuntimeError):
    """A rollout engine cannot serve a request."""


class ReplayGapError(GrpoLatentError, RuntimeError):
    """Replayed log-probs differ from the rollout's by more than the configured bound."""


class RewardError(GrpoLatentError, RuntimeError):
    """A reward function failed: `kind` is one of exception, nan, inf, type or timeout."""

    KINDS = ("exception", "nan", "inf", "type", "timeout")

    def __init__(
        self,
        what: str,
        *,
        kind: str = "exception",
        where: str | None = None,
        got: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.kind = kind
        super().__init__(what, where=where, got=got, expected=expected, fix=fix)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_reward, (
            type(self),
            self.kind,
            self.what,
            self.where,
            self.got,
            self.expected,
            self.fix,
        )


def _rebuild_reward(
    cls: type[RewardError],
    kind: str,
    what: str,
    where: str | None,
    got: str | None,
    expected: str | None,
    fix: str | None,
) -> RewardError:
    return cls(what, kind=kind, where=where, got=got, expected=expected, fix=fix)


class ActorDeathError(GrpoLatentError, RuntimeError):
    """An actor of a run has died: its process was killed, crashed, or was lost with its node."""


class NodeLostError(GrpoLatentError, RuntimeError):
    """A node of the cluster that a run uses has died, or cannot be reached any more."""


class PluginError(GrpoLatentError, RuntimeError):
    """The verl plug-in is not loaded in a process, or a library changed under this package."""


class PreflightError(GrpoLatentError, RuntimeError):
    """A check before a run found that the run would fail."""


class TrainingError(GrpoLatentError, RuntimeError):
    """An update cannot be made, for example because the loss is not finite."""


class ConformanceError(GrpoLatentError, RuntimeError):
    """A mechanism breaks a promise that training relies on.

    `where` names the check (see `grpo_latent.testing`).
    """
