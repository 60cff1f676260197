"""Virtual time: tasks that wait in one heap, and one source of chance. No threads, no sleeping.

A task is a greenlet, so that the service's own code runs as it is: where it would wait, it
hands over to the scheduler and comes back when its time has come. Only one runs at a time,
and which one is a matter of the seed.
"""

import heapq
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final, Generic, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")
FOR_EVER_S: Final = 1e9


class Killed(BaseException):
    """What a task runs into when its process dies. No `except Exception` can stop it."""


class Group:
    """What dies together: the tasks of one process, or all that runs on one host."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dead = False
        self.frozen_until_s = 0.0
        self.tasks: dict[int, Task] = {}


class Task:
    """One line of execution. `wake` counts what it waited for, so that a late alarm for
    something it no longer waits for does not wake it."""

    def __init__(self, number: int, name: str, group: Group) -> None:
        self.number = number
        self.name = name
        self.group = group
        self.wake = 0
        self.greenlet: greenlet = None


class Answer(Generic[T]):
    """What one task gives and another waits for."""

    def __init__(self) -> None:
        self.is_there = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self.on_arrival: Callable[[], None] | None = None

    def give(self, value: T | None = None, error: BaseException | None = None) -> None:
        """Give the value, or an error to be raised; only the first counts."""
        if self.is_there:
            return
        self.is_there, self._value, self._error = True, value, error
        if self.on_arrival is not None:
            self.on_arrival()

    def take(self) -> T:
        """Return what was given, or raise it."""
        assert self.is_there
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value] # None is a value where T allows it


class Scheduler:
    """Runs what is due, in the order of time; `chance` decides among what is due at once."""

    def __init__(self, chance: random.Random, begins_at: datetime) -> None:
        self.chance = chance
        self.now_s = 0.0
        self.events = 0
        self.on_bug: Callable[[Task, Exception], None] | None = None
        # Nobody may make the others wait while it holds the database.
        self.check_may_wait: Callable[[], None] = lambda: None
        self.after_event: Callable[[], None] = lambda: None
        self._begins_at = begins_at
        self._heap: list[tuple[float, float, int, Callable[[], None]]] = []
        self._count = 0
        self._hub = getcurrent()
        self._current: Task | None = None
        self._groups: dict[int, Group] = {}
        self._dying: list[Group] = []

    def clock(self) -> datetime:
        return self._begins_at + timedelta(seconds=self.now_s)

    def seconds_of(self, at: datetime) -> float:
        return (at - self._begins_at).total_seconds()

    @property
    def current(self) -> Task | None:
        """The task that runs now; None while the scheduler itself does."""
        return self._current

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something done later that does not wait itself."""
        self._count += 1
        entry = (self.now_s + seconds, self.chance.random(), self._count, action)
        heapq.heappush(self._heap, entry)

    def spawn(
        self, name: str, run: Callable[[], None], group: Group, *, after_s: float = 0.0
    ) -> Task:
        """Begin a task in a group that is alive."""
        self._count += 1
        task = Task(self._count, name, group)

        def body() -> None:
            try:
                run()
            except Killed:
                pass
            except Exception as error:
                if self.on_bug is None:
                    raise
                self.on_bug(task, error)
            finally:
                group.tasks.pop(task.number, None)

        task.greenlet = greenlet(body, parent=self._hub)
        group.tasks[task.number] = task
        self._groups.setdefault(id(group), group)
        self.after(after_s, lambda: self._resume(task, 0))
        return task

    def sleep(self, seconds: float) -> None:
        """Let time pass for the task that calls."""
        task = self._waiting_task()
        wake = task.wake
        self.after(seconds, lambda: self._resume(task, wake))
        self._hub.switch()

    def wait(self, answer: Answer[T], limit_s: float) -> bool:
        """Wait until the answer is there; return False when it is not within the limit."""
        if answer.is_there:
            return True
        task = self._waiting_task()
        wake = task.wake
        answer.on_arrival = lambda: self.after(0.0, lambda: self._resume(task, wake))
        self.after(limit_s, lambda: self._resume(task, wake))
        self._hub.switch()
        answer.on_arrival = None
        return answer.is_there

    def kill(self, group: Group) -> None:
        """End every task of a group where it stands: nothing of it runs any more.

        Whoever kills its own group has to raise `Killed` itself.
        """
        if not group.is_dead:
            group.is_dead = True
            self._dying.append(group)

    def freeze(self, group: Group, seconds: float) -> None:
        """Have a group stand still, as a process does that was sent SIGSTOP."""
        group.frozen_until_s = max(group.frozen_until_s, self.now_s + seconds)

    def run(self, is_over: Callable[[], bool], limit_s: float) -> bool:
        """Run until `is_over`; return False when that did not come within the limit."""
        while self._heap and not is_over():
            at, _, _, action = heapq.heappop(self._heap)
            if at > limit_s:
                return False
            self.now_s = max(self.now_s, at)
            self.events += 1
            action()
            self._bury()
            self.after_event()
        return is_over()

    def close(self) -> None:
        """Kill all that is left, so that it does not come back when memory is cleaned up."""
        for group in list(self._groups.values()):
            self.kill(group)
        self._bury()
        self._heap.clear()

    def _waiting_task(self) -> Task:
        task = self._current
        assert task is not None, "only a task can wait"
        if task.group.is_dead:
            raise Killed
        self.check_may_wait()
        task.wake += 1
        return task

    def _resume(self, task: Task, wake: int) -> None:
        if task.wake != wake or task.group.is_dead or task.greenlet.dead:
            return
        late = task.group.frozen_until_s - self.now_s
        if late > 0:
            self.after(late, lambda: self._resume(task, wake))
            return
        self._switch_to(task)

    def _switch_to(self, task: Task, *, to_die: bool = False) -> None:
        self._current = task
        try:
            if to_die:
                task.greenlet.throw(Killed)
            else:
                task.greenlet.switch()
        finally:
            self._current = None

    def _bury(self) -> None:
        while self._dying:
            group = self._dying.pop()
            self._groups.pop(id(group), None)
            for task in list(group.tasks.values()):
                if task.greenlet:  # has begun, and has not ended
                    self._switch_to(task, to_die=True)
            group.tasks.clear()
