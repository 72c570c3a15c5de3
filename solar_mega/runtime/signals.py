"""Asked to stop? USR1 and TERM set a flag; the training loop looks at it between steps, on all ranks
together."""

import signal
from types import FrameType


class StopRequest:
    """with StopRequest() as stop: ... if any rank's stop.received: save and leave

    Signals reach ranks at different moments, and all must leave at the same step: ask with
    `parallel.any_rank`."""

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
