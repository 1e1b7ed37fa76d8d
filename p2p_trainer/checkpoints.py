"""Checkpoints that are whole or not read: sealed last, and resumed to the numbers of an uninterrupted run."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ._compat import ColumnKeepingSFTTrainer, row_index
from ._files import write_json


logger = logging.getLogger(__name__)

SEAL_NAME = "p2p_seal.json"

# Rows that are hashed at a time.
_BLOCK = 10_000

_FAILED_WRITES = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}
)


@contextlib.contextmanager
def explained(what: str, path: Path, advice: str) -> Iterator[None]:
    """
    Turn what libraries raise when a disk is full or may not be written to into one clear error.

    Args:
        what (`str`):
            What is being written, as the beginning of a sentence.
        path (`Path`):
            Where.
        advice (`str`):
            What to do once there is room, without a full stop.

    Raises:
        `OSError`: something could not be written.
    """
    try:
        yield
    except Exception as error:
        if not _is_failed_write(error):
            raise
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free / 2**20
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise OSError(
            f"{what} could not be written ({reason}; {free:,.0f} MiB are free there). Make room, or see to it that "
            f"the folder may be written to. {advice}."
        ) from error


def _is_failed_write(error: Exception) -> bool:
    if isinstance(error, OSError):
        # Errors of a network have no such number.
        return error.errno in _FAILED_WRITES
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    writing = any(frame.f_globals.get("__name__") == torch.serialization.__name__ for frame in frames)
    # torch does not tell the cause; libraries in Rust, for weights and tokenizers, do so in words.
    return (writing and isinstance(error, RuntimeError)) or "os error" in str(error)


def seal(folder: Path, **content: Any) -> None:
    """
    Mark a checkpoint as complete: write down its files and their sizes, once they are on the disk.

    Args:
        folder (`Path`):
            The checkpoint; nobody writes to it any more.
        **content:
            JSON values to keep beside that.
    """
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / SEAL_NAME:
            # Sizes are all that is compared: a power cut must not leave a file of the right size without content.
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_json(folder / SEAL_NAME, {**content, "files": sizes})


def defect(folder: Path) -> str | None:
    """
    Say why a checkpoint must not be read.

    Args:
        folder (`Path`):
            The checkpoint.

    Returns:
        `str` or `None`: what is wrong with it; `None` if it is complete.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        sizes = _content(folder)["files"]
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
    except FileNotFoundError:
        return f"it has no {SEAL_NAME}, which is written last"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its {SEAL_NAME} is damaged"
    return None


def checkpoints_of(folder: Path) -> list[Path]:
    """
    List the checkpoints of a run, complete or not.

    Args:
        folder (`Path`):
            Output folder.

    Returns:
        `list[Path]`: folders, the latest step first.
    """
    found = [path for path in folder.glob("checkpoint-*") if _step(path) is not None and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def newest_complete(folder: Path, world_size: int = 1) -> Path | None:
    """
    Choose the checkpoint to go on from; all processes call this, and all get the same.

    Args:
        folder (`Path`):
            Output folder.
        world_size (`int`, *optional*, defaults to 1):
            Number of processes.

    Returns:
        `Path` or `None`: the latest checkpoint that is complete wherever a process looks at it.
    """
    defects = {path: defect(path) for path in checkpoints_of(folder)}
    whole = {path.name for path, wrong in defects.items() if wrong is None}
    if world_size > 1:
        # Machines without a common disk may have been stopped on either side of a seal.
        whole = set.intersection(*map(set, gather_object([sorted(whole)])))
    for path, wrong in defects.items():
        if path.name in whole:
            return path
        logger.warning(
            "The checkpoint %s is left out, since it is incomplete: %s. It is deleted when the next one is saved.",
            path,
            wrong or "another machine has it in part",
        )
    return None


def rows_hash(dataset: Dataset, columns: Sequence[str]) -> str:
    """
    Hash what training rows hold, and their order.

    Texts and numbers themselves are read, 2 to 3 s for ten million rows of 100 bytes: fingerprints of `datasets`
    follow a file's path and date instead of its content. The table and the index into it are hashed one after the
    other, since to look up rows one by one takes twenty times as long. Of images that are files, it is their paths.

    Args:
        dataset (`Dataset`):
            Rows.
        columns (`Sequence[str]`):
            Columns that count.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    table = dataset.data.select(list(columns))
    for start in range(0, len(table), _BLOCK):
        # Blocks of our own: how a table is cut into chunks depends on how it was read.
        for batch in table.fast_slice(start, _BLOCK).combine_chunks().to_batches():
            digest.update(batch.serialize())
    index = row_index(dataset)
    if index is not None:
        digest.update(index.tobytes())
    return digest.hexdigest()


class ResumableTrainer(ColumnKeepingSFTTrainer):
    """
    `SFTTrainer` that can be killed at any moment.

    A checkpoint counts once it is sealed: after all processes have written their part, and before an older one is
    deleted. One that is not sealed is never read. A resumed run gives the numbers of an uninterrupted one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows_hash: str | None = None
        # Last: what other callbacks want to be saved is seen.
        self.add_callback(ResumeCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Train.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Checkpoint to go on from, one of your own runs: never one that somebody else could write to. `True`
                takes the newest complete one of `args.output_dir`.

        Returns:
            `TrainOutput`: as of `SFTTrainer`.

        Raises:
            `ValueError`: the checkpoint is incomplete, or of other rows or another number of processes.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(Path(self.args.output_dir), self.args.world_size)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no complete checkpoint in {self.args.output_dir!r}. Start anew.")
        if resume_from_checkpoint:
            self.check_checkpoint(Path(resume_from_checkpoint))
            resume_from_checkpoint = str(resume_from_checkpoint)
            # It was evaluated before the first step, and once is enough.
            self.args.eval_on_start = False
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_checkpoint(self, folder: Path) -> None:
        """
        Refuse to go on from a checkpoint that does not belong to this run.

        Args:
            folder (`Path`):
                The checkpoint.

        Raises:
            `ValueError`: it is incomplete, or of other rows or another number of processes.
        """
        wrong = defect(folder)
        if wrong is not None:
            raise ValueError(
                f"The checkpoint {str(folder)!r} is incomplete ({wrong}). Name another one, or let "
                f"`--resume_from_checkpoint auto` find it."
            )
        content = _content(folder)
        if content.get("world_size") != self.args.world_size:
            raise ValueError(
                f"The checkpoint {str(folder)!r} is of a run with {content.get('world_size')} process(es), and now "
                f"there are {self.args.world_size}: batches and random numbers would be others. Launch as many as "
                f"before, or start anew in another `--output_dir`."
            )
        if self.args.process_index == 0 and content.get("rows") != self.rows_hash():
            raise ValueError(
                f"The checkpoint {str(folder)!r} was trained on other rows than there are now. Bring the data back as "
                f"they were, or start anew in another `--output_dir`."
            )

    def rows_hash(self) -> str | None:
        """
        Hash the training rows; once, since it takes seconds where there are millions.

        Returns:
            `str` or `None`: the hash; `None` of rows that are no `Dataset`.
        """
        if self._rows_hash is None and isinstance(self.train_dataset, Dataset):
            self._rows_hash = rows_hash(
                self.train_dataset, self.collator_columns or sorted(self.train_dataset.column_names)
            )
        return self._rows_hash

    @contextlib.contextmanager
    def writing_checkpoint(self, folder: Path) -> Iterator[None]:
        args, runs = self.args, folder.parent
        if args.should_save:
            for path in checkpoints_of(runs):
                if path == folder or defect(path) is not None:
                    shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        last = next(iter(checkpoints_of(runs)), None)
        advice = (
            f"The last good one is {str(last)!r}: go on with `--resume_from_checkpoint auto`"
            if last is not None
            else "There is none before it: start again"
        )
        # transformers deletes older ones before anybody could seal this one.
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            with explained(f"The checkpoint {str(folder)!r}", folder, advice):
                yield
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    seal(folder, world_size=args.world_size, rows=self.rows_hash())
        finally:
            args.save_total_limit = limit
        if args.should_save:
            rotate_checkpoints(str(runs), limit, self.state.best_model_checkpoint, use_mtime=True)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        # transformers would train a step more when the last checkpoint of a run that ends within an epoch is resumed.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)


class ResumeCallback(TrainerCallback):
    """
    Makes a run the same whether it is interrupted or not.

    Args:
        trainer ([`ResumableTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self._postponed = False
        self._had_ended = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._had_ended = state.global_step >= state.max_steps
        counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer.set_tokens_trained(int(counts[-1]) if counts else 0)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader,
        **kwargs: Any,
    ) -> None:
        # The trainer tells the sampler as well, but does not get through to that of rows grouped by length where one
        # of many processes skips batches (accelerate/data_loader.py, 1.15, line 622).
        sampler = train_dataloader
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        sampler = getattr(sampler, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        last_of_epoch = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if control.should_save and last_of_epoch:
            # The epoch's own evaluation comes next; a run that is resumed here would never do it.
            control.should_save, self._postponed = False, True
        self._log_what_is_saved(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._had_ended:
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._postponed:
            control.should_save, self._postponed = True, False
        self._log_what_is_saved(args, control)

    def _log_what_is_saved(self, args: TrainingArguments, control: TrainerControl) -> None:
        # Sums since the last logged step are in no checkpoint: behind one, a logged loss has to start anew.
        saves = control.should_save or (control.should_evaluate and args.save_strategy == "best")
        if args.logging_strategy != "no" and (saves or self._postponed):
            control.should_log = True


def _content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SEAL_NAME).read_text(encoding="utf-8"))


def _step(folder: Path) -> int | None:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() and len(number) < 20 else None
