"""Train a GPT: from scratch, from the weights of another model, adapters for one, or on from where a run stopped.

    python train.py config/train_scientific.py
    python train.py config/train_scientific.py --init_from=resume
    python train.py config/finetune_lora.py
    torchrun --nproc_per_node=2 train.py config/train_scientific.py
    torchrun --nproc_per_node=4 train.py config/train_scientific.py --n_head=4 --mesh_shape='[[2,2],["fsdp","tp"]]'

`python train.py --help` lists the settings. A run that is stopped and resumed computes what an uninterrupted one would,
bit for bit on a CPU with as many threads: which tokens a step sees follows from the seed and the number of samples
seen, the learning rate from the step, and the generators behind dropout are saved with the weights. Evaluation draws
from none of them.
"""

import contextlib
import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import configurator
import script

if __name__ == "__main__":
    script.begin()
    RUN = configurator.parse()  # --help and mistakes do not wait for torch

import torch
from torch import Tensor, nn

import files
import lora
from checkpoint import CheckpointManager
from configurator import RunConfig
from data.batches import BlockSampler, fixed_batches, sequences
from device import autocast, pick_compile, pick_device, pick_dtype, use_huge_pages
from distributed import Ranks, is_lost_contact, leave
from logbook import Logbook, duration, plot_loss, read_metrics
from loss import unchanged_weights
from mesh import Mesh
from model_directory import PLOT, TOKENIZER
from optimizer import build_optimizer, learning_rate, load_moments, set_rate
from preflight import Start, check_shared, check_unchanged, prepare_start
from tokenizer import Tokenizer
from words import first_line, in_shell

REPEATED_SIGNAL_SECONDS = 1.0  # torchrun repeats to its children the Ctrl-C that the terminal has sent them already


class StopSignal:
    """Remembers SIGINT, SIGTERM or SIGHUP for the loop to act on between two steps; a second one ends it at once."""

    def __init__(self, speak: bool = True):
        self.number, self.since, self.speak = 0, 0.0, speak

    def __enter__(self) -> "StopSignal":
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # nohup wants SIGHUP ignored
        self.previous = {n: signal.signal(n, self._receive) for n in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self.since = number, now
            if self.speak:
                os.write(2, b"\nstopping after this step; once more to leave at once, with the last save intact\n")
        elif now - self.since > REPEATED_SIGNAL_SECONDS:
            os._exit(128 + number)


class Trainer:
    """One run: the model, what updates it, and where it stands. `run` trains until max_iters or a signal."""

    def __init__(self, start: Start, device: torch.device, ranks: Ranks):
        """`start.config` has dtype and compile resolved (`set_up`)."""
        self.config, self.dataset, self.directory, self.base = start.config, start.dataset, start.directory, start.base
        self.ranks, self.device, config = ranks, device, start.config
        self.log = Logbook(self.directory, speak=ranks.main)
        path = self.dataset.tokenizer_path
        self.tokenizer = Tokenizer.load(path) if path else None
        self.raw_model, self.parameter_count, self.shares = start.model, start.model.num_params(), None
        if ranks.size > 1:
            from shares import Shares  # FSDP2 and DCP take half a second to import, which one process can do without

            drawn = start.state is None and config.init_from == "scratch"
            self.shares = Shares(self.raw_model, ranks, device, config, drawn)
        else:
            self.raw_model.to(device)
            if lora.adapter_names(self.raw_model) and config.dtype == "bfloat16":
                lora.round_frozen(self.raw_model, torch.bfloat16)
        self.raw_model.recompute = config.activation_checkpointing
        self.block_size = config.block_size
        self.micro_steps = config.micro_batches // ranks.mesh.readers
        self.samples_per_step = config.batch_size * config.micro_batches
        self.sampler = BlockSampler(self.dataset.train, self.block_size, config.seed)
        # A run compares its evaluations, so it keeps their sequences when a resume changes batch_size.
        self.evaluation_size = (start.state or {}).get("evaluation_size", config.batch_size * config.eval_iters)
        self.evaluation = {
            split: fixed_batches(tokens, self.block_size, config.batch_size, self.evaluation_size)
            for split, tokens in (("train", self.dataset.train), ("val", self.dataset.val))
        }
        self.optimizer = build_optimizer(self.raw_model, config)
        self.with_kept_gradient = []  # their gradients come as rows, added to a matrix that is kept
        if device.type == "cpu" and ranks.size == 1 and config.compile == "false":
            self.with_kept_gradient = self.raw_model.make_embedding_sparse()
        self._drop_gradients()
        self.frozen = {}  # what the loss made of weights that never change
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
        self.iter_num, self.samples_seen = 0, 0
        self.evaluated_at, self.saved_at = None, None  # iterations of the last evaluation and save
        self.best_val_loss, self.best = math.inf, {}  # best: iteration and metrics of what ckpt.pt holds
        torch.manual_seed(config.seed + ranks.reader)
        if start.state is not None:
            self._restore(start.state)
        self.log.rewind(self.iter_num if start.state is not None else -1)
        whole = config.compile == "true" and not self.shares  # of shares, each block is compiled
        self.model = torch.compile(self.raw_model) if whole else self.raw_model

    # ---- the loop

    def run(self, stop: StopSignal) -> int:
        """Train; evaluate and save when due. Returns 0, or the signal that stopped it. Raises FloatingPointError when
        a loss is not finite, before it can reach the weights or a file."""
        config = self.config
        self.began_at, self.last_save = self.iter_num, time.monotonic()
        while True:
            stopping, save_due = self._agree_on_stop(stop)
            finished = self.iter_num >= config.max_iters
            due = self.iter_num % config.eval_interval == 0 or finished
            if due and self.evaluated_at != self.iter_num and not stopping:
                self.evaluate_and_save(stop)
                stopping, _ = self._agree_on_stop(stop)
            if (save_due or stopping) and self.saved_at not in (None, self.iter_num):
                self.save(best=False)
            if finished and self.evaluated_at == self.iter_num:  # nothing is left that a signal could stop
                return 0
            if stopping:
                return stopping
            start = time.monotonic()
            if self.iter_num == self.began_at:
                self.began = start  # the evaluation before the first step says nothing about the time that is left
            loss, rate, norm = self.step()
            self._report(loss, rate, norm, time.monotonic() - start)

    def step(self) -> tuple[float, float, float]:
        """One optimizer step over samples_per_step sequences: (mean loss before it, learning rate, gradient norm)."""
        config, rate = self.config, learning_rate(self.iter_num, self.config)
        set_rate(self.optimizer, rate)
        total = torch.zeros((), device=self.device)
        first = self.samples_seen + self.ranks.reader * self.micro_steps * config.batch_size
        # Weights are cast once for all micro-batches, but not gathered ones: fsdp takes those back behind each.
        with unchanged_weights(self.frozen), autocast(self.device, config.dtype, hold=not self.shares):
            for micro in range(self.micro_steps):
                x, y = self.sampler.batch(first + micro * config.batch_size, config.batch_size)
                if self.shares:
                    self.raw_model.set_requires_gradient_sync(micro == self.micro_steps - 1)
                _, loss = self.model(x.to(self.device), y.to(self.device), only_loss=True)
                with autocast(self.device, "float32"):  # the way back has its dtypes from the way here
                    self.scaler.scale(loss / self.micro_steps).backward()
                total += loss.detach() / self.micro_steps
        loss = self.ranks.mean(total)
        self.scaler.unscale_(self.optimizer)
        largest = config.grad_clip or math.inf
        if self.shares:
            self.shares.agree_on_overflow(self.scaler, self.optimizer)
            norm = self.shares.clip_gradients(largest)
        else:
            weights = [p for p in self.raw_model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in weights]).item()
            if norm > largest:  # to multiply them all by one takes time too
                nn.utils.clip_grads_with_norm_(weights, largest, torch.tensor(norm))
        # float16's scaler meets infinite gradients as a matter of course: it skips the step and lowers its scale.
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise self._not_finite(f"the loss is {loss} and the gradient's norm {norm}", rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._drop_gradients()
        self.iter_num += 1
        self.samples_seen += self.samples_per_step
        return loss, rate, norm

    def _drop_gradients(self) -> None:
        kept = [torch.zeros_like(w) if w.grad is None else w.grad.zero_() for w in self.with_kept_gradient]
        self.optimizer.zero_grad(set_to_none=True)
        for weight, gradient in zip(self.with_kept_gradient, kept, strict=True):
            weight.grad = gradient

    @unchanged_weights()
    def evaluate(self, stop: StopSignal | None = None) -> dict[str, float] | None:
        """Mean loss on the fixed batches of train and val, nats per token, and val's bits per byte of UTF-8 text.
        None if a signal comes meanwhile."""
        self.raw_model.eval()
        result = {}
        for split, batches in self.evaluation.items():
            total = 0.0
            for first in range(0, len(batches), self.ranks.mesh.readers):
                if stop is not None and self._agree_on_stop(stop)[0]:
                    self.raw_model.train()
                    return None
                i = first + self.ranks.reader
                batch = batches[min(i, len(batches) - 1)]  # who has none left repeats it: the others wait
                x, y = sequences(getattr(self.dataset, split), batch, self.block_size)
                with torch.no_grad(), autocast(self.device, self.config.dtype):
                    _, loss = self.raw_model(x.to(self.device), y.to(self.device), only_loss=True)
                total += loss.item() * len(batch) * (i < len(batches))  # the last batch may be smaller
                self.log.progress(f"evaluating {split} {i + 1}/{len(batches)}")
            readers = self.ranks.gather(total)[:: self.ranks.mesh.tp]
            result[f"{split}_loss"] = sum(readers) / sum(map(len, batches))
        self.raw_model.train()
        if self.dataset.bytes_per_token:
            result["val_bits_per_byte"] = result["val_loss"] / math.log(2) / self.dataset.bytes_per_token
        return result

    def evaluate_and_save(self, stop: StopSignal | None = None) -> None:
        if (metrics := self.evaluate(stop)) is None:
            return
        if not all(map(math.isfinite, metrics.values())):
            raise self._not_finite(f"the evaluation gives {metrics}", learning_rate(self.iter_num, self.config))
        best = metrics["val_loss"] < self.best_val_loss
        self.best_val_loss = min(self.best_val_loss, metrics["val_loss"])
        self.evaluated_at = self.iter_num
        if best:
            self.best = {"iter_num": self.iter_num, "metrics": metrics}
        self.log.metric({"iter": self.iter_num, **metrics})
        bits = f", {metrics['val_bits_per_byte']:.3f} bits per byte" if "val_bits_per_byte" in metrics else ""
        self.log.say(
            f"iteration {self.iter_num:,}: train loss {metrics['train_loss']:.4f}, val loss {metrics['val_loss']:.4f}"
            f"{bits}{' (best so far)' if best else ''}"
        )
        self.save(best)
        self._show_sample()

    # ---- state

    def save(self, best: bool) -> None:
        """Write the directory: always last/; with `best`, the model too. Collective: every rank calls it."""
        weights = self.raw_model.parameters()
        if not (self.shares.are_finite() if self.shares else all(torch.isfinite(p).all() for p in weights)):
            raise self._not_finite("the weights are not finite", learning_rate(self.iter_num, self.config))
        generators = self.ranks.gather(self._generators())[:: self.ranks.mesh.tp]
        shards = self.shares.stage(self.directory, self.optimizer) if self.shares else None
        self.ranks.main_alone(lambda: self._write(best, generators, shards))
        self.saved_at, self.last_save = self.iter_num, time.monotonic()

    def _write(self, best: bool, generators: list[dict[str, Tensor]], shards: dict[str, Any] | None) -> None:
        model, optimizer, fingerprint = self.raw_model, self.optimizer.state_dict(), None
        if self.shares:
            model, fingerprint = self.shares.consolidated(self.directory, filled=best), self.shares.fingerprint
            optimizer = self.shares.without_shards(optimizer)
        metadata = {
            "config": asdict(self.config),
            "iter_num": self.iter_num,
            "best_val_loss": self.best_val_loss,
            "dataset": {
                "name": self.dataset.name,
                "fingerprint": self.dataset.fingerprint,
                **{key: self.dataset.meta.get(key) for key in ("source", "licence", "synthetic")},
            },
            "tokenizer": {"name": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint}
            if self.tokenizer
            else None,
            "best": self.best,
        } | ({"base": self.base} if self.base else {})
        state = {
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "generators": generators,
            "samples_seen": self.samples_seen,
            "evaluated_at": self.evaluated_at,
            "evaluation_size": self.evaluation_size,
            "threads": torch.get_num_threads(),
            "dataset": metadata["dataset"],
            "best": self.best,
        }
        CheckpointManager.save_checkpoint(
            model,
            self.directory,
            metadata,
            best=best,
            training_state=state,
            texts={TOKENIZER: self.tokenizer.to_json().encode()} if self.tokenizer else {},
            shards=shards,
            fingerprint=fingerprint,
        )
        with contextlib.suppress(ImportError):  # a run needs no picture
            plot = plot_loss(read_metrics(self.directory), self.directory.resolve().name)
            files.write_atomic(self.directory / PLOT, plot)

    def _restore(self, state: dict[str, Any]) -> None:
        if self.shares:
            self.shares.restore(self.optimizer, state, self.directory)
        else:
            load_moments(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:  # else the run had, or now has, another dtype
            self.scaler.load_state_dict(state["scaler"])
        self.iter_num, self.samples_seen = state["iter_num"], state["samples_seen"]
        self.best_val_loss, self.evaluated_at = state["best_val_loss"], state["evaluated_at"]
        self.best, self.saved_at = state["best"], state["iter_num"]
        if self.ranks.reader < len(state["generators"]):
            own = state["generators"][self.ranks.reader]
            torch.set_rng_state(own["cpu"])
            if self.device.type == "cuda" and own["cuda"] is not None:
                torch.cuda.set_rng_state(own["cuda"], self.device)

    def _generators(self) -> dict[str, Tensor | None]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    # ---- telling

    def _report(self, loss: float, rate: float, norm: float, seconds: float) -> None:
        speed = self.samples_per_step * self.block_size / seconds
        spent = time.monotonic() - self.began
        left = spent / (self.iter_num - self.began_at) * (self.config.max_iters - self.iter_num)
        line = (
            f"iteration {self.iter_num:,}/{self.config.max_iters:,}  loss {loss:.4f}  lr {rate:.2e}  "
            f"{speed:,.0f} tokens/s  ETA {duration(left)}"
        )
        if self.iter_num % self.config.log_interval == 0 or self.iter_num == self.began_at + 1:
            self.log.say(line)
        else:
            self.log.progress(line)
        if self.iter_num % self.config.log_interval == 0:
            tokens = self.samples_seen * self.block_size
            finite = norm if math.isfinite(norm) else None  # float16 overflows now and then; JSON knows no infinity
            record = {"iter": self.iter_num, "loss": loss, "lr": rate, "grad_norm": finite, "tokens": tokens}
            self.log.metric({**record, "tokens_per_second": round(speed, 1)})

    def _show_sample(self) -> None:
        """A line of text from the model as it is, with a generator of its own."""
        if not self.config.sample_tokens or self.tokenizer is None:
            return
        prompt = torch.full((1, 1), self.tokenizer.eot, device=self.device)
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with autocast(self.device, self.config.dtype):
            ids = self.raw_model.generate(
                prompt,
                self.config.sample_tokens,
                top_k=50,
                # Ranks that have shares compute each token together, so none may end before the others.
                stop_tokens=() if self.shares else self.tokenizer.stops,
                vocab_size=self.tokenizer.drawn,
                generator=generator,
            )[0, 1:].tolist()
        text = " ".join(self.tokenizer.decode(self.tokenizer.before_stop(ids)).split())
        self.log.say(f"  sample: {text or '(end of text at once)'}")

    def _agree_on_stop(self, stop: StopSignal) -> tuple[int, bool]:
        """(signal to stop for or 0, whether save_minutes have passed), the same on every rank."""
        minutes = self.config.save_minutes
        late = minutes > 0 and time.monotonic() - self.last_save > 60 * minutes
        if self.ranks.size == 1:
            return stop.number, late
        votes = self.ranks.gather((stop.number, late))
        return max(number for number, _ in votes), votes[0][1]

    def _not_finite(self, what: str, rate: float) -> FloatingPointError:
        kept = (
            f"iteration {self.saved_at:,} is safe in {self.directory}"
            if self.saved_at is not None
            else "nothing was saved yet"
        )
        return FloatingPointError(
            f"{what} at iteration {self.iter_num:,} with learning rate {rate:.2e}; it stopped before any of that was "
            f"saved, and {kept}. A lower learning_rate, a longer warmup_iters or a smaller grad_clip usually helps"
        )


def set_up(start: Start, ranks: Ranks) -> tuple[Trainer, list[str]]:
    """The trainer for this machine, and what was chosen for it and why.

    What was chosen replaces `auto` in the configuration, the same on every rank, and is saved with the run: a resume
    on a machine that measures differently still computes the same.
    """
    device = pick_device(start.config.device, ranks.local)
    if device.type == "cpu":
        use_huge_pages()
    ranks.arrange(Mesh.parse(start.config.mesh_shape, ranks.size), device.type)
    dtype, why_dtype = ranks.agree(pick_dtype(start.config.dtype, device))
    compiled, why_compile = ranks.agree(pick_compile(start.config.compile, device))
    start.config = replace(start.config, dtype=dtype, compile=str(compiled).lower())
    if dtype == "float16" and ranks.mesh.tp > 1:
        raise ValueError("dtype=float16 is too narrow for a loss in shares (tp): use bfloat16 or float32")
    places = f": mesh_shape {ranks.mesh}" if ranks.size > 1 else ""
    return Trainer(start, device, ranks), [
        f"device {device} ({torch.get_num_threads()} threads), {ranks.size} process(es){places}",
        f"dtype {dtype}: {why_dtype}",
        f"compile {start.config.compile}: {why_compile}",
    ]


def announce(trainer: Trainer, notes: list[str]) -> None:
    """What is about to happen, before the first step."""
    config, dataset, log = trainer.config, trainer.dataset, trainer.log
    tokens = trainer.samples_per_step * trainer.block_size
    synthetic = " (synthetic text)" if dataset.meta.get("synthetic") else ""
    base = f", adapters included; the base is {trainer.base['given']}" if trainer.base else ""
    log.say(f"{trainer.directory}: {trainer.parameter_count:,} parameters, block_size {trainer.block_size}{base}")
    log.say(
        f"data {dataset.name}{synthetic}: {len(dataset.train):,} training and {len(dataset.val):,} validation tokens"
    )
    epochs = config.max_iters * tokens / len(dataset.train)
    readers = trainer.ranks.mesh.readers
    divided = f", divided among {readers} processes" if readers > 1 else ""
    log.say(
        f"{tokens:,} tokens a step, {config.micro_batches} micro-batches of {config.batch_size} sequences{divided}; "
        f"{config.max_iters:,} steps are {epochs:.2f} epochs"
    )
    if config.warmup_iters > config.max_iters:
        log.say(f"warmup_iters={config.warmup_iters:,} is longer than the run: learning_rate is never reached")
    for note in notes:
        log.say(note)
    if trainer.iter_num:
        log.say(
            f"going on at iteration {trainer.iter_num:,}, learning rate {learning_rate(trainer.iter_num, config):.2e}"
        )
    if trainer.iter_num >= config.max_iters:
        left = "nothing" if trainer.evaluated_at == trainer.iter_num else "only the last evaluation"
        log.say(f"{left} is left to do: the run has its {config.max_iters:,} steps; a higher --max_iters goes on")
        return
    due = trainer.iter_num % config.eval_interval == 0 and trainer.evaluated_at != trainer.iter_num
    first = "with the first evaluation, before the first step; then " if due else ""
    log.say(
        f"saves come {first}every {config.eval_interval} steps"
        + (f" or {config.save_minutes:g} minutes" if config.save_minutes else "")
    )


def conclude(trainer: Trainer, number: int) -> None:
    """Where the run is, and what can be done with it now; `number` is the signal that stopped it, or 0."""
    log, where = trainer.log, f"iteration {trainer.iter_num:,} is saved in {trainer.directory}"
    place = in_shell(trainer.directory)
    stopped = f"stopped by {signal.Signals(number).name}" if number else ""
    if stopped and trainer.saved_at is None:
        log.say(f"{stopped}: before the first step, so there was nothing to save\nstart it again as before")
    elif stopped:
        log.say(f"{stopped}: {where}\ngo on with: python train.py --init_from=resume --out_dir={place}")
    else:
        log.say(f"done: {where}, best val loss {trainer.best_val_loss:.4f}")
        if trainer.tokenizer:
            log.say(f'try it: python sample.py {place} --prompt "In this paper we"')
        if trainer.base:
            log.say(f"make it a model of its own: python merge_lora.py {place}")


def train(config: RunConfig, given: dict[str, str], ranks: Ranks) -> int:
    """Run train.py with what `configurator.load` gave; the exit code: 0, or 128 + the signal that stopped it."""
    start = prepare_start(config, given, ranks)
    pick_device(start.config.device, ranks.local)  # before anything is written
    with files.lock(start.directory) if ranks.main else contextlib.nullcontext(), StopSignal(ranks.main) as stop:
        ranks.main_alone(lambda: check_unchanged(start))
        ranks.main_alone(lambda: files.recover(start.directory))
        check_shared(start, ranks)
        trainer, notes = set_up(start, ranks)
        announce(trainer, start.notes + notes)
        number = trainer.run(stop)
        conclude(trainer, number)
    ranks.close()
    return 128 + number if number else 0


def main(config: RunConfig, given: dict[str, str]) -> int:
    ranks = None
    try:
        ranks = Ranks()
        return train(config, given, ranks)
    except (ValueError, OSError, FloatingPointError) as error:
        if ranks is None or ranks.is_first_to_fail():
            print(f"train.py: {ranks.name if ranks else ''}{error}", file=sys.stderr)
        return 1
    except Exception as error:
        if ranks is None or ranks.size == 1:
            if not script.is_out_of_memory(error):
                raise
            print(
                f"train.py: there is not enough memory ({first_line(error)}); what was saved before is intact. A "
                "smaller batch_size, with more gradient_accumulation_steps for it, computes the same with less, and "
                "activation_checkpointing=true needs less still",
                file=sys.stderr,
            )
            return 1
        if ranks.is_first_to_fail():
            if not is_lost_contact(error):
                raise
            print(f"train.py: {ranks.name}another process has ended; what was saved before is intact", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if ranks is None or ranks.main:
            print("train.py: interrupted before training began; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    script.ready()
    leave(main(*RUN))
