"""TorchRL's own DreamerV3 at the same size, for side-by-side timing: its modules, its losses, its optimisation stepper."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.model_based import DreamerEnv
from torchrl.modules import (
    DreamerV3ImageDecoder,
    DreamerV3ImageEncoder,
    DreamerV3MLP,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMRolloutV3,
    SymExpTwoHot,
    WorldModelWrapper,
)
from torchrl.objectives import DreamerV3ActorLoss, DreamerV3Loss, DreamerV3ModelLoss, DreamerV3ValueLoss, SoftUpdate
from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer

from r2dreamer.dreamer import Agent, BoundedNormal, NormalParameters


def torchrl_dreamer(
    agent: Agent,
    model: Mapping,
    algorithm: Mapping,
    precision: torch.dtype,
    device: torch.device,
    capture: bool = False,
) -> tuple[Callable[[TensorDict], object], int]:
    """One update of TorchRL's DreamerV3 (with its decoder), as wide as ``agent``, on the same records, captured or not.

    And the number of parameters that it trains.
    """
    if agent.observations.vectors or list(agent.observations.images) != ["pixels"]:
        raise ValueError("compare=torchrl wants one image observation called pixels, as DreamerV3ImageEncoder does.")
    belief, hidden, actions = model["belief"], model["hidden"], agent.actions.size
    sizes = {
        "hidden_dim": hidden,
        "rnn_hidden_dim": belief,
        "num_categoricals": model["categoricals"],
        "num_classes": model["classes"],
    }
    state = agent.latent_sizes["state"]
    image_shape = agent.observations.images["pixels"]
    encoder = DreamerV3ImageEncoder(image_shape[0], model["depth"], tuple(model["encoder_multipliers"]))
    prior_net = RSSMPriorV3(
        action_shape=(actions,), action_dim=actions, recurrent_model="block_gru", unimix=model["unimix"], **sizes
    )
    posterior_net = RSSMPosteriorV3(
        obs_embed_dim=encoder.output_features(image_shape), use_rms_norm=True, unimix=model["unimix"], **sizes
    )
    decoder = DreamerV3ImageDecoder(state + belief, image_shape, model["depth"], tuple(model["encoder_multipliers"]))

    def head(out: int | None, depth: int, scale: float = 1.0) -> nn.Module:
        return DreamerV3MLP(state + belief, out, depth=depth, num_cells=hidden, outscale=scale)

    class TwoHotHead(nn.Module):
        def __init__(self, depth: int):
            super().__init__()
            self.mlp, self.two_hot = head(255, depth, 0.0), SymExpTwoHot(255)

        def forward(self, state: torch.Tensor, belief: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.mlp(state, belief).float()
            return logits, self.two_hot(logits)

    reward_net, continue_net = TwoHotHead(1), head(1, 1)
    root, after = ["state", "belief"], [("next", "state"), ("next", "belief")]
    world_model = TensorDictSequential(
        TensorDictModule(encoder, in_keys=[("next", "pixels")], out_keys=[("next", "encoded_latents")]),
        RSSMRolloutV3(
            TensorDictModule(
                prior_net,
                in_keys=["state", "belief", "action"],
                out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
            ),
            TensorDictModule(
                posterior_net,
                in_keys=[("next", "belief"), ("next", "encoded_latents")],
                out_keys=[("next", "posterior_logits"), ("next", "state")],
            ),
        ),
        TensorDictModule(decoder, in_keys=after, out_keys=[("next", "reco_pixels")]),
        TensorDictModule(reward_net, in_keys=after, out_keys=[("next", "reward_logits"), ("next", "reward")]),
        TensorDictModule(continue_net, in_keys=after, out_keys=[("next", "continue_pred")]),
    )
    imagination = WorldModelWrapper(
        TensorDictModule(prior_net, in_keys=[*root, "action"], out_keys=["_", "state", "belief"]),
        TensorDictModule(reward_net, in_keys=root, out_keys=["_", "reward"]),
    )
    environment = DreamerEnv(imagination, prior_shape=(state,), belief_shape=(belief,), device=device)
    environment.observation_spec = Composite(state=Unbounded(state), belief=Unbounded(belief), device=device)
    environment.state_spec = environment.observation_spec.clone()
    environment.action_spec = Bounded(-1, 1, (actions,), device=device)
    environment.reward_spec = Unbounded((1,), device=device)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(head(2 * actions, 3, 0.01), in_keys=root, out_keys=["parameters"]),
        TensorDictModule(NormalParameters(), in_keys=["parameters"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(in_keys=["loc", "scale"], out_keys=["action"], distribution_class=BoundedNormal),
    )
    value = TensorDictModule(TwoHotHead(3), in_keys=root, out_keys=["state_value_logits", "state_value"])
    continuation = TensorDictSequential(
        TensorDictModule(continue_net, in_keys=root, out_keys=["continue_logit"]),
        TensorDictModule(torch.sigmoid, in_keys=["continue_logit"], out_keys=["continuation"]),
    )
    model_loss = DreamerV3ModelLoss(
        world_model,
        kl_mode="separate",
        unimix=model["unimix"],
        lambda_continue=1.0,
        reco_symlog=False,
        detach_output=False,
    )
    actor_loss = DreamerV3ActorLoss(
        actor,
        value,
        environment,
        continuation_model=continuation,
        imagination_horizon=algorithm["actor"]["imagination_horizon"],
        use_reinforce=True,
    )
    actor_loss.make_value_estimator(gamma=algorithm["actor"]["discount"], lmbda=algorithm["actor"]["lmbda"])
    value_loss = DreamerV3ValueLoss(value, value_loss="two_hot", actor_loss=actor_loss, slow_critic_regularization=1.0)
    losses = DreamerV3Loss(model_loss, actor_loss, value_loss).to(device)
    trained = [p for p in losses.parameters() if p.requires_grad]
    stepper = DreamerV3OptimizationStepper(
        losses,
        DreamerV3Optimizer(trained),
        SoftUpdate(value_loss, tau=0.02),
        compile_train_step=False,
        cudagraph=capture,
    )
    ready = not capture

    def update(records: TensorDict) -> object:
        nonlocal ready
        # The stepper's own switch for mixed precision covers CUDA only.
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            if not ready:
                stepper.warmup(records)
                ready = True
            return stepper.step(None, records)

    return update, sum(p.numel() for p in trained)
