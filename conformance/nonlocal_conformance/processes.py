"""Several processes that do the same work together, each of which has to answer in time."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["Processes"]

Answer = tuple[Any, Exception | None]


class Processes:
    """Processes that wait for work until they are closed, or this one ends.

    Args:
        count: how many.
        preload: the module that they import once for all, where the system can share it.

    Raises:
        ValueError: from a call, and any other error that the work raises, if every process raises the same.
        RuntimeError: from a call, if only some raise an error, or one ends.
        TimeoutError: from a call, if one does not answer in time; all have been ended then.
    """

    def __init__(self, count: int, preload: str) -> None:
        """Start them."""
        kinds = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
        if "forkserver" in kinds:
            context.set_forkserver_preload([preload])
        self.is_closed = False
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, work: Callable[..., Any], *arguments: Any, timeout: float = 120.0, **options: Any) -> list[Any]:
        """Return what `work(rank, *arguments, **options)` gives in each process."""
        for rank, pipe in enumerate(self._pipes):
            pipe.send((work, (rank, *arguments), options))
        end = time.monotonic() + timeout
        answers = [self._answer(rank, end) for rank in range(len(self._pipes))]
        errors = [error for _, error in answers]
        if any(errors):
            if len({(type(error), str(error)) for error in errors}) > 1:
                self.close()  # some may wait for others still
                message = f"every process must do the same. Got the errors {errors}."
                raise RuntimeError(message)
            raise next(error for error in errors if error)
        return [value for value, _ in answers]

    def close(self) -> None:
        """End them all."""
        self.is_closed = True
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()

    def _answer(self, rank: int, end: float) -> Answer:
        pipe = self._pipes[rank]
        try:
            if pipe.poll(max(0.0, end - time.monotonic())):
                return pipe.recv()
        except EOFError:
            self.close()
            message = f"process {rank} must answer. Got its end."
            raise RuntimeError(message) from None
        self.close()
        message = f"process {rank} must answer in time. Got nothing."
        raise TimeoutError(message)


def _serve(pipe: Connection) -> None:
    while True:
        try:
            work, arguments, options = pipe.recv()
        except EOFError:  # whoever asked has ended
            return
        answer: Answer
        try:
            answer = work(*arguments, **options), None
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            answer = None, error
        pipe.send(answer)
