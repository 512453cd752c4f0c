"""The policy with its value function.

Letters: B = rows, L = tokens of the longest row, N = selected (trained) tokens, H = hidden width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolrl_ray.algos.losses import entropy_from_logits, logprobs_from_logits
from toolrl_ray.pretrained import load_model

Critic = Literal["none", "shared", "separate"]


class ValueHead(nn.Module):
    """Linear(H, 1), zero at first so that the first returns are compared with 0. Computes in float32 whatever the dtype of its
    input or (mixed precision) of its weights."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> values [N], float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class PolicyWithValue(nn.Module):
    """A Hugging Face causal LM and, unless critic is "none", a value head on its trunk or on a trunk of its own.

    Logits are computed only at the selected positions, for any model and without losing its own scaling or soft-capping of
    logits: a hook in front of the output embedding replaces hidden [B, L, H] by the selected [1, N, H]. The hook sleeps
    outside `forward`, so `lm` itself stays usable for generation.

    temperature: of the sampler; logprobs and entropies are those of softmax(logits / temperature), the distribution that the
        rollout sampled from.
    entropy_grad: let gradients flow through the entropy (an entropy bonus is in use).
    """

    def __init__(
        self,
        lm: nn.Module,
        critic: Critic = "shared",
        critic_trunk: nn.Module | None = None,
        temperature: float = 1.0,
        entropy_grad: bool = False,
    ):
        super().__init__()
        if (critic == "separate") != (critic_trunk is not None):
            raise ValueError(f"critic={critic!r} contradicts critic_trunk={type(critic_trunk).__name__}")
        self.lm = lm
        self.critic_trunk = critic_trunk
        output = lm.get_output_embeddings()
        self.value_head = None if critic == "none" else ValueHead(output.weight.shape[1])
        self.temperature = temperature
        self.entropy_grad = entropy_grad
        self._selection: tuple[Tensor, Tensor] | None = None
        self._hidden: Tensor | None = None
        output.register_forward_pre_hook(self._select)

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._selection is None:
            return None
        rows, positions = self._selection
        self._hidden = args[0][rows, positions]
        return (self._hidden.unsqueeze(0), *args[1:])

    def forward(
        self, input_ids: Tensor, rows: Tensor, positions: Tensor, entropy: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logprobs, entropies and values at the selected positions, each float32 [N]; N may be 0.

        input_ids: [B, L], right-padded with any id. There is no attention mask: under causal attention a token never sees the
            padding to its right, and without a mask the fast causal kernel is taken.
        rows, positions: [N]; the trained token is input_ids[rows, positions + 1].
        entropy: False leaves the entropies out (None). Values are None where critic is "none".
        """
        self._selection = rows, positions
        try:
            logits = self.lm(input_ids=input_ids, use_cache=False).logits
            hidden = self._hidden
        finally:
            self._selection = self._hidden = None
        logits = logits.squeeze(0)  # [N, V] in the model's dtype: all of it in float32 would be several GB
        logprobs = logprobs_from_logits(logits, input_ids[rows, positions + 1], self.temperature)
        entropies = None
        if entropy:
            with torch.set_grad_enabled(self.entropy_grad and torch.is_grad_enabled()):
                entropies = entropy_from_logits(logits, self.temperature)
        if self.value_head is None:
            return logprobs, entropies, None
        if self.critic_trunk is not None:
            hidden = self.critic_trunk(input_ids=input_ids, use_cache=False).last_hidden_state[rows, positions]
        return logprobs, entropies, self.value_head(hidden)


def load_policy(path: str, dtype: str) -> nn.Module:
    """The causal LM in the folder (or of the Hub name) `path`, every dropout rate 0, in eval mode.

    Raises UserError with one line where there is no complete model.
    """
    from transformers import AutoModelForCausalLM

    return load_model(AutoModelForCausalLM, path, dtype).eval()


def load_trunk(path: str, dtype: str) -> nn.Module:
    """The same model without its output embedding, as the trunk of a separate critic. Raises as `load_policy` does."""
    from transformers import AutoModel

    return load_model(AutoModel, path, dtype).eval()


def leave_nothing_to_chance(model: nn.Module) -> nn.Module:
    """The model with every module in eval mode: in training mode there is dropout, and some routers of experts jitter or sample, so that
    two forwards of the same weights differ and importance ratios are wrong. Only modules that checkpoint their activations stay in
    training mode, without which they do not."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # its own flag alone: what draws lies further inside
    return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module of the model in eval mode, and afterwards each as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
