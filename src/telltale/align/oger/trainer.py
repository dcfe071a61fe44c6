"""``OGERTrainer``: TRL's ``GRPOTrainer`` with teachers. Sampling, loss, logging, checkpoints and everything else are TRL's.

What is added, at the places where TRL's own methods are overridden: the entropies of the rollouts are read while they are sampled;
each group gets its teacher trace in place of a rollout before masks, old and reference log-probabilities, rewards and lengths are
computed; the verifier's reward gets its bonus; teacher tokens get their weight in the loss. Metrics under ``completions/`` count
what the policy wrote, before the swap.

With ``oger_coef=0, oger_hybrid=0`` parameters are equal to TRL's bit for bit, and in every run the global random state is left
alone: draws of teachers have generators of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from telltale.align.oger.config import OGERConfig, check_save_steps, refuse_options
from telltale.align.oger.encoders import Encoder, open_encoder
from telltale.align.oger.entropy_capture import EntropyCapture
from telltale.align.oger.hybrid import GroupBuilder, HybridGroups, Metrics
from telltale.align.oger.pass_at_k import distinct_correct_at_k, pass_at_k
from telltale.align.oger.reward import group_advantages, offline_token_weight, sequence_entropy
from telltale.align.oger.teachers import TeacherStore, told_drops
from telltale.align.oger.tokens import TokenisedTeachers, TokenTrace
from telltale.align.oger.trl_hooks import check_hooks
from telltale.align.oger.verification import Verifier, checked_verifier, text_of, verdicts
from telltale.errors import CheckpointError, ConfigError, DataError, NumericalError, UnsupportedModelError
from telltale.runs.files import write_atomically

STATE_FILE = "oger_state.json"
Route = Callable[[Any, Any], Hashable | None]
"""(prompt, completion) to the name of the way it was solved, or None."""


class OGERTrainer(GRPOTrainer):
    """``GRPOTrainer`` whose groups hold teacher traces and whose rewards pay for correct, sure and different rollouts.

    model, args and everything that is not listed: as in ``trl.GRPOTrainer``; args is an :class:`OGERConfig`.
    teachers: a :class:`TeacherStore`. encoder: "hidden", "ngrams", a folder, or an
    :class:`~telltale.align.oger.encoders.Encoder`. verifier: the reward function that says what is correct; None takes the
    store's. It becomes the first of ``reward_funcs``, if it is not among them already; the bonus is part of its reward, before
    ``reward_weights``. train_dataset: rows with ``prompt`` and ``id``, the id of the store's prompt; None takes the store's
    prompts. route: names the way a completion solves its prompt, for distinct-correct@k; None takes its text.

    Raises children of :class:`~telltale.errors.TelltaleError` on construction for whatever cannot be right.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "oger"]

    def __init__(
        self,
        model: Any,
        args: OGERConfig | None = None,
        *,
        teachers: TeacherStore | None = None,
        encoder: str | Path | Encoder = "hidden",
        verifier: Verifier | None = None,
        reward_funcs: Any = None,
        train_dataset: Any = None,
        route: Route | None = None,
        **others: Any,
    ) -> None:
        check_hooks(GRPOTrainer)
        args = OGERConfig("oger-output") if args is None else args
        if not isinstance(args, OGERConfig):
            raise ConfigError(
                f"args is a {type(args).__name__}; expected an OGERConfig (it has every field of GRPOConfig)."
            )
        if args.active and teachers is None:
            raise ConfigError("teachers=None; expected a TeacherStore, or oger_coef=0 and oger_hybrid=0.")
        verifier = checked_verifier(verifier or (teachers.verifier if teachers is not None else None))
        refuse_options(others, active=args.active)
        check_save_steps(args, args.save_steps)
        if train_dataset is None and teachers is not None:
            train_dataset = teachers.dataset()
        if args.active:
            _check_column(train_dataset)
        self._gate = _Gate(verifier)
        reward_funcs, self._column = _with_gate(reward_funcs, verifier, self._gate)
        self._route = route or (lambda prompt, completion: text_of(completion).strip())
        self._generations = 0
        self._rows: Sequence[dict[str, Any]] = ()
        self._captured: torch.Tensor | None = None
        self._groups: HybridGroups | None = None
        self._rewards_per_func: torch.Tensor | None = None
        self._late: dict[str, Any] | None = None
        self._builder: GroupBuilder | None = None
        super().__init__(model, reward_funcs, args, train_dataset, **others)
        self.add_callback(_SaveStepsCheck())
        if args.active and teachers is not None:
            self._builder = self._open_builder(teachers, encoder)

    @property
    def teacher_encodes(self) -> int:
        """How many teacher traces the encoder has computed so far; a second epoch adds none."""
        embeddings = self._builder.embeddings if self._builder is not None else None
        return 0 if embeddings is None else embeddings.encoded

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As TRL's. Raises :class:`~telltale.errors.NumericalError` if the encoder's weights changed meanwhile."""
        result = super().train(*arguments, **options)
        builder = self._builder
        if builder is not None and builder.encoder is not None and builder.encoder.checksum() != builder.checksum:
            raise NumericalError(
                f"the weights of the encoder {builder.encoder.identity} changed during training, so the teachers' embeddings were "
                f"of another encoder than the rollouts'. Give the trainer a frozen copy."
            )
        return result

    def _open_builder(self, teachers: TeacherStore, encoder: Any) -> GroupBuilder:
        if self._is_vlm:
            raise UnsupportedModelError(
                "OGER reads text; a vision-language processor is not supported. Give a tokenizer."
            )
        tokens = TokenisedTeachers(
            teachers, self._tokenizer, end_ids=self.eos_token_ids, longest=self.args.max_completion_length
        )
        if not tokens.all():
            raise DataError(
                f"no teacher trace is left for this policy: {told_drops(teachers.counts, tokens.dropped)}. "
                f"max_completion_length is {self.args.max_completion_length} tokens."
            )
        _check_prompts(self.train_dataset, self.args, teachers, {name for name, _ in tokens.all()})
        if self.args.oger_offline_loss == "behavior" and tokens.without_log_probs():
            raise ConfigError(
                f"oger_offline_loss='behavior' needs log_probs in teachers.jsonl; {tokens.without_log_probs()} of "
                f"{len(tokens.all())} traces have none. Expected recorded log-probabilities, or another oger_offline_loss."
            )
        needed = self.args.oger_coef or self.args.oger_replaced.startswith("least_divergent")
        if not needed:
            return GroupBuilder(self.args, tokens, None)
        policy = self.accelerator.unwrap_model(self.model)
        return GroupBuilder(self.args, tokens, open_encoder(encoder, model=policy, tokenizer=self._tokenizer))

    # Generation: rows are stashed, entropies captured, traces put in.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        if self._builder is None or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        output = super()._generate_and_score_completions(inputs)
        assert self._groups is not None
        output["oger_offline"] = self._groups.offline.to(output["advantages"].device)
        if self.args.oger_offline_loss == "behavior":
            output["oger_behavior"] = _recorded(self._groups.traces, output["completion_ids"])
        output["advantages"] = self._advantages(output["advantages"], output["oger_offline"])
        self._generations += 1
        self._groups = self._gate.pending = self._captured = None
        return output

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        wanted = self._builder is not None and self.args.oger_coef and self.args.oger_entropy != "none"
        if not wanted or not self.model.training:
            return super()._generate_single_turn(*arguments, **options)
        policy = self.accelerator.unwrap_model(self.model)
        policy = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        with EntropyCapture(policy, temperature=self.temperature) as capture:
            completion_ids, log_probs = super()._generate_single_turn(*arguments, **options)
        self._captured = capture.entropies(len(completion_ids), max(map(len, completion_ids)))
        return completion_ids, log_probs

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        generated = super()._generate(prompts)
        if self._builder is None or not self.model.training:
            return generated
        prompt_ids, completion_ids, tool_mask, completions, log_probs, extra, images, tool_images = generated
        groups = self._build_groups(prompts, prompt_ids, completion_ids, completions)
        for row, trace in enumerate(groups.traces):
            if trace is None:
                continue
            completion_ids[row] = list(trace.ids)
            completions[row] = self._completion(completions[row], trace, prompt_ids[row])
            if log_probs is not None:
                known = trace.log_probs or (math.nan,) * len(trace.ids)
                log_probs[row] = [None if math.isnan(value) else value for value in known]
        extra = {
            **extra,
            "oger_offline": groups.offline.tolist(),
            "oger_divergence": groups.divergence.tolist(),
            "oger_entropy": groups.entropy.tolist(),
        }
        self._groups, self._gate.pending = groups, groups.totals.tolist()
        self._log_groups(groups.metrics)
        return prompt_ids, completion_ids, tool_mask, completions, log_probs, extra, images, tool_images

    def _build_groups(self, prompts: Any, prompt_ids: Any, completion_ids: Any, completions: Any) -> HybridGroups:
        rows, builder = self._rows, self._builder
        assert builder is not None
        if "id" not in rows[0]:
            raise DataError(
                f"the training data have no column 'id' (but {', '.join(rows[0])}); expected the ids of the prompts."
            )
        for row in rows[:: self.num_generations]:
            builder.teachers.store.check_prompt(str(row["id"]), row["prompt"])
        columns = {
            key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion", "completion_ids")
        }
        columns |= {
            "completion_ids": completion_ids,
            "trainer_state": self.state,
            "log_extra": self._log_completion_extra,
            "log_metric": self._log_metric,
        }
        rewards = torch.tensor(verdicts(self._gate.verifier, prompts, completions, columns))

        def entropy(wanted: torch.Tensor) -> torch.Tensor:
            return self._sequence_entropies(prompt_ids, completion_ids, wanted)

        return builder.build(
            [str(row["id"]) for row in rows],
            [text_of(prompt) for prompt in prompts],
            [text_of(completion) for completion in completions],
            rewards,
            entropy=entropy,
            generation=self._generations,
        )

    def _sequence_entropies(self, prompt_ids: Any, completion_ids: Any, wanted: torch.Tensor) -> torch.Tensor:
        """(rows,) in nats; rows that are not ``wanted`` have 0. A pass of its own only where nothing could be captured."""
        entropies = torch.zeros(len(completion_ids))
        reduce = self.args.oger_entropy
        rows = torch.nonzero(wanted).flatten().tolist()
        if reduce == "none" or not rows:
            return entropies
        width = max(len(completion_ids[row]) for row in rows)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, row in enumerate(rows):
            mask[index, : len(completion_ids[row])] = True
        if self._captured is not None:
            tokens = self._captured[rows][:, :width]
        else:
            tokens = self._entropies_by_forward(
                [prompt_ids[row] for row in rows], [completion_ids[row] for row in rows], width
            )
        entropies[rows] = sequence_entropy(tokens, mask, reduce=reduce)
        return entropies

    @torch.no_grad()
    def _entropies_by_forward(self, prompt_ids: Any, completion_ids: Any, width: int) -> torch.Tensor:
        longest, device = max(map(len, prompt_ids)), self.accelerator.device
        ids = torch.full((len(prompt_ids), longest + width), self._tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            whole = torch.tensor([*prompt, *completion])
            place = slice(longest - len(prompt), longest + len(completion))
            ids[index, place], mask[index, place] = whole, 1
        _, entropies, _ = super()._get_per_token_logps_and_entropies(
            self.model,
            ids.to(device),
            mask.to(device),
            width,
            batch_size=self.args.per_device_train_batch_size,
            compute_entropy=True,
        )
        return entropies.float().cpu()

    def _completion(self, replaced: Any, trace: TokenTrace, prompt_ids: Any) -> Any:
        """The trace in the form that TRL gives a completion."""
        if isinstance(replaced, str):
            return trace.text
        if getattr(self._tokenizer, "response_template", None) or getattr(self._tokenizer, "response_schema", None):
            from trl.trainer.grpo_trainer import parse_response

            return [parse_response(self._tokenizer, list(trace.ids), prefix=prompt_ids, tools=self.tools)]
        return [{"role": "assistant", "content": trace.text}]

    # Rewards and advantages.

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards_per_func = rewards
        if not self.model.training:
            self._log_samples(rewards[:, self._column], prompts, completions)
        return rewards

    def _advantages(self, advantages: torch.Tensor, offline: torch.Tensor) -> torch.Tensor:
        """TRL's advantages of this process's rows with the teacher's clamp and the floor on the deviation."""
        args, per_func = self.args, self._rewards_per_func
        assert per_func is not None
        everywhere = self.accelerator.gather(offline)
        if self.multi_objective_aggregation == "sum_then_normalize":
            rewards = (per_func * self.reward_weights.to(per_func.device)).nansum(dim=1)
            rewards[torch.isnan(per_func).all(dim=1)] = torch.nan
            if args.oger_offline_loss == "sft":
                rewards[everywhere] = torch.nan  # a supervised row is no member of the group
            shape = (-1, self.num_generations)
            raw = group_advantages(
                rewards.view(shape), scale=self.scale_rewards, std_floor=args.oger_std_floor
            ).flatten()
        else:
            raw = self.accelerator.gather(advantages)
        taught = raw[everywhere]
        metrics = self._metrics["train"]
        metrics["oger/teacher_adv"].append(float(taught.mean()) if len(taught) else math.nan)
        metrics["oger/teacher_adv_neg_frac"].append(float((taught < 0).float().mean()) if len(taught) else math.nan)
        if args.oger_teacher_advantage == "clamp":
            raw = torch.where(everywhere, raw.clamp(min=0), raw)
        if args.oger_offline_loss == "sft":
            raw = torch.where(everywhere, torch.ones_like(raw), raw)
        self._logs["advantages"].extend(raw.tolist())  # pushes TRL's out
        local = len(offline)
        return raw[self.accelerator.process_index * local : (self.accelerator.process_index + 1) * local]

    # Loss: teacher tokens are weighed between TRL's forward pass and TRL's loss.

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        offline = inputs.get("oger_offline")
        if self.args.oger_offline_loss == "on_policy" or offline is None or not offline.any():
            return super()._compute_loss(model, inputs)
        self._late = dict(inputs)
        try:
            return super()._compute_loss(model, self._late)
        finally:
            self._late = None

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **options: Any) -> tuple[Any, Any, Any]:
        log_probs, entropies, auxiliary = super()._get_per_token_logps_and_entropies(*arguments, **options)
        if self._late is not None:
            self._weigh_offline(self._late, log_probs.detach())
        return log_probs, entropies, auxiliary

    def _weigh_offline(self, inputs: dict[str, Any], log_probs: torch.Tensor) -> None:
        """Change advantages or old log-probabilities so that TRL's loss has the gradient of the chosen offline loss."""
        mode, offline = self.args.oger_offline_loss, inputs["oger_offline"].unsqueeze(1)
        if mode == "shaped":
            weight = offline_token_weight(log_probs, mode=mode, gamma=self.args.oger_gamma)
            inputs["advantages"] = inputs["advantages"].unsqueeze(1) * torch.where(
                offline, weight, torch.ones_like(weight)
            )
            return
        old = inputs.get("old_per_token_logps")
        old = log_probs if old is None else old
        if mode == "behavior":
            recorded = inputs["oger_behavior"]
            teacher = torch.where(torch.isnan(recorded), log_probs, recorded)
        else:
            teacher = log_probs  # ratio 1 at every update: no ratio
        inputs["old_per_token_logps"] = torch.where(offline, teacher, old)

    # Checkpoints and metrics.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._builder is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            state = {
                "step": self.state.global_step,
                "generations": self._generations,
                "seed": self.args.seed,
                "encoder": self._encoder_name(),
            }
            write_atomically(folder / STATE_FILE, json.dumps(state) + "\n")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._builder is None:
            return
        file = Path(checkpoint) / STATE_FILE
        try:
            state = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}; expected a checkpoint of an OGERTrainer."
            ) from error
        for name, own in (("seed", self.args.seed), ("encoder", self._encoder_name())):
            if state.get(name) != own:
                raise CheckpointError(
                    f"{checkpoint} was made with {name}={state.get(name)!r}, this trainer has {own!r}; expected the same, "
                    f"or the resumed run would be another one."
                )
        step, every = int(state.get("step", 0)), self.args.steps_per_generation * self.args.num_iterations
        if step * self.args.gradient_accumulation_steps % every:
            raise CheckpointError(
                f"{checkpoint} was made inside a generation, whose rollouts are not in it, so a run resumed there would not be the "
                f"same. Expected a checkpoint from a generation's end, such as the one before."
            )
        self._generations = int(state["generations"])

    def _encoder_name(self) -> str | None:
        encoder = self._builder.encoder if self._builder is not None else None
        return None if encoder is None else encoder.identity

    def _log_groups(self, metrics: Metrics) -> None:
        """Means over all processes; a teacher's figure is its number of traces in the generation."""
        for name, (total, count) in metrics.items():
            if name.startswith("teacher/"):
                continue
            summed = self._summed([total, count])
            self._metrics["train"][f"oger/{name}"].append(summed[0] / summed[1] if summed[1] else math.nan)
        assert self._builder is not None
        names = self._builder.teachers.store.teachers()
        counts = self._summed([metrics.get(f"teacher/{name}", (0.0, 1.0))[0] for name in names])
        for name, count in zip(names, counts, strict=True):
            self._metrics["train"][f"oger/teacher/{name}"].append(count)

    def _summed(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()

    def _log_samples(self, rewards: torch.Tensor, prompts: Any, completions: Any) -> None:
        """pass@k and distinct-correct@k of an evaluation batch, from all processes' rows."""
        from accelerate.utils import gather_object

        size = self.num_generations_eval
        routes = [
            repr(self._route(prompt, completion)) for prompt, completion in zip(prompts, completions, strict=True)
        ]
        if self.accelerator.num_processes > 1:
            routes = gather_object(routes)
        for k in (k for k in self.args.oger_pass_at if k <= size):
            passed, distinct = [], []
            for start in range(0, len(routes), size):
                correct = [
                    route
                    for route, reward in zip(
                        routes[start : start + size], rewards[start : start + size].tolist(), strict=True
                    )
                    if reward > 0
                ]
                passed.append(pass_at_k(size, len(correct), k))
                distinct.append(distinct_correct_at_k(size, [correct.count(route) for route in set(correct)], k))
            self._metrics["eval"][f"pass@{k}"].append(sum(passed) / len(passed))
            self._metrics["eval"][f"distinct_correct@{k}"].append(sum(distinct) / len(distinct))


class _Gate:
    """The verifier as one of TRL's reward functions: gives the totals that wait, or asks the verifier."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.pending: list[float] | None = None
        self.__name__ = getattr(verifier, "__name__", type(verifier).__name__)

    def __call__(self, *, prompts: Any, completions: Any, **columns: Any) -> Sequence[float | None]:
        return self.pending if self.pending is not None else verdicts(self.verifier, prompts, completions, columns)


class _SaveStepsCheck(TrainerCallback):
    """Checks again once a ``save_steps`` that was given as a share of the run is known in steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise ConfigError if checkpoints would fall inside a generation."""
        check_save_steps(args, state.save_steps)


def _check_column(dataset: Any) -> None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "id" not in columns:
        raise DataError(
            f"train_dataset has no column 'id' (but {', '.join(columns)}); expected the id of each prompt in the teacher store."
        )


def _check_prompts(dataset: Any, args: OGERConfig, store: TeacherStore, taught: set[str]) -> None:
    """Of a dataset that can be read twice: it has to make a batch of the store's prompts, and some have to have a trace."""
    if getattr(dataset, "column_names", None) is None or not hasattr(dataset, "__len__"):
        return
    names, groups = [str(name) for name in dataset["id"]], args.generation_batch_size // args.num_generations
    if len(names) < groups:
        raise DataError(
            f"train_dataset has {len(names)} prompts and a generation takes {groups}, so that nothing would be trained. Expected "
            f"more prompts, or a smaller per_device_train_batch_size, steps_per_generation or gradient_accumulation_steps."
        )
    if taught.isdisjoint(names):
        raise DataError(
            f"no id of train_dataset has a teacher trace; its first is {names[0]!r}, a prompt with traces is {min(taught)!r}. "
            f"Expected the store's ids."
        )
    if "prompt" in dataset.column_names:
        for name, prompt in zip(names, dataset["prompt"], strict=True):
            store.check_prompt(name, prompt)


def _with_gate(reward_funcs: Any, verifier: Verifier, gate: _Gate) -> tuple[list[Any], int]:
    if not isinstance(reward_funcs, (list, tuple)):
        reward_funcs = [] if reward_funcs is None else [reward_funcs]
    functions = list(reward_funcs)
    if verifier in functions:
        place = functions.index(verifier)
        functions[place] = gate
        return functions, place
    return [gate, *functions], 0


def _recorded(traces: Sequence[TokenTrace | None], completion_ids: torch.Tensor) -> torch.Tensor:
    recorded = torch.full(completion_ids.shape, math.nan, device=completion_ids.device)
    for row, trace in enumerate(traces):
        if trace is not None and trace.log_probs is not None:
            recorded[row, : len(trace.log_probs)] = torch.tensor(trace.log_probs, device=completion_ids.device)
    return recorded
