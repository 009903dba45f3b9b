"""An output cache as TeaCache has it (arXiv 2411.19108), for teacher and student alike: the last output again while the
input has not changed much since the model ran.

    cache_outputs(pipe, limit=0.1)    # from now on; `remove` of what it returns ends it
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from diffusers.hooks.hooks import BaseState, CacheContext, HookRegistry, ModelHook, StateManager

NAME = "output_cache"


def cache_outputs(pipeline: DiffusionPipeline, limit: float) -> "OutputCache":
    """Let the pipeline's transformer answer with its last output while relative L1 changes of its input from step to
    step add up to less than ``limit``; the first and the last step of a run are computed.

    The transformer must take x_t as its first argument (or as ``hidden_states``), once a step, or in one
    `cache_context` for each call of a step; a run in which that is not so is computed throughout.

    Raises:
        ValueError: the limit is no number from 0 up, there is an output cache already, or a DDiT adapter whose schedule
            counts the calls that run.
    """
    if hasattr(pipeline.transformer, "ddit"):
        raise ValueError("no output cache on a DDiT adapter: its schedule takes every call that runs for the next step")
    if not limit >= 0:
        raise ValueError(f"the limit of an output cache must be a number from 0 up, got {limit}")
    cache = OutputCache(pipeline, limit)
    HookRegistry.check_if_exists_or_initialize(pipeline.transformer).register_hook(cache, NAME)
    return cache


def signal(model: torch.nn.Module, x: torch.Tensor, timestep: torch.Tensor, class_labels: Any) -> torch.Tensor:
    """What is compared: the patches of x_t, embedded, and modulated by timestep and class as in the first block,
    [B, tokens, D]; of a transformer that is neither a DiT nor a lean `ChunkedDiT`, x_t itself.

    At equal numbers of calls that is two to three times nearer than x_t on the digits (docs/composition.md).
    """
    if isinstance(model, DiTTransformer2DModel):
        tokens = model.pos_embed(x)
        return model.transformer_blocks[0].norm1(tokens, timestep, class_labels, hidden_dtype=x.dtype)[0]
    if hasattr(model, "embedders") and hasattr(model, "pos_embed"):
        patch = model.config.patch_size
        windows = F.unfold(x, patch, stride=patch).transpose(1, 2)
        tokens = model.pos_embed["proj"](windows.flatten(0, 1).unflatten(-1, (-1, patch, patch)))
        tokens = F.layer_norm(tokens.view(*windows.shape[:2], -1), tokens.shape[1:2], eps=1e-6)
        shift, scale, *_ = model.transformer_blocks[0].norm1(F.silu(model.embedders[0](timestep, class_labels)))
        return tokens * (1 + scale[:, None]) + shift[:, None]
    return x


class State(BaseState):
    """What is known of a run: its timesteps, how many of them are past, the last call's timestep and signal, the change
    since the model ran, and what it put out; ``scale`` from timesteps to the scheduler's; ``odd`` where calls and steps
    do not go together."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.times: Any = None
        self.timestep: Any = None
        self.signal: Any = None
        self.output: Any = None
        self.step, self.since, self.scale, self.odd = 0, 0.0, 1.0, False


class OutputCache(ModelHook):
    """The hook on the transformer; ``computed`` and ``reused`` count its calls."""

    _is_stateful = True

    def __init__(self, pipeline: DiffusionPipeline, limit: float):
        super().__init__()
        self.pipeline, self.limit = pipeline, limit
        self.states = StateManager(State)
        self.computed = self.reused = 0

    def remove(self) -> None:
        """End it."""
        HookRegistry.check_if_exists_or_initialize(self.pipeline.transformer).remove_hook(NAME)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.states.reset()
        return module

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        context = self.states._context or CacheContext("default")
        self.states.set_context(context)
        state = self._advance(self.states.get_state(), module, *args, **kwargs)
        within = 0 < state.step - 1 < len(state.times) - 1 and not state.odd
        if within and state.output is not None and state.since < self.limit:
            self.reused += 1
            return state.output
        # Out of the way while the model runs: a `ChunkedDiT` with a cache resets what it finds where a run
        # begins. After a call that failed nothing is known.
        del self.states._state_cache[context.name]
        state.output, state.since = self.fn_ref.original_forward(*args, **kwargs), 0.0
        self.computed += 1
        self.states._state_cache[context.name] = state
        self.states.set_context(context)
        return state.output

    def _advance(self, state: State, module: torch.nn.Module, *args: Any, **kwargs: Any) -> State:
        """Take note of another call."""
        x = args[0] if args else kwargs["hidden_states"]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        new = signal(module, x, timestep, kwargs.get("class_labels"))
        times = self.pipeline.scheduler.timesteps  # another tensor after every set_timesteps
        if times is not state.times or state.step == len(times):
            state.reset()
            state.times = times
        elif new.shape != state.signal.shape:  # other samples, or guidance that began or ended
            state.output = None
        else:
            state.odd |= torch.equal(timestep, state.timestep) != bool(times[state.step] == times[state.step - 1])
            state.since += ((new - state.signal).abs().mean() / state.signal.abs().mean()).item()
        state.odd |= not self._due(state, timestep)
        state.step += 1
        state.timestep, state.signal = timestep.clone(), new
        return state

    def _due(self, state: State, timestep: torch.Tensor) -> bool:
        """Whether a call at this timestep is the next of the run. Flow models get it on a scale of their own."""
        given, wanted = timestep.reshape(-1)[0], state.times[state.step].to(timestep.device)
        if not timestep.is_floating_point():
            return bool(given == wanted)
        if state.step == 0:
            state.scale = float(wanted / given)
        rounding = 2 * torch.finfo(timestep.dtype).eps * abs(float(wanted))
        return abs(float(given) * state.scale - float(wanted)) <= rounding
