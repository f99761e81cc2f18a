"""Measures time and number of compilations in a stretch of code."""

import time

import jax

_PREFIX = "/jax/core/compile/"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompileClock:
    """Context manager that measures `seconds` of tracing and compiling, and `count` programs.

    Traces nest, so the seconds are those of the union of the reported intervals.
    """

    def __enter__(self):
        self.count = 0
        self._intervals = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @property
    def seconds(self):
        """Seconds of tracing and compiling; those of nested traces count once."""
        return sum(end - start for start, end in self._intervals)

    def _listen(self, event, duration, **_):
        if not event.startswith(_PREFIX):
            return
        self.count += event == _COMPILED
        end = time.perf_counter()
        start = end - duration
        while self._intervals and self._intervals[-1][0] >= start:
            self._intervals.pop()
        self._intervals.append((start, end))
