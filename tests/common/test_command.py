"""Exit codes and messages of commands.

That every entry point is wrapped, the last test reads from their source.
"""

import ast
import contextlib
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_latent
from grpo_latent import errors
from grpo_latent.common.command import command, config_command

PACKAGE = Path(grpo_latent.__file__).parent
TYPES = [
    t
    for t in vars(errors).values()
    if isinstance(t, type) and issubclass(t, errors.GrpoLatentError)
]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_typed_error_is_one_line_and_code_2(kind, capsys):
    @command
    def main():
        raise kind("broken", where="here", fix="Mend it.")

    assert main() == 2
    assert capsys.readouterr() == ("", f"{kind.__name__}: here: broken. Mend it.\n")


def test_codes_of_what_is_no_typed_error(capsys):
    assert command(lambda: None)() == 0
    assert command(lambda: 3)() == 3

    @command
    def interrupted():
        raise KeyboardInterrupt

    assert interrupted() == 130 and "interrupted" in capsys.readouterr().err

    @command
    def ours():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # Python makes it a traceback and code 1
        ours()


@pytest.mark.parametrize(
    ("asked", "unbuffered"),
    [(["--help"], ""), (["--help"], "1"), (["init", "--help"], "")],  # argparse, unbuffered: 0
)
def test_a_reader_that_is_gone_ends_a_command_in_silence(tmp_path, asked, unbuffered):
    arguments = ["-m", "grpo_latent.cli", *asked]
    assert unread(tmp_path, arguments, PYTHONUNBUFFERED=unbuffered) == (141, "")


def test_a_reader_that_is_gone_hides_no_fault_of_ours(tmp_path):
    code = (
        "import sys; from grpo_latent.common.command import command\n"
        "@command\ndef main():\n    print('a line')\n    1 / 0\nsys.exit(main())"
    )
    _, said = unread(tmp_path, ["-c", code], PYTHONUNBUFFERED="")
    assert "Traceback" in said and "ZeroDivisionError" in said


def unread(folder, arguments, **environment):
    """Code and stderr of a Python whose output nobody reads."""
    with (folder / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | environment,
        )
        process.stdout.close()
        code = process.wait(600)  # against a deadlock only
        stderr.seek(0)
        return code, stderr.read()


def test_an_output_that_is_closed_or_full_is_no_fault_of_ours(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert command(lambda: None)() == 0
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command(lambda: full.write("a line") and None)() == 2
        monkeypatch.undo()
        assert "the disk is full" in capsys.readouterr().err
        with contextlib.suppress(OSError):  # the line that is left
            full.close()


def test_a_pipe_of_ours_that_breaks_is_no_reader_that_is_gone(tmp_path, monkeypatch):
    @command
    def main():
        raise BrokenPipeError

    with (tmp_path / "out").open("w") as out, pytest.raises(BrokenPipeError):
        monkeypatch.setattr(sys, "stdout", out)
        main()


def test_a_place_that_cannot_be_written_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "file").touch()

    @command
    def main(path):
        path.mkdir()

    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 100)):
        assert main(path) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"ConfigError: {path}: ") and error.count("\n") == 1, error
    with pytest.raises(FileNotFoundError):  # a folder that we should have made
        main(tmp_path / "absent" / "below")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPERM])
def test_of_errors_without_a_file_a_full_disk_is_told_in_a_line(number, capsys):
    @command
    def main():
        raise OSError(number, os.strerror(number))

    if number == errno.ENOSPC:
        assert main() == 2
        assert capsys.readouterr().err.startswith("ConfigError: the disk: the disk is full")
    else:  # of a process or a socket
        with pytest.raises(PermissionError):
            main()


@pytest.mark.parametrize("before", [None, "0"])
def test_the_environment_of_what_runs_is_the_users_afterwards(monkeypatch, before):
    if before is None:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    else:
        monkeypatch.setenv("HYDRA_FULL_ERROR", before)
    monkeypatch.setattr(sys, "argv", ["sft"])
    seen = []
    assert config_command("sft")(lambda config: seen.append(config.method))() == 0
    assert seen == ["lvr"] and os.environ.get("HYDRA_FULL_ERROR") == before


def test_a_config_that_is_given_needs_no_hydra(capsys):
    @config_command("sft")
    def main(config):
        raise errors.DataError("no rows", got=config)

    assert main({"a": 1}) == 2 and "got {'a': 1}" in capsys.readouterr().err


HYDRA = """
import sys
from grpo_latent.common.command import config_command
from grpo_latent.errors import DataError

@config_command("sft")
def main(config):
    {body}

sys.exit(main())
"""


@pytest.mark.parametrize(
    ("body", "arguments", "code", "message"),
    [
        ("pass", [], 0, "^$"),
        (
            "raise DataError('no rows', where='x.parquet')",
            [],
            2,
            r"^DataError: x\.parquet: no rows\.\n$",
        ),
        ("1 / 0", [], 1, "Traceback.*ZeroDivisionError"),
        (
            "pass",
            ["no_such_key=1"],
            2,
            "^ConfigError: the config: unknown key; got no_such_key; .* Take it out",
        ),
        (
            "pass",
            ["trainer.learning_rat=1"],
            2,
            "^ConfigError: trainer: unknown key; .* Write trainer.learning_rate, the nearest",
        ),
        ("pass", ["method=no_such_method"], 2, "^ConfigError: config: .*method/no_such_method"),
        ("config.model.path", [], 2, "^ConfigError: config: Missing mandatory value: model.path"),
        (
            "pass",
            ["--config-dir", "mine", "--config-name", "my_sfft"],
            2,
            r"^ConfigError: --config-name: no such config; got my_sfft; expected one of "
            r"\['my_sft'\], of mine\. Write my_sft, the nearest spelling\.\n$",
        ),
        ("pass", ["--config-name", "my_sft"], 2, "^ConfigError: .*Name its folder: --config-dir"),
    ],
)
def test_commands_with_a_hydra_config(tmp_path, body, arguments, code, message):
    script = tmp_path / "script.py"
    script.write_text(HYDRA.format(body=body))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_sft.yaml").write_text("defaults: [sft]")
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr, re.DOTALL), done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def entry_points():
    for path in sorted(PACKAGE.rglob("*.py")):
        if re.search(r'^if __name__ == "__main__":', path.read_text(), re.MULTILINE):
            yield path.relative_to(PACKAGE)


# vLLM's and VLMEvalKit's own command lines, processes that another one starts and reads, a line of
# the Makefile
_NAMES = (
    "rollout/vllm/cli.py",
    "harnesses/vlmevalkit.py",
    "rewards/worker.py",
    "inspect/wandb_log.py",
    "torchvision_ops.py",
)
NOT_OURS = set(map(Path, _NAMES))


@pytest.mark.parametrize("path", sorted(set(entry_points()) - NOT_OURS), ids=str)
def test_every_command_is_wrapped(path):
    tree = ast.parse((PACKAGE / path).read_text())
    (main,) = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    assert [
        d
        for d in map(ast.unparse, main.decorator_list[:1])
        if d == "command" or d.startswith("config_command(")
    ]
    assert (PACKAGE / path).read_text().rstrip().endswith("sys.exit(main())")
