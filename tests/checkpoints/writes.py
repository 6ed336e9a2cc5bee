"""What is written of a checkpoint, weight by weight, and interruptions of it."""

from qjax.checkpoints import placing


class Writes:
    """Counts the weights that are written, and lets one of them fail."""

    def __init__(self, monkeypatch):
        self.names, self.error, self.at = [], None, None
        self._fill = placing.fill
        monkeypatch.setattr(placing, "fill", self)

    def __call__(self, stream, places, arrays):
        if self.error is not None and len(self.names) == self.at:
            half = next(iter(arrays.values())).tobytes()[:5]
            stream.seek(places[0].offset)
            stream.write(half)
            raise self.error
        self.names.append(places[0].name.rpartition(".")[0])
        return self._fill(stream, places, arrays)

    def fail(self, at, error):
        self.names, self.at, self.error = [], at, error

    def watch(self):
        self.names, self.error = [], None
