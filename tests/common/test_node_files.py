"""What one machine says of the driver's files: two folders play the two machines."""

import pickle
from pathlib import Path

import pytest

from grpo_latent.common import node_files, paths
from grpo_latent.common.node_files import PART_BYTES, FileRequest, marked, print_of, problems_here
from grpo_latent.errors import ConfigError


def test_a_machine_that_sees_the_same_has_no_problem(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    out = tmp_path / "new" / "out"
    read = [str(tmp_path / "model"), "s3://bucket/rows.parquet"]
    with marked(read, [str(out)], shared=True) as request:
        request = pickle.loads(pickle.dumps(request))
        assert list(request.read) == read[:1] and None not in request.read.values()
        assert problems_here(request) == []
        assert len(list(out.iterdir())) == 1
    assert list(out.iterdir()) == []


def test_each_difference_is_named_with_its_path(tmp_path, monkeypatch):
    for name in ("reward.py", "rows.parquet"):
        (tmp_path / name).write_text(f"of the driver: {name}")
    gone, changed = tmp_path / "rows.parquet", tmp_path / "reward.py"
    (tmp_path / "file").touch()
    written = [str(tmp_path / "out"), str(tmp_path / "file" / "out")]
    with marked([str(gone), str(changed)], written[:1], shared=True) as request:
        gone.unlink()
        changed.write_text("OF THE DRIVER: reward.py")  # as long, and another one
        (mark,) = (tmp_path / "out").iterdir()
        mark.unlink()
        request.written[written[1]] = None
        monkeypatch.setattr(node_files, "package_digest", lambda: "of another version")
        problems = problems_here(request)
    assert [problem.split(" (")[0].split(": [")[0] for problem in problems] == [
        f"grpo_latent in {Path(node_files.__file__).parents[1]} is not the driver's",
        f"no such file: {gone}",
        f"not the driver's content: {changed}",
        f"output folder {written[0]} is not the driver's: what is written here would stay here",
        f"output folder {written[1]} is not writable",
    ]


def test_a_print_takes_names_sizes_and_both_ends_of_large_files(tmp_path):
    large = tmp_path / "model.safetensors"
    whole = bytearray(5 * PART_BYTES)
    seen = set()
    for position in (None, 0, PART_BYTES - 1, len(whole) - PART_BYTES, len(whole) - 1):
        changed = bytearray(whole)
        if position is not None:
            changed[position] = 1
        large.write_bytes(changed)
        seen.add(print_of(tmp_path))
    large.write_bytes(whole + b"\0")
    seen.add(print_of(tmp_path))
    large.rename(tmp_path / "other.safetensors")
    seen.add(print_of(tmp_path))
    assert len(seen) == 7
    assert print_of(tmp_path / "gone") is None
    small = tmp_path / "small"
    small.write_bytes(bytes(PART_BYTES + 10))  # its ends meet
    before = print_of(small)
    small.write_bytes(bytes(PART_BYTES + 9) + b"\1")
    assert print_of(small) != before


def test_a_file_that_the_driver_lacks_is_only_looked_for(tmp_path):
    (tmp_path / "here").touch()
    request = FileRequest(node_files.package_digest(), {str(tmp_path / "here"): None})
    assert problems_here(request) == []


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job that was submitted with a working directory, this process's now."""
    monkeypatch.chdir(tmp_path)
    working_dir = '{"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip", "env_vars": {}}}'
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", working_dir)
    return tmp_path


def test_a_shipped_file_is_named_from_where_each_process_stands(job):
    key = "reward.custom_reward_function.path"
    for path in (
        "reward/digits.py",
        str(job / "reward" / "digits.py"),
        "recipes/../reward/digits.py",
    ):
        assert paths.for_all_nodes(path, key) == "reward/digits.py"
    assert paths.for_all_nodes("/data/rows.parquet", key) == "/data/rows.parquet"
    assert paths.for_all_nodes("../rows.parquet", key) == f"{job}/../rows.parquet"
    assert paths.for_all_nodes("s3://bucket/rows.parquet", key) == "s3://bucket/rows.parquet"


def test_an_output_that_the_job_would_lose_is_refused(job, monkeypatch):
    with pytest.raises(
        ConfigError, match="^latent.output_dir: an output in the job's working dir"
    ):
        paths.for_all_nodes("outputs/grpo", "latent.output_dir")
    assert paths.for_all_nodes("/shared/out", "latent.output_dir") == "/shared/out"
    # submitted without a working directory
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {}}}')
    assert paths.for_all_nodes("out", "latent.output_dir") == str(job / "out")
