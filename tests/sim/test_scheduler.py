"""Virtual time: order, waiting, killing and standing still."""

from collections.abc import Callable
from functools import partial
from random import Random

from tests.parts.stores import NOW
from tests.sim.scheduler import FOR_EVER_S, Answer, Group, Killed, Scheduler


def scheduler(seed: int = 1) -> Scheduler:
    return Scheduler(Random(seed), NOW)


def run(made: Scheduler) -> None:
    made.run(lambda: False, FOR_EVER_S / 2)


def test_what_is_due_earlier_happens_first_and_takes_no_time_of_ours() -> None:
    made, seen = scheduler(), list[float]()
    for seconds in (3600.0, 1.0, 60.0):
        made.after(seconds, lambda: seen.append(made.now_s))
    run(made)
    assert seen == [1.0, 60.0, 3600.0]
    assert (made.clock() - NOW).total_seconds() == 3600.0


def test_what_is_due_at_once_has_an_order_that_the_seed_decides() -> None:
    def order(seed: int) -> list[int]:
        made, seen = scheduler(seed), list[int]()
        for number in range(8):
            made.after(1.0, partial(seen.append, number))
        run(made)
        return seen

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) > 1


def test_a_task_waits_for_an_answer_or_for_its_limit() -> None:
    made, seen, answer, never = scheduler(), list[object](), Answer[str](), Answer[str]()

    def wait() -> None:
        seen.append((made.wait(answer, 10.0), made.now_s, answer.take()))
        seen.append((made.wait(never, 10.0), made.now_s))
        never.give("too late to wake anybody")
        made.sleep(5.0)
        seen.append(made.now_s)

    made.spawn("waits", wait, Group("one"))
    made.after(2.0, lambda: answer.give("here"))
    run(made)
    assert seen == [(True, 2.0, "here"), (False, 12.0), 17.0]


def counting(made: Scheduler, seen: list[float]) -> Callable[[], None]:
    def count() -> None:
        for _ in range(5):
            made.sleep(1.0)
            seen.append(made.now_s)

    return count


def test_a_killed_group_does_nothing_any_more_and_cleans_up_without_waiting() -> None:
    made, seen, ended = scheduler(), list[float](), list[str]()
    group = Group("process")

    def stubborn() -> None:
        try:
            made.sleep(100.0)
        except Exception:  # noqa: BLE001 # what our own code does at the top
            ended.append("took it for an error")
        finally:
            ended.append("finally")
            made.sleep(1.0)
            ended.append("waited when it was dead")

    made.spawn("counts", counting(made, seen), group)
    made.spawn("is stubborn", stubborn, group)
    made.after(2.5, lambda: made.kill(group))
    run(made)
    assert seen == [1.0, 2.0]
    assert ended == ["finally"]


def test_whoever_kills_its_own_process_goes_with_it() -> None:
    made, seen = scheduler(), list[str]()
    group = Group("process")

    def die() -> None:
        made.kill(group)
        seen.append("last words")
        raise Killed

    made.spawn("dies", die, group)
    made.spawn("was about to begin", lambda: seen.append("never"), group, after_s=1.0)
    run(made)
    assert seen == ["last words"]


def test_a_frozen_group_goes_on_later_where_it_was() -> None:
    made, seen = scheduler(), list[float]()
    group = Group("process")
    made.spawn("counts", counting(made, seen), group)
    made.after(2.5, lambda: made.freeze(group, 60.0))
    run(made)
    assert seen == [1.0, 2.0, 62.5, 63.5, 64.5]


def test_an_error_of_a_task_is_told_and_ends_only_that_task() -> None:
    made, told, seen = scheduler(), list[str](), list[float]()
    made.on_bug = lambda task, error: told.append(f"{task.name}: {error!r}")
    group = Group("process")

    def stumble() -> None:
        raise KeyError("x")

    made.spawn("stumbles", stumble, group)
    made.spawn("counts", counting(made, seen), group)
    run(made)
    assert told == ["stumbles: KeyError('x')"]
    assert len(seen) == 5
