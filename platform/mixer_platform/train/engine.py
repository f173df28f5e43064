"""The towers in a DeepSpeed engine beside the class-sharded softmax, which keeps its own optimizer.

ZeRO averages gradients over the workers; the classes of a worker are its own and must not be averaged. They are stepped
in the backward pass, or after it, where gradients of towers and classes are clipped together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mixer.held_gradients import HeldGradients
from mixer.row_adam import RowAdam
from mixer.sampling import learning_rate_factor
from mixer.softmax import ShardedMarginSoftmax
from mixer.targets import Targets, concatenate
from mixer.training import Batch
from mixer_platform.config import TrainConfig
from mixer_platform.errors import DivergedError
from mixer_platform.train.stopwatch import Stopwatch

MOMENTS = ("exp_avg", "exp_avg_sq")
CLIP_NORM = 1.0
_MOST_IN_BUCKET = 500_000_000  # gradients that travel together; DeepSpeed's default


class HybridTrainer:
    """Data-parallel towers, model-parallel classifier: one `step` is one global batch."""

    def __init__(self, tower: nn.Module, head: ShardedMarginSoftmax, config: TrainConfig, steps: int) -> None:
        import deepspeed  # here, not at the top: it looks for accelerators and compilers when imported

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does, and needs no compiler
        self.config, self.steps, self.head = config, steps, head
        self.engine, self._towers_optimizer, _, _ = deepspeed.initialize(
            model=tower,
            optimizer=torch.optim.AdamW(_groups(tower, config), weight_decay=config.weight_decay),
            config=_deepspeed_config(config, head.world, sum(p.numel() for p in tower.parameters() if p.requires_grad)),
            dist_init_required=False,
        )
        if config.zero_stage:
            self._make_moments()
        elif head.weight.device.type == "cpu":  # convolutions take a third less time; not before: DeepSpeed sends bytes
            tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._rows = RowAdam(head.weight, config.classifier_lr, config.weight_decay)
        self._held = HeldGradients(self._rows) if config.clip_classes else None
        head.optimizer = self._held or self._rows
        self.step_count = 0
        self.watch = Stopwatch(head.weight.device)
        head.lap = self.watch.lap
        # From stage 2 on ZeRO sends gradients while the backward pass makes them.
        self._sends_apart = config.zero_stage < 2
        self.engine.enable_backward_allreduce = not self._sends_apart
        whole = -(-config.batch_size // head.world)
        self._micro_batches = -(-whole // min(config.micro_batch or whole, whole))

    def step(self, batch: Batch) -> float:
        """Learn from one global batch of which `batch` is this worker's part; return the global loss.

        Raises DivergedError on every worker if it is no number.
        """
        self._set_learning_rates()
        self.head.begin_step(self.config.seed, self.step_count)
        loss = (
            self._learn(batch) if self._micro_batches == 1 else self._learn_in_parts(batch.parts(self._micro_batches))
        )
        if not loss.isfinite():
            raise self._diverged(f"the loss is {float(loss)}")
        if self._held:
            self._clip_together(self._held)
            self._held.step()
            self.watch.lap("softmax")
        self.engine.step()
        self.step_count += 1
        self.watch.lap("towers")
        return float(loss)

    def _learn(self, batch: Batch) -> Tensor:
        embeddings = self._embedded(batch)
        self.watch.lap("towers")
        embeddings.register_hook(self._back_from_softmax)
        loss = self.head(embeddings, self._targets(batch))
        self._backward(loss)
        return loss.detach()

    def _learn_in_parts(self, parts: list[Batch]) -> Tensor:
        """Bring the same gradients with the activations of one part in memory at a time (GradCache, arXiv 2101.06983):
        parts are embedded, the softmax sees all of them at once, and then each is embedded again and learned from."""
        with torch.no_grad():
            seen = [self._embedded(part) for part in parts]
        self.watch.lap("towers")
        embeddings = torch.cat(seen).requires_grad_()
        loss = self.head(embeddings, concatenate([self._targets(part) for part in parts]))
        loss.backward()
        assert embeddings.grad is not None
        gradients = self._back_from_softmax(embeddings.grad).split([len(part) for part in seen])
        for number, (part, gradient) in enumerate(zip(parts, gradients, strict=True), 1):
            self.engine.set_gradient_accumulation_boundary(number == len(parts))
            self._backward((self._embedded(part) * gradient).sum())
        return loss.detach()

    def _embedded(self, batch: Batch) -> Tensor:
        return self.engine(batch, branches=self.config.branch_weight > 0).float()

    def _targets(self, batch: Batch) -> Targets:
        weight = self.config.branch_weight
        return batch.targets_by_branch(weight) if weight > 0 else batch.targets

    def _backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if self._sends_apart:
            self.watch.lap("towers")
            self.engine.allreduce_gradients()
            self.watch.lap("communication")

    def _clip_together(self, held: HeldGradients) -> None:
        """Scale the gradients of towers and classes, so that their norm over all workers is at most 1."""
        towers, classes = self._tower_gradients(), held.gradients()
        counted_elsewhere = self.config.zero_stage == 0 and self.head.rank > 0  # every worker has the same
        counted = classes if counted_elsewhere else [*towers, *classes]
        square = get_total_norm(counted).square().to(self.head.weight.device)
        self.watch.lap("towers")
        if self.head.world > 1:
            dist.all_reduce(square, group=self.head.group)
            self.watch.lap("communication")
        if not square.isfinite():
            raise self._diverged(f"the norm of the gradient is {float(square.sqrt())}")
        excess = (square.sqrt() / CLIP_NORM).clamp_min(1)
        for gradient in (*towers, *classes):
            gradient.div_(excess)

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"step {self.step_count}: {what}; lower train.tower_lr, train.classifier_lr or train.fine_tune.encoder_lr, "
            "or set train.precision=fp32; the last checkpoint and all models are as they were"
        )

    def _tower_gradients(self) -> list[Tensor]:
        """Return the gradients that the next step takes: of ZeRO's partitions this worker's."""
        if self.config.zero_stage == 0:
            return [parameter.grad for _, parameter in self._trained() if parameter.grad is not None]
        return [gradient for group in self.engine.optimizer.averaged_gradients.values() for gradient in group]

    def _back_from_softmax(self, gradient: Tensor) -> Tensor:
        """Return the embeddings' gradient as ZeRO wants it: it will divide it by the number of workers, but the loss
        is the mean over all of them already."""
        self.watch.lap("softmax")
        return gradient * self.head.world

    def _set_learning_rates(self) -> None:
        factor = learning_rate_factor(self.step_count, self.steps, self.config.warmup)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._rows.lr = self.config.classifier_lr * factor

    def tower_state(self) -> dict[str, Tensor]:
        """Return the buffers and every trained parameter with its moments, whole and in fp32; a collective call.

        Raises DivergedError on every worker if some are no numbers: nobody may go on from them.
        """
        state = self.trained_state()
        if broken := next((name for name, values in state.items() if not values.isfinite().all()), None):
            raise self._diverged(f"{broken} is not finite")
        for name, parameter in self._trained():
            for moment in MOMENTS:
                state[f"{moment}:{name}"] = _whole(parameter, moment, self.engine)
        return state

    def trained_state(self) -> dict[str, Tensor]:
        """Return the buffers and every trained parameter, whole and in fp32; a collective call."""
        state = {name: buffer.detach().cpu().clone() for name, buffer in self._buffers()}
        return state | {name: _whole(parameter, None, self.engine) for name, parameter in self._trained()}

    def load_tower_state(self, state: dict[str, Tensor], step: int) -> None:
        """Go on from what `tower_state` gave, on any number of workers; before the first step."""
        if self.config.zero_stage:
            self._load_partitions(state, step)
        else:
            for name, parameter in self._trained():
                parameter.data.copy_(state[name])
                moments = {moment: state[f"{moment}:{name}"].to(parameter.device, copy=True) for moment in MOMENTS}
                self.engine.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        for name, buffer in self._buffers():
            buffer.copy_(state[name])
        self.step_count = step

    def _make_moments(self) -> None:
        """Make what AdamW would make in its first step. ZeRO 1 and 2 look for it once, after the first group's."""
        zero = self.engine.optimizer
        for partition in self._partitions():
            moments = {moment: torch.zeros_like(partition) for moment in MOMENTS}
            zero.optimizer.state[partition] = {"step": torch.tensor(0.0), **moments}
        if self.config.zero_stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _load_partitions(self, state: dict[str, Tensor], step: int) -> None:
        zero = self.engine.optimizer
        for partition in self._partitions():
            zero.optimizer.state[partition]["step"] = torch.tensor(float(step))
        load = _load_cut if self.config.zero_stage == 3 else _load_whole
        for name, parameter in self._trained():
            load(parameter, state[name], {moment: state[f"{moment}:{name}"] for moment in MOMENTS})
        if self.config.zero_stage < 3:
            zero.update_lp_params()

    def _partitions(self) -> list[Tensor]:
        """Return what ZeRO's optimizer steps: this worker's part of each group of parameters, or of each of them."""
        zero = self.engine.optimizer
        return (
            zero.fp32_partitioned_groups_flat if self.config.zero_stage == 3 else zero.single_partition_of_fp32_groups
        )

    def head_state(self) -> dict[str, Tensor]:
        """Return the rows of this worker's classes and their moments, each [owned classes, ..]."""
        return self._rows.state()

    def load_head_state(self, pieces: Iterable[tuple[slice, dict[str, Tensor]]], step: int) -> None:
        """Go on from the rows of this worker's classes, a piece after the other."""
        self._rows.load(pieces, step)

    def release(self) -> Tensor:
        """Return the rows of this worker's classes without their moments; the last thing that is asked of a trainer.

        A stage's classes may take most of the memory, which the next stage needs for its own.
        """
        weight = self.head_state()["weight"]
        del self._rows, self._held, self.head
        return weight

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """Return what the model saves beside parameters, such as the features' mean."""
        kept = self.engine.module.state_dict().keys()
        return [(name, buffer) for name, buffer in self.engine.module.named_buffers() if name in kept]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        named = self.engine.module.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def _groups(tower: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return what is trained, by learning rate: the image encoder, if it is, and the rest."""
    trained = {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}
    encoder = {name for name in trained if name.startswith("image_encoder.")}
    rates = {True: config.fine_tune.encoder_lr, False: config.tower_lr}
    parts = {part: [trained[name] for name in trained if (name in encoder) is part] for part in rates}
    return [{"params": parts[part], "lr": rates[part], "initial_lr": rates[part]} for part in rates if parts[part]]


def _whole(parameter: nn.Parameter, moment: str | None, engine: Any) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        value = parameter if moment is None else engine.optimizer.state[parameter][moment]
    elif moment is None:
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, moment)
    return value.detach().float().cpu().clone(memory_format=torch.contiguous_format)


def _load_whole(parameter: nn.Parameter, value: Tensor, moments: dict[str, Tensor]) -> None:
    """Set a parameter that is whole on every worker, and this worker's part of its moments."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    safe_set_full_fp32_param(parameter, value)
    for moment, values in moments.items():
        safe_set_full_optimizer_state(parameter, values, moment)


def _load_cut(parameter: nn.Parameter, value: Tensor, moments: dict[str, Tensor]) -> None:
    """Set this worker's part of a parameter and of its moments; the last worker's part is padded."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    cut: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    size = cut.numel()

    def mine(values: Tensor) -> Tensor:
        padded = F.pad(values.flatten(), (0, size * dist.get_world_size() - values.numel()))
        return padded[size * dist.get_rank() :][:size].to(cut.device)

    safe_set_local_fp32_param(parameter, mine(value))
    cut.data.copy_(mine(value))
    for moment, values in moments.items():
        safe_set_local_optimizer_state(parameter, mine(values), moment)


def _deepspeed_config(config: TrainConfig, world: int, trained: int) -> dict[str, Any]:
    return {
        # DeepSpeed wants a number; batches are cut by the epoch's plan and may be uneven.
        "train_micro_batch_size_per_gpu": max(1, config.batch_size // world),
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": min(trained, _MOST_IN_BUCKET),  # stage 3 makes all of it at once, for good
        },
        "gradient_clipping": CLIP_NORM,  # of the towers' norm, over all workers
        "zero_allow_untested_optimizer": True,
        # Autocast, not DeepSpeed's bf16: that casts the parameters but not the buffers, and then they do not multiply.
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
    }
