"""A run, from creating its folder to its report: progress, evaluations, Ctrl-C, saving."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from tqdm import tqdm

from .checkpoint import save_checkpoint
from .completions import Rollout
from .config import TrainConfig
from .evaluation import Evaluation, evaluate
from .interrupt import Interrupt
from .metrics import MetricsLog
from .model import Policy
from .report import new_run_folder, write_report
from .rollout import check_prompts
from .sampler import Sampler
from .samples import SampleLog
from .stalled import Stalled
from .tasks import Task


class Run:
    """Context of a run. Leaving it saves checkpoint and report, even after Ctrl-C or SIGTERM.

    ``sampler`` decodes in evaluations, and is at hand for the training. A prompt that the model
    cannot read is a ValueError before anything is written.
    """

    def __init__(self, config: TrainConfig, policy: Policy, sampler: Sampler, task: Task) -> None:
        prompts = dict.fromkeys(e.prompt for e in task.train + task.held_out + task.demonstrations)
        check_prompts(policy, list(prompts), config.max_completion_length)
        self.config, self.policy, self.sampler, self.task = config, policy, sampler, task
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        self.stalled = Stalled()
        self.interrupt = Interrupt()

    def __enter__(self) -> Run:
        self._start = time.perf_counter()
        self.folder = new_run_folder(self.config, self.task.name)
        self._log = MetricsLog(self.folder, self.config.tensorboard)
        self._samples = SampleLog(self.folder / "samples.md")
        self.interrupt.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        interrupted = isinstance(error, KeyboardInterrupt)
        self._log.close()
        if error is None or interrupted:
            self._save(interrupted)
        self.interrupt.__exit__(kind, error, trace)
        return interrupted

    @property
    def exit_code(self) -> int:
        """0, or 128 + the number of the signal that ended the run."""
        return 128 + self.interrupt.signum if self.interrupt.signum else 0

    def steps(self, count: int, title: str) -> Iterator[int]:
        """Yield 1 to ``count`` with a progress bar, or fewer when ``max_minutes`` have passed.

        An interrupt lets the current step finish.
        """
        minutes = self.config.max_minutes or math.inf
        for step in tqdm(range(1, count + 1), desc=title):
            self.interrupt.safe_point()
            self._began = time.perf_counter()
            if self._began - self._start > 60 * minutes:
                tqdm.write(f"{title} ends before step {step}: {minutes:g} minutes have passed")
                return
            yield step

    def evaluate(self, title: str | None = None) -> Evaluation:
        """Return greedy completions of the held-out prompts; with a title, show some of them."""
        batch_size = self.config.num_prompts * self.config.num_generations
        length = self.config.max_completion_length
        made = evaluate(
            self.policy, self.sampler, self.task, batch_size, length, self.interrupt.safe_point
        )
        if title is not None:
            self._samples.add_evaluation(title, made)
        return made

    def log(self, step: int, metrics: dict[str, float], tokens: int) -> None:
        """Log a step with its speed, and every ``eval_every`` steps the held-out accuracy."""
        metrics = metrics | {"tokens_per_s": tokens / (time.perf_counter() - self._began)}
        if self.config.eval_every and step % self.config.eval_every == 0:
            evaluation = self.evaluate()
            metrics |= {"eval_reward": evaluation.reward, "eval_seconds": evaluation.seconds}
            if evaluation.accuracy is not None:
                metrics["accuracy"] = evaluation.accuracy
        self._log.write(step, metrics)

    def watch(self, step: int, rollout: Rollout) -> None:
        """Show completions every ``log_completions_every`` steps; warn where nothing is learnt."""
        self.stalled.watch(rollout)
        every = self.config.log_completions_every
        if every and step % every == 0:
            self._samples.add_group(step, self.policy, rollout)

    def _save(self, interrupted: bool) -> None:
        save_checkpoint(self.policy, self.folder / "checkpoint")
        seconds = time.perf_counter() - self._start
        write_report(
            self.folder,
            self.config,
            self._log.rows,
            self.before,
            self.after,
            task=self.task.name,
            seconds=seconds,
            interrupted=interrupted,
        )
        if self.before and self.after:
            print(f"held-out before: {self.before}; after: {self.after} ({seconds:.0f} s)")
        print(f"{'interrupted, saved' if interrupted else 'saved'} in {self.folder}")
        sys.stdout.flush()
