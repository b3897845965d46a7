"""A run, from creating its folder to its report: progress, evaluations, checkpoints, Ctrl-C."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from . import ranks
from .atomic import finish_all
from .best_effort import BestEffort, lasting_console, say
from .checkpoint import remove_older, save_checkpoint, save_training
from .completions import Rollout
from .config import TrainConfig, one_line_errors
from .evaluation import Evaluation, evaluate
from .interrupt import Interrupt
from .metrics import MetricsLog
from .model import Policy
from .not_finite import NotFinite, NotFiniteError
from .optimizer import MasterAdamW
from .random_state import random_state, set_random_state
from .reference import Reference
from .report import write_report
from .rollout import check_prompts
from .run_folder import check_unchanged, lock, run_folder, writable, write_settings
from .sampler import Sampler
from .samples import SampleLog
from .stalled import Stalled
from .tasks import Shuffled, Task


class Run:
    """Context of a run. Leaving it saves report and checkpoint, after Ctrl-C or an error too.

    ``sampler`` decodes in evaluations, and is at hand for the training. A prompt that the model
    cannot read is a ValueError before anything is written. ``state`` is that of the checkpoint that
    the run in ``config.output_dir`` goes on from; None: it starts.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        sampler: Sampler,
        task: Task,
        state: dict[str, Any] | None = None,
    ) -> None:
        prompts = dict.fromkeys(e.prompt for e in task.train + task.held_out + task.demonstrations)
        check_prompts(policy, list(prompts), config.max_completion_length)
        self.config, self.policy, self.sampler, self.task = config, policy, sampler, task
        self.state = state
        self.before = None
        if state is not None and state["before"] is not None:
            self.before = Evaluation(**state["before"])
        self.after: Evaluation | None = None
        self.stalled = Stalled(0 if state is None else state["stalled"])
        self.interrupt = Interrupt()
        self._optimizer: MasterAdamW | None = None
        self._others: dict[str, Shuffled | Reference] = {}
        self._saved = self.step  # the step of the last checkpoint
        self._all_saved, self._interrupted, self._evaluation_due = True, False, False

    @property
    def step(self) -> int:
        """The last step that was taken as a whole."""
        return 0 if self.state is None else self.state["step"]

    def __enter__(self) -> Run:
        self._start = time.perf_counter()
        self._earlier = 0.0 if self.state is None else self.state["seconds"]
        goes_on = self.state is not None and ranks.rank() == 0
        with one_line_errors():
            self.folder = run_folder(self.config, self.task.name)
            with writable(self.folder):
                self._lock = lock(self.folder)
                check_unchanged(self.folder, self.config, self.step)
                kept = self.step if goes_on else 0
                self._log = MetricsLog(self.folder, self.config.tensorboard, kept)
                finish_all(self.folder)  # behind the lock: nobody is replacing one
                kept = self.state["samples"] if goes_on else 0
                self._samples = SampleLog(self.folder / "samples.md", kept)
                write_settings(self.folder, self.config)
            skipped = 0 if self.state is None else self.state["not_finite"]
            self._not_finite = NotFinite(self.folder, skipped)
        self.interrupt.__enter__()
        self._console = lasting_console()
        self._console.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._interrupted = isinstance(error, KeyboardInterrupt)
        try:
            self._save(None if self._interrupted else error, self._interrupted)
        finally:
            self._log.close()
            self._lock.close()
            self._console.__exit__(None, None, None)
            self.interrupt.__exit__(kind, error, trace)
        return self._interrupted

    @property
    def exit_code(self) -> int:
        """0; 128 + the number of the signal that ended the run; 1 if not all could be saved."""
        return 128 + self.interrupt.signum if self._interrupted else int(not self._all_saved)

    def keep(self, optimizer: MasterAdamW, prompts: Shuffled, reference: Reference | None) -> None:
        """Have checkpoints hold the training as it is after each whole step.

        If the run goes on from a checkpoint, they and all random numbers become what they were.
        Several processes begin with the same weights and different random numbers.
        """
        ranks.copy_first(self.policy.model.parameters())
        if ranks.rank() > 0:
            torch.manual_seed(self.config.seed + ranks.rank())
        self._others = {"prompts": prompts}
        if reference is not None:
            self._others["reference"] = reference
        if self.state is not None:
            optimizer.load_state_dict(self.state["optimizer"])
            for name, part in self._others.items():
                part.load_state_dict(self.state[name])
            states = self.state["random"]
            if len(states) == ranks.count():
                set_random_state(states[ranks.rank()])
            if self.state["evaluation_due"]:
                self._log.add(self.step, self.evaluate().metrics())
        self._optimizer = optimizer

    def steps(self, count: int, title: str) -> Iterator[int]:
        """Yield 1 to ``count`` with a progress bar, or fewer when ``max_minutes`` have passed.

        After `keep` the first is the one behind the last whole step. An interrupt lets the current
        step finish.
        """
        done = self.step if self._optimizer is not None else 0
        minutes = self.config.max_minutes or math.inf
        for step in tqdm(
            range(done + 1, count + 1), title, initial=done, total=count, disable=ranks.rank() > 0
        ):
            self.interrupt.safe_point()
            self._began = time.perf_counter()
            if any(ranks.gathered(self._began - self._start > 60 * minutes)):
                tqdm.write(f"{title} ends before step {step}: {minutes:g} minutes have passed")
                return
            yield step
            if self._optimizer is not None:
                self._take_note(step)

    def evaluate(self, title: str | None = None) -> Evaluation:
        """Return greedy completions of the held-out prompts; with a title, show some of them."""
        batch_size = self.config.num_prompts * self.config.num_generations
        length = self.config.max_completion_length
        # Several processes have different numbers of batches, and can stop between steps alone.
        safe_point = self.interrupt.safe_point if ranks.count() == 1 else lambda: None
        with self.policy.gathered():
            made = evaluate(self.policy, self.sampler, self.task, batch_size, length, safe_point)
        if title is not None:
            self._samples.add_evaluation(title, made)
        return made

    def log(self, step: int, metrics: dict[str, float], tokens: int) -> None:
        """Log a step with its speed, and every ``eval_every`` steps the held-out accuracy."""
        metrics = metrics | {"tokens_per_s": tokens / (time.perf_counter() - self._began)}
        if self.config.eval_every and step % self.config.eval_every == 0:
            try:
                metrics |= self.evaluate().metrics()
            except KeyboardInterrupt:  # raised again before the next step
                self._evaluation_due = True
        self._log.write(step, metrics)

    def watch(self, step: int, metrics: dict[str, float], rollout: Rollout) -> None:
        """Show completions every ``log_completions_every`` steps; warn where nothing is learnt.

        Raises NotFiniteError after several steps without an update.
        """
        self._not_finite.watch(metrics, rollout)
        self.stalled.watch(rollout)
        every = self.config.log_completions_every
        if every and step % every == 0:
            self._samples.add_group(step, self.policy, rollout)

    def _take_note(self, step: int) -> None:
        """Take note of the state after a step, and write it every ``checkpoint_every`` steps.

        Weights and averages are not copied: they are those of this step until the optimizer's next.
        """
        self.state = {
            "step": step,
            "updates": self._optimizer.updates,
            "seconds": self._earlier + time.perf_counter() - self._start,
            "stalled": self.stalled.steps,
            "evaluation_due": self._evaluation_due,
            "not_finite": self._not_finite.steps,
            "samples": self._samples.size,
            "random": random_state(),
            "optimizer": self._optimizer.state_dict(),
            **{name: part.state_dict() for name, part in self._others.items()},
        }
        every = self.config.checkpoint_every
        if every and step % every == 0:
            self._save_training()

    def _save_training(self) -> bool:
        """Write a checkpoint of the last whole step; return whether that was possible."""
        state = self.state | {
            "task": self.task.digest,
            "before": self.before and asdict(self.before),
            "random": ranks.gathered(self.state["random"]),
        }
        with BestEffort(str(self.folder / f"checkpoint-{self.step}")) as checkpoint:
            if ranks.rank() == 0:
                # Their sizes are part of the state.
                self._log.sync()
                self._samples.sync()
            save_training(self.policy, state, self.folder, self.step)
            if ranks.rank() == 0:
                remove_older(self.folder, self.config.keep)
        if any(ranks.gathered(checkpoint.failed)):
            return False
        self._saved = self.step
        return True

    def _can_go_on(self) -> bool:
        """Return whether the weights are those that were noted."""
        return self._optimizer.updates == self.state["updates"]

    def _save(self, error: BaseException | None, interrupted: bool) -> None:
        """Save report, training and model; one that fails does not keep the others from it."""
        ended = self.after is not None and self.step == self.config.max_steps
        seconds = self._earlier + time.perf_counter() - self._start

        def report(whole: bool) -> bool:
            with BestEffort(f"the report in {self.folder}") as effort:
                write_report(
                    self.folder,
                    self.config,
                    self._log.rows,
                    self.before,
                    self.after,
                    task=self.task.name,
                    seconds=seconds,
                    whole=whole,
                    interrupted=interrupted,
                    error=None if error is None else repr(error),
                )
            return not effort.failed

        self._all_saved = report(ended)
        # All processes: what another error has ended waits for none.
        all_there = error is None or ranks.count() == 1 or isinstance(error, NotFiniteError)
        if self._saved < self.step and not ended and all_there and self._can_go_on():
            self._all_saved &= self._save_training()
        # A run that fails before it has its weights again keeps the model that it has.
        has_weights = self.state is None or self._optimizer is not None
        if has_weights and not all_there and self.policy.mesh is not None:
            say("the model is not saved: parts of it lie in other processes")
            self._all_saved = False
        elif has_weights:
            with BestEffort(str(self.folder / "checkpoint")) as model:
                save_checkpoint(self.policy, self.folder / "checkpoint")
            self._all_saved &= not model.failed
            if ended and model.failed:
                report(whole=False)  # so that --resume takes the steps behind a checkpoint again
        if self.before and self.after:
            print(f"held-out before: {self.before}; after: {self.after} ({seconds:.0f} s)")
        saved = "interrupted, saved" if interrupted else "saved"
        but = "" if self._all_saved else ", but for what could not be written"
        print(f"{saved} in {self.folder}{but}")
        sys.stdout.flush()
        if all_there:
            # The first is still writing, and torchrun ends it when another has ended by a signal.
            ranks.gathered(None)
