"""What a job has finished, written down as it goes, so that the next one can go on."""

import json
from pathlib import Path
from typing import TextIO


class Journal:
    """Finished parts of a job: JSON, one object a line, the first naming the job.

    Attributes:
      finished: What to compare a part with, such as a checksum, by its name.
    """

    def __init__(self, file: Path, job: str):
        """Opens a journal; that of another job is begun anew.

        Args:
          file: Where it is kept.
          job: Names the job and all that its parts depend on.
        """
        self.finished = _read(file, job)
        # Anew also for the same job: its last line may be torn.
        self._stream: TextIO = file.open("w")
        self._line({"job": job})
        for part, mark in self.finished.items():
            self._line({"part": part, "mark": mark})

    def add(self, part: str, mark: str) -> None:
        """Writes down that a part is finished."""
        self.finished[part] = mark
        self._line({"part": part, "mark": mark})

    def _line(self, entry: dict[str, str]) -> None:
        self._stream.write(json.dumps(entry) + "\n")
        # To the system, which outlives this process.
        self._stream.flush()

    def __enter__(self) -> "Journal":
        """Returns the journal."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the file."""
        self._stream.close()


def _read(file: Path, job: str) -> dict[str, str]:
    if not file.is_file():
        return {}
    finished: dict[str, str] = {}
    lines = file.read_text(errors="replace").splitlines()
    try:
        entries = [json.loads(line) for line in lines[:1]]
        if entries != [{"job": job}]:
            return {}
        for line in lines[1:]:
            match json.loads(line):
                case {"part": str(part), "mark": str(mark)}:
                    finished[part] = mark
    except (ValueError, RecursionError):
        pass  # The line that was being written when the process ended, or damage.
    return finished
