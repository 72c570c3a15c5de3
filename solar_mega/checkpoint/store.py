"""The checkpoints of a run on disk: complete under their own name, or not there at all.

    checkpoints/
      step-00000100/            complete: it got this name only after every byte was on the disk
      step-00000120/
      .step-00000140.partial/   being written, or what a killed run left; the next save removes it
      step-00000130.damaged/    found damaged by a run that was told to fall back; yours to remove
      latest                    "step-00000120"

Order of a save: write partial -> fsync -> rename -> move `latest` -> prune. A kill at any point leaves at
least the checkpoint that `latest` named before.
"""

import os
import re
import shutil
import threading
from pathlib import Path

from solar_mega.runtime.console import say
from solar_mega.runtime.files import atomic_file, disk_errors, sync_directory

MIN_KEEP = 2
"""The newest checkpoint may turn out to be damaged, so there is always one before it."""

_COMPLETE = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(partial|replaced)")


class CheckpointStore:
    """Names, commits and prunes; knows nothing of what is inside. Used by one process of a run (rank 0)."""

    def __init__(self, root: Path | str, keep: int = MIN_KEEP) -> None:
        """`keep`: complete checkpoints kept, the newest ones; values below 2 count as 2."""
        self.root = Path(root)
        self.keep = max(keep, MIN_KEEP)

    def path(self, step: int) -> Path:
        """Where the complete checkpoint of `step` is or will be."""
        return self.root / f"step-{step:08d}"

    def partial_path(self, step: int) -> Path:
        """Where the checkpoint of `step` is while it is being written."""
        return self.root / f".step-{step:08d}.partial"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        names = (_COMPLETE.fullmatch(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in names if match)

    def latest(self) -> Path | None:
        """The checkpoint to resume from; None when there is none.

        It is the one that `latest` names. Where that file is missing, damaged, or names a directory that is
        not there, it is the newest complete one, and the reason is printed.
        """
        steps = self.steps()
        name, trouble = self._read_latest()
        if trouble is None:
            return self.root / name
        if not steps:
            return None
        newest = self.path(steps[-1])
        say(f"{self.root / 'latest'} {trouble}; using the newest complete checkpoint, {newest.name}")
        return newest

    def _read_latest(self) -> tuple[str, str | None]:
        """(directory name, None), or ("", what is wrong)."""
        try:
            name = (self.root / "latest").read_text("utf-8").strip()
        except FileNotFoundError:
            return "", "is missing"
        except (OSError, UnicodeDecodeError) as error:
            return "", f"cannot be read ({error})"
        if not _COMPLETE.fullmatch(name):
            return "", f"is damaged (it says {name[:40]!r})"
        if not (self.root / name).is_dir():
            return "", f"names {name}, which does not exist"
        return name, None

    def partial(self, step: int) -> Path:
        """A new empty directory to write the checkpoint of `step` into. Leftovers of killed saves are
        removed.
        """
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            for entry in self.root.iterdir():
                if _LEFTOVER.fullmatch(entry.name):
                    # Not strictly: another thread may be removing a pruned one.
                    shutil.rmtree(entry, ignore_errors=True)
            place = self.partial_path(step)
            place.mkdir()
        return place

    def discard(self, step: int) -> None:
        """Removes an unfinished checkpoint. Nothing happens when there is none."""
        shutil.rmtree(self.partial_path(step), ignore_errors=True)

    def commit(self, step: int) -> Path:
        """Makes the partial checkpoint of `step` the latest one, then prunes. Returns its final path.

        A complete checkpoint of the same step (of a run that went back) is replaced.
        """
        final, replaced = self.path(step), self.root / f".step-{step:08d}.replaced"
        with disk_errors(final):
            _sync_tree(self.partial_path(step))
            if final.exists():
                final.rename(replaced)
            self.partial_path(step).rename(final)
            sync_directory(self.root)
            with atomic_file(self.root / "latest") as stream:
                stream.write(final.name + "\n")
        shutil.rmtree(replaced, ignore_errors=True)
        self._prune()
        return final

    def set_aside(self, step: int) -> Path:
        """Takes a damaged checkpoint out of the row: it keeps its content as `step-....damaged`, and `latest`
        names the newest one left. Returns where it is now."""
        damaged = self.root / f"{self.path(step).name}.damaged"
        with disk_errors(self.root):
            shutil.rmtree(damaged, ignore_errors=True)  # of the same step, set aside before
            self.path(step).rename(damaged)
            sync_directory(self.root)
            steps = self.steps()
            if steps:
                with atomic_file(self.root / "latest") as stream:
                    stream.write(self.path(steps[-1]).name + "\n")
        return damaged

    def _prune(self) -> None:
        """Removes the oldest complete checkpoints; never the one that `latest` names. Deleting large files
        takes some file systems seconds, so a thread does it; the process does not end before it has."""
        named, _ = self._read_latest()
        others = [step for step in self.steps() if self.path(step).name != named]
        for step in others[: max(0, len(others) - (self.keep - 1))]:
            # Renamed first: a kill inside rmtree must not leave half a checkpoint under a complete name.
            doomed = self.root / f".step-{step:08d}.replaced"
            shutil.rmtree(doomed, ignore_errors=True)
            self.path(step).rename(doomed)
            threading.Thread(target=shutil.rmtree, args=(doomed,), kwargs={"ignore_errors": True}).start()


def _sync_tree(directory: Path) -> None:
    for place, _, files in os.walk(directory):
        for name in files:
            descriptor = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(place))
