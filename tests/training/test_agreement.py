"""Processes of one run with different settings end at once, each naming what differs; really started."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

import toolkit
from tests.processes import START, _as_main, free_port
from tests.training.test_train import environment
from toolkit.compose.tree import compose_config
from toolkit.training.agreement import _differences, flat

SMALL = ["debug=smoke", "training.steps=1", "warmup.steps=1", "task.num_heldout=4", "hydra.run.dir=run"]


def launched(folder: Path, *of_rank: list[str]) -> list[tuple[int, str]]:
    """Run the command once for each list of overrides, as by hand; return exit codes and error lines."""
    port = str(free_port())
    world = str(len(of_rank))
    logs, processes = [], []
    for rank, overrides in enumerate(of_rank):
        env = environment(
            RANK=str(rank), WORLD_SIZE=world, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port, ACCELERATE_USE_CPU="1", PYTHONPATH=str(Path(toolkit.__file__).parents[1]),
        )  # fmt: skip
        streams = [str(folder / f"{rank}.{name}") for name in ("out", "err")]
        args = ("toolkit.train", [*SMALL, *overrides], str(folder), env, streams)
        processes.append(START.Process(target=_as_main, args=args))
        logs.append(Path(streams[1]))
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    found = []
    for process, log in zip(processes, logs, strict=True):
        said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
        found.append((process.exitcode or 0, "\n".join(said)))
    return found


@pytest.mark.slow
@pytest.mark.dist
def test_settings_of_one_rank_alone(tmp_path: Path) -> None:
    one = ["optimizer.lr=0.002", "aggregation=token_sum", "seed=3", "++training.steps=2"]
    (code0, said0), (code1, said1) = launched(tmp_path, [], one)
    assert (code0, code1) == (1, 1)
    for said, here, values in ((said0, 0, ("0.001", "0.002")), (said1, 1, ("0.002", "0.001"))):
        assert said.startswith("error: the processes of one run have different settings: ")
        assert f"optimizer.lr={values[0]} on rank {here}, {values[1]} on rank {1 - here}" in said
        assert "loss.aggregation.name=" in said
        assert "training.steps=" in said
        assert f"seed={3 * here} on rank {here}" in said
        assert said.count("\n") == 0
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_the_same_settings_and_threads_of_a_machine(tmp_path: Path) -> None:
    codes = [code for code, _ in launched(tmp_path, ["model.cpu_threads=1"], [])]
    assert codes == [0, 0]


def test_what_is_compared() -> None:
    base, other = flat(compose_config([])), flat(compose_config(["policy_loss.cliprange_low=0.1", "kl=k3"]))
    different = {key for key in {**base, **other} if base.get(key) != other.get(key)}
    assert {"policy_loss.cliprange_low", "loss.use_kl_loss", "loss.kl_loss_type"} <= different
    assert not any(key.startswith("loss.policy_loss_cfg") for key in base)  # follows policy_loss
    assert "model.cpu_threads" not in base
    assert _differences({"a.b": 1, "c": 2}, {"a.b": 1.5, "d": 2}, 0, 3) == (
        "a.b=1 on rank 0, 1.5 on rank 3; c=2 on rank 0, (not there) on rank 3; d=(not there) on rank 0, 2 on rank 3"
    )
    many = {str(number): number for number in range(10)}
    assert _differences(many, dict.fromkeys(many), 0, 1).endswith("; and 2 more")
