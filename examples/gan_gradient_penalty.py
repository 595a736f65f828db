"""A gradient penalty through batch norm on two processes: the gradient of a gradient passes the layer twice.

    torchrun --standalone --nproc-per-node 2 examples/gan_gradient_penalty.py [--small]

First the proof, in float64, then a GAN that learns 8×8 digits. (Gulrajani et al., 2017, keep batch norm out of the critic,
as a sample's gradient then depends on its companions. Here at least they are the same on any number of ranks.)
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn

import syncnorm

NOISE, BATCH, PENALTY = 16, 16, 10.0  # features of the noise; digits per rank and step; weight of the penalty


def mlp(num_in: int, num_out: int) -> nn.Sequential:
    hidden = [(nn.Linear(n, 128), nn.BatchNorm1d(128), nn.LeakyReLU(0.2)) for n in (num_in, 128)]
    return nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(128, num_out))


def penalty(critic: nn.Module, x: Tensor, num_samples: int) -> Tensor:
    """This rank's share of the mean of (‖∂ Σ critic / ∂x_i‖ − 1)² over ``num_samples`` on all ranks."""
    (gradient,) = torch.autograd.grad(critic(x.requires_grad_()).sum(), x, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().sum() / num_samples


def prove() -> None:
    """Each rank computes the whole batch by itself, too, and compares; local batch norm shows that this can fail."""
    critic, rank, world = mlp(64, 1).double(), dist.get_rank(), dist.get_world_size()
    x = torch.randn(3 * world + 5, 64, dtype=torch.float64)
    mine = x[3 * rank : 3 * rank + 3] if rank < world - 1 else x[3 * rank :]  # uneven: 3 samples, the last rank 8

    def gradient(critic: nn.Module, x_part: Tensor) -> Tensor:
        parts = torch.autograd.grad(penalty(critic, x_part, len(x)), [*critic.parameters()], materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    exact, local = gradient(critic, x), gradient(critic, mine)
    ours = gradient(syncnorm.convert(critic), mine)
    for name, found in (("syncnorm", ours), ("local batch norm", local)):
        dist.all_reduce(found)
        error = ((found - exact).abs().max() / exact.abs().max()).item()
        say(f"gradient of the penalty, {world} ranks against the whole batch: {name} is off by {error:.1e}")
        assert (error < 1e-10) == (name == "syncnorm"), error


def train(num_steps: int) -> None:
    digits = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)  # [1797, 64], from -1 to 1
    generator, critic = syncnorm.convert(mlp(NOISE, 64).append(nn.Tanh())), syncnorm.convert(mlp(64, 1))
    adams = {model: torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.9)) for model in (generator, critic)}
    torch.manual_seed(dist.get_rank() + 1)  # the same weights on every rank until here, and from here other samples
    num_samples = BATCH * dist.get_world_size()

    def draw() -> tuple[Tensor, ...]:
        real, fake = digits[torch.randint(len(digits), (BATCH,))], generator(torch.randn(BATCH, NOISE))
        # In one batch: a batch of its own would have its mean and variance, all that tells it apart, taken away.
        return real, fake.detach(), *critic(torch.cat([real, fake])).sum(1).split(BATCH)

    def update(model: nn.Module, loss: Tensor) -> None:
        adams[model].zero_grad()
        loss.backward(inputs=[*model.parameters()])
        for parameter in model.parameters():  # by hand: models that take turns are easier without DDP
            dist.all_reduce(parameter.grad)
        adams[model].step()

    for step in range(num_steps):
        for _ in range(2):
            real, fake, real_score, fake_score = draw()
            gap = (real_score.sum() - fake_score.sum()) / num_samples
            update(critic, PENALTY * penalty(critic, real.lerp(fake, torch.rand(BATCH, 1)), num_samples) - gap)
        update(generator, -draw()[-1].sum() / num_samples)
        if step == 0 or (step + 1) % (num_steps // 5) == 0:
            distance = energy_distance(generator.eval()(torch.randn(600, NOISE)), digits[::3])
            say(f"step {step + 1}/{num_steps}: energy distance to the digits {distance:.2f}")
            generator.train()


def energy_distance(a: Tensor, b: Tensor) -> float:  # Székely's; 0 for one and the same distribution
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="fewer training steps")
    num_steps = 40 if parser.parse_args().small else 200
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    prove()
    train(num_steps)
    dist.destroy_process_group()
